//! Positions, and rotary embeddings under every published scaling.

/// How positions enter the computation.
#[derive(Debug, Clone, PartialEq)]
pub enum Positions {
    /// Rotary embedding of queries and keys (Su et al., arXiv 2104.09864): one for all layers, or one for each kind of
    /// layer, see [`super::Layer::rope`].
    Rope(Vec<Rope>),
    /// A bias on scores, `slope · (key position − query position)`, a slope for each head (Press et al., arXiv
    /// 2108.12409).
    Alibi,
    /// A table of `max_positions` rows, added to the embedding.
    Learned,
}

/// A rotary embedding of pairs `(i, i + width/2)` of a head's first `width` numbers. Families that turn neighbours
/// `(2i, 2i + 1)` have the rows of their queries and keys reordered as they are loaded, see [`crate::model::layout`].
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies `base^(−2i/width)`.
    pub base: f64,
    /// Numbers of a head that turn; even.
    pub width: usize,
    /// What is done to the frequencies.
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
    /// The base of a whole request follows from its prompt's length `n`: it is multiplied by
    /// `alpha^(d / (d − 2))`, `alpha = max(2^⌈log2(n / trained) + 1⌉ − 1, 1)` (Qwen v1, `modeling_qwen.py`).
    PromptNtk {
        /// Positions of the original training.
        trained: u32,
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
        /// `[width / 2]` divisors up to `original` positions.
        short: Vec<f64>,
        /// `[width / 2]` divisors beyond.
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
