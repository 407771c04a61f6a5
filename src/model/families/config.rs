//! `config.json` as what it is: foreign input. Every value is checked where it is read.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// An object of the file. A key whose value is `null` counts as absent.
pub(super) struct Config<'a> {
    object: &'a Map<String, Value>,
    /// The key of this object with a dot, empty at the top.
    path: String,
}

impl<'a> Config<'a> {
    /// The file's top.
    pub(super) fn new(value: &'a Value) -> Result<Config<'a>> {
        match value {
            Value::Object(object) => Ok(Config { object, path: String::new() }),
            other => Err(Error::Checkpoint(format!("the config is {}, not an object", shown(other)))),
        }
    }

    /// The value of a key, unless it is `null`.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Whether a key is in the file at all, be it `null`.
    pub(super) fn mentions(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    /// Of two names of one key, the one that the file uses; the usual one where it uses neither.
    pub(super) fn either<'k>(&self, usual: &'k str, other: &'k str) -> &'k str {
        if self.get(usual).is_none() && self.get(other).is_some() { other } else { usual }
    }

    /// A whole number from 1 to `most`.
    pub(super) fn count(&self, key: &str, most: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=most).contains(&n) => Ok(Some(n)),
            _ => Err(self.wrong(key, value, &format!("a whole number from 1 to {most}"))),
        }
    }

    /// As [`Config::count`], and it must be there.
    pub(super) fn required_count(&self, key: &str, most: usize) -> Result<usize> {
        self.count(key, most)?.ok_or_else(|| self.missing(key))
    }

    /// A whole number from 0 to `most`.
    pub(super) fn index(&self, key: &str, most: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if n <= most => Ok(Some(n)),
            _ => Err(self.wrong(key, value, &format!("a whole number from 0 to {most}"))),
        }
    }

    /// A number from `least` to `most`.
    pub(super) fn number(&self, key: &str, least: f64, most: f64) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if (least..=most).contains(&x) => Ok(Some(x)),
            _ => Err(self.wrong(key, value, &format!("a number from {least} to {most}"))),
        }
    }

    /// As [`Config::number`], and it must be there.
    pub(super) fn required_number(&self, key: &str, least: f64, most: f64) -> Result<f64> {
        self.number(key, least, most)?.ok_or_else(|| self.missing(key))
    }

    /// A list of `len` numbers from `least` to `most`, which must be there.
    pub(super) fn required_numbers(&self, key: &str, len: usize, least: f64, most: f64) -> Result<Vec<f64>> {
        let value = self.get(key).ok_or_else(|| self.missing(key))?;
        let list = value.as_array().map_or(&[] as &[Value], Vec::as_slice);
        let wrong = || self.wrong(key, value, &format!("a list of {len} numbers from {least} to {most}"));
        if list.len() != len {
            return Err(wrong());
        }
        let in_range = |value: &Value| value.as_f64().filter(|x| (least..=most).contains(x));
        list.iter().map(in_range).collect::<Option<Vec<f64>>>().ok_or_else(wrong)
    }

    /// A list of whole numbers from 0 to `most`.
    pub(super) fn indices(&self, key: &str, most: usize) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let index =
            |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n <= most);
        let list: Option<Vec<usize>> = value.as_array().and_then(|list| list.iter().map(index).collect());
        let expected = format!("a list of whole numbers from 0 to {most}");
        list.map(Some).ok_or_else(|| self.wrong(key, value, &expected))
    }

    /// A truth value.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    /// Refuses a file in which a truth value differs from the only one that the family serves.
    pub(super) fn only(&self, key: &str, served: bool) -> Result<()> {
        match self.flag(key)? {
            Some(value) if value != served => {
                let path = &self.path;
                Err(Error::Unsupported(format!(
                    "the config's {path}{key} is {value}, which is not served in this family"
                )))
            }
            _ => Ok(()),
        }
    }

    /// A string.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, value, "a string"))
    }

    /// A list of strings.
    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let strings = value.as_array().and_then(|list| list.iter().map(Value::as_str).collect());
        strings.map(Some).ok_or_else(|| self.wrong(key, value, "a list of strings"))
    }

    /// The first of a list of strings, if there is one.
    pub(super) fn first_text(&self, key: &str) -> Result<Option<&'a str>> {
        Ok(self.texts(key)?.and_then(|list| list.first().copied()))
    }

    /// An object.
    pub(super) fn section(&self, key: &str) -> Result<Option<Config<'a>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let object = value.as_object().ok_or_else(|| self.wrong(key, value, "an object"))?;
        Ok(Some(Config { object, path: format!("{}{key}.", self.path) }))
    }

    fn wrong(&self, key: &str, value: &Value, expected: &str) -> Error {
        Error::Checkpoint(format!("the config's {}{key} is {}, not {expected}", self.path, shown(value)))
    }

    pub(super) fn missing(&self, key: &str) -> Error {
        Error::Checkpoint(format!("the config has no {}{key}", self.path))
    }
}

/// A value, short enough for a message.
fn shown(value: &Value) -> String {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) => format!("{:?}", text.chars().take(40).collect::<String>()),
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".to_owned(),
    }
}
