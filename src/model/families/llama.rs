//! LLaMA 1, 2, 3.x and Yi (`modeling_llama.py`; `modeling_yi.py` of Yi's first revision), and what the families of the
//! same shape share.

use super::config::Config;
use super::positions::rotary;
use super::{Family, Reading};
use crate::error::{Error, Result};
use crate::model::layout::Place;
use crate::model::names::{LayerRole, MlpRole, Names, Role};
use crate::model::spec::{
    Activation, Attention, Bias, Block, DecoderSpec, Embedding, Head, HeadAttention, Layer, Logits, Mask, Mlp, Norm,
    Positions, Sinks, limits,
};

/// LLaMA, and every model exported under its name.
pub(super) const LLAMA: Family = Family {
    architectures: &["LlamaForCausalLM", "LLaMAForCausalLM"],
    model_types: &["llama"],
    read: |config| {
        let flag = |key| Ok::<Bias, Error>(bias(config.flag(key)?.unwrap_or(false)));
        let attention = flag("attention_bias")?;
        let biases = Biases { qkv: attention, out: attention, mlp: flag("mlp_bias")? };
        read("llama", config, biases, &DEFAULTS)
    },
};

/// Yi under its first name.
pub(super) const YI: Family = Family {
    architectures: &["YiForCausalLM"],
    model_types: &["Yi"],
    read: |config| {
        let defaults = Defaults { kv_heads: Some(4), max_positions: 4096, rope_base: 5e6, eps: 1e-5 };
        read("yi", config, Biases::NONE, &defaults)
    },
};

/// What a file of `transformers`' `LlamaConfig` leaves unsaid.
pub(super) const DEFAULTS: Defaults =
    Defaults { kv_heads: None, max_positions: 2048, rope_base: 1e4, eps: 1e-6 };

/// Values of absent keys, by the family's config class.
pub(super) struct Defaults {
    /// `num_key_value_heads` where the key is absent; `None` for as many as query heads, which `null` means always.
    pub(super) kv_heads: Option<usize>,
    /// `max_position_embeddings`.
    pub(super) max_positions: usize,
    /// `rope_theta`.
    pub(super) rope_base: f64,
    /// `rms_norm_eps`.
    pub(super) eps: f64,
}

/// Which linear layers have biases.
pub(super) struct Biases {
    pub(super) qkv: Bias,
    pub(super) out: Bias,
    pub(super) mlp: Bias,
}

impl Biases {
    /// None has.
    pub(super) const NONE: Biases = Biases { qkv: Bias::Absent, out: Bias::Absent, mlp: Bias::Absent };
}

/// A bias that is there or not.
pub(super) fn bias(present: bool) -> Bias {
    if present { Bias::Present } else { Bias::Absent }
}

/// Reads a decoder of LLaMA's shape: pre-norm, rotary, gated MLP, every layer seeing the whole past.
pub(super) fn read(
    family: &'static str,
    config: &Config<'_>,
    biases: Biases,
    defaults: &Defaults,
) -> Result<Reading> {
    let hidden = config.required_count("hidden_size", limits::HIDDEN)?;
    let heads = config.required_count("num_attention_heads", limits::HEADS)?;
    let layers = config.required_count("num_hidden_layers", limits::LAYERS)?;
    let kv_heads = match config.count("num_key_value_heads", limits::HEADS)? {
        Some(kv_heads) => kv_heads,
        None if config.mentions("num_key_value_heads") => heads,
        None => defaults.kv_heads.unwrap_or(heads),
    };
    let head_dim = match config.count("head_dim", limits::HEAD_DIM)? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            return Err(Error::Checkpoint(format!(
                "the config's hidden_size {hidden} does not divide among {heads} heads, and it has no head_dim"
            )));
        }
    };
    let positions =
        config.count("max_position_embeddings", limits::POSITIONS)?.unwrap_or(defaults.max_positions);
    let rotary = rotary(config, head_dim, positions, defaults.rope_base)?;
    let width = config.required_count("intermediate_size", limits::WIDTH)?;
    let eps = config.number("rms_norm_eps", 0.0, 1.0)?.unwrap_or(defaults.eps) as f32;
    let tied = config.flag("tie_word_embeddings")?.unwrap_or(false);
    let mlp = Mlp::Gated { activation: activation(config)?, width, bias: biases.mlp };
    let spec = DecoderSpec {
        family,
        vocab: config.required_count("vocab_size", limits::VOCAB)?,
        hidden,
        max_positions: rotary.max_positions,
        embedding: Embedding::PLAIN,
        norm: Norm::Rms { eps },
        block: Block::Serial,
        branch_multiplier: 1.0,
        positions: Positions::Rope(vec![rotary.rope]),
        attention: Attention::Heads(HeadAttention {
            heads,
            kv_heads,
            head_dim,
            qkv_bias: biases.qkv,
            out_bias: biases.out,
            qk_norm: None,
            scale: 1.0 / (head_dim as f32).sqrt(),
            softcap: None,
            sinks: Sinks::Absent,
            log_n: None,
        }),
        layers: vec![Layer { mask: Mask::Causal, rope: 0, mlp }; layers],
        head: if tied { Head::Tied } else { Head::Untied },
        logits: Logits::PLAIN,
    };
    Ok(Reading { spec, names: NAMES, notes: rotary.notes })
}

fn activation(config: &Config<'_>) -> Result<Activation> {
    match config.text("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Ok(Activation::Silu),
        other => Err(Error::Unsupported(format!("the activation {other:.40} is not served in this family"))),
    }
}

/// The window of one layer; one that no position outgrows is none.
pub(super) fn windowed(window: usize, max_positions: usize) -> Mask {
    // Windows read from a file are at most limits::POSITIONS, which fits in 32 bits.
    if window >= max_positions { Mask::Causal } else { Mask::Window { window: window as u32 } }
}

/// Gives the layers their masks.
pub(super) fn set_masks(spec: &mut DecoderSpec, masks: Vec<Mask>) {
    for (layer, mask) in spec.layers.iter_mut().zip(masks) {
        layer.mask = mask;
    }
}

/// The masks that `layer_types` of the newer dialect lists, where it does.
pub(super) fn listed_masks(config: &Config<'_>, layers: usize, sliding: Mask) -> Result<Option<Vec<Mask>>> {
    let Some(types) = config.texts("layer_types")? else { return Ok(None) };
    if types.len() != layers {
        return Err(Error::Checkpoint(format!(
            "the config's layer_types has {} entries for {layers} layers",
            types.len()
        )));
    }
    let mask = |kind: &&str| match *kind {
        "full_attention" => Ok(Mask::Causal),
        "sliding_attention" => Ok(sliding),
        other => Err(Error::Unsupported(format!("the layer type {other:.40} is not served in this family"))),
    };
    types.iter().map(mask).collect::<Result<_>>().map(Some)
}

/// LLaMA's names. Yi's first revision called the block norms `ln1` and `ln2`.
pub(super) const NAMES: Names = Names { prefixes: &[""], place, ignores: |_, name| ignores(name) };

/// Buffers that old versions of the class saved.
pub(super) fn ignores(name: &str) -> bool {
    [".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached"]
        .iter()
        .any(|end| name.ends_with(end))
}

/// Where LLaMA's checkpoints keep a role.
pub(super) fn place(_: &DecoderSpec, role: Role) -> Place {
    use LayerRole::*;
    let Role::Layer(_, role) = role else {
        return match role {
            Role::Embedding => Place::of(&["model.embed_tokens.weight"]),
            Role::FinalNorm => Place::of(&["model.norm.weight"]),
            Role::Head => Place::of(&["lm_head.weight"]),
            _ => Place::nowhere(),
        };
    };
    match role {
        AttentionNorm => {
            Place::of(&["model.layers.{layer}.input_layernorm.weight", "model.layers.{layer}.ln1.weight"])
        }
        Query => Place::of(&["model.layers.{layer}.self_attn.q_proj.weight"]),
        QueryBias => Place::of(&["model.layers.{layer}.self_attn.q_proj.bias"]),
        Key => Place::of(&["model.layers.{layer}.self_attn.k_proj.weight"]),
        KeyBias => Place::of(&["model.layers.{layer}.self_attn.k_proj.bias"]),
        Value => Place::of(&["model.layers.{layer}.self_attn.v_proj.weight"]),
        ValueBias => Place::of(&["model.layers.{layer}.self_attn.v_proj.bias"]),
        Output => Place::of(&["model.layers.{layer}.self_attn.o_proj.weight"]),
        OutputBias => Place::of(&["model.layers.{layer}.self_attn.o_proj.bias"]),
        MlpNorm => Place::of(&[
            "model.layers.{layer}.post_attention_layernorm.weight",
            "model.layers.{layer}.ln2.weight",
        ]),
        Mlp(MlpRole::Gate) => Place::of(&["model.layers.{layer}.mlp.gate_proj.weight"]),
        Mlp(MlpRole::GateBias) => Place::of(&["model.layers.{layer}.mlp.gate_proj.bias"]),
        Mlp(MlpRole::Up) => Place::of(&["model.layers.{layer}.mlp.up_proj.weight"]),
        Mlp(MlpRole::UpBias) => Place::of(&["model.layers.{layer}.mlp.up_proj.bias"]),
        Mlp(MlpRole::Down) => Place::of(&["model.layers.{layer}.mlp.down_proj.weight"]),
        Mlp(MlpRole::DownBias) => Place::of(&["model.layers.{layer}.mlp.down_proj.bias"]),
        _ => Place::nowhere(),
    }
}

#[cfg(test)]
mod tests;
