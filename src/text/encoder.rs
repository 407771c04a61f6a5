//! Normalized text → ids, as SentencePiece divides it into pieces.
//!
//! The algorithms of github.com/google/sentencepiece, `src/bpe_model.cc` and `src/unigram_model.cc`. The `tokenizers`
//! crate has models of these names too, which find other pieces now and then: its BPE goes by pairs where
//! SentencePiece goes by the score of what they make, which shows on runs of spaces, and its Unigram finds pieces that
//! no text should hold.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::normalizer::Kept;

/// How a text is divided into pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    /// The division with the largest sum of scores.
    Unigram,
    /// Neighbours are merged, those first that make the piece of the highest score.
    Bpe,
}

/// What less a character scores that no piece has than the worst piece.
const UNKNOWN_PENALTY: f32 = 10.0;

/// Finds pieces in normalized text.
#[derive(Debug)]
pub(super) struct Encoder {
    pub(super) algorithm: Algorithm,
    /// Pieces that a text may hold.
    pub(super) pieces: HashMap<String, u32>,
    /// Those of them that are found before others.
    pub(super) user_defined: Kept,
    /// `[pieces]`, finite.
    pub(super) scores: Vec<f32>,
    /// The smallest and the largest score of pieces that are not user-defined.
    pub(super) score_range: (f32, f32),
    /// Length of the longest piece.
    pub(super) max_piece_bytes: usize,
    /// What stands for text without a piece.
    pub(super) unknown: u32,
    /// What stands for its bytes instead, `[256]`.
    pub(super) bytes: Option<Vec<u32>>,
}

impl Encoder {
    /// Ids of a text.
    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        let found = match self.algorithm {
            Algorithm::Bpe => self.merge(text),
            Algorithm::Unigram => self.best_path(text),
        };
        let mut ids = Vec::with_capacity(found.len());
        let mut is_behind_unknown = false;
        for (piece, id) in found {
            match (id, &self.bytes) {
                (Some(id), _) => ids.push(id),
                (None, Some(bytes)) => ids.extend(piece.bytes().map(|byte| bytes[usize::from(byte)])),
                // Neighbours are unknown as a whole.
                (None, None) if is_behind_unknown => {}
                (None, None) => ids.push(self.unknown),
            }
            is_behind_unknown = id.is_none();
        }
        ids
    }

    /// Pieces of BPE: characters, but user-defined pieces as a whole, of which neighbours become one while they can.
    fn merge<'a>(&self, text: &'a str) -> Vec<(&'a str, Option<u32>)> {
        let mut symbols = self.symbols(text);
        let mut candidates = BinaryHeap::new();
        for right in 1..symbols.len() {
            candidates.extend(self.candidate(text, &symbols, right - 1, right));
        }
        while let Some(Candidate { left, right, n_bytes, .. }) = candidates.pop() {
            let (first, second) = (symbols[left], symbols[right]);
            // One of them was merged with its other neighbour meanwhile.
            if first.is_empty() || second.is_empty() || second.end - first.start != n_bytes {
                continue;
            }
            symbols[left] = Symbol { end: second.end, next: second.next, ..first };
            symbols[right] = Symbol { start: second.end, ..second };
            if let Some(next) = second.next {
                symbols[next].previous = Some(left);
                candidates.extend(self.candidate(text, &symbols, left, next));
            }
            if let Some(previous) = first.previous {
                candidates.extend(self.candidate(text, &symbols, previous, left));
            }
        }
        let pieces =
            symbols.iter().filter(|symbol| !symbol.is_empty()).map(|symbol| &text[symbol.start..symbol.end]);
        pieces.map(|piece| (piece, self.pieces.get(piece).copied())).collect()
    }

    fn symbols(&self, text: &str) -> Vec<Symbol> {
        let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len() / 4);
        let mut start = 0;
        while let Some(first) = text[start..].chars().next() {
            let defined = self.user_defined.prefix_of(&text[start..]);
            let end = start + defined.unwrap_or(first.len_utf8());
            let previous = symbols.len().checked_sub(1);
            let next = (end < text.len()).then_some(symbols.len() + 1);
            symbols.push(Symbol { start, end, previous, next, is_whole: defined.is_some() });
            start = end;
        }
        symbols
    }

    /// What two neighbours would make, if that is a piece.
    fn candidate(&self, text: &str, symbols: &[Symbol], left: usize, right: usize) -> Option<Candidate> {
        let (first, second) = (symbols[left], symbols[right]);
        let n_bytes = second.end - first.start;
        if first.is_whole || second.is_whole || n_bytes > self.max_piece_bytes {
            return None;
        }
        let id = *self.pieces.get(&text[first.start..second.end])?;
        Some(Candidate { score: self.scores[id as usize], left, right, n_bytes })
    }

    /// Pieces of Unigram: for each end in the text the best way to it, then the way to the text's end (Viterbi).
    fn best_path<'a>(&self, text: &'a str) -> Vec<(&'a str, Option<u32>)> {
        let (worst, best) = self.score_range;
        let mut ways = vec![None; text.len() + 1];
        let mut here = 0.0;
        for (start, character) in text.char_indices() {
            if start > 0 {
                // Every character ends a way, at least one through the unknown.
                here = ways[start].map_or(0.0, |way: Way| way.score);
            }
            let mut has_own_piece = false;
            let longest = (start + self.max_piece_bytes).min(text.len());
            for end in (start + character.len_utf8()..=longest).filter(|&end| text.is_char_boundary(end)) {
                let piece = &text[start..end];
                let Some(&id) = self.pieces.get(piece) else { continue };
                // Sums are of double precision, and kept in single precision, as the original has them.
                let score = match self.user_defined.contains(piece) {
                    true => f64::from(piece.len() as f32 * best) - 0.1,
                    false => f64::from(self.scores[id as usize]),
                };
                Way::offer(&mut ways[end], start, Some(id), score + f64::from(here));
                has_own_piece |= end == start + character.len_utf8();
            }
            if !has_own_piece {
                let score = worst - UNKNOWN_PENALTY + here;
                Way::offer(&mut ways[start + character.len_utf8()], start, None, f64::from(score));
            }
        }
        let mut pieces = Vec::new();
        let mut end = text.len();
        while let Some(Way { start, id, .. }) = ways[end] {
            pieces.push((&text[start..end], id));
            end = start;
        }
        pieces.reverse();
        pieces
    }
}

/// A part of a text, in a list of them; empty once it was merged with the one before it.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
    /// User-defined, so never a part of something else.
    is_whole: bool,
}

impl Symbol {
    fn is_empty(self) -> bool {
        self.start == self.end
    }
}

/// Two neighbours that make a piece. The greatest has the highest score, and of equal ones comes first in the text.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    /// Of both.
    n_bytes: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Candidate) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Candidate) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Candidate) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// The best way to a place in a text: where its last piece begins, that piece, and the sum of scores.
#[derive(Debug, Clone, Copy)]
struct Way {
    start: usize,
    id: Option<u32>,
    score: f32,
}

impl Way {
    /// Takes another way if it is better.
    fn offer(way: &mut Option<Way>, start: usize, id: Option<u32>, score: f64) {
        if way.is_none_or(|way| score > f64::from(way.score)) {
            *way = Some(Way { start, id, score: score as f32 });
        }
    }
}
