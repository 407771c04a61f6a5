//! StarCoder and SantaCoder (`modeling_gpt_bigcode.py`): a table of positions, and one KV head for all queries.

use super::config::Config;
use super::{Family, Reading, shape};
use crate::error::Result;
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
    let multi_query = config.flag("multi_query")?.unwrap_or(true);
    let kv_heads = if multi_query { 1 } else { heads };
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
    Ok(Reading { spec, names: if multi_query { NAMES } else { NAMES_BY_HEAD }, notes: Vec::new() })
}
