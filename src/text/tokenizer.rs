//! A model's tokenizer, as its folder describes it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde_json::Value;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, Tokenizer as Inner};

use super::bytes::TokenBytes;
use crate::error::{Error, Result};

/// Largest tokenizer file that is read.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// A model's tokenizer. Immutable; shared by threads.
pub struct Tokenizer {
    inner: Inner,
    /// Of a byte-level vocabulary.
    bytes: Option<TokenBytes>,
    special: BTreeSet<u32>,
    /// What encoding adds before and after the text's ids.
    added: (Vec<u32>, Vec<u32>),
    n_ids: u32,
    eos: Option<u32>,
    /// Whether decoded text loses the spaces before punctuation, as `clean_up_tokenization_spaces` asks.
    cleans_up: bool,
}

impl Tokenizer {
    /// Loads the tokenizer of a model folder: `tokenizer.json`, with what `tokenizer_config.json` and
    /// `special_tokens_map.json` say beside it, as `transformers`' AutoTokenizer does.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where a file is missing or broken, [`Error::Unsupported`] for a folder with another
    /// kind of tokenizer only.
    pub fn load(folder: &Path) -> Result<Tokenizer> {
        let Some(file) = read(folder, "tokenizer.json")? else { return Err(no_tokenizer(folder)) };
        let broken = |error| Error::Checkpoint(format!("tokenizer.json cannot be read: {error}"));
        let mut inner = Inner::from_bytes(file).map_err(broken)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(broken)?;
        let config = Settings::read(folder)?;
        config.mark_special(&mut inner)?;
        config.patch_post_processor(&mut inner)?;
        let n_ids = inner.get_vocab(true).values().max().map_or(0, |largest| largest.saturating_add(1));
        let byte_level = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let cleans_up = config.flag("clean_up_tokenization_spaces") == Some(true);
        let special = inner.get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special);
        Ok(Tokenizer {
            bytes: byte_level.then(|| TokenBytes::new((0..n_ids).map(|id| inner.id_to_token(id)))),
            special: special.map(|(id, _)| id).collect(),
            added: added_around(&inner)?,
            eos: config.token("eos_token").and_then(|token| inner.token_to_id(&token)),
            n_ids,
            cleans_up,
            inner,
        })
    }

    /// Ids of `text`; of more than `truncate`, the last: the text loses its beginning, added special tokens stay.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the tokenizer has no ids for the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool, truncate: usize) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, false)
            .map_err(|error| Error::Invalid(format!("the prompt cannot be tokenised: {error}")))?;
        let (before, after): (&[u32], &[u32]) =
            if add_special_tokens { (&self.added.0, &self.added.1) } else { (&[], &[]) };
        let room = truncate.saturating_sub(before.len() + after.len());
        let ids = encoding.get_ids();
        let kept = &ids[ids.len().saturating_sub(room)..];
        let all = [before, kept, after].concat();
        Ok(all[all.len().saturating_sub(truncate)..].to_vec())
    }

    /// Text of `ids` as they stand; unknown ids have none.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let Some(bytes) = &self.bytes else {
            // Decoding fails for no ids that a model can produce; what cannot be decoded has no text.
            return self.inner.decode(ids, skip_special_tokens).unwrap_or_default();
        };
        let kept = ids.iter().filter(|id| !(skip_special_tokens && self.is_special(**id)));
        let all: Vec<u8> = kept.flat_map(|&id| bytes.of(id)).copied().collect();
        String::from_utf8(all).unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
    }

    /// Text of `ids` in an answer: cleaned up where the tokenizer's configuration asks for it.
    pub fn decode_answer(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let text = self.decode(ids, skip_special_tokens);
        if self.cleans_up { clean_up(text) } else { text }
    }

    /// Whether `id` is special: text of the protocol between model and program, not of the answer.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// One above the largest id.
    pub fn n_ids(&self) -> u32 {
        self.n_ids
    }

    /// The end-of-text id that the tokenizer's configuration names.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }
}

/// What the files beside `tokenizer.json` say; the more specific one first.
struct Settings {
    files: Vec<Value>,
}

impl Settings {
    fn read(folder: &Path) -> Result<Settings> {
        let mut files = Vec::new();
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            if let Some(text) = read(folder, name)? {
                let broken = |error| Error::Checkpoint(format!("{name} is no JSON: {error}"));
                files.push(serde_json::from_slice(&text).map_err(broken)?);
            }
        }
        Ok(Settings { files })
    }

    /// A token, written as a string or as an object with its `content`.
    fn token(&self, key: &str) -> Option<String> {
        let value = self.files.iter().find_map(|file| file.get(key).filter(|value| !value.is_null()))?;
        let content = value.get("content").unwrap_or(value);
        content.as_str().map(str::to_owned)
    }

    fn flag(&self, key: &str) -> Option<bool> {
        self.files.iter().find_map(|file| file.get(key)?.as_bool())
    }

    /// Tokens that the configuration calls special are special, also where `tokenizer.json` forgot to say so.
    fn mark_special(&self, inner: &mut Inner) -> Result<()> {
        let named =
            ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
        let known: Vec<AddedToken> = (named.iter().filter_map(|key| self.token(key)))
            .filter(|token| !token.is_empty() && inner.token_to_id(token).is_some())
            .map(|token| AddedToken::from(token, true))
            .collect();
        let broken = |error| Error::Checkpoint(format!("the special tokens cannot be added: {error}"));
        inner.add_special_tokens(known).map(drop).map_err(broken)
    }

    /// `add_bos_token` and `add_eos_token` go before what `tokenizer.json` adds, where they say otherwise.
    fn patch_post_processor(&self, inner: &mut Inner) -> Result<()> {
        let (wants_bos, wants_eos) = (self.flag("add_bos_token"), self.flag("add_eos_token"));
        let special = |key| self.token(key).and_then(|token| Some((inner.token_to_id(&token)?, token)));
        let (bos, eos) = (special("bos_token"), special("eos_token"));
        let (before, after) = added_around(inner)?;
        let has = |ids: &[u32], token: &Option<(u32, String)>| {
            token.as_ref().is_some_and(|(id, _)| ids.contains(id))
        };
        let (has_bos, has_eos) = (has(&before, &bos), has(&after, &eos));
        let (add_bos, add_eos) = (wants_bos.unwrap_or(has_bos), wants_eos.unwrap_or(has_eos));
        if (add_bos, add_eos) == (has_bos, has_eos) {
            return Ok(());
        }
        let bos = bos.filter(|_| add_bos);
        let eos = eos.filter(|_| add_eos);
        let piece = |token: &Option<(u32, String)>| token.as_ref().map(|(_, token)| format!("{token}:0"));
        let template: Vec<String> =
            [piece(&bos), Some("$A:0".into()), piece(&eos)].into_iter().flatten().collect();
        let broken = |error: String| Error::Checkpoint(format!("special tokens cannot be added: {error}"));
        let special: Vec<(String, u32)> =
            [bos, eos].into_iter().flatten().map(|(id, token)| (token, id)).collect();
        let processor = TemplateProcessing::builder()
            .try_single(template)
            .map_err(broken)?
            .special_tokens(special)
            .build()
            .map_err(|error| broken(error.to_string()))?;
        inner.with_post_processor(Some(processor));
        Ok(())
    }
}

/// What the post-processor puts around a text's ids.
fn added_around(inner: &Inner) -> Result<(Vec<u32>, Vec<u32>)> {
    let encode = |add_special_tokens| {
        let encoded = inner.encode_fast("a", add_special_tokens);
        let broken = |error| Error::Checkpoint(format!("tokenizer.json cannot encode: {error}"));
        encoded.map(|encoding| encoding.get_ids().to_vec()).map_err(broken)
    };
    let (bare, whole) = (encode(false)?, encode(true)?);
    let at = (0..=whole.len().saturating_sub(bare.len())).find(|&at| whole[at..].starts_with(&bare));
    let at = at.ok_or_else(|| Error::Checkpoint("tokenizer.json rewrites a text's ids".into()))?;
    Ok((whole[..at].to_vec(), whole[at + bare.len()..].to_vec()))
}

/// A file of the folder, if it is there.
fn read(folder: &Path, name: &str) -> Result<Option<Vec<u8>>> {
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

fn no_tokenizer(folder: &Path) -> Error {
    let other = ["tokenizer.model", "qwen.tiktoken"].into_iter().find(|name| folder.join(name).exists());
    match other {
        Some(name) => Error::Unsupported(format!("the model has only {name}; a tokenizer.json is needed")),
        None => Error::Checkpoint("the model has no tokenizer.json".into()),
    }
}

/// `transformers`' `clean_up_tokenization`.
fn clean_up(text: String) -> String {
    const CLEANED: [(&str, &str); 10] = [
        (" .", "."),
        (" ?", "?"),
        (" !", "!"),
        (" ,", ","),
        (" ' ", "'"),
        (" n't", "n't"),
        (" 'm", "'m"),
        (" 's", "'s"),
        (" 've", "'ve"),
        (" 're", "'re"),
    ];
    CLEANED
        .iter()
        .fold(text, |text, (from, to)| if text.contains(from) { text.replace(from, to) } else { text })
}
