//! Incremental detokenisation: the text of each token as it comes, and the whole at the end.

use super::Tokenizer;

/// Tokens of the prompt that the first output token is decoded with, so that it is spelled as within a text.
const LEFT_CONTEXT: usize = 5;
/// What an incomplete character decodes to.
const REPLACEMENT: char = '\u{FFFD}';

/// The state of one request: which ids have been decoded, and from where they are decoded again for context. Ids
/// `read..` have no text yet: they are the beginning of a character.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    prefix: usize,
    read: usize,
}

impl Detokenizer {
    /// State before the first output token of a prompt.
    pub fn new(prompt: &[u32]) -> Detokenizer {
        Detokenizer { prefix: prompt.len().saturating_sub(LEFT_CONTEXT), read: prompt.len() }
    }

    /// The text that the newest of `ids` completes; empty while a character is incomplete. `ids` is prompt and
    /// output so far; called once for each output token.
    pub fn push(&mut self, tokenizer: &Tokenizer, ids: &[u32]) -> String {
        let known = tokenizer.decode_answer(&ids[self.prefix..self.read], false);
        let all = tokenizer.decode_answer(&ids[self.prefix..], false);
        let n_known = known.chars().count();
        if all.ends_with(REPLACEMENT) || all.chars().count() <= n_known {
            return String::new();
        }
        (self.prefix, self.read) = (self.read, ids.len());
        all.chars().skip(n_known).collect()
    }

    /// The whole output's text, special tokens left out, decoded behind the prompt's last token so that a leading
    /// space stays. An incomplete last character shows as U+FFFD; one that the output completes counts as its own.
    pub fn whole(&self, tokenizer: &Tokenizer, ids: &[u32], prompt_len: usize) -> String {
        let from = prompt_len.saturating_sub(1);
        let before = tokenizer.decode_answer(&ids[from..prompt_len], true);
        let all = tokenizer.decode_answer(&ids[from..], true);
        all.chars().skip(before.trim_end_matches(REPLACEMENT).chars().count()).collect()
    }
}
