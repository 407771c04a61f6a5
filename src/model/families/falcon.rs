//! Falcon 7B, 40B, 180B and Falcon2-11B (`modeling_falcon.py`): attention and a plain MLP added at once. From 40B on,
//! each has a norm of its own and the rows of a KV head follow those of its queries.

use super::config::Config;
use super::positions::{Wanted, rotary};
use super::{Family, Reading, bloom, llama, shape};
use crate::error::Result;
use crate::model::layout::Place;
use crate::model::names::{LayerRole, Names, Role};
use crate::model::spec::{Attention, Bias, Block, DecoderSpec, Embedding, Logits, Mlp, Positions, limits};

/// Falcon, `RefinedWeb` in its first files.
pub(super) const FALCON: Family = Family {
    architectures: &["FalconForCausalLM", "RWForCausalLM"],
    model_types: &["falcon", "RefinedWeb", "RefinedWebModel"],
    read,
};

fn read(config: &Config<'_>) -> Result<Reading> {
    // Falcon-RW scales its ALiBi with the scores, and has serial blocks with biases.
    config.only("alibi", false)?;
    config.only("bias", false)?;
    let hidden = config.required_count(config.either("hidden_size", "n_embed"), limits::HIDDEN)?;
    let layers = config.required_count(config.either("num_hidden_layers", "n_layer"), limits::LAYERS)?;
    let heads = config.required_count(config.either("num_attention_heads", "n_head"), limits::HEADS)?;
    let head_dim = shape::shared_width(config, hidden, heads)?;
    // The first 40B files have the KV heads and no name for the architecture.
    let kv_key = config.either("num_kv_heads", "n_head_kv");
    let grouped = config.flag("new_decoder_architecture")?.unwrap_or(config.mentions("n_head_kv"));
    let (kv_heads, two_norms) = if grouped {
        let kv_heads = config.count(kv_key, limits::HEADS)?.unwrap_or(heads);
        (kv_heads, config.count("num_ln_in_parallel_attn", 2)? != Some(1))
    } else {
        config.only("multi_query", true)?;
        config.only("parallel_attn", true)?;
        (1, false)
    };
    let rotary = rotary(
        config,
        &Wanted {
            head_dim,
            max_positions: config.count("max_position_embeddings", limits::POSITIONS)?.unwrap_or(2048),
            base: 1e4,
            part: None,
            aliases: &[],
        },
    )?;
    let mlp = Mlp::Plain {
        activation: shape::activation(config, "activation", "gelu")?,
        width: config.count("ffn_hidden_size", limits::WIDTH)?.unwrap_or(4 * hidden),
        bias: Bias::Absent,
    };
    let spec = DecoderSpec {
        family: "falcon",
        vocab: config.required_count("vocab_size", limits::VOCAB)?,
        hidden,
        max_positions: rotary.max_positions,
        embedding: Embedding::PLAIN,
        norm: shape::layer_norm(shape::eps(config, "layer_norm_epsilon", 1e-5)?),
        block: if two_norms { Block::ParallelTwoNorms } else { Block::ParallelOneNorm },
        branch_multiplier: 1.0,
        positions: Positions::Rope(rotary.ropes),
        attention: Attention::Heads(shape::attention(heads, kv_heads, head_dim)),
        layers: shape::layers(layers, mlp),
        head: shape::head(config.flag("tie_word_embeddings")?.unwrap_or(true)),
        logits: Logits::PLAIN,
    };
    Ok(Reading { spec, names: NAMES, notes: rotary.notes })
}

const NAMES: Names =
    Names { prefixes: &["transformer.", ""], place, ignores: |_, name| llama::ignores(name) };

/// BLOOM's names, and a block of rows for each KV head: its queries, its key, its value.
fn place(spec: &DecoderSpec, role: Role) -> Place {
    let kv_heads = spec.attention.kv_heads();
    let by_group = |which| {
        let place = Place::of(&["h.{layer}.self_attention.query_key_value.weight"]);
        place.block(kv_heads, &shape::qkv_rows_of(spec, kv_heads), which)
    };
    let two_norms = spec.block == Block::ParallelTwoNorms;
    match role {
        Role::Layer(_, LayerRole::Query) => by_group(0),
        Role::Layer(_, LayerRole::Key) => by_group(1),
        Role::Layer(_, LayerRole::Value) => by_group(2),
        Role::Layer(_, LayerRole::AttentionNorm) if two_norms => Place::of(&["h.{layer}.ln_attn.weight"]),
        Role::Layer(_, LayerRole::AttentionNormBias) if two_norms => Place::of(&["h.{layer}.ln_attn.bias"]),
        Role::Layer(_, LayerRole::MlpNorm) => Place::of(&["h.{layer}.ln_mlp.weight"]),
        Role::Layer(_, LayerRole::MlpNormBias) => Place::of(&["h.{layer}.ln_mlp.bias"]),
        _ => bloom::place(spec, role),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{heads, refusal_of, spec_of};
    use crate::model::spec::Block;

    #[test]
    fn generations() {
        let large = spec_of("FalconForCausalLM", json!({}));
        assert_eq!((large.block, heads(&large).kv_heads), (Block::ParallelTwoNorms, 2));
        let of_11b = spec_of("FalconForCausalLM", json!({"num_ln_in_parallel_attn": 1}));
        assert_eq!((of_11b.block, heads(&of_11b).kv_heads), (Block::ParallelOneNorm, 2));
        // Files of the new dialect state as many KV heads as heads beside multi_query.
        let small = json!({"new_decoder_architecture": false, "multi_query": true, "num_kv_heads": 4});
        let small = spec_of("FalconForCausalLM", small);
        assert_eq!((small.block, heads(&small).kv_heads), (Block::ParallelOneNorm, 1));
    }

    #[test]
    fn first_files_have_other_keys() {
        let first = json!({
            "new_decoder_architecture": null, "num_kv_heads": null, "n_head_kv": 2, "num_hidden_layers": null,
            "n_layer": 3, "num_attention_heads": null, "n_head": 4
        });
        assert_eq!(spec_of("FalconForCausalLM", first), spec_of("FalconForCausalLM", json!({})));
    }

    #[test]
    fn falcon_rw_is_refused_by_its_keys() {
        let small = json!({"new_decoder_architecture": false});
        for (key, value) in
            [("alibi", true), ("bias", true), ("multi_query", false), ("parallel_attn", false)]
        {
            let mut change = small.clone();
            change[key] = json!(value);
            let refusal = refusal_of("FalconForCausalLM", change);
            assert!(refusal.contains(&format!("{key} is {value}")), "{refusal}");
        }
    }
}
