//! Qwen v1 (`modeling_qwen.py` of Qwen-7B): a base of the rotary embedding that follows from the prompt's length, and
//! queries scaled by the logarithm of their position.

use super::config::Config;
use super::positions::{MAX_BASE, MIN_BASE, part_of};
use super::{Family, Reading, llama, shape};
use crate::error::{Error, Result};
use crate::model::layout::Place;
use crate::model::names::{LayerRole, MlpRole, Names, Role};
use crate::model::spec::{
    Activation, Attention, Bias, Block, DecoderSpec, Embedding, HeadAttention, Logits, Mlp, Positions, Rope,
    RopeScaling, limits,
};

/// Qwen v1.
pub(super) const QWEN: Family = Family { architectures: &["QWenLMHeadModel"], model_types: &["qwen"], read };

/// The first revision has names of its own: `n_embd`, `n_layer`, `n_head`, `ffn_hidden_size`, `n_positions`, and
/// `padded_vocab_size`, beside which its `vocab_size` counts no padding.
fn read(config: &Config<'_>) -> Result<Reading> {
    if config.mentions("visual") {
        return Err(Error::Unsupported("Qwen-VL (a Qwen config with visual) is not served".to_owned()));
    }
    let hidden = config.required_count(config.either("hidden_size", "n_embd"), limits::HIDDEN)?;
    let layers = config.required_count(config.either("num_hidden_layers", "n_layer"), limits::LAYERS)?;
    let heads = config.required_count(config.either("num_attention_heads", "n_head"), limits::HEADS)?;
    let head_dim = match config.count("kv_channels", limits::HEAD_DIM)? {
        Some(head_dim) => head_dim,
        None => shape::shared_width(config, hidden, heads)?,
    };
    let trained = config.required_count("seq_length", limits::POSITIONS)? as u32;
    let bias = shape::bias(!config.flag("no_bias")?.unwrap_or(true));
    let log_n = config.flag("use_logn_attn")?.unwrap_or(true);
    if log_n && trained < 2 {
        return Err(Error::Checkpoint(format!(
            "the config's seq_length {trained} has no logarithm to scale by"
        )));
    }
    let attention = HeadAttention {
        qkv_bias: Bias::Present,
        out_bias: bias,
        log_n: log_n.then_some(trained),
        ..shape::attention(heads, heads, head_dim)
    };
    let dynamic = config.flag("use_dynamic_ntk")?.unwrap_or(true);
    let rope = Rope {
        base: config.number("rotary_emb_base", MIN_BASE, MAX_BASE)?.unwrap_or(1e4),
        width: part_of(head_dim, config.number("rotary_pct", 0.0, 1.0)?.unwrap_or(1.0))?,
        scaling: if dynamic { RopeScaling::PromptNtk { trained } } else { RopeScaling::Unscaled },
    };
    let both_widths = config.either("intermediate_size", "ffn_hidden_size");
    // The file's number counts gate and up together.
    let width = config.required_count(both_widths, 2 * limits::WIDTH)? / 2;
    let spec = DecoderSpec {
        family: "qwen",
        vocab: config.required_count(config.either("padded_vocab_size", "vocab_size"), limits::VOCAB)?,
        hidden,
        max_positions: config
            .count(config.either("max_position_embeddings", "n_positions"), limits::POSITIONS)?
            .unwrap_or(8192),
        embedding: Embedding::PLAIN,
        norm: shape::rms(shape::eps(config, "layer_norm_epsilon", 1e-6)?),
        block: Block::Serial,
        branch_multiplier: 1.0,
        positions: Positions::Rope(vec![rope]),
        attention: Attention::Heads(attention),
        layers: shape::layers(layers, Mlp::Gated { activation: Activation::Silu, width, bias }),
        head: shape::head(config.flag("tie_word_embeddings")?.unwrap_or(false)),
        logits: Logits::PLAIN,
    };
    Ok(Reading { spec, names: NAMES, notes: Vec::new() })
}

const NAMES: Names = Names {
    prefixes: &[""],
    place,
    // Buffers that the first revision saved.
    ignores: |_, name| {
        llama::ignores(name) || name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")
    },
};

fn place(spec: &DecoderSpec, role: Role) -> Place {
    let fused = |names, which| Place::of(names).block(1, &shape::qkv_rows(spec), which);
    const QKV: &[&str] = &["transformer.h.{layer}.attn.c_attn.weight"];
    const QKV_BIAS: &[&str] = &["transformer.h.{layer}.attn.c_attn.bias"];
    let Role::Layer(_, part) = role else {
        return match role {
            Role::Embedding => Place::of(&["transformer.wte.weight"]),
            Role::FinalNorm => Place::of(&["transformer.ln_f.weight"]),
            Role::Head => Place::of(&["lm_head.weight"]),
            _ => Place::nowhere(),
        };
    };
    use LayerRole::*;
    match part {
        AttentionNorm => Place::of(&["transformer.h.{layer}.ln_1.weight"]),
        Query => fused(QKV, 0),
        QueryBias => fused(QKV_BIAS, 0),
        Key => fused(QKV, 1),
        KeyBias => fused(QKV_BIAS, 1),
        Value => fused(QKV, 2),
        ValueBias => fused(QKV_BIAS, 2),
        Output => Place::of(&["transformer.h.{layer}.attn.c_proj.weight"]),
        OutputBias => Place::of(&["transformer.h.{layer}.attn.c_proj.bias"]),
        MlpNorm => Place::of(&["transformer.h.{layer}.ln_2.weight"]),
        Mlp(MlpRole::Gate) => Place::of(&["transformer.h.{layer}.mlp.w2.weight"]),
        Mlp(MlpRole::GateBias) => Place::of(&["transformer.h.{layer}.mlp.w2.bias"]),
        Mlp(MlpRole::Up) => Place::of(&["transformer.h.{layer}.mlp.w1.weight"]),
        Mlp(MlpRole::UpBias) => Place::of(&["transformer.h.{layer}.mlp.w1.bias"]),
        Mlp(MlpRole::Down) => Place::of(&["transformer.h.{layer}.mlp.c_proj.weight"]),
        Mlp(MlpRole::DownBias) => Place::of(&["transformer.h.{layer}.mlp.c_proj.bias"]),
        _ => Place::nowhere(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{heads, refusal_of, spec_of};
    use crate::model::spec::{Bias, Mlp, RopeScaling};

    #[test]
    fn the_file_counts_gate_and_up_together() {
        let spec = spec_of("QWenLMHeadModel", json!({}));
        assert!(matches!(spec.layers[0].mlp, Mlp::Gated { width: 32, bias: Bias::Absent, .. }));
        assert_eq!((heads(&spec).qkv_bias, heads(&spec).out_bias), (Bias::Present, Bias::Absent));
        assert_eq!(heads(&spec).log_n, Some(32));
        assert_eq!(spec.ropes()[0].scaling, RopeScaling::PromptNtk { trained: 32 });
    }

    #[test]
    fn the_first_revision_has_names_of_its_own() {
        let first = json!({
            "hidden_size": null, "n_embd": 32, "num_hidden_layers": null, "n_layer": 3,
            "num_attention_heads": null, "n_head": 4, "intermediate_size": null, "ffn_hidden_size": 64,
            "max_position_embeddings": null, "n_positions": 128, "vocab_size": 97, "padded_vocab_size": 100
        });
        assert_eq!(spec_of("QWenLMHeadModel", first), spec_of("QWenLMHeadModel", json!({})));
    }

    #[test]
    fn what_depends_on_lengths_can_be_off() {
        let spec = spec_of("QWenLMHeadModel", json!({"use_dynamic_ntk": false, "use_logn_attn": false}));
        assert_eq!((heads(&spec).log_n, &spec.ropes()[0].scaling), (None, &RopeScaling::Unscaled));
    }

    #[test]
    fn pictures_are_refused() {
        let refusal = refusal_of("QWenLMHeadModel", json!({"visual": {"heads": 16}}));
        assert!(refusal.contains("Qwen-VL"), "{refusal}");
        assert!(refusal_of("QWenLMHeadModel", json!({"seq_length": 1})).contains("seq_length 1"));
    }
}
