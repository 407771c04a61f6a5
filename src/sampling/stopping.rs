//! When a request ends.

use std::sync::Arc;

use crate::error::{Error, Result};

/// Longest stop sequence, in bytes: longer ones would have every token compared with a page of text.
const MAX_STOP_BYTES: usize = 4096;
/// Most stop sequences of a request.
const MAX_STOPS: usize = 64;

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
pub struct Stopping {
    max_new_tokens: u32,
    n_tokens: u32,
    /// Sorted; empty where end-of-text tokens are tokens like others.
    eos: Arc<[u32]>,
    stops: Vec<String>,
    /// The output's last bytes, as many as a stop sequence and a newline can take.
    tail: String,
    tail_bytes: usize,
}

impl RawStopping {
    /// Checks the criteria and makes the state before the first token. `eos`: the model's end-of-text ids, sorted.
    ///
    /// # Errors
    /// [`Error::Invalid`] for `max_new_tokens` 0, and for stop sequences that are empty, too long or too many.
    pub fn validate(self, eos: &Arc<[u32]>) -> Result<Stopping> {
        if self.max_new_tokens == 0 {
            return Err(Error::Invalid("max_new_tokens is 0; it must be at least 1".into()));
        }
        if self.stop_sequences.len() > MAX_STOPS {
            let n = self.stop_sequences.len();
            return Err(Error::Invalid(format!("{n} stop sequences are more than {MAX_STOPS}")));
        }
        let longest = self.stop_sequences.iter().map(String::len).max().unwrap_or(0);
        if longest > MAX_STOP_BYTES {
            return Err(Error::Invalid(format!(
                "a stop sequence of {longest} bytes is longer than {MAX_STOP_BYTES}"
            )));
        }
        if self.stop_sequences.iter().any(String::is_empty) {
            return Err(Error::Invalid("a stop sequence is empty, and would stop at once".into()));
        }
        Ok(Stopping {
            max_new_tokens: self.max_new_tokens,
            n_tokens: 0,
            eos: if self.ignore_eos { Arc::new([]) } else { eos.clone() },
            stops: self.stop_sequences,
            tail: String::new(),
            tail_bytes: longest + 1,
        })
    }
}

impl Stopping {
    /// Most tokens that the request may get.
    pub fn max_new_tokens(&self) -> u32 {
        self.max_new_tokens
    }

    /// Tokens accepted so far.
    pub fn n_tokens(&self) -> u32 {
        self.n_tokens
    }

    /// Whether the request ends with this token, whatever its text is.
    pub fn ends_with(&self, id: u32) -> bool {
        self.n_tokens.saturating_add(1) >= self.max_new_tokens || self.eos.binary_search(&id).is_ok()
    }

    /// Accepts a token and the text it completed; tells whether the request ends with it. Length comes last: a
    /// router that sees it may continue the text, and must not behind its end.
    pub fn accept(&mut self, id: u32, text: &str) -> Option<FinishReason> {
        self.n_tokens = self.n_tokens.saturating_add(1);
        if self.eos.binary_search(&id).is_ok() {
            return Some(FinishReason::EndOfText);
        }
        if !self.stops.is_empty() && !text.is_empty() && self.completes_stop(text) {
            return Some(FinishReason::StopSequence);
        }
        (self.n_tokens >= self.max_new_tokens).then_some(FinishReason::Length)
    }

    /// Whether the output, with `text` at its end, ends in a stop sequence or in one and a newline, as the `$` of
    /// TGI's expression does.
    fn completes_stop(&mut self, text: &str) -> bool {
        self.tail.push_str(text);
        let ended = self.tail.strip_suffix('\n').unwrap_or(&self.tail);
        let found = self
            .stops
            .iter()
            .any(|stop| self.tail.ends_with(stop.as_str()) || ended.ends_with(stop.as_str()));
        let mut surplus = self.tail.len().saturating_sub(self.tail_bytes);
        while !self.tail.is_char_boundary(surplus) {
            surplus -= 1;
        }
        self.tail.drain(..surplus);
        found
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stopping(max_new_tokens: u32, stops: &[&str], ignore_eos: bool) -> Stopping {
        let stop_sequences = stops.iter().map(|stop| stop.to_string()).collect();
        RawStopping { max_new_tokens, stop_sequences, ignore_eos }.validate(&[2, 9].into()).unwrap()
    }

    #[test]
    fn end_of_text_goes_before_length() {
        let mut last = stopping(1, &[], false);
        assert_eq!(last.accept(9, ""), Some(FinishReason::EndOfText));
        let mut ignoring = stopping(2, &[], true);
        assert_eq!((ignoring.accept(9, ""), ignoring.accept(2, "")), (None, Some(FinishReason::Length)));
        assert_eq!(ignoring.n_tokens(), 2);
    }

    #[test]
    fn stop_sequences_match_where_a_token_ends() {
        let mut split = stopping(9, &["END", "\n\n"], false);
        assert_eq!((split.accept(5, "the E"), split.accept(5, "N"), split.accept(5, "")), (None, None, None));
        assert_eq!(split.accept(5, "D"), Some(FinishReason::StopSequence));
        assert_eq!(stopping(9, &["END"], false).accept(5, "ENDING"), None, "in the middle of a token's text");
        assert_eq!(stopping(9, &["END"], false).accept(5, "END\n"), Some(FinishReason::StopSequence));
        assert_eq!(stopping(1, &["END"], false).accept(5, "END"), Some(FinishReason::StopSequence));
    }

    #[test]
    fn what_cannot_stop_is_refused() {
        let raw = |stops: Vec<String>, max_new_tokens| RawStopping {
            max_new_tokens,
            stop_sequences: stops,
            ignore_eos: false,
        };
        let eos: Arc<[u32]> = [2].into();
        for bad in [
            raw(vec![], 0),
            raw(vec![String::new()], 1),
            raw(vec!["x".repeat(5000)], 1),
            raw(vec!["x".into(); 65], 1),
        ] {
            assert!(matches!(bad.validate(&eos), Err(Error::Invalid(_))));
        }
    }

    proptest! {
        #[test]
        fn a_bounded_tail_finds_what_the_whole_text_would(
            pieces in prop::collection::vec("[abé\n]{0,3}", 1..40),
            stops in prop::collection::vec("[abé]{1,5}", 1..4),
        ) {
            let mut stopping = RawStopping { max_new_tokens: 1000, stop_sequences: stops.clone(), ignore_eos: true }
                .validate(&[].into()).unwrap();
            let mut whole = String::new();
            for piece in pieces {
                whole.push_str(&piece);
                let ends = |text: &str| stops.iter().any(|stop| text.ends_with(stop.as_str()));
                let expected = !piece.is_empty() && (ends(&whole) || ends(whole.strip_suffix('\n').unwrap_or(&whole)));
                prop_assert_eq!(stopping.accept(5, &piece).is_some(), expected);
                if expected {
                    break;
                }
            }
        }
    }
}
