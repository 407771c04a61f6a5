//! LLaMA 1, 2, 3.x and Yi (`modeling_llama.py`; `modeling_yi.py` of Yi's first revision), and what the families of the
//! same keys share.

use super::config::Config;
use super::positions::{Rotary, Wanted, rotary};
use super::{Family, Reading, shape};
use crate::error::{Error, Result};
use crate::model::layout::Place;
use crate::model::names::{LayerRole, MlpRole, Names, Role};
use crate::model::spec::{
    Activation, Attention, Bias, Block, DecoderSpec, Embedding, HeadAttention, Logits, Mlp, Norm, Positions,
    limits,
};

/// LLaMA, and every model exported under its name.
pub(super) const LLAMA: Family = Family {
    architectures: &["LlamaForCausalLM", "LLaMAForCausalLM"],
    model_types: &["llama"],
    read: |config| {
        let bias = |key| Ok::<Bias, Error>(shape::bias(config.flag(key)?.unwrap_or(false)));
        let (attention_bias, mlp_bias) = (bias("attention_bias")?, bias("mlp_bias")?);
        read("llama", config, &Class { mlp_bias, ..CLASS }, |attention| {
            attention.qkv_bias = attention_bias;
            attention.out_bias = attention_bias;
        })
    },
};

/// Yi under its first name.
pub(super) const YI: Family = Family {
    architectures: &["YiForCausalLM"],
    model_types: &["Yi"],
    read: |config| {
        let class = Class { kv_heads: Some(4), max_positions: 4096, rope_base: 5e6, eps: 1e-5, ..CLASS };
        read("yi", config, &class, |_| ())
    },
};

/// What a family's config class says where its files are silent, and under which keys they speak.
pub(super) struct Class {
    /// `num_attention_heads`; `None` where every file states it.
    pub(super) heads: Option<usize>,
    /// `vocab_size`; `None` where every file states it.
    pub(super) vocab: Option<usize>,
    /// `head_dim`; `None` for the heads' share of the hidden size.
    pub(super) head_dim: Option<usize>,
    /// `num_key_value_heads` where the key is absent; `None` for as many as query heads, which `null` means always.
    pub(super) kv_heads: Option<usize>,
    /// `max_position_embeddings`.
    pub(super) max_positions: usize,
    /// `rope_theta`.
    pub(super) rope_base: f64,
    /// Reads rotary embeddings.
    pub(super) rotary: fn(&Config<'_>, &Wanted) -> Result<Rotary>,
    /// See [`Wanted::part`].
    pub(super) rope_part: Option<f64>,
    /// See [`Wanted::aliases`].
    pub(super) rope_aliases: &'static [(&'static str, &'static str)],
    /// The norm of blocks and output.
    pub(super) norm: fn(f32) -> Norm,
    /// Key of its eps.
    pub(super) eps_key: &'static str,
    /// Its eps.
    pub(super) eps: f64,
    /// Key of the activation.
    pub(super) activation_key: &'static str,
    /// The activation's name.
    pub(super) activation: &'static str,
    /// The feed-forward part of `intermediate_size` neurons.
    pub(super) mlp: fn(Activation, usize, Bias) -> Mlp,
    /// Its biases.
    pub(super) mlp_bias: Bias,
    /// `tie_word_embeddings`.
    pub(super) tied: bool,
}

/// `transformers`' `LlamaConfig`.
pub(super) const CLASS: Class = Class {
    heads: None,
    vocab: None,
    head_dim: None,
    kv_heads: None,
    max_positions: 2048,
    rope_base: 1e4,
    rotary,
    rope_part: None,
    rope_aliases: &[],
    norm: shape::rms,
    eps_key: "rms_norm_eps",
    eps: 1e-6,
    activation_key: "hidden_act",
    activation: "silu",
    mlp: |activation, width, bias| Mlp::Gated { activation, width, bias },
    mlp_bias: Bias::Absent,
    tied: false,
};

/// Reads a decoder of LLaMA's shape: pre-norm, rotary, every layer like the others and seeing the whole past.
pub(super) fn read(
    family: &'static str,
    config: &Config<'_>,
    class: &Class,
    adjust: impl FnOnce(&mut HeadAttention),
) -> Result<Reading> {
    let hidden = config.required_count("hidden_size", limits::HIDDEN)?;
    let stated = |key, most, default| match config.count(key, most)?.or(default) {
        Some(count) => Ok(count),
        None => Err(config.missing(key)),
    };
    let heads = stated("num_attention_heads", limits::HEADS, class.heads)?;
    let layers = config.required_count("num_hidden_layers", limits::LAYERS)?;
    let kv_heads = match config.count("num_key_value_heads", limits::HEADS)? {
        Some(kv_heads) => kv_heads,
        None if config.mentions("num_key_value_heads") => heads,
        None => class.kv_heads.unwrap_or(heads),
    };
    let head_dim = match config.count("head_dim", limits::HEAD_DIM)?.or(class.head_dim) {
        Some(head_dim) => head_dim,
        None => shape::shared_width(config, hidden, heads)?,
    };
    let mut attention = shape::attention(heads, kv_heads, head_dim);
    adjust(&mut attention);
    let rotary = (class.rotary)(
        config,
        &Wanted {
            head_dim,
            max_positions: config
                .count("max_position_embeddings", limits::POSITIONS)?
                .unwrap_or(class.max_positions),
            base: class.rope_base,
            part: class.rope_part,
            aliases: class.rope_aliases,
        },
    )?;
    let activation = shape::activation(config, class.activation_key, class.activation)?;
    let width = config.required_count("intermediate_size", limits::WIDTH)?;
    let spec = DecoderSpec {
        family,
        vocab: stated("vocab_size", limits::VOCAB, class.vocab)?,
        hidden,
        max_positions: rotary.max_positions,
        embedding: Embedding::PLAIN,
        norm: (class.norm)(shape::eps(config, class.eps_key, class.eps)?),
        block: Block::Serial,
        branch_multiplier: 1.0,
        positions: Positions::Rope(rotary.ropes),
        attention: Attention::Heads(attention),
        layers: shape::layers(layers, (class.mlp)(activation, width, class.mlp_bias)),
        head: shape::head(config.flag("tie_word_embeddings")?.unwrap_or(class.tied)),
        logits: Logits::PLAIN,
    };
    Ok(Reading { spec, names: NAMES, notes: rotary.notes })
}

/// LLaMA's names.
pub(super) const NAMES: Names = Names { prefixes: &[""], place, ignores: |_, name| ignores(name) };

/// Buffers that old versions of the class saved.
pub(super) fn ignores(name: &str) -> bool {
    [".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached"]
        .iter()
        .any(|end| name.ends_with(end))
}

/// Where checkpoints with LLaMA's names keep a role. What LLaMA itself lacks is where most other classes of
/// `transformers` keep it. Yi's first revision called the block norms `ln1` and `ln2`.
pub(super) fn place(_: &DecoderSpec, role: Role) -> Place {
    let Role::Layer(_, role) = role else {
        return match role {
            Role::Embedding => Place::of(&["model.embed_tokens.weight"]),
            Role::FinalNorm => Place::of(&["model.norm.weight"]),
            Role::FinalNormBias => Place::of(&["model.norm.bias"]),
            Role::Head => Place::of(&["lm_head.weight"]),
            _ => Place::nowhere(),
        };
    };
    use LayerRole::*;
    match role {
        AttentionNorm => {
            Place::of(&["model.layers.{layer}.input_layernorm.weight", "model.layers.{layer}.ln1.weight"])
        }
        AttentionNormBias => Place::of(&["model.layers.{layer}.input_layernorm.bias"]),
        Query => Place::of(&["model.layers.{layer}.self_attn.q_proj.weight"]),
        QueryBias => Place::of(&["model.layers.{layer}.self_attn.q_proj.bias"]),
        QueryNorm => Place::of(&["model.layers.{layer}.self_attn.q_norm.weight"]),
        Key => Place::of(&["model.layers.{layer}.self_attn.k_proj.weight"]),
        KeyBias => Place::of(&["model.layers.{layer}.self_attn.k_proj.bias"]),
        KeyNorm => Place::of(&["model.layers.{layer}.self_attn.k_norm.weight"]),
        Value => Place::of(&["model.layers.{layer}.self_attn.v_proj.weight"]),
        ValueBias => Place::of(&["model.layers.{layer}.self_attn.v_proj.bias"]),
        Output => Place::of(&["model.layers.{layer}.self_attn.o_proj.weight"]),
        OutputBias => Place::of(&["model.layers.{layer}.self_attn.o_proj.bias"]),
        MlpNorm => Place::of(&[
            "model.layers.{layer}.post_attention_layernorm.weight",
            "model.layers.{layer}.ln2.weight",
        ]),
        MlpNormBias => Place::of(&["model.layers.{layer}.post_attention_layernorm.bias"]),
        Mlp(MlpRole::Gate) => Place::of(&["model.layers.{layer}.mlp.gate_proj.weight"]),
        Mlp(MlpRole::GateBias) => Place::of(&["model.layers.{layer}.mlp.gate_proj.bias"]),
        Mlp(MlpRole::Up) => Place::of(&["model.layers.{layer}.mlp.up_proj.weight"]),
        Mlp(MlpRole::UpBias) => Place::of(&["model.layers.{layer}.mlp.up_proj.bias"]),
        Mlp(MlpRole::Down) => Place::of(&["model.layers.{layer}.mlp.down_proj.weight"]),
        Mlp(MlpRole::DownBias) => Place::of(&["model.layers.{layer}.mlp.down_proj.bias"]),
        Router => Place::of(&["model.layers.{layer}.mlp.gate.weight"]),
        Expert(_, MlpRole::Gate) => {
            Place::of(&["model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"])
        }
        Expert(_, MlpRole::Up) => Place::of(&["model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"]),
        Expert(_, MlpRole::Down) => {
            Place::of(&["model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"])
        }
        _ => Place::nowhere(),
    }
}

#[cfg(test)]
mod tests;
