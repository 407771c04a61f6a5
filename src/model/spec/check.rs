//! Relations between a decoder's sizes.

use super::{
    Activation, Attention, Bias, Block, DecoderSpec, Embedding, Experts, Groups, HeadAttention, HeadNorm,
    LatentAttention, Layer, Logits, Mask, Mlp, Norm, Positions, Rope, RopeScaling, Router, limits,
};
use crate::error::{Error, Result};
use crate::model::executor::PositionRegime;

/// See [`DecoderSpec::check`].
pub(super) fn check(spec: &DecoderSpec) -> Result<()> {
    size("layers", spec.layers(), limits::LAYERS)?;
    size("hidden size", spec.hidden, limits::HIDDEN)?;
    size("vocabulary", spec.vocab, limits::VOCAB)?;
    size("positions", spec.max_positions, limits::POSITIONS)?;
    match &spec.attention {
        Attention::Heads(heads) => check_heads(heads)?,
        Attention::Latent(latent) => check_latent(latent)?,
    }
    check_positions(spec)?;
    for layer in &spec.layers {
        check_layer(layer, spec.ropes().len())?;
    }
    check_scalars(spec)?;
    check_post_norms(spec)
}

/// A norm behind a branch undoes what multiplies it, and sums no two results.
fn check_post_norms(spec: &DecoderSpec) -> Result<()> {
    let has_experts = spec.layers.iter().any(|layer| matches!(layer.mlp, Mlp::Experts(_)));
    match spec.block {
        Block::SerialPostNorms if spec.norm.bias() == Bias::Present => {
            wrong("norms with biases behind the branches of a layer".to_owned())
        }
        Block::SerialPostNorms if has_experts || spec.branch_multiplier != 1.0 => {
            wrong("experts or a multiplier before norms behind the branches of a layer".to_owned())
        }
        _ => Ok(()),
    }
}

fn wrong(what: String) -> Result<()> {
    Err(Error::Checkpoint(what))
}

fn size(what: &str, size: usize, most: usize) -> Result<()> {
    if size == 0 || size > most {
        return wrong(format!("the config's {what} is {size}, which is not between 1 and {most}"));
    }
    Ok(())
}

fn multiplier(what: &str, number: f32) -> Result<()> {
    if !number.is_finite() || number == 0.0 {
        return wrong(format!("the config's {what} is {number}"));
    }
    Ok(())
}

fn check_heads(heads: &HeadAttention) -> Result<()> {
    let HeadAttention { heads: n, kv_heads, head_dim, .. } = *heads;
    size("query heads", n, limits::HEADS)?;
    size("KV heads", kv_heads, limits::HEADS)?;
    size("head width", head_dim, limits::HEAD_DIM)?;
    if !n.is_multiple_of(kv_heads) {
        return wrong(format!("{n} query heads do not divide among {kv_heads} KV heads"));
    }
    multiplier("scale of attention scores", heads.scale)?;
    if heads.log_n.is_some_and(|length| length < 2) {
        return wrong("the logarithm of the trained length divides LogN, which is 1".to_owned());
    }
    if let Some(cap) = heads.softcap {
        multiplier("softcap of attention scores", cap)?;
    }
    match heads.qk_norm {
        Some(HeadNorm::Shared(norm) | HeadNorm::PerHead(norm)) if norm.bias() == Bias::Present => {
            wrong("norms of queries and keys with biases".to_owned())
        }
        _ => Ok(()),
    }
}

fn check_latent(latent: &LatentAttention) -> Result<()> {
    let LatentAttention { heads, query_rank, kv_rank, nope_dim, rope_dim, value_dim, scale, norm } = *latent;
    size("query heads", heads, limits::HEADS)?;
    size("query rank", query_rank.unwrap_or(1), limits::HIDDEN)?;
    size("KV rank", kv_rank, limits::HIDDEN)?;
    size("head width without rotation", nope_dim, limits::HEAD_DIM / 2)?;
    size("head width with rotation", rope_dim, limits::HEAD_DIM / 2)?;
    size("width of a value", value_dim, limits::HEAD_DIM)?;
    multiplier("scale of attention scores", scale)?;
    if norm.bias() == Bias::Present {
        return wrong("norms of latents with biases".to_owned());
    }
    Ok(())
}

fn check_positions(spec: &DecoderSpec) -> Result<()> {
    let head = spec.attention.rope_dim();
    match (&spec.positions, &spec.attention) {
        (Positions::Rope(ropes), _) => {
            size("number of rotary embeddings", ropes.len(), limits::LAYERS)?;
            ropes.iter().try_for_each(|rope| check_rope(rope, head))?;
            let mut regimes = ropes.iter().map(|rope| PositionRegime::of_scaling(&rope.scaling));
            let regime = PositionRegime::of(&spec.positions);
            match regimes.find(|other| *other != PositionRegime::Fixed && *other != regime) {
                Some(other) => {
                    wrong(format!("rotary embeddings that depend on lengths by {regime:?} and {other:?}"))
                }
                None => Ok(()),
            }
        }
        (Positions::Alibi | Positions::Learned, Attention::Heads(_)) => Ok(()),
        (positions, Attention::Latent(_)) => {
            wrong(format!("latent attention with positions {positions:?}, it needs rotary embeddings"))
        }
    }
}

fn check_rope(rope: &Rope, head: usize) -> Result<()> {
    let width = rope.width;
    if width == 0 || !width.is_multiple_of(2) || width > head {
        return wrong(format!(
            "rotary embeddings turn {width} numbers of a head of {head}: not an even number up to {head}"
        ));
    }
    match &rope.scaling {
        RopeScaling::LongRope { short, long, .. } if short.len() != width / 2 || long.len() != width / 2 => {
            let (short, long) = (short.len(), long.len());
            wrong(format!("{short} short and {long} long divisors for {} frequencies", width / 2))
        }
        RopeScaling::PromptNtk { trained: 0 } => wrong("a trained length of 0 tokens".to_owned()),
        // The base grows by a power of width / (width − 2).
        RopeScaling::PromptNtk { .. } | RopeScaling::Dynamic { .. } if width == 2 => {
            wrong("a rotary embedding of 2 numbers has no base to grow".to_owned())
        }
        _ => Ok(()),
    }
}

fn check_layer(layer: &Layer, n_ropes: usize) -> Result<()> {
    if layer.mask == (Mask::Window { window: 0 }) {
        return wrong("a sliding window of 0 tokens hides every key".to_owned());
    }
    if layer.rope >= n_ropes.max(1) {
        return wrong(format!("a layer turns by rotary embedding {} of {n_ropes}", layer.rope));
    }
    match layer.mlp {
        Mlp::Gated { width, activation, .. } => {
            check_activation(activation, true)?;
            size("MLP width", width, limits::WIDTH)
        }
        Mlp::Plain { width, activation, .. } => {
            check_activation(activation, false)?;
            size("MLP width", width, limits::WIDTH)
        }
        Mlp::Experts(experts) => check_experts(&experts),
    }
}

fn check_activation(activation: Activation, gated: bool) -> Result<()> {
    match activation {
        Activation::ClampedSwiglu { .. } if !gated => {
            wrong("a clamped gate in an MLP without gates".to_owned())
        }
        Activation::ClampedSwiglu { limit } => multiplier("bound of the gates", limit),
        Activation::Silu | Activation::GeluTanh | Activation::Gelu => Ok(()),
    }
}

fn check_experts(experts: &Experts) -> Result<()> {
    let Experts { n_experts, n_chosen, width, activation, router, shared_width, .. } = *experts;
    size("number of experts", n_experts, limits::EXPERTS)?;
    size("number of experts a token", n_chosen, n_experts)?;
    size("width of an expert", width, limits::WIDTH / n_experts)?;
    if shared_width > limits::WIDTH {
        size("width of the shared expert", shared_width, limits::WIDTH)?;
    }
    check_activation(activation, true)?;
    let (factor, groups) = match router {
        Router::Softmax { factor, groups } | Router::Sigmoid { factor, groups } => (factor, groups),
        Router::SoftmaxRenormalised | Router::SoftmaxOfChosen => return Ok(()),
    };
    multiplier("scaling factor of the experts", factor)?;
    let Groups { n, n_used } = groups;
    size("number of groups of experts", n, n_experts)?;
    size("number of groups a token", n_used, n)?;
    if !n_experts.is_multiple_of(n) {
        return wrong(format!("{n_experts} experts do not divide among {n} groups"));
    }
    if n_experts / n * n_used < n_chosen {
        return wrong(format!("{n_used} groups of {} experts for {n_chosen} experts a token", n_experts / n));
    }
    if matches!(router, Router::Sigmoid { .. }) && n > 1 && n_experts / n < 2 {
        return wrong("groups of one expert, where groups are judged by their two best".to_owned());
    }
    Ok(())
}

fn check_scalars(spec: &DecoderSpec) -> Result<()> {
    let Embedding { multiplier: of_embedding, norm } = spec.embedding;
    multiplier("multiplier of the embedding", of_embedding)?;
    multiplier("multiplier of branches", spec.branch_multiplier)?;
    let Logits { multiplier: of_logits, softcap } = spec.logits;
    multiplier("multiplier of the logits", of_logits)?;
    if let Some(cap) = softcap {
        multiplier("softcap of the logits", cap)?;
    }
    let eps = |norm: Norm| match norm {
        Norm::Rms { eps } | Norm::RmsOnePlus { eps } | Norm::Layer { eps, .. } => eps,
    };
    if [Some(spec.norm), norm].into_iter().flatten().any(|norm| !eps(norm).is_finite() || eps(norm) < 0.0) {
        return wrong("what the config adds to variances is negative".to_owned());
    }
    Ok(())
}
