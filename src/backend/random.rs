//! The counter-based generator of every backend: what is drawn depends on the request's seed and the token's
//! absolute position, not on batch, rank or schedule.
//!
//! Philox4x32-10 (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011).

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Four random words for a counter and a key.
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let [c0, c1, c2, c3] = counter;
        let product = [u64::from(MULTIPLIERS[0]) * u64::from(c0), u64::from(MULTIPLIERS[1]) * u64::from(c2)];
        let high = product.map(|p| (p >> 32) as u32);
        let low = product.map(|p| p as u32);
        counter = [high[1] ^ c1 ^ key[0], low[1], high[0] ^ c3 ^ key[1], low[0]];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// What is drawn for one token of one request.
///
/// The word of an id is word `id % 4` of `philox([id / 4, position, 0, 0], [low half of seed, high half])`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draws {
    key: [u32; 2],
    position: u32,
    block: Option<(u32, [u32; 4])>,
}

impl Draws {
    /// The draws for the token at the absolute `position` of a request with this `seed`.
    pub fn new(seed: u64, position: u32) -> Draws {
        Draws { key: [seed as u32, (seed >> 32) as u32], position, block: None }
    }

    /// The id's random word. Four neighbouring ids share a block, kept for the next call.
    pub fn word(&mut self, id: u32) -> u32 {
        let number = id / 4;
        let block = match self.block {
            Some((kept, block)) if kept == number => block,
            _ => philox([number, self.position, 0, 0], self.key),
        };
        self.block = Some((number, block));
        block[id as usize % 4]
    }

    /// A draw from the exponential distribution of rate 1: positive and finite.
    pub fn exponential(&mut self, id: u32) -> f32 {
        // Small values win a race, so the word counts up from 0, where floats are dense.
        let uniform = ((self.word(id) as f32 + 0.5) * 2f32.powi(-32)).min(1.0 - f32::EPSILON / 2.0);
        -(-uniform).ln_1p()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that Random123 publishes for Philox4x32-10.
    #[test]
    fn agrees_with_the_published_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn a_word_does_not_depend_on_the_order_of_calls() {
        let mut forward = Draws::new(7, 11);
        let words: Vec<u32> = (0..32).map(|id| forward.word(id)).collect();
        let mut backward = Draws::new(7, 11);
        for id in (0..32).rev() {
            assert_eq!(backward.word(id), words[id as usize]);
        }
        assert_ne!(Draws::new(7, 12).word(0), words[0]);
        assert_ne!(Draws::new(7 << 32, 11).word(0), words[0]);
    }

    #[test]
    fn exponential_draws_have_mean_and_variance_one() {
        let n = 100_000;
        let mut draws = Draws::new(3, 5);
        let values: Vec<f64> = (0..n).map(|id| f64::from(draws.exponential(id))).collect();
        assert!(values.iter().all(|&v| v > 0.0 && v.is_finite()));
        let mean = values.iter().sum::<f64>() / f64::from(n);
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / f64::from(n);
        assert!((mean - 1.0).abs() < 0.02, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.05, "variance {variance}");
    }
}
