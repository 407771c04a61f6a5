//! Incremental detokenisation: the text of each token as it comes, and the whole at the end.

use super::Tokenizer;

/// The state of one request (protocol: offsets into prompt and output, five tokens of left context).
pub struct Detokenizer {}

impl Detokenizer {
    /// State before the first output token of a prompt.
    pub fn new(_prompt: &[u32]) -> Detokenizer {
        todo!()
    }

    /// The text that the newest of `ids` completes; empty while a character is incomplete. `ids` is prompt and
    /// output so far; called once for each output token.
    pub fn push(&mut self, _tokenizer: &Tokenizer, _ids: &[u32]) -> String {
        todo!()
    }

    /// The whole output's text, special tokens left out; an incomplete last character shows as U+FFFD.
    pub fn whole(&self, _tokenizer: &Tokenizer, _ids: &[u32], _prompt_len: usize) -> String {
        todo!()
    }
}
