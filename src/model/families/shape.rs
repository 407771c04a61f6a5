//! What readers of different files make in the same way.

use super::config::Config;
use crate::error::{Error, Result};
use crate::model::spec::{
    Activation, Attention, Bias, DecoderSpec, Head, HeadAttention, Layer, Mask, Mlp, Norm, Sinks, limits,
};

/// A bias that is there or not.
pub(super) fn bias(present: bool) -> Bias {
    if present { Bias::Present } else { Bias::Absent }
}

/// The embedding's rows, or rows of its own.
pub(super) fn head(tied: bool) -> Head {
    if tied { Head::Tied } else { Head::Untied }
}

/// A norm by root mean square.
pub(super) fn rms(eps: f32) -> Norm {
    Norm::Rms { eps }
}

/// A norm by mean and variance, with biases.
pub(super) fn layer_norm(eps: f32) -> Norm {
    Norm::Layer { eps, bias: Bias::Present }
}

/// Attention without a peculiarity.
pub(super) fn attention(heads: usize, kv_heads: usize, head_dim: usize) -> HeadAttention {
    HeadAttention {
        heads,
        kv_heads,
        head_dim,
        qkv_bias: Bias::Absent,
        out_bias: Bias::Absent,
        qk_norm: None,
        scale: (head_dim as f64).powf(-0.5) as f32,
        softcap: None,
        sinks: Sinks::Absent,
        log_n: None,
    }
}

/// A head's width where the file states none: the heads share the hidden size.
pub(super) fn shared_width(config: &Config<'_>, hidden: usize, heads: usize) -> Result<usize> {
    if hidden.is_multiple_of(heads) {
        return Ok(hidden / heads);
    }
    let key = config.either("hidden_size", "n_embd");
    Err(Error::Checkpoint(format!(
        "the config's {key} {hidden} does not divide among {heads} heads, and it has no head_dim"
    )))
}

/// Layers that see the whole past, with the first rotary embedding if there is one.
pub(super) fn layers(n: usize, mlp: Mlp) -> Vec<Layer> {
    vec![Layer { mask: Mask::Causal, rope: 0, mlp }; n]
}

/// A norm's eps.
pub(super) fn eps(config: &Config<'_>, key: &str, default: f64) -> Result<f32> {
    Ok(config.number(key, 0.0, 1.0)?.unwrap_or(default) as f32)
}

/// An activation by its name among those of `transformers`.
pub(super) fn activation(config: &Config<'_>, key: &str, default: &str) -> Result<Activation> {
    match config.text(key)?.unwrap_or(default) {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        // The last two are the same formula written otherwise.
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Ok(Activation::GeluTanh),
        other => Err(Error::Unsupported(format!("the activation {other:.40} is not served in this family"))),
    }
}

/// The bound of a `tanh` cap; 0 is none, as in the reference's truth values.
pub(super) fn softcap(config: &Config<'_>, key: &str, default: Option<f64>) -> Result<Option<f32>> {
    let cap = match config.number(key, 0.0, 1e6)? {
        None if !config.mentions(key) => default,
        cap => cap,
    };
    Ok(cap.map(|cap| cap as f32).filter(|&cap| cap > 0.0))
}

/// The length of a sliding window, where `null` means none and an absent key the class's default.
pub(super) fn window(config: &Config<'_>, default: Option<usize>) -> Result<Option<usize>> {
    match config.count("sliding_window", limits::POSITIONS)? {
        None if !config.mentions("sliding_window") => Ok(default),
        window => Ok(window),
    }
}

/// The mask of a window; one that no position outgrows is none.
pub(super) fn windowed(window: Option<usize>, max_positions: usize) -> Mask {
    match window {
        // Windows read from a file are at most limits::POSITIONS, which fits in 32 bits.
        Some(window) if window < max_positions => Mask::Window { window: window as u32 },
        _ => Mask::Causal,
    }
}

/// Which layers slide: those that `layer_types` of the newer dialect lists, else those of `usual`.
pub(super) fn sliding(
    config: &Config<'_>,
    layers: usize,
    usual: impl Fn(usize) -> bool,
) -> Result<Vec<bool>> {
    let Some(types) = config.texts("layer_types")? else { return Ok((0..layers).map(usual).collect()) };
    if types.len() != layers {
        return Err(Error::Checkpoint(format!(
            "the config's layer_types has {} entries for {layers} layers",
            types.len()
        )));
    }
    let slides = |kind: &&str| match *kind {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => Err(Error::Unsupported(format!("the layer type {other:.40} is not served in this family"))),
    };
    types.iter().map(slides).collect()
}

/// Gives the layers that slide their mask.
pub(super) fn slide(
    config: &Config<'_>,
    layers: &mut [Layer],
    mask: Mask,
    usual: impl Fn(usize) -> bool,
) -> Result<()> {
    let sliding = sliding(config, layers.len(), usual)?;
    for (layer, _) in layers.iter_mut().zip(sliding).filter(|(_, slides)| *slides) {
        layer.mask = mask;
    }
    Ok(())
}

/// Rows of queries, of keys and of values.
pub(super) fn qkv_rows(spec: &DecoderSpec) -> [usize; 3] {
    match spec.attention {
        Attention::Heads(HeadAttention { heads, kv_heads, head_dim, .. }) => {
            [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        }
        Attention::Latent(_) => [0; 3],
    }
}

/// The same of one of the `groups` into which a checkpoint gathers them.
pub(super) fn qkv_rows_of(spec: &DecoderSpec, groups: usize) -> [usize; 3] {
    qkv_rows(spec).map(|rows| rows / groups.max(1))
}
