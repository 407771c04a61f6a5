//! `qwen.tiktoken`: the ranks of Qwen v1's byte-level BPE, read into the `tokenizers` crate's model.
//!
//! A line for each token: its bytes in base64, a space, and its rank, which is its id too. `tiktoken` merges whatever
//! two neighbours make a token, the one of the lowest rank first. The crate wants pairs; each token is made of one
//! pair only, which is what merging its own bytes by lower ranks ends with.

use std::collections::HashMap;
use std::path::Path;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer as Inner};

use super::Tokenizer;
use super::from_sentencepiece::append;
use super::pieces::char_of;
use super::settings::{Defaults, Settings};
use super::tokenizer::guarded;
use crate::error::{Error, Result};

/// Longest token, of which a published vocabulary has some of 128.
const MAX_TOKEN_BYTES: usize = 256;
/// Bound of the sum of squares of lengths, some 30 times what a published vocabulary has.
const MAX_WORK: usize = 1 << 28;
/// Where a text is cut before merging, as `tokenization_qwen.py` beside Qwen's weights has it.
const SPLIT: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Tokens behind the ranks; as many `<|extra_N|>` follow.
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const N_EXTRA: u32 = 205;

impl Tokenizer {
    /// From a `qwen.tiktoken` and what else is in its folder.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the file and what is wrong with it.
    pub(super) fn from_tiktoken(file: &[u8], folder: &Path) -> Result<Tokenizer> {
        let broken = |why: String| Error::Checkpoint(format!("qwen.tiktoken cannot be used: {why}"));
        let tokens = parse(file).map_err(broken)?;
        let settings = Settings::read(folder, Defaults { eos: Some(SPECIAL[0]), ..Defaults::default() })?;
        let build = || {
            let spelled = |bytes: &[u8]| bytes.iter().map(|&byte| char_of(byte)).collect::<String>();
            let vocab: Vocab = (0..).zip(&tokens).map(|(id, bytes)| (spelled(bytes), id)).collect();
            let merges: Merges =
                merges(&tokens).into_iter().map(|(left, right)| (spelled(left), spelled(right))).collect();
            // A token that no merges lead to is still found where it is all there is between two cuts.
            let mut inner =
                Inner::new(BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(true).build()?);
            inner.with_normalizer(Some(NFC))?;
            let split =
                Split::new(SplitPattern::Regex(SPLIT.to_owned()), SplitDelimiterBehavior::Isolated, false)?;
            let bytes = ByteLevel::new(false, true, false);
            inner.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
            inner.with_decoder(Some(ByteLevel::default()));
            let extra = (0..N_EXTRA).map(|number| format!("<|extra_{number}|>"));
            let special: Vec<String> = SPECIAL.map(str::to_owned).into_iter().chain(extra).collect();
            let n_ids = (tokens.len() + special.len()) as u32;
            // They are looked for in the normalized text.
            inner.add_special_tokens(
                special.into_iter().map(|text| AddedToken::from(text, true).normalized(true)),
            )?;
            append(&mut inner, n_ids, &settings)?;
            Ok(inner)
        };
        Tokenizer::new(guarded(build).map_err(broken)?, &settings)
    }
}

/// Tokens by rank.
fn parse(file: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    let lines = file.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    let mut ranks: HashMap<Vec<u8>, usize> = HashMap::new();
    for (number, line) in (1..).zip(lines) {
        let (token, rank) = token_and_rank(line)
            .ok_or_else(|| format!("line {number} is not a token in base64 and its rank"))?;
        if token.is_empty() || token.len() > MAX_TOKEN_BYTES {
            let n = token.len();
            return Err(format!("line {number} has a token of {n} bytes; 1 to {MAX_TOKEN_BYTES} are read"));
        }
        if ranks.insert(token, rank).is_some() {
            return Err(format!("line {number} has a token that an earlier line has"));
        }
    }
    if let Some(byte) = (0..=u8::MAX).find(|byte| !ranks.contains_key([*byte].as_slice())) {
        return Err(format!("no token stands for the byte {byte:#04x} alone"));
    }
    // Finding what a token is made of takes as many steps as the square of its length.
    let work: usize = ranks.keys().map(|token| token.len() * token.len()).sum();
    if work > MAX_WORK {
        return Err(format!("its {} tokens are too long altogether", ranks.len()));
    }
    let mut tokens = vec![Vec::new(); ranks.len()];
    let n_tokens = tokens.len();
    for (token, rank) in ranks {
        match tokens.get_mut(rank) {
            Some(place) if place.is_empty() => *place = token,
            Some(_) => return Err(format!("rank {rank} is given twice")),
            None => return Err(format!("rank {rank} is given, of {n_tokens} tokens")),
        }
    }
    Ok(tokens)
}

fn token_and_rank(line: &[u8]) -> Option<(Vec<u8>, usize)> {
    let space = line.iter().position(|&byte| byte == b' ')?;
    let rank = std::str::from_utf8(&line[space + 1..]).ok()?.parse().ok()?;
    Some((decode_base64(&line[..space])?, rank))
}

/// Base64 with padding (RFC 4648, section 4).
fn decode_base64(text: &[u8]) -> Option<Vec<u8>> {
    let sextet = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let n_padding = text.iter().rev().take_while(|&&byte| byte == b'=').count();
    if !text.len().is_multiple_of(4) || n_padding > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut n_bits) = (0u32, 0);
    for &byte in &text[..text.len() - n_padding] {
        bits = bits << 6 | u32::from(sextet(byte)?);
        n_bits += 6;
        if n_bits >= 8 {
            n_bits -= 8;
            bytes.push((bits >> n_bits) as u8);
        }
    }
    Some(bytes)
}

/// The pair that each token is made of, by rank. A token that merges of lower ranks do not lead to has none.
fn merges(tokens: &[Vec<u8>]) -> Vec<(&[u8], &[u8])> {
    let ranks: HashMap<&[u8], usize> = tokens.iter().map(Vec::as_slice).zip(0..).collect();
    let pair = |(rank, token): (usize, &'_ Vec<u8>)| {
        // Where parts begin, and the end.
        let mut bounds: Vec<usize> = (0..=token.len()).collect();
        while bounds.len() > 3 {
            let merged = |at: usize| ranks.get(&token[bounds[at]..bounds[at + 2]]).copied();
            let candidates = (0..bounds.len() - 2).filter_map(|at| Some((merged(at)?, at)));
            let (_, at) = candidates.min().filter(|(lowest, _)| *lowest < rank)?;
            bounds.remove(at + 1);
        }
        (bounds.len() == 3).then(|| bounds[1])
    };
    let pairs = tokens.iter().enumerate().map(|(rank, token)| (token, pair((rank, token))));
    pairs.filter_map(|(token, middle)| Some(token.split_at(middle?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_decoded_or_refused() {
        for (text, bytes) in
            [("", &b""[..]), ("Zg==", b"f"), ("Zm8=", b"fo"), ("Zm9v", b"foo"), ("+/8A", b"\xfb\xff\0")]
        {
            assert_eq!(decode_base64(text.as_bytes()).as_deref(), Some(bytes), "{text}");
        }
        for text in ["Z", "Zg=", "Zg", "Z===", "====", "Zm9v=", "Z=9v", "Zm9\n", "é==="] {
            assert_eq!(decode_base64(text.as_bytes()), None, "{text}");
        }
    }

    /// Base64 of a byte, without a library.
    fn line(byte: u8, rank: usize) -> String {
        const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let digit = |bits: u8| char::from(DIGITS[usize::from(bits & 63)]);
        format!("{}{}== {rank}\n", digit(byte >> 2), digit(byte << 4))
    }

    #[test]
    fn what_are_no_ranks_is_told() {
        let bytes: String = (0..=u8::MAX).map(|byte| line(byte, byte.into())).collect();
        assert_eq!(parse(bytes.as_bytes()).map(|tokens| tokens.len()), Ok(256));
        assert_eq!(
            parse(format!("{bytes}\r\nYWI= 256\r\n").as_bytes()).map(|tokens| tokens[256].clone()),
            Ok(b"ab".to_vec())
        );
        let long = "YWFh".repeat(86);
        for (added, words) in [
            ("YWI=", "line 257 is not a token in base64 and its rank"),
            ("YWI= ", "line 257 is not"),
            ("YWI= -1", "line 257 is not"),
            ("YWI= 99999999999999999999", "line 257 is not"),
            ("YW?= 256", "line 257 is not"),
            ("YQ== 256", "line 257 has a token that an earlier line has"),
            ("==== 256", "line 257 is not"),
            ("YWI= 255", "rank 255 is given twice"),
            ("YWI= 257", "rank 257 is given, of 257 tokens"),
            (&format!("{long} 256"), "line 257 has a token of 258 bytes; 1 to 256 are read"),
        ] {
            let told = parse(format!("{bytes}{added}").as_bytes()).unwrap_err();
            assert!(told.contains(words), "{told:?} for {words:?}");
        }
        assert_eq!(parse(b""), Err("no token stands for the byte 0x00 alone".to_owned()));
        assert_eq!(parse(&[0xFF; 9]), Err("line 1 is not a token in base64 and its rank".to_owned()));
    }

    #[test]
    fn each_token_is_made_of_one_pair() {
        let tokens: Vec<Vec<u8>> =
            ["a", "b", "c", "bc", "ab", "abc", "abcabc", "xyz"].map(|token| token.as_bytes().to_vec()).into();
        // "bc" comes first, so "abc" is "a" and "bc".
        let expected: Vec<(&[u8], &[u8])> = vec![(b"b", b"c"), (b"a", b"b"), (b"a", b"bc"), (b"abc", b"abc")];
        assert_eq!(merges(&tokens), expected);
    }
}
