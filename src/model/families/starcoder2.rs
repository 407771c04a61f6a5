//! StarCoder 2 (`modeling_starcoder2.py`): LLaMA's attention with biases, norms by mean and variance, and a plain MLP.

use super::config::Config;
use super::llama::{self, CLASS, Class};
use super::{Family, Reading, shape};
use crate::error::Result;
use crate::model::layout::Place;
use crate::model::names::{LayerRole, MlpRole, Names, Role};
use crate::model::spec::{DecoderSpec, Mlp};

/// StarCoder 2.
pub(super) const STARCODER2: Family =
    Family { architectures: &["Starcoder2ForCausalLM"], model_types: &["starcoder2"], read };

fn read(config: &Config<'_>) -> Result<Reading> {
    let bias = shape::bias(config.flag("use_bias")?.unwrap_or(true));
    let class = Class {
        kv_heads: Some(2),
        max_positions: 4096,
        norm: shape::layer_norm,
        eps_key: "norm_epsilon",
        eps: 1e-5,
        activation: "gelu_pytorch_tanh",
        mlp: |activation, width, bias| Mlp::Plain { activation, width, bias },
        mlp_bias: bias,
        tied: true,
        ..CLASS
    };
    let mut reading = llama::read("starcoder2", config, &class, |attention| {
        attention.qkv_bias = bias;
        attention.out_bias = bias;
    })?;
    let spec = &mut reading.spec;
    let window = shape::windowed(shape::window(config, None)?, spec.max_positions);
    shape::slide(config, &mut spec.layers, window, |_| true)?;
    Ok(Reading { names: NAMES, ..reading })
}

const NAMES: Names = Names { place, ..llama::NAMES };

fn place(spec: &DecoderSpec, role: Role) -> Place {
    let Role::Layer(_, part) = role else { return llama::place(spec, role) };
    match part {
        LayerRole::Mlp(MlpRole::Up) => Place::of(&["model.layers.{layer}.mlp.c_fc.weight"]),
        LayerRole::Mlp(MlpRole::UpBias) => Place::of(&["model.layers.{layer}.mlp.c_fc.bias"]),
        LayerRole::Mlp(MlpRole::Down) => Place::of(&["model.layers.{layer}.mlp.c_proj.weight"]),
        LayerRole::Mlp(MlpRole::DownBias) => Place::of(&["model.layers.{layer}.mlp.c_proj.bias"]),
        _ => llama::place(spec, role),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{heads, masks, spec_of};
    use crate::model::spec::{Activation, Bias, Head, Mask, Mlp};

    #[test]
    fn biases_windows_and_a_plain_mlp() {
        let spec = spec_of("Starcoder2ForCausalLM", json!({}));
        assert_eq!((masks(&spec)[2], spec.head), (Mask::Window { window: 24 }, Head::Tied));
        let mlp = Mlp::Plain { activation: Activation::GeluTanh, width: 64, bias: Bias::Present };
        assert_eq!((heads(&spec).out_bias, spec.layers[0].mlp), (Bias::Present, mlp));
        let bare = spec_of("Starcoder2ForCausalLM", json!({"use_bias": false, "sliding_window": null}));
        assert_eq!((masks(&bare)[0], heads(&bare).qkv_bias), (Mask::Causal, Bias::Absent));
    }
}
