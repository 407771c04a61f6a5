//! A model's tokenizer, as its folder describes it.

use std::path::Path;

use crate::error::Result;

/// A model's tokenizer. Immutable; shared by threads.
pub struct Tokenizer {}

impl Tokenizer {
    /// Loads the tokenizer of a model folder.
    pub fn load(_folder: &Path) -> Result<Tokenizer> {
        todo!()
    }

    /// Ids of `text`; of more than `truncate`, the last: the text loses its beginning, added special tokens stay.
    pub fn encode(&self, _text: &str, _add_special_tokens: bool, _truncate: usize) -> Result<Vec<u32>> {
        todo!()
    }

    /// Text of `ids`; unknown ids have none.
    pub fn decode(&self, _ids: &[u32], _skip_special_tokens: bool) -> String {
        todo!()
    }

    /// Whether `id` is special: text of the protocol between model and program, not of the answer.
    pub fn is_special(&self, _id: u32) -> bool {
        todo!()
    }

    /// One above the largest id.
    pub fn n_ids(&self) -> u32 {
        todo!()
    }

    /// The end-of-text id that the tokenizer's configuration names.
    pub fn eos(&self) -> Option<u32> {
        todo!()
    }
}
