//! BLOOM (`modeling_bloom.py`): ALiBi, a norm on the embedding, biases everywhere, and the rows of queries, keys and
//! values in turns, head by head.

use super::config::Config;
use super::{Family, Reading, shape};
use crate::error::Result;
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
