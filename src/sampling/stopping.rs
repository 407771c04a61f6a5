//! When a request ends.

use std::sync::Arc;

use crate::error::Result;

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// It has `max_new_tokens` tokens.
    Length,
    /// The model ended it.
    EndOfText,
    /// A stop sequence came.
    StopSequence,
}

/// Stopping criteria as they came over the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawStopping {
    /// At least 1.
    pub max_new_tokens: u32,
    /// Texts that end the request where a token's text completes them; none empty.
    pub stop_sequences: Vec<String>,
    /// Whether end-of-text tokens are tokens like others.
    pub ignore_eos: bool,
}

/// The stopping state of one request.
#[derive(Debug, Clone)]
pub struct Stopping {}

impl RawStopping {
    /// Checks the criteria and makes the state before the first token. `eos`: the model's end-of-text ids, sorted.
    ///
    /// # Errors
    /// [`crate::error::Error::Invalid`] for `max_new_tokens` 0 and for empty or overlong stop sequences.
    pub fn validate(self, _eos: &Arc<[u32]>) -> Result<Stopping> {
        todo!()
    }
}

impl Stopping {
    /// Most tokens that the request may get.
    pub fn max_new_tokens(&self) -> u32 {
        todo!()
    }

    /// Tokens accepted so far.
    pub fn n_tokens(&self) -> u32 {
        todo!()
    }

    /// Accepts a token and the text it completed; tells whether the request ends with it, end-of-text before length.
    pub fn accept(&mut self, _id: u32, _text: &str) -> Option<FinishReason> {
        todo!()
    }
}
