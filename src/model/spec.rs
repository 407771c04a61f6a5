//! What a decoder is, as data: every axis on which the families differ is an enum here.
//!
//! A variant enters when a published model needs it, together with its arm where it acts.

mod check;

use super::names;
use crate::error::Result;

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
    /// From tokens to the residual stream.
    pub embedding: Embedding,
    /// Of block norms and of the final norm.
    pub norm: Norm,
    /// How the branches of a layer join the residual stream.
    pub block: Block,
    /// Multiplies what a branch returns before it is added (MiniCPM's `scale_depth / sqrt(layers)`); 1 is neutral.
    pub branch_multiplier: f32,
    /// How positions enter.
    pub positions: Positions,
    /// Heads and biases of every layer.
    pub attention: Attention,
    /// `[layers]`.
    pub layers: Vec<Layer>,
    /// Where the head's rows come from.
    pub head: Head,
    /// What becomes of the head's products.
    pub logits: Logits,
}

/// In what a layer differs from others.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    /// Which keys a query sees.
    pub mask: Mask,
    /// Which of [`Positions::Rope`]'s embeddings turns its queries and keys; 0 where there is none.
    pub rope: usize,
    /// The feed-forward part.
    pub mlp: Mlp,
}

/// From tokens to the residual stream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Embedding {
    /// Multiplies the token's row; 1 is neutral.
    pub multiplier: f32,
    /// Applied to the row (BLOOM).
    pub norm: Option<Norm>,
}

impl Embedding {
    /// The token's row as it is stored.
    pub const PLAIN: Embedding = Embedding { multiplier: 1.0, norm: None };
}

/// How the branches of a layer join the residual stream `x`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// `x += attention(norm(x)); x += mlp(norm'(x))`.
    Serial,
    /// `x += post(attention(norm(x))); x += post'(mlp(norm'(x)))` (Gemma 2 and 3).
    SerialPostNorms,
    /// `h = norm(x); x += attention(h) + mlp(h)` (Cohere, Falcon 7B, StableLM-2 12B).
    ParallelOneNorm,
    /// `x += attention(norm(x)) + mlp(norm'(x))` (Falcon 40B).
    ParallelTwoNorms,
}

/// What becomes of the head's products: `softcap(multiplier · products)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Logits {
    /// 1 is neutral.
    pub multiplier: f32,
    /// `c · tanh(z / c)`.
    pub softcap: Option<f32>,
}

impl Logits {
    /// As they are.
    pub const PLAIN: Logits = Logits { multiplier: 1.0, softcap: None };

    /// Whether nothing becomes of them.
    pub fn is_plain(self) -> bool {
        self == Logits::PLAIN
    }
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
    /// Experts of a layer.
    pub const EXPERTS: usize = 1 << 10;
    /// Vocabulary.
    pub const VOCAB: usize = 1 << 24;
    /// Positions.
    pub const POSITIONS: usize = 1 << 26;
}

impl DecoderSpec {
    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Number of weights, a tied head counted once.
    pub fn n_parameters(&self) -> u64 {
        let product = |shape: Vec<usize>| shape.into_iter().map(|size| size as u64).product::<u64>();
        names::roles(self).into_iter().map(|role| product(role.shape(self))).sum()
    }

    /// Numbers that a token leaves in the KV cache, over all layers, were each KV head kept once.
    pub fn kv_elements_per_token(&self) -> u64 {
        let in_layer = match self.attention {
            Attention::Heads(heads) => 2 * heads.kv_heads * heads.head_dim,
            Attention::Latent(latent) => latent.row_width(),
        };
        (self.layers() * in_layer) as u64
    }

    /// The rotary embeddings, none where positions enter otherwise.
    pub fn ropes(&self) -> &[Rope] {
        match &self.positions {
            Positions::Rope(ropes) => ropes,
            Positions::Alibi | Positions::Learned => &[],
        }
    }

    /// Checks the relations on which decoder and backends rely.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the sizes that disagree.
    pub fn check(&self) -> Result<()> {
        check::check(self)
    }
}

/// A norm over the last dimension, statistics in f32, variances biased.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Norm {
    /// `w · x / sqrt(mean(x²) + eps)` (Zhang and Sennrich, arXiv 1910.07467).
    Rms {
        /// Added to the mean square.
        eps: f32,
    },
    /// `(1 + w) · x / sqrt(mean(x²) + eps)` (Gemma).
    RmsOnePlus {
        /// Added to the mean square.
        eps: f32,
    },
    /// `w · (x − mean(x)) / sqrt(var(x) + eps) + b` (Ba et al., arXiv 1607.06450).
    Layer {
        /// Added to the variance.
        eps: f32,
        /// Whether there is a `b`.
        bias: Bias,
    },
}

impl Norm {
    /// Whether it has a bias.
    pub fn bias(self) -> Bias {
        match self {
            Norm::Rms { .. } | Norm::RmsOnePlus { .. } => Bias::Absent,
            Norm::Layer { bias, .. } => bias,
        }
    }

    /// The weight that does nothing.
    pub fn neutral(self) -> f32 {
        match self {
            Norm::Rms { .. } | Norm::Layer { .. } => 1.0,
            Norm::RmsOnePlus { .. } => 0.0,
        }
    }
}

/// How positions enter the computation.
#[derive(Debug, Clone, PartialEq)]
pub enum Positions {
    /// Rotary embedding of queries and keys (Su et al., arXiv 2104.09864): one for all layers, or one for each kind of
    /// layer, see [`Layer::rope`].
    Rope(Vec<Rope>),
    /// A bias on scores, `slope · (key position − query position)`, a slope for each head (Press et al., arXiv
    /// 2108.12409).
    Alibi,
    /// A table of `max_positions` rows, added to the embedding.
    Learned,
}

/// A rotary embedding of pairs `(i, i + width/2)` of a head's first `width` numbers. Families that turn neighbours
/// `(2i, 2i + 1)` have the rows of their queries and keys reordered as they are loaded, see [`super::layout`].
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

/// The attention of every layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Attention {
    /// Keys and values of each KV head are cached.
    Heads(HeadAttention),
    /// A latent vector is cached, from which keys and values of all heads are made.
    Latent(LatentAttention),
}

impl Attention {
    /// Query heads.
    pub fn heads(&self) -> usize {
        match self {
            Attention::Heads(heads) => heads.heads,
            Attention::Latent(latent) => latent.heads,
        }
    }

    /// KV heads: of latent attention the latent itself.
    pub fn kv_heads(&self) -> usize {
        match self {
            Attention::Heads(heads) => heads.kv_heads,
            Attention::Latent(_) => 1,
        }
    }

    /// Width of a head's part that rotary embeddings may turn.
    pub fn rope_dim(&self) -> usize {
        match self {
            Attention::Heads(heads) => heads.head_dim,
            Attention::Latent(latent) => latent.rope_dim,
        }
    }
}

/// Multi-head, grouped-query or multi-query attention, by the number of KV heads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadAttention {
    /// Query heads.
    pub heads: usize,
    /// KV heads; a divisor of `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Of the query, key and value projections.
    pub qkv_bias: Bias,
    /// Of the output projection; added once, not once a rank.
    pub out_bias: Bias,
    /// Of each head's query and key, before the rotary embedding.
    pub qk_norm: Option<HeadNorm>,
    /// Multiplies scores; usually `1/sqrt(head_dim)`.
    pub scale: f32,
    /// `c · tanh(score / c)`, before the mask (Gemma 2).
    pub softcap: Option<f32>,
    /// Whether each head has a learned logit that takes part in the softmax without a value (GPT-OSS).
    pub sinks: Sinks,
    /// Queries at 1-based positions `j > length` are multiplied by `ln j / ln length` (Qwen v1's LogN).
    pub log_n: Option<u32>,
}

/// The norm of queries and keys, over a head's width.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum HeadNorm {
    /// One `[head_dim]` weight for all heads (Qwen3, Gemma 3).
    Shared(Norm),
    /// `[heads, head_dim]` weights (Cohere, StableLM-2 12B).
    PerHead(Norm),
}

impl HeadNorm {
    /// Its kind.
    pub fn norm(self) -> Norm {
        match self {
            HeadNorm::Shared(norm) | HeadNorm::PerHead(norm) => norm,
        }
    }
}

/// Whether attention has sink logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sinks {
    /// No.
    Absent,
    /// One a query head.
    Present,
}

/// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). Scores are
/// `scale · (q_nope · k_nope + q_rope · k_rope)`, where `k_nope` and the values are linear in the cached latent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentAttention {
    /// Query heads.
    pub heads: usize,
    /// Width of the latent from which queries are made, where there is one.
    pub query_rank: Option<usize>,
    /// Width of the cached latent.
    pub kv_rank: usize,
    /// Width of the part of a query that meets the latent.
    pub nope_dim: usize,
    /// Width of the part that turns with the position; its key is shared by all heads and cached beside the latent.
    pub rope_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Multiplies scores.
    pub scale: f32,
    /// Of both latents.
    pub norm: Norm,
}

impl LatentAttention {
    /// Width of a query.
    pub fn query_dim(&self) -> usize {
        self.nope_dim + self.rope_dim
    }

    /// Width of what a token leaves in a layer's cache: latent and turned key.
    pub fn row_width(&self) -> usize {
        self.kv_rank + self.rope_dim
    }
}

/// Whether a linear layer or a norm has a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// `x·Wᵀ`.
    Absent,
    /// `x·Wᵀ + b`.
    Present,
}

/// The feed-forward part of a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
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
    /// `down(act(up(x)))`.
    Plain {
        /// Of the neurons.
        activation: Activation,
        /// Neurons.
        width: usize,
        /// Of both projections.
        bias: Bias,
    },
    /// A few of many gated MLPs, chosen by each token.
    Experts(Experts),
}

impl Mlp {
    /// Neurons; of experts those of one.
    pub fn width(&self) -> usize {
        match self {
            Mlp::Gated { width, .. } | Mlp::Plain { width, .. } => *width,
            Mlp::Experts(experts) => experts.width,
        }
    }
}

/// A mixture of experts: `Σ w_e · expert_e(x)` over the chosen, plus the shared expert's output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Experts {
    /// Experts to choose from.
    pub n_experts: usize,
    /// Chosen for each token.
    pub n_chosen: usize,
    /// Neurons of an expert.
    pub width: usize,
    /// Of the gates.
    pub activation: Activation,
    /// Of the experts' projections.
    pub bias: Bias,
    /// How they are chosen and weighed.
    pub router: Router,
    /// Neurons of a gated MLP that every token passes, of the same activation; 0 for none.
    pub shared_width: usize,
}

/// How experts are chosen and weighed, from the f32 logits of the router. Ties go to the lower number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Router {
    /// Softmax over all; the chosen weights are divided by their sum (Mixtral, Qwen3).
    SoftmaxRenormalised,
    /// Softmax over all; the chosen weights are multiplied by `factor` (DeepSeek-V2).
    Softmax {
        /// Multiplier.
        factor: f32,
        /// Only experts of the best groups, by their best expert.
        groups: Groups,
    },
    /// Sigmoids, plus a bias of each expert for the choice alone; the chosen sigmoids are divided by their sum and
    /// multiplied by `factor` (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    Sigmoid {
        /// Multiplier.
        factor: f32,
        /// Only experts of the best groups, by the sum of their two best.
        groups: Groups,
    },
    /// Logits have a bias; softmax over the chosen (GPT-OSS).
    SoftmaxOfChosen,
}

/// Experts come in equal groups, of which a token uses the best.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Groups; 1 for no limit.
    pub n: usize,
    /// Of these, used.
    pub n_used: usize,
}

/// A pointwise non-linearity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `x / (1 + e^−x)`.
    Silu,
    /// `x/2 · (1 + tanh(sqrt(2/π) · (x + 0.044715 · x³)))` (Hendrycks and Gimpel, arXiv 1606.08415).
    GeluTanh,
    /// `x/2 · (1 + erf(x / sqrt 2))`.
    Gelu,
    /// Of gated MLPs only: `g / (1 + e^(−1.702 g)) · (u + 1)` with `g = min(gate, limit)` and `u = clamp(up, ±limit)`
    /// (GPT-OSS).
    ClampedSwiglu {
        /// Bound.
        limit: f32,
    },
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
    /// A tensor of its own, each row divided by its length, `max(‖row‖₂, 1e−12)` (Baichuan 2's NormHead).
    Normalised,
}

#[cfg(test)]
pub(crate) mod tests;
