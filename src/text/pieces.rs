//! What each id stands for, worked out once, so that decoding a token neither hashes nor matches nor allocates.

use tokenizers::{DecoderWrapper, Tokenizer as Inner};

/// What an incomplete character decodes to, and what is no character.
pub(super) const REPLACEMENT: char = '\u{FFFD}';

/// The pieces of a vocabulary whose decoder is one of two common kinds. Decodes exactly as `tokenizers` does.
pub(super) struct Pieces {
    joining: Joining,
    /// All pieces in a row.
    bytes: Vec<u8>,
    /// `[ids + 1]` where each piece begins.
    bounds: Vec<u32>,
    /// `[ids]`
    kinds: Vec<Kind>,
}

/// How pieces become text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Joining {
    /// Bytes in a row; what is no UTF-8 becomes U+FFFD (`ByteLevel`).
    ByteLevel,
    /// Texts, with runs of bytes between them: a run is its text if it is UTF-8, else a U+FFFD for each byte; then up
    /// to `n_stripped` leading spaces go (`Replace`, `ByteFallback`, `Fuse`, `Strip`).
    ByteFallback { n_stripped: usize },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// No token has this id.
    Absent,
    Text,
    /// One byte of a run.
    Byte,
}

impl Pieces {
    /// The pieces of ids below `n_ids`; `None` for a decoder of another kind, or more than 4 GiB of pieces.
    pub(super) fn new(inner: &Inner, n_ids: u32) -> Option<Pieces> {
        let (joining, replace) = joining_of(inner.get_decoder()?)?;
        let mut pieces = Pieces { joining, bytes: Vec::new(), bounds: vec![0], kinds: Vec::new() };
        for id in 0..n_ids {
            let token = inner.id_to_token(id);
            let kind = token.map_or(Kind::Absent, |token| match &replace {
                None => pieces.extend_by_alphabet(&token),
                Some((from, to)) => pieces.extend_by_text(&token.replace(from, to)),
            });
            pieces.kinds.push(kind);
            pieces.bounds.push(u32::try_from(pieces.bytes.len()).ok()?);
        }
        Some(pieces)
    }

    /// A token spelled in the alphabet of byte-level BPE stands for these bytes, any other for itself.
    fn extend_by_alphabet(&mut self, token: &str) -> Kind {
        match token.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
            Some(bytes) => self.bytes.extend(bytes),
            None => self.bytes.extend(token.as_bytes()),
        }
        Kind::Text
    }

    fn extend_by_text(&mut self, token: &str) -> Kind {
        if let Some(byte) = fallback_byte(token) {
            self.bytes.push(byte);
            return Kind::Byte;
        }
        self.bytes.extend(token.as_bytes());
        Kind::Text
    }

    fn get(&self, id: u32) -> (Kind, &[u8]) {
        let entry = || {
            let id = usize::try_from(id).ok()?;
            let bytes = *self.bounds.get(id)? as usize..*self.bounds.get(id + 1)? as usize;
            Some((*self.kinds.get(id)?, self.bytes.get(bytes)?))
        };
        entry().unwrap_or((Kind::Absent, &[]))
    }

    /// Text of `ids`, by `tokenizers`' rules.
    pub(super) fn decode(&self, ids: impl Iterator<Item = u32>) -> String {
        self.decode_until(ids, push_run)
    }

    /// Text of `ids`, but of a last run of bytes that ends within a character, the complete ones stay.
    pub(super) fn decode_cut(&self, ids: impl Iterator<Item = u32>) -> String {
        self.decode_until(ids, |text, run| text.push_str(&String::from_utf8_lossy(run)))
    }

    fn decode_until(&self, ids: impl Iterator<Item = u32>, push_last: fn(&mut String, &[u8])) -> String {
        match self.joining {
            Joining::ByteLevel => {
                let mut bytes = Vec::new();
                ids.for_each(|id| bytes.extend_from_slice(self.get(id).1));
                String::from_utf8(bytes)
                    .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned())
            }
            Joining::ByteFallback { n_stripped } => {
                let (mut text, last_run) = self.join_runs(ids);
                push_last(&mut text, &last_run);
                let n_spaces = text.bytes().take(n_stripped).take_while(|byte| *byte == b' ').count();
                text.drain(..n_spaces);
                text
            }
        }
    }

    /// Text of `ids` up to the last run of bytes, and that run.
    fn join_runs(&self, ids: impl Iterator<Item = u32>) -> (String, Vec<u8>) {
        let (mut text, mut run) = (String::new(), Vec::new());
        for id in ids {
            match self.get(id) {
                (Kind::Absent, _) => {}
                (Kind::Byte, byte) => run.extend_from_slice(byte),
                (Kind::Text, piece) => {
                    push_run(&mut text, &run);
                    run.clear();
                    text.push_str(&String::from_utf8_lossy(piece));
                }
            }
        }
        (text, run)
    }

    /// Whether the last of `ids` completes no text: there is no such token, or the text ends in U+FFFD. Looks at the
    /// last few ids only, or at the last run of bytes.
    pub(super) fn is_open(&self, ids: &[u32]) -> bool {
        let Some((last, piece)) = ids.last().map(|&id| self.get(id)) else { return true };
        match (last, self.joining) {
            (Kind::Absent, _) => true,
            (_, Joining::ByteLevel) => piece.is_empty() || self.bytes_end_open(ids),
            (Kind::Byte, _) => self.bytes_end_open(ids) || self.last_run_is_broken(ids),
            (Kind::Text, _) => {
                piece.is_empty() || piece.ends_with(REPLACEMENT.encode_utf8(&mut [0; 3]).as_bytes())
            }
        }
    }

    /// Whether the bytes that `ids` end with are no UTF-8, and so decode to U+FFFD one and all.
    fn last_run_is_broken(&self, ids: &[u32]) -> bool {
        let newest_first = ids.iter().rev().map(|&id| self.get(id));
        let mut run: Vec<u8> = Vec::new();
        newest_first.take_while(|(kind, _)| *kind != Kind::Text).for_each(|(_, byte)| run.extend(byte));
        run.reverse();
        std::str::from_utf8(&run).is_err()
    }

    /// Whether the bytes of `ids`, decoded, end in U+FFFD. A character has at most 4 bytes, and its first byte cannot
    /// be part of what comes before, so the last four bytes tell.
    fn bytes_end_open(&self, ids: &[u32]) -> bool {
        let newest_first = ids.iter().rev().flat_map(|&id| self.get(id).1.iter().rev());
        let mut tail = [0; 4];
        let mut from = tail.len();
        for &byte in newest_first.take(4) {
            from -= 1;
            tail[from] = byte;
            if !is_continuation(byte) {
                break;
            }
        }
        std::str::from_utf8(&tail[from..]).map_or(true, |text| text.ends_with(REPLACEMENT))
    }

    /// The first position at or before `at` from which `ids` decode as they do within the whole: not between the
    /// bytes of a character, where the run of bytes would turn into U+FFFD as a whole.
    pub(super) fn character_start(&self, ids: &[u32], at: usize) -> usize {
        if self.joining == Joining::ByteLevel {
            return at;
        }
        let is_inside = |at: usize| {
            ids.get(at).is_some_and(|&id| {
                let (kind, bytes) = self.get(id);
                kind == Kind::Byte && bytes.iter().all(|byte| is_continuation(*byte))
            })
        };
        (at.saturating_sub(3)..=at).rev().find(|&start| !is_inside(start)).unwrap_or(at)
    }
}

fn push_run(text: &mut String, run: &[u8]) {
    match std::str::from_utf8(run) {
        Ok(run) => text.push_str(run),
        Err(_) => text.extend(run.iter().map(|_| REPLACEMENT)),
    }
}

/// How a decoder joins pieces, and what its `Replace` does to them. `None` for other kinds of decoders.
fn joining_of(decoder: &DecoderWrapper) -> Option<(Joining, Option<(String, String)>)> {
    let steps = match decoder {
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders(),
        other => std::slice::from_ref(other),
    };
    match steps {
        [DecoderWrapper::ByteLevel(_)] => Some((Joining::ByteLevel, None)),
        [
            DecoderWrapper::Replace(replace),
            DecoderWrapper::ByteFallback(_),
            DecoderWrapper::Fuse(_),
            last @ ..,
        ] => {
            let n_stripped = match last {
                [] => 0,
                [DecoderWrapper::Strip(strip)] if strip.content == ' ' && strip.stop == 0 => strip.start,
                _ => return None,
            };
            // The crate keeps the pattern to itself, but writes it.
            let written = serde_json::to_value(replace).ok()?;
            let from = written.get("pattern")?.get("String")?.as_str().filter(|from| !from.is_empty())?;
            let replace = (from.to_owned(), replace.content.clone());
            Some((Joining::ByteFallback { n_stripped }, Some(replace)))
        }
        _ => None,
    }
}

/// The byte of a token such as `<0x0A>`, by the rule of `tokenizers`' `ByteFallback`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>').filter(|digits| digits.len() == 2)?;
    u8::from_str_radix(digits, 16).ok()
}

fn is_continuation(byte: u8) -> bool {
    byte & 0xC0 == 0x80
}

/// The byte that a character of GPT-2's byte-level alphabet stands for: printable Latin-1 for itself, the other 68
/// bytes, in order, from U+0100 on.
fn byte_of(character: char) -> Option<u8> {
    let code = u32::from(character);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The character that stands for a byte; the inverse of [`byte_of`].
pub(super) fn char_of(byte: u8) -> char {
    match byte {
        0x00..=0x20 => char::from_u32(0x100 + u32::from(byte)),
        0x7F..=0xA0 => char::from_u32(0x121 + u32::from(byte - 0x7F)),
        0xAD => Some('\u{143}'),
        _ => None,
    }
    .unwrap_or(char::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_names_every_byte_once() {
        assert!((0..=255).all(|byte| byte_of(char_of(byte)) == Some(byte)));
        let mut seen: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of('é')), (Some(b' '), Some(b'\n'), Some(0xE9)));
    }

    #[test]
    fn byte_tokens_are_told_from_texts() {
        assert_eq!((fallback_byte("<0x0A>"), fallback_byte("<0xe5>")), (Some(10), Some(0xE5)));
        for text in ["<0x0>", "<0x0A", "<0x0AB>", "<0xGG>", "<0é>", "<0xé>", "0x0A", ""] {
            assert_eq!(fallback_byte(text), None, "{text}");
        }
    }
}
