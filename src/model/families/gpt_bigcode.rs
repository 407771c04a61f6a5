//! StarCoder and SantaCoder (`modeling_gpt_bigcode.py`): a table of positions, and one KV head for all queries.

use super::config::Config;
use super::{Family, Reading, shape};
use crate::error::Result;
use crate::model::layout::Place;
use crate::model::names::{LayerRole, MlpRole, Names, Role};
use crate::model::spec::{
    Attention, Bias, Block, DecoderSpec, Embedding, HeadAttention, Logits, Mlp, Positions, limits,
};

/// GPT BigCode.
pub(super) const GPT_BIGCODE: Family =
    Family { architectures: &["GPTBigCodeForCausalLM"], model_types: &["gpt_bigcode"], read };

fn read(config: &Config<'_>) -> Result<Reading> {
    config.only("scale_attn_weights", true)?;
    config.only("add_cross_attention", false)?;
    let hidden = config.required_count("n_embd", limits::HIDDEN)?;
    let layers = config.required_count("n_layer", limits::LAYERS)?;
    let heads = config.required_count("n_head", limits::HEADS)?;
    let kv_heads = if config.flag("multi_query")?.unwrap_or(true) { 1 } else { heads };
    let attention = shape::attention(heads, kv_heads, shape::shared_width(config, hidden, heads)?);
    let mlp = Mlp::Plain {
        activation: shape::activation(config, "activation_function", "gelu_pytorch_tanh")?,
        width: config.count("n_inner", limits::WIDTH)?.unwrap_or(4 * hidden),
        bias: Bias::Present,
    };
    let spec = DecoderSpec {
        family: "gpt_bigcode",
        vocab: config.required_count("vocab_size", limits::VOCAB)?,
        hidden,
        max_positions: config.count("n_positions", limits::POSITIONS)?.unwrap_or(1024),
        embedding: Embedding::PLAIN,
        norm: shape::layer_norm(shape::eps(config, "layer_norm_epsilon", 1e-5)?),
        block: Block::Serial,
        branch_multiplier: 1.0,
        positions: Positions::Learned,
        attention: Attention::Heads(HeadAttention {
            qkv_bias: Bias::Present,
            out_bias: Bias::Present,
            ..attention
        }),
        layers: shape::layers(layers, mlp),
        head: shape::head(config.flag("tie_word_embeddings")?.unwrap_or(true)),
        logits: Logits::PLAIN,
    };
    Ok(Reading { spec, names: NAMES, notes: Vec::new() })
}

const NAMES: Names = Names {
    prefixes: &["transformer.", ""],
    place,
    // The causal mask, which old versions saved.
    ignores: |_, name| name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias"),
};

/// With one KV head all queries come first; with as many as query heads, rows go head by head.
fn place(spec: &DecoderSpec, role: Role) -> Place {
    let kv_heads = spec.attention.kv_heads();
    let fused = |names, which| Place::of(names).block(kv_heads, &shape::qkv_rows_of(spec, kv_heads), which);
    const QKV: &[&str] = &["h.{layer}.attn.c_attn.weight"];
    const QKV_BIAS: &[&str] = &["h.{layer}.attn.c_attn.bias"];
    let Role::Layer(_, part) = role else {
        return match role {
            Role::Embedding => Place::of(&["wte.weight"]),
            Role::Positions => Place::of(&["wpe.weight"]),
            Role::FinalNorm => Place::of(&["ln_f.weight"]),
            Role::FinalNormBias => Place::of(&["ln_f.bias"]),
            Role::Head => Place::of(&["lm_head.weight"]),
            _ => Place::nowhere(),
        };
    };
    use LayerRole::*;
    match part {
        AttentionNorm => Place::of(&["h.{layer}.ln_1.weight"]),
        AttentionNormBias => Place::of(&["h.{layer}.ln_1.bias"]),
        Query => fused(QKV, 0),
        QueryBias => fused(QKV_BIAS, 0),
        Key => fused(QKV, 1),
        KeyBias => fused(QKV_BIAS, 1),
        Value => fused(QKV, 2),
        ValueBias => fused(QKV_BIAS, 2),
        Output => Place::of(&["h.{layer}.attn.c_proj.weight"]),
        OutputBias => Place::of(&["h.{layer}.attn.c_proj.bias"]),
        MlpNorm => Place::of(&["h.{layer}.ln_2.weight"]),
        MlpNormBias => Place::of(&["h.{layer}.ln_2.bias"]),
        Mlp(MlpRole::Up) => Place::of(&["h.{layer}.mlp.c_fc.weight"]),
        Mlp(MlpRole::UpBias) => Place::of(&["h.{layer}.mlp.c_fc.bias"]),
        Mlp(MlpRole::Down) => Place::of(&["h.{layer}.mlp.c_proj.weight"]),
        Mlp(MlpRole::DownBias) => Place::of(&["h.{layer}.mlp.c_proj.bias"]),
        _ => Place::nowhere(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{heads, refusal_of, spec_of};
    use crate::model::spec::{Activation, Bias, Mlp, Positions};

    #[test]
    fn one_kv_head_unless_told_otherwise() {
        let kv_heads = |change| heads(&spec_of("GPTBigCodeForCausalLM", change)).kv_heads;
        assert_eq!(kv_heads(json!({"multi_query": null})), 1);
        assert_eq!(kv_heads(json!({"multi_query": false})), 4);
    }

    #[test]
    fn the_activation_is_read() {
        let mlp = |change| spec_of("GPTBigCodeForCausalLM", change).layers[0].mlp;
        let of = |activation, width| Mlp::Plain { activation, width, bias: Bias::Present };
        assert_eq!(mlp(json!({})), of(Activation::Gelu, 64));
        assert_eq!(mlp(json!({"activation_function": null, "n_inner": null})), of(Activation::GeluTanh, 128));
        let refusal = refusal_of("GPTBigCodeForCausalLM", json!({"activation_function": "quick_gelu"}));
        assert!(refusal.contains("the activation quick_gelu"), "{refusal}");
    }

    #[test]
    fn positions_end_with_their_table() {
        let spec = spec_of("GPTBigCodeForCausalLM", json!({"n_positions": null}));
        assert_eq!((spec.positions, spec.max_positions), (Positions::Learned, 1024));
    }
}
