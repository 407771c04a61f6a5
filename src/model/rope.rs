//! Frequencies of the rotary embedding.

use std::borrow::Cow;

use super::spec::Rope;

/// Inverse frequencies of a rotary embedding, by the length that counts.
#[derive(Debug, Clone)]
pub struct Frequencies {
    inverse: Vec<f32>,
}

impl Frequencies {
    /// For heads of `head_dim`.
    pub fn new(rope: &Rope, head_dim: usize) -> Frequencies {
        let inverse =
            (0..head_dim / 2).map(|i| rope.base.powf(-2.0 * i as f64 / head_dim as f64) as f32).collect();
        Frequencies { inverse }
    }

    /// `[head_dim / 2]` inverse frequencies and the amplitude of cosine and sine at a length.
    pub fn for_length(&self, _len: u32) -> (Cow<'_, [f32]>, f32) {
        (Cow::Borrowed(&self.inverse), 1.0)
    }
}
