//! The green list of Kirchenbauer et al., *A Watermark for Large Language Models* (arXiv 2301.10226).
//!
//! The paper draws a permutation of the vocabulary from a generator seeded by the previous token and colours its
//! first `⌊vocab · gamma⌋` entries green. The permutation here is our own, computed id by id: a balanced Feistel
//! network of four rounds over the smallest even number of bits that holds the vocabulary, applied again while the
//! image lies outside the vocabulary (*cycle walking*; Black and Rogaway, CT-RSA 2002). An id is green if its image
//! is below `⌊vocab · gamma⌋`. A round's function is the finaliser of SplitMix64 (Steele et al., OOPSLA 2014) over
//! `seed + round · 0x9E3779B97F4A7C15 + half`, where `seed = 15485863 · previous token`.

use crate::backend::step::Watermark;

const ROUNDS: u64 = 4;
const HASH_KEY: u64 = 15_485_863;

/// Which ids are green after a given token.
pub struct GreenList {
    vocab: u64,
    n_green: u64,
    seed: u64,
    half_bits: u32,
}

impl GreenList {
    /// The list that follows the token `previous`.
    pub fn new(watermark: Watermark, vocab: usize, previous: u32) -> GreenList {
        let vocab = vocab as u64;
        let bits = u64::BITS - vocab.saturating_sub(1).leading_zeros();
        GreenList {
            vocab,
            n_green: (vocab as f64 * f64::from(watermark.gamma)) as u64,
            seed: HASH_KEY.wrapping_mul(u64::from(previous)),
            half_bits: bits.div_ceil(2).max(1),
        }
    }

    /// Whether `id`, which is below the vocabulary, is green.
    pub fn contains(&self, id: u32) -> bool {
        let mut image = self.feistel(u64::from(id));
        while image >= self.vocab {
            image = self.feistel(image);
        }
        image < self.n_green
    }

    fn feistel(&self, number: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let (mut left, mut right) = (number >> self.half_bits, number & mask);
        for round in 0..ROUNDS {
            let seed = self.seed.wrapping_add(round.wrapping_mul(0x9E37_79B9_7F4A_7C15));
            (left, right) = (right, left ^ (splitmix(seed.wrapping_add(right)) & mask));
        }
        left << self.half_bits | right
    }
}

fn splitmix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greens(gamma: f32, vocab: usize, previous: u32) -> Vec<u32> {
        let list = GreenList::new(Watermark { gamma, delta: 2.0 }, vocab, previous);
        (0..vocab as u32).filter(|&id| list.contains(id)).collect()
    }

    #[test]
    fn exactly_the_share_is_green() {
        for vocab in [1, 2, 3, 7, 64, 65, 1000, 4096, 4097] {
            for gamma in [0.25, 0.5, 0.75] {
                for previous in [0, 1, 999, u32::MAX] {
                    let expected = (vocab as f64 * f64::from(gamma)) as usize;
                    assert_eq!(greens(gamma, vocab, previous).len(), expected, "{vocab} {gamma} {previous}");
                }
            }
        }
    }

    #[test]
    fn lists_of_different_tokens_overlap_as_chance_has_it() {
        let (vocab, lists) = (4000, 20);
        for previous in 1..lists {
            let first = greens(0.5, vocab, 0);
            let other = greens(0.5, vocab, previous);
            let both = first.iter().filter(|id| other.binary_search(id).is_ok()).count();
            // Hypergeometric: mean 1000, standard deviation 15.8.
            assert!((900..1100).contains(&both), "{both} of 2000 shared after token {previous}");
        }
    }
}
