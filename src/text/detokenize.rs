//! Incremental detokenisation: the text of each token as it comes, and the whole at the end.

use super::Tokenizer;

/// Tokens of the prompt that the first output token is decoded with, so that it is spelled as within a text.
const LEFT_CONTEXT: usize = 5;

/// The state of one request: which ids have been decoded, and from where they are decoded again for context. Ids
/// `read..` have no text yet: they are the beginning of a character.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    prefix: usize,
    read: usize,
    /// Characters of ids `prefix..read`, once known.
    n_known: Option<usize>,
}

impl Detokenizer {
    /// State before the first output token of a prompt.
    pub fn new(prompt: &[u32]) -> Detokenizer {
        Detokenizer { prefix: prompt.len().saturating_sub(LEFT_CONTEXT), read: prompt.len(), n_known: None }
    }

    /// The text that the newest of `ids` completes; empty while a character is incomplete. `ids` is prompt and
    /// output so far; called once for each output token.
    ///
    /// The text of ids `prefix..` beyond that of ids `prefix..read`, in characters, unless it ends in U+FFFD: the
    /// scheme of TGI's `Model.decode_token`, special tokens kept. The cost does not grow with the text, nor (but for
    /// rare decoders) with a run of tokens that are no text.
    pub fn push(&mut self, tokenizer: &Tokenizer, ids: &[u32]) -> String {
        let n_known = match self.n_known {
            Some(n_known) => n_known,
            None => {
                self.prefix = tokenizer.character_start(ids, self.prefix);
                self.know(tokenizer, ids)
            }
        };
        let window = ids.get(self.prefix..).unwrap_or_default();
        if tokenizer.is_open(window) {
            return String::new();
        }
        let text = tokenizer.decode_part(window);
        let Some((new, _)) = text.char_indices().nth(n_known) else { return String::new() };
        (self.prefix, self.read) = (self.read, ids.len());
        self.know(tokenizer, ids);
        text.get(new..).unwrap_or_default().to_owned()
    }

    fn know(&mut self, tokenizer: &Tokenizer, ids: &[u32]) -> usize {
        let known = ids.get(self.prefix..self.read).unwrap_or_default();
        *self.n_known.insert(tokenizer.decode_part(known).chars().count())
    }

    /// The whole output's text, special tokens left out, decoded behind the prompt's last token so that a leading
    /// space stays. An incomplete last character shows as U+FFFD, so that no text is lost.
    pub fn whole(&self, tokenizer: &Tokenizer, ids: &[u32], prompt_len: usize) -> String {
        let from = tokenizer.character_start(ids, prompt_len.saturating_sub(1));
        let decode = |ids: Option<&[u32]>| tokenizer.decode_whole(ids.unwrap_or_default());
        let n_known = decode(ids.get(from..prompt_len)).chars().count();
        decode(ids.get(from..)).chars().skip(n_known).collect()
    }
}
