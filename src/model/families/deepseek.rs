//! DeepSeek-V2, V2-Lite, V3 and R1 (`modeling_deepseek.py`; DeepSeek-V3's `inference/model.py`): latent attention, and
//! experts beside a shared one after some dense layers.

use super::config::Config;
use super::llama;
use super::positions::{Rotary, Wanted, rotary, yarn_amplitude};
use super::{Family, Reading, shape};
use crate::error::{Error, Result};
use crate::model::layout::{Pairs, Place};
use crate::model::names::{LayerRole, MlpRole, Names, Role};
use crate::model::spec::{
    Activation, Attention, Bias, Block, DecoderSpec, Embedding, Experts, Groups, LatentAttention, Layer,
    Logits, Mask, Mlp, Norm, Positions, Router, limits,
};

/// DeepSeek-V2 and V2-Lite.
pub(super) const DEEPSEEK_V2: Family = Family {
    architectures: &["DeepseekV2ForCausalLM"],
    model_types: &["deepseek_v2"],
    read: |config| read("deepseek_v2", config, softmax_router),
};

/// DeepSeek-V3 and R1.
pub(super) const DEEPSEEK_V3: Family = Family {
    architectures: &["DeepseekV3ForCausalLM"],
    model_types: &["deepseek_v3", "kimi_k2"],
    read: |config| read(V3, config, sigmoid_router),
};

/// The newer one's name.
const V3: &str = "deepseek_v3";

/// Of both latents, whatever the eps of the blocks.
const LATENT_NORM: Norm = Norm::Rms { eps: 1e-6 };

fn read(
    family: &'static str,
    config: &Config<'_>,
    router: fn(&Config<'_>) -> Result<Router>,
) -> Result<Reading> {
    config.only("attention_bias", false)?;
    config.only("mlp_bias", false)?;
    config.only("rope_interleave", true)?;
    let (attention, rotary) = attention(config)?;
    let experts = match config.count("n_routed_experts", limits::EXPERTS)? {
        Some(n_experts) => Some(experts(config, n_experts, router)?),
        None => None,
    };
    let dense = Mlp::Gated {
        activation: activation(config)?,
        width: config.required_count("intermediate_size", limits::WIDTH)?,
        bias: Bias::Absent,
    };
    let first = config.index("first_k_dense_replace", limits::LAYERS)?.unwrap_or(0);
    let frequency = config.count("moe_layer_freq", limits::LAYERS)?.unwrap_or(1);
    let mlp = |layer: usize| match experts {
        Some(experts) if layer >= first && layer.is_multiple_of(frequency) => Mlp::Experts(experts),
        _ => dense,
    };
    let layers = config.required_count("num_hidden_layers", limits::LAYERS)?;
    let spec = DecoderSpec {
        family,
        vocab: config.required_count("vocab_size", limits::VOCAB)?,
        hidden: config.required_count("hidden_size", limits::HIDDEN)?,
        max_positions: rotary.max_positions,
        embedding: Embedding::PLAIN,
        norm: shape::rms(shape::eps(config, "rms_norm_eps", 1e-6)?),
        block: Block::Serial,
        branch_multiplier: 1.0,
        positions: Positions::Rope(rotary.ropes),
        attention: Attention::Latent(attention),
        layers: (0..layers).map(|layer| Layer { mask: Mask::Causal, rope: 0, mlp: mlp(layer) }).collect(),
        head: shape::head(config.flag("tie_word_embeddings")?.unwrap_or(false)),
        logits: Logits::PLAIN,
    };
    Ok(Reading { spec, names: NAMES, notes: rotary.notes })
}

fn activation(config: &Config<'_>) -> Result<Activation> {
    shape::activation(config, "hidden_act", "silu")
}

fn attention(config: &Config<'_>) -> Result<(LatentAttention, Rotary)> {
    let width = |key| config.required_count(key, limits::HEAD_DIM);
    let (nope_dim, rope_dim, value_dim) =
        (width("qk_nope_head_dim")?, width("qk_rope_head_dim")?, width("v_head_dim")?);
    let query_rank = match config.count("q_lora_rank", limits::HIDDEN)? {
        // Only an explicit null means queries without a latent.
        None if !config.mentions("q_lora_rank") => return Err(config.missing("q_lora_rank")),
        rank => rank,
    };
    let rotary = rotary(
        config,
        &Wanted {
            head_dim: rope_dim,
            max_positions: config.required_count("max_position_embeddings", limits::POSITIONS)?,
            base: 1e4,
            part: None,
            aliases: &[],
        },
    )?;
    let attention = LatentAttention {
        heads: config.required_count("num_attention_heads", limits::HEADS)?,
        query_rank,
        kv_rank: config.required_count("kv_lora_rank", limits::HIDDEN)?,
        nope_dim,
        rope_dim,
        value_dim,
        scale: (((nope_dim + rope_dim) as f64).powf(-0.5) * score_stretch(config)?) as f32,
        norm: LATENT_NORM,
    };
    Ok((attention, rotary))
}

/// What scores are multiplied by beside `1/sqrt(width)`: the square of YaRN's amplitude by `mscale_all_dim`.
fn score_stretch(config: &Config<'_>) -> Result<f64> {
    let scaling = match config.section("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => config.section("rope_scaling")?,
    };
    let Some(scaling) = scaling else { return Ok(1.0) };
    match scaling.number("mscale_all_dim", 0.0, 1e6)? {
        Some(scale) if scale > 0.0 => {
            Ok(yarn_amplitude(scaling.required_number("factor", 1.0, 1e6)?, scale).powi(2))
        }
        _ => Ok(1.0),
    }
}

fn experts(
    config: &Config<'_>,
    n_experts: usize,
    router: fn(&Config<'_>) -> Result<Router>,
) -> Result<Experts> {
    let width = config.required_count("moe_intermediate_size", limits::WIDTH)?;
    let shared = config.index("n_shared_experts", limits::EXPERTS)?.unwrap_or(0);
    Ok(Experts {
        n_experts,
        n_chosen: config.required_count("num_experts_per_tok", limits::EXPERTS)?,
        width,
        activation: activation(config)?,
        bias: Bias::Absent,
        router: router(config)?,
        // The shared experts are one MLP.
        shared_width: shared * width,
    })
}

fn factor(config: &Config<'_>) -> Result<f32> {
    Ok(config.number("routed_scaling_factor", 1e-6, 1e6)?.unwrap_or(1.0) as f32)
}

fn groups(config: &Config<'_>) -> Result<Groups> {
    let n = config.count("n_group", limits::EXPERTS)?.unwrap_or(1);
    Ok(Groups { n, n_used: config.count("topk_group", limits::EXPERTS)?.unwrap_or(n) })
}

/// Version 2. With `norm_topk_prob` its two references differ, and no published model has it.
fn softmax_router(config: &Config<'_>) -> Result<Router> {
    config.only("norm_topk_prob", false)?;
    served(config, "scoring_func", &["softmax"])?;
    let groups = match served(config, "topk_method", &["greedy", "group_limited_greedy"])? {
        Some("group_limited_greedy") => groups(config)?,
        _ => Groups { n: 1, n_used: 1 },
    };
    Ok(Router::Softmax { factor: factor(config)?, groups })
}

/// Version 3.
fn sigmoid_router(config: &Config<'_>) -> Result<Router> {
    config.only("norm_topk_prob", true)?;
    served(config, "scoring_func", &["sigmoid"])?;
    served(config, "topk_method", &["noaux_tc"])?;
    Ok(Router::Sigmoid { factor: factor(config)?, groups: groups(config)? })
}

/// A key of few possible values.
fn served<'a>(config: &Config<'a>, key: &str, values: &[&str]) -> Result<Option<&'a str>> {
    match config.text(key)? {
        Some(value) if !values.contains(&value) => Err(Error::Unsupported(format!(
            "the config's {key} is {value:.40}, which is not served in this family"
        ))),
        value => Ok(value),
    }
}

const NAMES: Names = Names { prefixes: &[""], place, ignores };

/// Old buffers, and the layer after the last, which predicts a second token.
fn ignores(spec: &DecoderSpec, name: &str) -> bool {
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
    llama::ignores(name) || (spec.family == V3 && layer == Some(spec.layers()))
}

fn place(spec: &DecoderSpec, role: Role) -> Place {
    let Role::Layer(_, part) = role else { return llama::place(spec, role) };
    let Attention::Latent(latent) = spec.attention else { return Place::nowhere() };
    let LatentAttention { heads, kv_rank, nope_dim, rope_dim, value_dim, .. } = latent;
    let up = |which| {
        Place::of(&["model.layers.{layer}.self_attn.kv_b_proj.weight"]).block(
            heads,
            &[nope_dim, value_dim],
            which,
        )
    };
    use LayerRole::*;
    match part {
        Query => Place::of(match latent.query_rank {
            Some(_) => &["model.layers.{layer}.self_attn.q_b_proj.weight"],
            None => &["model.layers.{layer}.self_attn.q_proj.weight"],
        })
        .pairs(Pairs { head: nope_dim + rope_dim, first: nope_dim, width: rope_dim }),
        QueryDown => Place::of(&["model.layers.{layer}.self_attn.q_a_proj.weight"]),
        QueryDownNorm => Place::of(&["model.layers.{layer}.self_attn.q_a_layernorm.weight"]),
        KvDown => Place::of(&["model.layers.{layer}.self_attn.kv_a_proj_with_mqa.weight"]).pairs(Pairs {
            head: kv_rank + rope_dim,
            first: kv_rank,
            width: rope_dim,
        }),
        KvDownNorm => Place::of(&["model.layers.{layer}.self_attn.kv_a_layernorm.weight"]),
        KeyUp => up(0),
        ValueUp => up(1),
        ChoiceBias => Place::of(&["model.layers.{layer}.mlp.gate.e_score_correction_bias"]),
        SharedExpert(MlpRole::Gate) => {
            Place::of(&["model.layers.{layer}.mlp.shared_experts.gate_proj.weight"])
        }
        SharedExpert(MlpRole::Up) => Place::of(&["model.layers.{layer}.mlp.shared_experts.up_proj.weight"]),
        SharedExpert(MlpRole::Down) => {
            Place::of(&["model.layers.{layer}.mlp.shared_experts.down_proj.weight"])
        }
        _ => llama::place(spec, role),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::families::resolve;
    use crate::model::families::tests::{config_of, refusal_of, spec_of};

    fn latent(spec: &DecoderSpec) -> LatentAttention {
        match spec.attention {
            Attention::Latent(latent) => latent,
            Attention::Heads(heads) => panic!("{heads:?}"),
        }
    }

    fn experts_of(spec: &DecoderSpec, layer: usize) -> Experts {
        match spec.layers[layer].mlp {
            Mlp::Experts(experts) => experts,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn published_scales() {
        // DeepSeek-V2-Lite: (128 + 64)^(−1/2) · (0.1 · 0.707 · ln 40 + 1)².
        let sizes = json!({"qk_nope_head_dim": 128, "qk_rope_head_dim": 64});
        let scale = latent(&spec_of("DeepseekV2ForCausalLM", sizes)).scale;
        assert!((scale - 0.114_721).abs() < 1e-6, "{scale}");
        let plain = json!({"rope_scaling": null});
        assert_eq!(latent(&spec_of("DeepseekV2ForCausalLM", plain)).scale, 12f32.powf(-0.5));
    }

    #[test]
    fn queries_have_a_latent_unless_it_is_null() {
        assert_eq!(latent(&spec_of("DeepseekV2ForCausalLM", json!({}))).query_rank, Some(24));
        assert_eq!(latent(&spec_of("DeepseekV2ForCausalLM", json!({"q_lora_rank": null}))).query_rank, None);
    }

    #[test]
    fn dense_layers_come_first() {
        let spec = spec_of("DeepseekV2ForCausalLM", json!({}));
        assert!(matches!(spec.layers[0].mlp, Mlp::Gated { width: 64, .. }));
        assert_eq!((experts_of(&spec, 1).shared_width, experts_of(&spec, 2).n_chosen), (48, 3));
        let every_second = spec_of("DeepseekV2ForCausalLM", json!({"moe_layer_freq": 2}));
        assert!(matches!(every_second.layers[1].mlp, Mlp::Gated { .. }));
    }

    #[test]
    fn routers() {
        let router = |name, change| experts_of(&spec_of(name, change), 1).router;
        let groups = Groups { n: 4, n_used: 2 };
        let grouped = router("DeepseekV2ForCausalLM", json!({}));
        assert_eq!(grouped, Router::Softmax { factor: 16.0, groups });
        let greedy = json!({"topk_method": "greedy", "routed_scaling_factor": 1.0});
        let everywhere = Groups { n: 1, n_used: 1 };
        assert_eq!(
            router("DeepseekV2ForCausalLM", greedy),
            Router::Softmax { factor: 1.0, groups: everywhere }
        );
        assert_eq!(router("DeepseekV3ForCausalLM", json!({})), Router::Sigmoid { factor: 2.5, groups });
    }

    #[test]
    fn other_routers_are_refused_by_key() {
        for (name, key, value) in [
            ("DeepseekV2ForCausalLM", "norm_topk_prob", json!(true)),
            ("DeepseekV2ForCausalLM", "topk_method", json!("noaux_tc")),
            ("DeepseekV2ForCausalLM", "scoring_func", json!("sigmoid")),
            ("DeepseekV3ForCausalLM", "norm_topk_prob", json!(false)),
            ("DeepseekV3ForCausalLM", "scoring_func", json!("softmax")),
            ("DeepseekV3ForCausalLM", "attention_bias", json!(true)),
        ] {
            let refusal = refusal_of(name, json!({key: value}));
            assert!(refusal.contains(key), "{refusal}");
        }
        let quantized =
            json!({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}});
        assert!(refusal_of("DeepseekV3ForCausalLM", quantized).contains("quantized (fp8)"));
    }

    #[test]
    fn the_layer_that_predicts_a_second_token_is_skipped() {
        let resolved = resolve(&config_of("DeepseekV3ForCausalLM", json!({}))).unwrap();
        let ignores = |name| (resolved.names.ignores)(&resolved.spec, name);
        assert!(ignores("model.layers.3.eh_proj.weight"));
        assert!(!ignores("model.layers.2.eh_proj.weight") && !ignores("model.layers.4.eh_proj.weight"));
        let older = resolve(&config_of("DeepseekV2ForCausalLM", json!({}))).unwrap();
        assert!(!(older.names.ignores)(&older.spec, "model.layers.3.mlp.gate.weight"));
    }
}
