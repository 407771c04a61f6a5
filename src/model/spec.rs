//! What a decoder is, as data: every axis on which the families differ is an enum here.
//!
//! A variant enters when a published model needs it, together with its arm where it acts.

mod attention;
mod check;
mod mlp;
mod positions;

pub use attention::{Attention, HeadAttention, HeadNorm, LatentAttention, Mask, Sinks};
pub use mlp::{Activation, Experts, Groups, Mlp, Router};
pub use positions::{Positions, RampBounds, Rope, RopeScaling};

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

/// Whether a linear layer or a norm has a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// `x·Wᵀ`.
    Absent,
    /// `x·Wᵀ + b`.
    Present,
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
