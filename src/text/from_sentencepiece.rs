//! A folder's tokenizer from its `tokenizer.model`, as the classes of `transformers` and of the models' authors read it.

use std::path::Path;

use tokenizers::{AddedToken, Tokenizer as Inner};

use super::Tokenizer;
use super::parts::Parts;
use super::sentencepiece::Model;
use super::settings::{Defaults, Settings};
use super::tokenizer::{Around, guarded};
use crate::error::{Error, Result};

/// The class of ChatGLM2, ChatGLM3 and CodeGeeX2.
const CHAT_GLM: &str = "ChatGLMTokenizer";
/// What it appends to the pieces; a text is never found to hold them. After `tokenization_chatglm.py` beside their
/// weights.
const CHAT_GLM_TOKENS: [&str; 5] = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"];
/// Those that it puts before every text: `[gMASK]` and `sop`.
const CHAT_GLM_PREFIX: [u32; 2] = [1, 3];

impl Tokenizer {
    /// From a `tokenizer.model` and what else is in its folder. The begin token goes before a text unless the folder
    /// says otherwise, which is what the classes of all published models do.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the file and what is wrong with it.
    pub(super) fn from_sentencepiece(file: &[u8], folder: &Path) -> Result<Tokenizer> {
        let broken = |why: String| Error::Checkpoint(format!("tokenizer.model cannot be used: {why}"));
        let model = Model::parse(file).map_err(broken)?;
        let defaults = Defaults { bos: Some(&model.bos), eos: Some(&model.eos), add_bos: Some(true) };
        let mut settings = Settings::read(folder, defaults)?;
        let mut around = Around::default();
        let is_chat_glm = settings.class.as_deref() == Some(CHAT_GLM);
        if is_chat_glm {
            (settings.add_bos, settings.add_eos) = (None, None);
            around.before = CHAT_GLM_PREFIX.map(|token| model.n_pieces() + token).to_vec();
        }
        let built = guarded(|| {
            let mut inner = model.vocabulary()?;
            let mut n_ids = model.n_pieces();
            if is_chat_glm {
                let appended = CHAT_GLM_TOKENS.map(|name| AddedToken::from(unknown_to(&inner, name), true));
                n_ids += appended.len() as u32;
                inner.add_special_tokens(appended)?;
            }
            append(&mut inner, n_ids, &settings)?;
            let described = described(&inner, &settings);
            inner.add_tokens(described.clone())?;
            let special = model.special().filter(|_| !is_chat_glm).map(|text| AddedToken::from(text, true));
            let found: Vec<AddedToken> = special.chain(described).collect();
            let parts = Parts::new(&inner, found, model.into_rules(), settings.begins_anew)?;
            Ok((inner, parts))
        });
        let (inner, parts) = built.map_err(broken)?;
        Tokenizer::assemble(inner, Some(parts), around, &settings)
    }
}

/// A spelling of a token that no piece has: a vocabulary may hold the word.
fn unknown_to(inner: &Inner, name: &str) -> String {
    let mut spelling = name.to_owned();
    while inner.token_to_id(&spelling).is_some() {
        spelling = format!("<{spelling}>");
    }
    spelling
}

/// Adds the tokens that the settings have for the ids from `n_ids` on, without a gap.
pub(super) fn append(inner: &mut Inner, mut n_ids: u32, settings: &Settings) -> tokenizers::Result<()> {
    let mut appended = Vec::new();
    for (id, token) in &settings.added {
        if *id == n_ids && inner.token_to_id(&token.content).is_none() {
            appended.push(token.clone());
            n_ids += 1;
        }
    }
    inner.add_tokens(appended)?;
    Ok(())
}

/// The settings' tokens that `inner` knows by the ids they have there, and those they call special.
fn described(inner: &Inner, settings: &Settings) -> Vec<AddedToken> {
    let known = settings.added.iter().filter(|(id, token)| inner.token_to_id(&token.content) == Some(*id));
    let mut tokens: Vec<AddedToken> = known.map(|(_, token)| token.clone()).collect();
    for text in &settings.special {
        match tokens.iter_mut().find(|token| token.content == *text) {
            Some(token) => token.special = true,
            None if inner.token_to_id(text).is_some() => tokens.push(AddedToken::from(text.as_str(), true)),
            None => {}
        }
    }
    tokens
}
