//! Mixtral (`modeling_mixtral.py`): Mistral with eight experts in every layer.

use super::config::Config;
use super::llama::{self, CLASS, Class};
use super::{Family, Reading, shape};
use crate::error::Result;
use crate::model::layout::Place;
use crate::model::names::{LayerRole, MlpRole, Names, Role};
use crate::model::spec::{Bias, DecoderSpec, Experts, Mlp, Router, limits};

/// Mixtral.
pub(super) const MIXTRAL: Family =
    Family { architectures: &["MixtralForCausalLM"], model_types: &["mixtral"], read };

fn read(config: &Config<'_>) -> Result<Reading> {
    let class = Class { kv_heads: Some(8), max_positions: 131_072, rope_base: 1e6, eps: 1e-5, ..CLASS };
    let mut reading = llama::read("mixtral", config, &class, |_| ())?;
    let spec = &mut reading.spec;
    let experts = Mlp::Experts(Experts {
        n_experts: config.required_count("num_local_experts", limits::EXPERTS)?,
        n_chosen: config.required_count("num_experts_per_tok", limits::EXPERTS)?,
        width: config.required_count("intermediate_size", limits::WIDTH)?,
        activation: shape::activation(config, "hidden_act", "silu")?,
        bias: Bias::Absent,
        router: Router::SoftmaxRenormalised,
        shared_width: 0,
    });
    spec.layers.iter_mut().for_each(|layer| layer.mlp = experts);
    let sliding = shape::windowed(shape::window(config, None)?, spec.max_positions);
    shape::slide(config, &mut spec.layers, sliding, |_| true)?;
    Ok(Reading { names: NAMES, ..reading })
}

const NAMES: Names = Names { place, ..llama::NAMES };

fn place(spec: &DecoderSpec, role: Role) -> Place {
    let Role::Layer(_, part) = role else { return llama::place(spec, role) };
    match part {
        LayerRole::Router => Place::of(&["model.layers.{layer}.block_sparse_moe.gate.weight"]),
        LayerRole::Expert(_, MlpRole::Gate) => {
            Place::of(&["model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight"])
        }
        LayerRole::Expert(_, MlpRole::Up) => {
            Place::of(&["model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight"])
        }
        LayerRole::Expert(_, MlpRole::Down) => {
            Place::of(&["model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"])
        }
        _ => llama::place(spec, role),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{masks, refusal_of, spec_of};
    use crate::model::spec::{Mask, Mlp, Router};

    #[test]
    fn every_layer_has_experts() {
        let spec = spec_of("MixtralForCausalLM", json!({}));
        let Mlp::Experts(experts) = spec.layers[2].mlp else { panic!("{spec:?}") };
        assert_eq!((experts.n_experts, experts.n_chosen, experts.width), (4, 2, 64));
        assert_eq!((experts.router, experts.shared_width), (Router::SoftmaxRenormalised, 0));
        assert_eq!(masks(&spec), [Mask::Causal; 3]);
        assert_eq!(spec.ropes()[0].base, 1e6);
    }

    #[test]
    fn more_cannot_be_chosen_than_there_are() {
        let refusal = refusal_of("MixtralForCausalLM", json!({"num_experts_per_tok": 5}));
        assert!(refusal.contains('5') && refusal.contains('4'), "{refusal}");
    }
}
