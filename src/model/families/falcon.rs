//! Falcon 7B, 40B, 180B and Falcon2-11B (`modeling_falcon.py`): attention and a plain MLP added at once. From 40B on,
//! each has a norm of its own and the rows of a KV head follow those of its queries.

use super::config::Config;
use super::positions::{Wanted, rotary};
use super::{Family, Reading, shape};
use crate::error::{Error, Result};
use crate::model::spec::{
    Attention, Bias, Block, DecoderSpec, Embedding, Logits, Mlp, Positions, limits,
};

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
    Ok(Reading { spec, names: if grouped { NAMES_BY_GROUP } else { NAMES }, notes: rotary.notes })
}
