//! Attention, by heads or over a latent.

use super::{Bias, Norm};

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
