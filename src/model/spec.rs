//! What a decoder is, as data: every axis on which the families differ is an enum here.
//!
//! A variant enters when a published model needs it, together with its arm where it acts.

use super::names;
use crate::error::{Error, Result};

/// A decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// The family's name.
    pub family: &'static str,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Largest number of positions.
    pub max_positions: usize,
    /// Of block norms and of the final norm.
    pub norm: Norm,
    /// How positions enter.
    pub positions: Positions,
    /// Heads and biases of every layer.
    pub attention: Attention,
    /// Of every layer.
    pub mlp: Mlp,
    /// `[layers]` which keys a query sees.
    pub masks: Vec<Mask>,
    /// Where the head's rows come from.
    pub head: Head,
}

/// Bounds on a decoder's sizes, several times those of the largest published models. Within them no product of sizes
/// overflows 64 bits: a layer has fewer than 2⁴⁸ weights.
pub mod limits {
    /// Layers.
    pub const LAYERS: usize = 1 << 10;
    /// Width of the residual stream.
    pub const HIDDEN: usize = 1 << 20;
    /// Query heads.
    pub const HEADS: usize = 1 << 12;
    /// Width of a head.
    pub const HEAD_DIM: usize = 1 << 12;
    /// Neurons of an MLP.
    pub const WIDTH: usize = 1 << 22;
    /// Vocabulary.
    pub const VOCAB: usize = 1 << 24;
    /// Positions.
    pub const POSITIONS: usize = 1 << 26;
}

impl DecoderSpec {
    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.masks.len()
    }

    /// Number of weights, a tied head counted once.
    pub fn n_parameters(&self) -> u64 {
        let product = |shape: Vec<usize>| shape.into_iter().map(|size| size as u64).product::<u64>();
        names::roles(self).into_iter().map(|role| product(role.shape(self))).sum()
    }

    /// Numbers that a token leaves in the KV cache, over all layers, were each KV head kept once.
    pub fn kv_elements_per_token(&self) -> u64 {
        2 * (self.layers() * self.attention.kv_heads * self.attention.head_dim) as u64
    }

    /// Checks the relations on which decoder and backends rely.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the sizes that disagree.
    pub fn check(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::Checkpoint(what));
        let Attention { heads, kv_heads, head_dim, .. } = self.attention;
        let Mlp::Gated { width, .. } = self.mlp;
        let sizes = [
            ("layers", self.layers(), limits::LAYERS),
            ("hidden size", self.hidden, limits::HIDDEN),
            ("query heads", heads, limits::HEADS),
            ("KV heads", kv_heads, limits::HEADS),
            ("head width", head_dim, limits::HEAD_DIM),
            ("MLP width", width, limits::WIDTH),
            ("vocabulary", self.vocab, limits::VOCAB),
            ("positions", self.max_positions, limits::POSITIONS),
        ];
        for (what, size, most) in sizes {
            if size == 0 || size > most {
                return wrong(format!("the config's {what} is {size}, which is not between 1 and {most}"));
            }
        }
        if !heads.is_multiple_of(kv_heads) {
            return wrong(format!("{heads} query heads do not divide among {kv_heads} KV heads"));
        }
        if !head_dim.is_multiple_of(2) {
            return wrong(format!("the head width is {head_dim}, rotary embeddings need an even one"));
        }
        if self.masks.iter().any(|mask| matches!(mask, Mask::Window { window: 0 })) {
            return wrong("a sliding window of 0 tokens hides every key".to_owned());
        }
        Ok(())
    }
}

/// A norm over the last dimension, statistics in f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Norm {
    /// `w · x / sqrt(mean(x²) + eps)` (Zhang and Sennrich, arXiv 1910.07467).
    Rms {
        /// Added to the mean square.
        eps: f32,
    },
}

/// How positions enter the computation.
#[derive(Debug, Clone, PartialEq)]
pub enum Positions {
    /// Rotary embedding of queries and keys, pairs `(i, i + d/2)` over the whole head (Su et al., arXiv 2104.09864).
    Rope(Rope),
}

/// A rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies `base^(−2i/d)`.
    pub base: f64,
    /// What is done to them.
    pub scaling: RopeScaling,
}

/// Published ways to stretch a rotary embedding; formulas as in `transformers`' `modeling_rope_utils`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    Unscaled,
    /// Frequencies divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// The base grows with the sequence beyond `original` positions.
    Dynamic {
        /// Growth.
        factor: f64,
        /// Positions of the original training.
        original: u32,
    },
    /// Llama 3.1: long waves divided, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of the long waves.
        factor: f64,
        /// `original / low_freq_factor` is the shortest wave divided.
        low_freq_factor: f64,
        /// `original / high_freq_factor` is the longest wave kept.
        high_freq_factor: f64,
        /// Positions of the original training.
        original: u32,
    },
    /// YaRN (Peng et al., arXiv 2309.00071).
    Yarn {
        /// Divisor of the long waves.
        factor: f64,
        /// Rotations above which a wave is kept.
        beta_fast: f64,
        /// Rotations below which a wave is divided.
        beta_slow: f64,
        /// Positions of the original training.
        original: u32,
        /// Whether the bounds of the ramp are rounded outward to whole dimensions.
        ramp_bounds: RampBounds,
        /// Multiplies cosine and sine.
        amplitude: f64,
    },
    /// Two sets of divisors, by the length of the sequence (LongRoPE, arXiv 2402.13753).
    LongRope {
        /// `[head_dim / 2]` divisors up to `original` positions.
        short: Vec<f64>,
        /// `[head_dim / 2]` divisors beyond.
        long: Vec<f64>,
        /// Positions of the original training.
        original: u32,
        /// Multiplies cosine and sine.
        amplitude: f64,
    },
}

/// How YaRN's ramp begins and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RampBounds {
    /// Floor and ceiling.
    Whole,
    /// As computed (`truncate: false`).
    Exact,
}

/// Multi-head, grouped-query or multi-query attention, by the number of KV heads. Scores are scaled by
/// `1/sqrt(head_dim)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// KV heads; a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Of the query, key and value projections.
    pub qkv_bias: Bias,
    /// Of the output projection; added once, not once a rank.
    pub out_bias: Bias,
}

/// Whether a linear layer has a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// `x·Wᵀ`.
    Absent,
    /// `x·Wᵀ + b`.
    Present,
}

/// The feed-forward part of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mlp {
    /// `down(act(gate(x)) ∘ up(x))`.
    Gated {
        /// Of the gate.
        activation: Activation,
        /// Neurons.
        width: usize,
        /// Of all three projections.
        bias: Bias,
    },
}

/// A pointwise non-linearity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^−x)`.
    Silu,
}

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// Those at its position and before.
    Causal,
    /// Of these, the last `window`: key `j` is visible to query `i` iff `j ≤ i` and `i − j < window`.
    Window {
        /// In tokens.
        window: u32,
    },
}

/// Where the output head's rows come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// The embedding.
    Tied,
    /// A tensor of its own.
    Untied,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A decoder of a few thousand weights, from which tests depart.
    pub(crate) fn tiny() -> DecoderSpec {
        DecoderSpec {
            family: "llama",
            vocab: 11,
            hidden: 8,
            max_positions: 64,
            norm: Norm::Rms { eps: 1e-5 },
            positions: Positions::Rope(Rope { base: 10_000.0, scaling: RopeScaling::Unscaled }),
            attention: Attention {
                heads: 4,
                kv_heads: 2,
                head_dim: 4,
                qkv_bias: Bias::Absent,
                out_bias: Bias::Absent,
            },
            mlp: Mlp::Gated { activation: Activation::Silu, width: 12, bias: Bias::Absent },
            masks: vec![Mask::Causal; 2],
            head: Head::Untied,
        }
    }

    #[test]
    fn parameters_are_those_of_the_shapes() {
        let spec = tiny();
        let layer = 8 + 16 * 8 + 2 * 8 * 8 + 8 * 16 + 8 + 3 * 12 * 8;
        assert_eq!(spec.n_parameters(), 2 * 11 * 8 + 2 * layer + 8);
        assert_eq!(DecoderSpec { head: Head::Tied, ..spec }.n_parameters(), 11 * 8 + 2 * layer + 8);
    }

    #[test]
    fn the_largest_sizes_do_not_overflow() {
        let mut spec = tiny();
        spec.vocab = limits::VOCAB;
        spec.hidden = limits::HIDDEN;
        spec.max_positions = limits::POSITIONS;
        let kv_heads = limits::HEADS;
        spec.attention =
            Attention { heads: kv_heads, kv_heads, head_dim: limits::HEAD_DIM, ..spec.attention };
        let Mlp::Gated { width, .. } = &mut spec.mlp;
        *width = limits::WIDTH;
        spec.masks = vec![Mask::Causal; limits::LAYERS];
        spec.check().unwrap();
        // Four bytes each still count in 64 bits.
        assert!(spec.n_parameters() < u64::MAX / 4);
        assert!(spec.kv_elements_per_token().checked_mul(4 * limits::POSITIONS as u64).is_some());
    }

    #[test]
    fn relations_are_checked() {
        let refusal = |change: fn(&mut DecoderSpec)| {
            let mut spec = tiny();
            change(&mut spec);
            spec.check().unwrap_err().to_string()
        };
        tiny().check().unwrap();
        assert_eq!(
            refusal(|spec| spec.attention.kv_heads = 3),
            "4 query heads do not divide among 3 KV heads"
        );
        assert!(
            refusal(|spec| spec.attention.head_dim = 5).contains("is 5, rotary embeddings need an even one")
        );
        assert!(refusal(|spec| spec.masks.clear()).contains("layers is 0"));
        assert!(refusal(|spec| spec.vocab = usize::MAX).contains("vocabulary"));
        assert!(refusal(|spec| spec.masks[1] = Mask::Window { window: 0 }).contains("window of 0"));
    }
}
