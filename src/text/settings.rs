//! What a model's folder says of its tokenizer beside `tokenizer.json`, as `transformers`' AutoTokenizer reads it.

use std::fs;
use std::path::Path;

use serde_json::Value;
use tokenizers::AddedToken;

use crate::error::{Error, Result};

/// Largest file that is read.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// Keys of `tokenizer_config.json` and `special_tokens_map.json` that name a special token.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Keys that list more of them.
const LISTED: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// Tokenizer classes of `transformers` 4.51 that decide by flags of their own what goes around a text, whatever
/// `tokenizer.json` says: name, begin token, end token, and whether the begin token is added by default. None adds
/// the end token by default.
const CLASSES: [(&str, &str, &str, bool); 5] = [
    ("LlamaTokenizer", "<s>", "</s>", true),
    ("CodeLlamaTokenizer", "<s>", "</s>", true),
    ("GemmaTokenizer", "<bos>", "<eos>", true),
    ("CohereTokenizer", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", true),
    ("GPTNeoXTokenizer", "<|endoftext|>", "<|endoftext|>", false),
];

/// What a vocabulary's own file says, where its settings and their class say nothing.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Defaults<'a> {
    pub(super) bos: Option<&'a str>,
    pub(super) eos: Option<&'a str>,
    pub(super) add_bos: Option<bool>,
}

/// The files beside the vocabulary's own.
#[derive(Debug, Default)]
pub(super) struct Settings {
    /// The class of `transformers` or of the model's authors that reads the files, without a `Fast` at its end.
    pub(super) class: Option<String>,
    /// The begin token.
    pub(super) bos: Option<String>,
    /// The end token.
    pub(super) eos: Option<String>,
    /// Whether the begin token goes before a text, where that is said.
    pub(super) add_bos: Option<bool>,
    /// Whether the end token goes behind a text, where that is said.
    pub(super) add_eos: Option<bool>,
    /// Texts of tokens that are special.
    pub(super) special: Vec<String>,
    /// Added tokens by id, with how they match.
    pub(super) added: Vec<(u32, AddedToken)>,
    /// Whether decoded text loses the spaces before punctuation.
    pub(super) cleans_up: bool,
    /// The same for vocabularies of BPE, where it harms: spaces before punctuation are the model's own there.
    pub(super) cleans_up_bpe: bool,
    /// Whether a byte-level text gets a leading space; not, where there is a configuration that does not say so.
    pub(super) add_prefix_space: Option<bool>,
    /// Whether what follows a special token begins as a text does: with a space that stands for its beginning. That
    /// is so unless LLaMA's class is told to be less like it was.
    pub(super) begins_anew: bool,
}

impl Settings {
    /// Reads a folder's files; those that are missing say nothing.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the file and the key.
    pub(super) fn read(folder: &Path, defaults: Defaults<'_>) -> Result<Settings> {
        let config = read_object(folder, "tokenizer_config.json")?;
        let map = read_object(folder, "special_tokens_map.json")?;
        let files = [("tokenizer_config.json", &config), ("special_tokens_map.json", &map)];
        let name = config.as_ref().and_then(|config| config.get("tokenizer_class")?.as_str());
        let name = name.map(|name| name.strip_suffix("Fast").unwrap_or(name));
        let class = CLASSES.iter().find(|class| Some(class.0) == name);
        let default = |key: &str, token: Option<&str>| {
            let is_null = config.as_ref().is_some_and(|config| config.get(key).is_some());
            token.filter(|_| !is_null).map(str::to_owned)
        };
        let flag = |key: &str| flag(config.as_ref(), key);
        Ok(Settings {
            class: name.map(str::to_owned),
            bos: token(&files, "bos_token")?
                .or_else(|| default("bos_token", class.map(|class| class.1).or(defaults.bos))),
            eos: token(&files, "eos_token")?
                .or_else(|| default("eos_token", class.map(|class| class.2).or(defaults.eos))),
            add_bos: flag("add_bos_token")?.or(class.map(|class| class.3)).or(defaults.add_bos),
            add_eos: flag("add_eos_token")?.or(class.map(|_| false)),
            special: special_tokens(&files)?,
            added: added_tokens(config.as_ref())?,
            cleans_up: flag("clean_up_tokenization_spaces")?.unwrap_or(false),
            cleans_up_bpe: flag("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")?
                .unwrap_or(false),
            begins_anew: !(name == Some("LlamaTokenizer") && flag("legacy")? == Some(false)),
            add_prefix_space: match config {
                Some(_) => Some(flag("add_prefix_space")?.unwrap_or(false)),
                None => None,
            },
        })
    }
}

/// A file of the folder, if it is there.
///
/// # Errors
/// [`Error::Checkpoint`] for one that cannot be read or is larger than any tokenizer's.
pub(super) fn read_file(folder: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let path = folder.join(name);
    let unreadable = |error: std::io::Error| Error::Checkpoint(format!("{name} cannot be read: {error}"));
    match fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(error)),
        Ok(found) if found.len() > MAX_FILE_BYTES => {
            Err(Error::Checkpoint(format!("{name} has {} bytes, more than {MAX_FILE_BYTES}", found.len())))
        }
        Ok(_) => fs::read(&path).map(Some).map_err(unreadable),
    }
}

fn read_object(folder: &Path, name: &str) -> Result<Option<Value>> {
    let Some(text) = read_file(folder, name)? else { return Ok(None) };
    match serde_json::from_slice(&text) {
        Ok(value @ Value::Object(_)) => Ok(Some(value)),
        Ok(_) => Err(Error::Checkpoint(format!("{name} is no JSON object"))),
        Err(error) => Err(Error::Checkpoint(format!("{name} is no JSON: {error}"))),
    }
}

fn flag(config: Option<&Value>, key: &str) -> Result<Option<bool>> {
    match config.and_then(|config| config.get(key)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(other) => wrong("tokenizer_config.json", key, other, "true or false"),
    }
}

/// What the first of `files` that knows `key` calls the token.
fn token(files: &[(&str, &Option<Value>)], key: &str) -> Result<Option<String>> {
    for (name, file) in files {
        if let Some(value) = file.as_ref().and_then(|file| file.get(key)).filter(|value| !value.is_null()) {
            return text_of(name, key, value).map(Some);
        }
    }
    Ok(None)
}

/// A token's text, written as a string or as an object with its `content`.
fn text_of(file: &str, key: &str, value: &Value) -> Result<String> {
    match value.get("content").unwrap_or(value).as_str() {
        Some(text) => Ok(text.to_owned()),
        None => wrong(file, key, value, "a token"),
    }
}

fn special_tokens(files: &[(&str, &Option<Value>)]) -> Result<Vec<String>> {
    let mut special = Vec::new();
    for key in NAMED {
        special.extend(token(files, key)?);
    }
    for (name, file) in files {
        for key in LISTED {
            let values: Vec<&Value> = match file.as_ref().and_then(|file| file.get(key)) {
                Some(Value::Array(values)) => values.iter().collect(),
                Some(Value::Object(values)) => values.values().collect(),
                _ => Vec::new(),
            };
            for value in values {
                special.push(text_of(name, key, value)?);
            }
        }
    }
    special.retain(|token| !token.is_empty());
    Ok(special)
}

/// `added_tokens_decoder`: how added tokens match, and which are special.
fn added_tokens(config: Option<&Value>) -> Result<Vec<(u32, AddedToken)>> {
    let key = "added_tokens_decoder";
    let Some(Value::Object(entries)) = config.and_then(|config| config.get(key)) else {
        return Ok(Vec::new());
    };
    let mut added = Vec::with_capacity(entries.len());
    for (id, entry) in entries {
        let Ok(id) = id.parse() else {
            return wrong("tokenizer_config.json", key, &Value::from(id.as_str()), "ids");
        };
        let content = text_of("tokenizer_config.json", key, entry)?;
        let is = |name: &str| entry.get(name).and_then(Value::as_bool).unwrap_or(false);
        let token = AddedToken::from(content, is("special"))
            .single_word(is("single_word"))
            .lstrip(is("lstrip"))
            .rstrip(is("rstrip"))
            .normalized(entry.get("normalized").and_then(Value::as_bool).unwrap_or(!is("special")));
        added.push((id, token));
    }
    added.sort_by_key(|(id, _)| *id);
    Ok(added)
}

fn wrong<T>(file: &str, key: &str, value: &Value, must: &str) -> Result<T> {
    let value: String = value.to_string().chars().take(80).collect();
    Err(Error::Checkpoint(format!("{file}: {key} is {value}; it must be {must}")))
}
