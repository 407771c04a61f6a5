//! BLOOM (`modeling_bloom.py`): ALiBi, a norm on the embedding, biases everywhere, and the rows of queries, keys and
//! values in turns, head by head.

use super::config::Config;
use super::{Family, Reading, shape};
use crate::error::Result;
use crate::model::layout::Place;
use crate::model::names::{LayerRole, MlpRole, Names, Role};
use crate::model::spec::{
    Activation, Attention, Bias, Block, DecoderSpec, Embedding, HeadAttention, Logits, Mlp, Positions, limits,
};

/// BLOOM.
pub(super) const BLOOM: Family =
    Family { architectures: &["BloomForCausalLM"], model_types: &["bloom"], read };

fn read(config: &Config<'_>) -> Result<Reading> {
    config.only("apply_residual_connection_post_layernorm", false)?;
    let hidden = config.required_count(config.either("hidden_size", "n_embed"), limits::HIDDEN)?;
    let layers = config.required_count(config.either("n_layer", "num_hidden_layers"), limits::LAYERS)?;
    let heads = config.required_count(config.either("n_head", "num_attention_heads"), limits::HEADS)?;
    let attention = shape::attention(heads, heads, shape::shared_width(config, hidden, heads)?);
    let norm = shape::layer_norm(shape::eps(config, "layer_norm_epsilon", 1e-5)?);
    let mlp = Mlp::Plain { activation: Activation::GeluTanh, width: 4 * hidden, bias: Bias::Present };
    let spec = DecoderSpec {
        family: "bloom",
        vocab: config.required_count("vocab_size", limits::VOCAB)?,
        hidden,
        max_positions: config.count("seq_length", limits::POSITIONS)?.unwrap_or(2048),
        embedding: Embedding { norm: Some(norm), ..Embedding::PLAIN },
        norm,
        block: Block::Serial,
        branch_multiplier: 1.0,
        positions: Positions::Alibi,
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

/// Some public files leave out the prefix.
const NAMES: Names = Names { prefixes: &["transformer.", ""], place, ignores: |_, _| false };

/// Where BLOOM's checkpoints keep a role, after the prefix.
pub(super) fn place(spec: &DecoderSpec, role: Role) -> Place {
    let heads = spec.attention.heads();
    let by_head = |names, which| Place::of(names).block(heads, &shape::qkv_rows_of(spec, heads), which);
    const QKV: &[&str] = &["h.{layer}.self_attention.query_key_value.weight"];
    const QKV_BIAS: &[&str] = &["h.{layer}.self_attention.query_key_value.bias"];
    let Role::Layer(_, part) = role else {
        return match role {
            Role::Embedding => Place::of(&["word_embeddings.weight"]),
            Role::EmbeddingNorm => Place::of(&["word_embeddings_layernorm.weight"]),
            Role::EmbeddingNormBias => Place::of(&["word_embeddings_layernorm.bias"]),
            Role::FinalNorm => Place::of(&["ln_f.weight"]),
            Role::FinalNormBias => Place::of(&["ln_f.bias"]),
            Role::Head => Place::of(&["lm_head.weight"]),
            _ => Place::nowhere(),
        };
    };
    use LayerRole::*;
    match part {
        AttentionNorm => Place::of(&["h.{layer}.input_layernorm.weight"]),
        AttentionNormBias => Place::of(&["h.{layer}.input_layernorm.bias"]),
        Query => by_head(QKV, 0),
        QueryBias => by_head(QKV_BIAS, 0),
        Key => by_head(QKV, 1),
        KeyBias => by_head(QKV_BIAS, 1),
        Value => by_head(QKV, 2),
        ValueBias => by_head(QKV_BIAS, 2),
        Output => Place::of(&["h.{layer}.self_attention.dense.weight"]),
        OutputBias => Place::of(&["h.{layer}.self_attention.dense.bias"]),
        MlpNorm => Place::of(&["h.{layer}.post_attention_layernorm.weight"]),
        MlpNormBias => Place::of(&["h.{layer}.post_attention_layernorm.bias"]),
        Mlp(MlpRole::Up) => Place::of(&["h.{layer}.mlp.dense_h_to_4h.weight"]),
        Mlp(MlpRole::UpBias) => Place::of(&["h.{layer}.mlp.dense_h_to_4h.bias"]),
        Mlp(MlpRole::Down) => Place::of(&["h.{layer}.mlp.dense_4h_to_h.weight"]),
        Mlp(MlpRole::DownBias) => Place::of(&["h.{layer}.mlp.dense_4h_to_h.bias"]),
        _ => Place::nowhere(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{refusal_of, spec_of};
    use crate::model::spec::{Activation, Bias, Mlp, Norm, Positions};

    #[test]
    fn both_generations_of_keys() {
        let norm = Norm::Layer { eps: 1e-5, bias: Bias::Present };
        let new = spec_of("BloomForCausalLM", json!({}));
        let old = json!({
            "hidden_size": null, "n_embed": 24, "n_layer": null, "num_hidden_layers": 3, "n_head": null,
            "num_attention_heads": 6
        });
        assert_eq!(spec_of("BloomForCausalLM", old), new);
        assert_eq!(
            (new.positions, new.embedding.norm, new.max_positions),
            (Positions::Alibi, Some(norm), 64)
        );
        let mlp = Mlp::Plain { activation: Activation::GeluTanh, width: 96, bias: Bias::Present };
        assert_eq!(new.layers[2].mlp, mlp);
    }

    #[test]
    fn residuals_of_norms_are_refused() {
        let refusal =
            refusal_of("BloomForCausalLM", json!({"apply_residual_connection_post_layernorm": true}));
        assert!(refusal.contains("apply_residual_connection_post_layernorm is true"), "{refusal}");
    }
}
