//! Byte-level vocabularies as bytes, which decode without going through the tokenizer's string pipeline.

use std::ops::Range;

/// `[ids]` the bytes of each token, in one piece of memory.
pub(super) struct TokenBytes {
    bytes: Vec<u8>,
    /// `[ids + 1]` where each token's bytes begin.
    bounds: Vec<u32>,
}

impl TokenBytes {
    /// From each id's token, spelled in the alphabet of byte-level BPE (GPT-2): a character a byte. A token with any
    /// other character stands for itself.
    pub(super) fn new(tokens: impl Iterator<Item = Option<String>>) -> TokenBytes {
        let mut table = TokenBytes { bytes: Vec::new(), bounds: vec![0] };
        for token in tokens {
            let token = token.unwrap_or_default();
            match token.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
                Some(bytes) => table.bytes.extend(bytes),
                None => table.bytes.extend(token.as_bytes()),
            }
            table.bounds.push(table.bytes.len() as u32);
        }
        table
    }

    /// The bytes of a token; none for an unknown id.
    pub(super) fn of(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let range: Option<Range<usize>> =
            self.bounds.get(id).zip(self.bounds.get(id + 1)).map(|(&from, &to)| from as usize..to as usize);
        range.and_then(|range| self.bytes.get(range)).unwrap_or_default()
    }
}

/// The byte that a character of the alphabet stands for: printable Latin-1 for itself, the other 68 bytes, in
/// order, from U+0100 on.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_names_every_byte_once() {
        let mut seen: Vec<u8> = (0..0x200).filter_map(char::from_u32).filter_map(byte_of).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..=255).collect::<Vec<u8>>());
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of('é')), (Some(b' '), Some(b'\n'), Some(0xE9)));
    }

    #[test]
    fn tokens_outside_the_alphabet_stand_for_themselves() {
        let tokens = [Some("Ġa".to_string()), None, Some("▁x".into())];
        let table = TokenBytes::new(tokens.into_iter());
        assert_eq!(table.of(0), b" a");
        assert_eq!((table.of(1), table.of(2), table.of(3)), (&b""[..], "▁x".as_bytes(), &b""[..]));
        assert_eq!(table.of(u32::MAX), b"");
    }
}
