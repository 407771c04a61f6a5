//! SentencePiece's normalizer: text → the text that pieces are found in.
//!
//! The algorithm of `Normalizer::Normalize` in github.com/google/sentencepiece, `src/normalizer.cc`. The `tokenizers`
//! crate has a normalizer of that name too, which works on grapheme clusters and differs on combining marks.

use std::collections::{BTreeSet, HashSet};

/// What stands for a space in pieces.
pub(super) const SPACE: char = '▁';

/// Longest left side of a rule.
const MAX_RULE_BYTES: usize = 1024;

/// Longest right side of a rule; that of NFKC has 33 bytes.
const MAX_REPLACEMENT_BYTES: usize = 256;

/// How a text becomes the text that pieces are found in.
#[derive(Debug, Default)]
pub(super) struct Normalizer {
    /// What to put for characters and sequences, such as Unicode's NFKC.
    pub(super) rules: Option<Rules>,
    /// A space goes before a text.
    pub(super) adds_dummy_prefix: bool,
    /// Leading, trailing and repeated spaces go.
    pub(super) removes_extra_spaces: bool,
    /// Pieces that no rule changes.
    pub(super) kept: Kept,
}

impl Normalizer {
    /// Normalizes a text, or a part of it before which no prefix goes.
    pub(super) fn normalize(&self, text: &str, with_prefix: bool) -> String {
        let mut normalized = String::with_capacity(text.len() + text.len() / 2 + SPACE.len_utf8());
        let mut rest = text;
        while self.removes_extra_spaces && !rest.is_empty() {
            let (first, n_bytes) = self.first(rest);
            if first != " " {
                break;
            }
            rest = &rest[n_bytes..];
        }
        if rest.is_empty() {
            return normalized;
        }
        if self.adds_dummy_prefix && with_prefix {
            normalized.push(SPACE);
        }
        let mut is_behind_space = self.removes_extra_spaces;
        while !rest.is_empty() {
            let (mut first, n_bytes) = self.first(rest);
            if is_behind_space {
                first = first.trim_start_matches(' ');
            }
            normalized
                .extend(first.chars().map(|character| if character == ' ' { SPACE } else { character }));
            if !first.is_empty() {
                is_behind_space = self.removes_extra_spaces && first.ends_with(' ');
            }
            rest = &rest[n_bytes..];
        }
        if self.removes_extra_spaces {
            normalized.truncate(normalized.trim_end_matches(SPACE).len());
        }
        normalized
    }

    /// What the beginning of a text becomes, and how many bytes of it: a kept piece, what a rule is for, or a character.
    fn first<'a>(&'a self, text: &'a str) -> (&'a str, usize) {
        if let Some(rules) = &self.rules {
            if let Some(n_bytes) = self.kept.prefix_of(text) {
                return (&text[..n_bytes], n_bytes);
            }
            if let Some((replacement, n_bytes)) = rules.longest(text) {
                return (replacement, n_bytes);
            }
        }
        let n_bytes = text.chars().next().map_or(0, char::len_utf8);
        (&text[..n_bytes], n_bytes)
    }
}

/// Texts that are found at the beginning of others.
#[derive(Debug, Clone, Default)]
pub(super) struct Kept {
    texts: HashSet<String>,
    /// Their lengths in bytes, the longest first, by their first byte; none, or `[256]`.
    lengths: Vec<Vec<usize>>,
}

impl Kept {
    pub(super) fn new(texts: HashSet<String>) -> Kept {
        let mut lengths = vec![BTreeSet::new(); if texts.is_empty() { 0 } else { 256 }];
        for text in &texts {
            if let Some(&first) = text.as_bytes().first() {
                lengths[usize::from(first)].insert(text.len());
            }
        }
        Kept {
            texts,
            lengths: lengths.into_iter().map(|lengths| lengths.into_iter().rev().collect()).collect(),
        }
    }

    pub(super) fn contains(&self, text: &str) -> bool {
        self.texts.contains(text)
    }

    /// Length of the longest of them that `text` begins with.
    pub(super) fn prefix_of(&self, text: &str) -> Option<usize> {
        let lengths = self.lengths.get(usize::from(*text.as_bytes().first()?))?;
        let is_kept = |length: &usize| text.get(..*length).is_some_and(|prefix| self.texts.contains(prefix));
        lengths.iter().copied().find(is_kept)
    }
}

/// A `precompiled_charsmap`: the length of a trie (u32), the trie, then replacements, each with a NUL behind it. The
/// trie is Darts' double array: units of 32 bits, of which one for each prefix of a rule's left side.
#[derive(Debug)]
pub(super) struct Rules {
    trie: Vec<u32>,
    replacements: String,
}

impl Rules {
    /// # Errors
    /// What is wrong with it, as the end of a sentence.
    pub(super) fn parse(charsmap: &[u8]) -> Result<Rules, &'static str> {
        let (length, rest) = charsmap.split_first_chunk::<4>().ok_or("it is cut short")?;
        let length = u32::from_le_bytes(*length) as usize;
        let (trie, replacements) = rest.split_at_checked(length).ok_or("it is cut short")?;
        let (units, []) = trie.as_chunks::<4>() else { return Err("its trie is not made of words") };
        let replacements = std::str::from_utf8(replacements).map_err(|_| "its replacements are no UTF-8")?;
        if units.is_empty() || !replacements.ends_with('\0') {
            return Err("it holds no rules");
        }
        if replacements.split('\0').any(|replacement| replacement.len() > MAX_REPLACEMENT_BYTES) {
            return Err("it makes very long texts of short ones");
        }
        let trie = units.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
        Ok(Rules { trie, replacements: replacements.to_owned() })
    }

    /// The replacement by the rule with the longest left side at the beginning of a text, and that side's length.
    fn longest(&self, text: &str) -> Option<(&str, usize)> {
        const HAS_LEAF: u32 = 1 << 8;
        const LABEL: u32 = 1 << 31 | 0xFF;
        let offset = |unit: u32| (unit >> 10) << ((unit & 1 << 9) >> 6);
        let unit_at = |node: u32| self.trie.get(node as usize).copied();
        let mut node = offset(unit_at(0)?);
        let mut found = None;
        for (at, byte) in text.bytes().enumerate().take(MAX_RULE_BYTES) {
            node ^= u32::from(byte);
            let Some(unit) = unit_at(node).filter(|unit| unit & LABEL == u32::from(byte)) else { break };
            node ^= offset(unit);
            if unit & HAS_LEAF != 0 {
                found = unit_at(node).map(|leaf| (leaf & !(1 << 31), at + 1)).or(found);
            }
        }
        let (start, n_bytes) = found?;
        let replacement = self.replacements.get(start as usize..)?.split('\0').next()?;
        text.is_char_boundary(n_bytes).then_some((replacement, n_bytes))
    }
}
