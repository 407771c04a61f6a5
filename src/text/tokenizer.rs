//! A model's tokenizer, as its folder describes it.
//!
//! Three kinds of files hold a vocabulary: `tokenizer.json`, and where there is none, SentencePiece's
//! `tokenizer.model` (see `from_sentencepiece`) and Qwen's `qwen.tiktoken` (see `tiktoken`).

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use tokenizers::models::ModelWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{AddedToken, Encoding, Token, Tokenizer as Inner};

use super::parts::Parts;
use super::pieces::{Pieces, REPLACEMENT};
use super::settings::{Defaults, Settings, read_file};
use crate::error::{Error, Result};

/// Makes a tokenizer of a file and what else is in its folder.
type Load = fn(&[u8], &Path) -> Result<Tokenizer>;
/// Files that hold a vocabulary, in the order in which they are looked for.
const VOCABULARIES: [(&str, Load); 3] = [
    ("tokenizer.json", Tokenizer::from_json),
    ("tokenizer.model", Tokenizer::from_sentencepiece),
    ("qwen.tiktoken", Tokenizer::from_tiktoken),
];
/// Ids at or above this are a broken file's: tables over ids are that long.
const MAX_IDS: u32 = 1 << 24;
/// Longest prompt, in bytes: some two million tokens, for which the tokenizer takes 200 times as much memory.
const MAX_TEXT_BYTES: usize = 8 << 20;

/// A model's tokenizer. Immutable; shared by threads.
pub struct Tokenizer {
    /// Without truncation, padding and post-processor.
    inner: Inner,
    /// What encodes instead of it, for vocabularies of SentencePiece.
    parts: Option<Parts>,
    /// Of the common kinds of vocabulary.
    pieces: Option<Pieces>,
    special: BTreeSet<u32>,
    around: Around,
    n_ids: u32,
    eos: Option<u32>,
    /// Whether the text of an answer loses the spaces before punctuation.
    cleans_up: bool,
}

/// What encoding adds around a text's ids.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Around {
    pub(super) before: Vec<u32>,
    pub(super) after: Vec<u32>,
}

impl Tokenizer {
    /// Loads the tokenizer of a model folder: `tokenizer.json`, else `tokenizer.model`, else `qwen.tiktoken`, with
    /// what `tokenizer_config.json` and `special_tokens_map.json` say beside it, as `transformers`' AutoTokenizer does.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where all are missing, or one is broken.
    pub fn load(folder: &Path) -> Result<Tokenizer> {
        for (name, load) in VOCABULARIES {
            if let Some(file) = read_file(folder, name)? {
                return load(&file, folder);
            }
        }
        let names = VOCABULARIES.map(|(name, _)| name).join(", ");
        Err(Error::Checkpoint(format!("the model has none of {names}")))
    }

    /// Whether a model folder has a tokenizer.
    pub fn is_in(folder: &Path) -> bool {
        VOCABULARIES.iter().any(|(name, _)| folder.join(name).exists())
    }

    fn from_json(file: &[u8], folder: &Path) -> Result<Tokenizer> {
        let settings = Settings::read(folder, Defaults::default())?;
        let loaded = guarded(|| {
            let mut inner = Inner::from_bytes(file)?;
            inner.with_padding(None);
            inner.with_truncation(None)?;
            let added = added_tokens(&inner, &settings);
            inner.add_special_tokens(added)?;
            set_prefix_space(&mut inner, &settings);
            let around = Around::of(&inner)?;
            inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
            Ok((inner, around))
        });
        let broken = |error| Error::Checkpoint(format!("tokenizer.json cannot be used: {error}"));
        let (inner, around) = loaded.map_err(broken)?;
        Tokenizer::assemble(inner, None, around, &settings)
    }

    /// A tokenizer without truncation, padding and post-processor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where it has no ids, or too many.
    pub(super) fn new(inner: Inner, settings: &Settings) -> Result<Tokenizer> {
        Tokenizer::assemble(inner, None, Around::default(), settings)
    }

    /// As [`Tokenizer::new`], with what goes before and around a text where `settings` do not say so.
    ///
    /// # Errors
    /// As [`Tokenizer::new`].
    pub(super) fn assemble(
        inner: Inner,
        parts: Option<Parts>,
        around: Around,
        settings: &Settings,
    ) -> Result<Tokenizer> {
        let n_ids = n_ids(&inner)?;
        let is_bpe = matches!(inner.get_model(), ModelWrapper::BPE(_));
        Ok(Tokenizer {
            pieces: Pieces::new(&inner, n_ids),
            special: special_ids(&inner),
            around: around.with(&inner, settings),
            n_ids,
            eos: settings.eos.as_deref().and_then(|token| inner.token_to_id(token)),
            cleans_up: if is_bpe { settings.cleans_up && settings.cleans_up_bpe } else { settings.cleans_up },
            parts,
            inner,
        })
    }

    /// Ids of `text`; of more than `truncate`, the last: the text loses its beginning, added special tokens stay, as
    /// long as there is room for them.
    ///
    /// # Errors
    /// [`Error::Invalid`] where the tokenizer has no ids for the text, or the text is longer than 8 MiB.
    pub fn encode(&self, text: &str, add_special_tokens: bool, truncate: usize) -> Result<Vec<u32>> {
        if text.len() > MAX_TEXT_BYTES {
            let n = text.len();
            return Err(Error::Invalid(format!("the prompt has {n} bytes, the limit is {MAX_TEXT_BYTES}")));
        }
        let ids = guarded(|| match &self.parts {
            Some(parts) => Ok(parts.encode(text)),
            None => Ok(self.inner.encode_fast(text, false)?.get_ids().to_vec()),
        });
        let ids = ids.map_err(|error| Error::Invalid(format!("the prompt cannot be tokenised: {error}")))?;
        let (before, after): (&[u32], &[u32]) =
            if add_special_tokens { (&self.around.before, &self.around.after) } else { (&[], &[]) };
        let room = truncate.saturating_sub(before.len().saturating_add(after.len()));
        let kept = ids.get(ids.len().saturating_sub(room)..).unwrap_or_default();
        let mut all = [before, kept, after].concat();
        all.truncate(truncate);
        Ok(all)
    }

    /// Text of `ids` as they stand; unknown ids have none.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        let Some(pieces) = &self.pieces else { return self.decode_by_crate(ids, skip_special_tokens) };
        if skip_special_tokens {
            pieces.decode(self.without_special(ids))
        } else {
            pieces.decode(ids.iter().copied())
        }
    }

    /// Text of `ids` in the course of an answer, special tokens kept; cleaned up where the tokenizer's configuration
    /// asks for it.
    pub(super) fn decode_part(&self, ids: &[u32]) -> String {
        self.clean_up(self.decode(ids, false))
    }

    /// Text of `ids` as a whole answer, special tokens left out; cleaned up where the tokenizer's configuration asks
    /// for it. Of an end within a character only that character is lost.
    pub(super) fn decode_whole(&self, ids: &[u32]) -> String {
        self.clean_up(match &self.pieces {
            Some(pieces) => pieces.decode_cut(self.without_special(ids)),
            None => self.decode_by_crate(ids, true),
        })
    }

    fn without_special(&self, ids: &[u32]) -> impl Iterator<Item = u32> {
        ids.iter().copied().filter(|id| !self.is_special(*id))
    }

    /// Decoding fails for no ids that a model can produce; what cannot be decoded has no text.
    fn decode_by_crate(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        guarded(|| self.inner.decode(ids, skip_special_tokens)).unwrap_or_default()
    }

    fn clean_up(&self, text: String) -> String {
        if self.cleans_up { clean_up(text) } else { text }
    }

    /// Whether the last of `ids` certainly completes no text of an answer: it has none, or leaves a character
    /// incomplete.
    pub(super) fn is_open(&self, ids: &[u32]) -> bool {
        match &self.pieces {
            Some(pieces) => pieces.is_open(ids),
            None => self.decode(ids, false).ends_with(REPLACEMENT),
        }
    }

    /// The first position at or before `at` that is not between the bytes of a character.
    pub(super) fn character_start(&self, ids: &[u32], at: usize) -> usize {
        self.pieces.as_ref().map_or(at, |pieces| pieces.character_start(ids, at))
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

    #[cfg(test)]
    pub(super) fn inner(&self) -> &Inner {
        &self.inner
    }
}

impl Around {
    /// What the post-processor of `tokenizer.json` adds: found by giving it an id that no vocabulary has.
    fn of(inner: &Inner) -> tokenizers::Result<Around> {
        const TEXT: u32 = u32::MAX;
        let text = Encoding::from_tokens(vec![Token::new(TEXT, "a".to_owned(), (0, 1))], 0);
        let whole = inner.post_process(text, None, true)?;
        let parts: Vec<&[u32]> = whole.get_ids().split(|id| *id == TEXT).collect();
        match parts[..] {
            [before, after] => Ok(Around { before: before.to_vec(), after: after.to_vec() }),
            _ => Err("the post-processor does not keep the text as it is".into()),
        }
    }

    /// With the begin and end tokens that the settings ask for. Where they say nothing, `tokenizer.json` decides.
    fn with(self, inner: &Inner, settings: &Settings) -> Around {
        if settings.add_bos.is_none() && settings.add_eos.is_none() {
            return self;
        }
        let id = |token: &Option<String>| token.as_deref().and_then(|token| inner.token_to_id(token));
        let (bos, eos) = (id(&settings.bos), id(&settings.eos));
        let is_in = |ids: &[u32], id: Option<u32>| id.is_some_and(|id| ids.contains(&id));
        let add_bos = settings.add_bos.unwrap_or(is_in(&self.before, bos));
        let add_eos = settings.add_eos.unwrap_or(is_in(&self.after, eos));
        let only = |id: Option<u32>, wanted: bool| id.filter(|_| wanted).into_iter().collect();
        Around { before: only(bos, add_bos), after: only(eos, add_eos) }
    }
}

/// Runs a call of the `tokenizers` crate, which indexes by what a file says: where that panics, the file's parts
/// contradict each other, and the process lives on.
pub(super) fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("its parts contradict each other".to_owned()),
    }
}

/// Tokens that the settings describe otherwise than `tokenizer.json`, or call special where it forgot to. Those
/// without an id stay out: the model has no embedding for them.
fn added_tokens(inner: &Inner, settings: &Settings) -> Vec<AddedToken> {
    let mut tokens: Vec<AddedToken> = Vec::new();
    for (id, token) in &settings.added {
        if inner.token_to_id(&token.content) == Some(*id) {
            let special = token.special || settings.special.contains(&token.content);
            tokens.push(token.clone().special(special));
        }
    }
    let known = inner.get_added_vocabulary().get_vocab();
    for token in &settings.special {
        let is_described = known.contains_key(token) || tokens.iter().any(|added| added.content == *token);
        if !is_described && inner.token_to_id(token).is_some() {
            tokens.push(AddedToken::from(token.as_str(), true));
        }
    }
    tokens
}

/// `transformers` sets this flag of a byte-level pre-tokenizer from its own configuration, false by default.
fn set_prefix_space(inner: &mut Inner, settings: &Settings) {
    let Some(wanted) = settings.add_prefix_space else { return };
    if let Some(PreTokenizerWrapper::ByteLevel(byte_level)) = inner.get_pre_tokenizer() {
        let byte_level = byte_level.add_prefix_space(wanted);
        inner.with_pre_tokenizer(Some(byte_level));
    }
}

fn n_ids(inner: &Inner) -> Result<u32> {
    let largest = inner.get_vocab(true).into_values().max();
    match largest {
        None => Err(Error::Checkpoint("the tokenizer has no tokens".to_owned())),
        Some(id) if id >= MAX_IDS => {
            Err(Error::Checkpoint(format!("the tokenizer has a token of id {id}, beyond {MAX_IDS}")))
        }
        Some(id) => Ok(id + 1),
    }
}

/// Ids that decoding skips when told to skip special tokens.
fn special_ids(inner: &Inner) -> BTreeSet<u32> {
    let added = inner.get_added_vocabulary();
    let ids = added.get_added_tokens_decoder().keys().copied();
    ids.filter(|id| added.simple_id_to_token(*id).is_some_and(|token| added.is_special_token(&token)))
        .collect()
}

/// English punctuation drawn to the word before it, in the order of `transformers`' `clean_up_tokenization`.
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
