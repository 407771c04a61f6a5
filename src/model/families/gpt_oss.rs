//! GPT-OSS (`modeling_gpt_oss.py`): biases on attention and experts, sink logits, a window on every second layer.

use super::config::Config;
use super::llama::{self, CLASS, Class};
use super::{Family, Reading, shape};
use crate::error::Result;
use crate::model::layout::Place;
use crate::model::names::{LayerRole, MlpRole, Names, Role};
use crate::model::spec::{Activation, Bias, DecoderSpec, Experts, Mlp, Router, Sinks, limits};

/// GPT-OSS, its experts stored in bf16.
pub(super) const GPT_OSS: Family =
    Family { architectures: &["GptOssForCausalLM"], model_types: &["gpt_oss"], read };

fn read(config: &Config<'_>) -> Result<Reading> {
    // Its class would stretch by yarn where a file says nothing of it.
    if !config.mentions("rope_scaling") && !config.mentions("rope_parameters") {
        return Err(config.missing("rope_scaling"));
    }
    let class = Class {
        head_dim: Some(64),
        kv_heads: Some(8),
        max_positions: 131_072,
        rope_base: 150_000.0,
        eps: 1e-5,
        ..CLASS
    };
    let bias = shape::bias(config.flag("attention_bias")?.unwrap_or(true));
    let mut reading = llama::read("gpt_oss", config, &class, |attention| {
        attention.qkv_bias = bias;
        attention.out_bias = bias;
        attention.sinks = Sinks::Present;
    })?;
    let spec = &mut reading.spec;
    let limit = config.number("swiglu_limit", 1e-3, 1e6)?.unwrap_or(7.0) as f32;
    let experts = Mlp::Experts(Experts {
        n_experts: config
            .required_count(config.either("num_local_experts", "num_experts"), limits::EXPERTS)?,
        n_chosen: config
            .required_count(config.either("num_experts_per_tok", "experts_per_token"), limits::EXPERTS)?,
        width: config.required_count("intermediate_size", limits::WIDTH)?,
        activation: Activation::ClampedSwiglu { limit },
        bias: Bias::Present,
        router: Router::SoftmaxOfChosen,
        shared_width: 0,
    });
    spec.layers.iter_mut().for_each(|layer| layer.mlp = experts);
    let window = shape::windowed(shape::window(config, Some(128))?, spec.max_positions);
    shape::slide(config, &mut spec.layers, window, |layer| layer % 2 == 0)?;
    Ok(Reading { names: NAMES, ..reading })
}

const NAMES: Names = Names { place, ..llama::NAMES };

/// The experts of a layer share tensors, stored `[expert, in, out]`; gates and ups alternate.
fn place(spec: &DecoderSpec, role: Role) -> Place {
    let Role::Layer(layer, part) = role else { return llama::place(spec, role) };
    let Mlp::Experts(experts) = spec.layers[layer].mlp else { return Place::nowhere() };
    let gate_up = |which| {
        let place = Place::of(&["model.layers.{layer}.mlp.experts.gate_up_proj"]).stacked(experts.n_experts);
        place.transposed().block(experts.width, &[1, 1], which)
    };
    let gate_up_bias = |which| {
        let place = Place::of(&["model.layers.{layer}.mlp.experts.gate_up_proj_bias"]);
        place.stacked(experts.n_experts).block(experts.width, &[1, 1], which)
    };
    match part {
        LayerRole::Sinks => Place::of(&["model.layers.{layer}.self_attn.sinks"]),
        LayerRole::Router => Place::of(&["model.layers.{layer}.mlp.router.weight"]),
        LayerRole::RouterBias => Place::of(&["model.layers.{layer}.mlp.router.bias"]),
        LayerRole::Expert(_, MlpRole::Gate) => gate_up(0),
        LayerRole::Expert(_, MlpRole::Up) => gate_up(1),
        LayerRole::Expert(_, MlpRole::GateBias) => gate_up_bias(0),
        LayerRole::Expert(_, MlpRole::UpBias) => gate_up_bias(1),
        LayerRole::Expert(_, MlpRole::Down) => {
            Place::of(&["model.layers.{layer}.mlp.experts.down_proj"]).stacked(experts.n_experts).transposed()
        }
        LayerRole::Expert(_, MlpRole::DownBias) => {
            Place::of(&["model.layers.{layer}.mlp.experts.down_proj_bias"]).stacked(experts.n_experts)
        }
        _ => llama::place(spec, role),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{heads, masks, refusal_of, spec_of};
    use crate::model::spec::{Activation, Bias, Mask, Mlp, RampBounds, RopeScaling, Router, Sinks};

    #[test]
    fn sinks_windows_and_clamped_experts() {
        let spec = spec_of("GptOssForCausalLM", json!({}));
        let window = Mask::Window { window: 8 };
        assert_eq!(masks(&spec), [window, Mask::Causal, window]);
        let attention = heads(&spec);
        assert_eq!((attention.sinks, attention.out_bias), (Sinks::Present, Bias::Present));
        let Mlp::Experts(experts) = spec.layers[0].mlp else { panic!("{spec:?}") };
        assert_eq!((experts.router, experts.bias), (Router::SoftmaxOfChosen, Bias::Present));
        assert_eq!(experts.activation, Activation::ClampedSwiglu { limit: 7.0 });
        let exact = |scaling: &RopeScaling| {
            matches!(scaling, RopeScaling::Yarn { ramp_bounds: RampBounds::Exact, original: 64, .. })
        };
        assert!(exact(&spec.ropes()[0].scaling), "{spec:?}");
        assert_eq!(spec.max_positions, 2048);
    }

    #[test]
    fn four_bit_experts_are_refused() {
        let refusal =
            refusal_of("GptOssForCausalLM", json!({"quantization_config": {"quant_method": "mxfp4"}}));
        assert!(refusal.contains("quantized (mxfp4)"), "{refusal}");
        let mut silent = crate::model::families::tests::config_of("GptOssForCausalLM", json!({}));
        silent.as_object_mut().unwrap().remove("rope_scaling");
        let refusal = crate::model::families::resolve(&silent).unwrap_err().to_string();
        assert!(refusal.contains("the config has no rope_scaling"), "{refusal}");
    }
}
