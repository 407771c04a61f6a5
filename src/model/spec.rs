//! What a decoder is, as data: every axis on which the families differ is an enum here.
//!
//! A variant enters when a published model needs it, together with its arm where it acts.

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
