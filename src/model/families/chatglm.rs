//! ChatGLM2, and ChatGLM3 and CodeGeeX2 of the same class (`modeling_chatglm.py` of ChatGLM2-6B): neighbours turn, in
//! half of each head.

use super::config::Config;
use super::{Family, Reading, shape};
use crate::error::{Error, Result};
use crate::model::layout::{Pairs, Place};
use crate::model::names::{LayerRole, MlpRole, Names, Role};
use crate::model::spec::{
    Activation, Attention, Block, DecoderSpec, Embedding, HeadAttention, Logits, Mlp, Positions, Rope,
    RopeScaling, limits,
};

/// ChatGLM2.
pub(super) const CHATGLM: Family = Family {
    architectures: &["ChatGLMModel", "ChatGLMForConditionalGeneration"],
    model_types: &["chatglm"],
    read,
};

fn read(config: &Config<'_>) -> Result<Reading> {
    // The first ChatGLM, another model of the same name, has neither.
    if config.flag("multi_query_attention")? != Some(true) || !config.mentions("padded_vocab_size") {
        return Err(Error::Unsupported(
            "a ChatGLM without multi_query_attention and padded_vocab_size (ChatGLM 1) is not served"
                .to_owned(),
        ));
    }
    let served = [
        ("rmsnorm", true),
        ("post_layer_norm", true),
        ("original_rope", true),
        ("apply_residual_connection_post_layernorm", false),
    ];
    served.iter().try_for_each(|&(key, value)| config.only(key, value))?;
    let hidden = config.required_count("hidden_size", limits::HIDDEN)?;
    let layers = config.required_count("num_layers", limits::LAYERS)?;
    let heads = config.required_count("num_attention_heads", limits::HEADS)?;
    let kv_heads = config.required_count("multi_query_group_num", limits::HEADS)?;
    let head_dim = config.count("kv_channels", limits::HEAD_DIM)?.unwrap_or(128);
    let linear_bias = shape::bias(config.flag("add_bias_linear")?.unwrap_or(false));
    let qkv_bias =
        config.flag("add_qkv_bias")?.unwrap_or(false) || config.flag("add_bias_linear")?.unwrap_or(false);
    let attention = HeadAttention {
        qkv_bias: shape::bias(qkv_bias),
        out_bias: linear_bias,
        ..shape::attention(heads, kv_heads, head_dim)
    };
    let stretch = config.number("rope_ratio", 1e-3, 1e9)?.unwrap_or(1.0);
    let rope = Rope {
        base: 1e4 * stretch,
        width: super::positions::part_of(head_dim, 0.5)?,
        scaling: RopeScaling::Unscaled,
    };
    let mlp = Mlp::Gated {
        activation: Activation::Silu,
        width: config.required_count("ffn_hidden_size", limits::WIDTH)?,
        bias: linear_bias,
    };
    let spec = DecoderSpec {
        family: "chatglm",
        vocab: config.required_count("padded_vocab_size", limits::VOCAB)?,
        hidden,
        max_positions: config.count("seq_length", limits::POSITIONS)?.unwrap_or(2048),
        embedding: Embedding::PLAIN,
        norm: shape::rms(shape::eps(config, "layernorm_epsilon", 1e-5)?),
        block: Block::Serial,
        branch_multiplier: 1.0,
        positions: Positions::Rope(vec![rope]),
        attention: Attention::Heads(attention),
        layers: shape::layers(layers, mlp),
        head: shape::head(config.flag("tie_word_embeddings")?.unwrap_or(false)),
        logits: Logits::PLAIN,
    };
    Ok(Reading { spec, names: NAMES, notes: Vec::new() })
}

const NAMES: Names =
    Names { prefixes: &[""], place, ignores: |_, name| name == "transformer.rotary_pos_emb.inv_freq" };

fn place(spec: &DecoderSpec, role: Role) -> Place {
    let Role::Layer(layer, part) = role else {
        return match role {
            Role::Embedding => Place::of(&["transformer.embedding.word_embeddings.weight"]),
            Role::FinalNorm => Place::of(&["transformer.encoder.final_layernorm.weight"]),
            Role::Head => Place::of(&["transformer.output_layer.weight"]),
            _ => Place::nowhere(),
        };
    };
    let Attention::Heads(HeadAttention { head_dim, .. }) = spec.attention else { return Place::nowhere() };
    let qkv = |names, which| Place::of(names).block(1, &shape::qkv_rows(spec), which);
    let turned =
        |names, which| qkv(names, which).pairs(Pairs { head: head_dim, first: 0, width: head_dim / 2 });
    let gate_up = |names, which| {
        let width = spec.layers[layer].mlp.width();
        Place::of(names).block(1, &[width, width], which)
    };
    const QKV: &[&str] = &["transformer.encoder.layers.{layer}.self_attention.query_key_value.weight"];
    const QKV_BIAS: &[&str] = &["transformer.encoder.layers.{layer}.self_attention.query_key_value.bias"];
    const GATE_UP: &[&str] = &["transformer.encoder.layers.{layer}.mlp.dense_h_to_4h.weight"];
    const GATE_UP_BIAS: &[&str] = &["transformer.encoder.layers.{layer}.mlp.dense_h_to_4h.bias"];
    use LayerRole::*;
    match part {
        AttentionNorm => Place::of(&["transformer.encoder.layers.{layer}.input_layernorm.weight"]),
        Query => turned(QKV, 0),
        QueryBias => turned(QKV_BIAS, 0),
        Key => turned(QKV, 1),
        KeyBias => turned(QKV_BIAS, 1),
        Value => qkv(QKV, 2),
        ValueBias => qkv(QKV_BIAS, 2),
        Output => Place::of(&["transformer.encoder.layers.{layer}.self_attention.dense.weight"]),
        OutputBias => Place::of(&["transformer.encoder.layers.{layer}.self_attention.dense.bias"]),
        MlpNorm => Place::of(&["transformer.encoder.layers.{layer}.post_attention_layernorm.weight"]),
        Mlp(MlpRole::Gate) => gate_up(GATE_UP, 0),
        Mlp(MlpRole::GateBias) => gate_up(GATE_UP_BIAS, 0),
        Mlp(MlpRole::Up) => gate_up(GATE_UP, 1),
        Mlp(MlpRole::UpBias) => gate_up(GATE_UP_BIAS, 1),
        Mlp(MlpRole::Down) => Place::of(&["transformer.encoder.layers.{layer}.mlp.dense_4h_to_h.weight"]),
        Mlp(MlpRole::DownBias) => Place::of(&["transformer.encoder.layers.{layer}.mlp.dense_4h_to_h.bias"]),
        _ => Place::nowhere(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{heads, refusal_of, spec_of};
    use crate::model::spec::Bias;

    #[test]
    fn half_of_each_head_turns() {
        let spec = spec_of("ChatGLMModel", json!({"add_bias_linear": false}));
        let rope = &spec.ropes()[0];
        assert_eq!((rope.width, rope.base, spec.max_positions), (4, 2e4, 128));
        let attention = heads(&spec);
        assert_eq!(
            (attention.kv_heads, attention.qkv_bias, attention.out_bias),
            (2, Bias::Present, Bias::Absent)
        );
    }

    #[test]
    fn other_models_of_the_name_are_refused() {
        for change in
            [json!({"multi_query_attention": null}), json!({"padded_vocab_size": null, "vocab_size": 100})]
        {
            let refusal = refusal_of("ChatGLMModel", change);
            assert!(refusal.contains("padded_vocab_size"), "{refusal}");
        }
        for (key, value) in [("rmsnorm", false), ("post_layer_norm", false), ("original_rope", false)] {
            let refusal = refusal_of("ChatGLMModel", json!({key: value}));
            assert!(refusal.contains(key), "{refusal}");
        }
    }
}
