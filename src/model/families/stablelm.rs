//! StableLM 3B-4e1t, 2-1.6B and 2-12B (`modeling_stablelm.py`; `modeling_stablelm_epoch.py` of the first revisions):
//! LLaMA's shape with norms by mean and variance and a quarter of each head turning. The 12B model adds attention and MLP
//! at once and norms each head's query and key.

use super::config::Config;
use super::llama::{self, CLASS, Class};
use super::{Family, Reading, shape};
use crate::error::Result;
use crate::model::layout::Place;
use crate::model::names::{LayerRole, Names, Role};
use crate::model::spec::{Bias, Block, DecoderSpec, HeadNorm, Norm};

/// StableLM.
pub(super) const STABLELM: Family = Family {
    architectures: &["StableLmForCausalLM", "StableLMEpochForCausalLM"],
    model_types: &["stablelm", "stablelm_epoch"],
    read,
};

fn read(config: &Config<'_>) -> Result<Reading> {
    let class = Class {
        max_positions: 4096,
        rope_part: Some(0.25),
        norm: shape::layer_norm,
        eps_key: if config.mentions("norm_eps") { "norm_eps" } else { "layer_norm_eps" },
        eps: 1e-5,
        ..CLASS
    };
    let qkv_bias = shape::bias(config.flag("use_qkv_bias")?.unwrap_or(false));
    let head_norm = match config.flag("qk_layernorm")? {
        Some(true) => {
            let eps = shape::eps(config, class.eps_key, class.eps)?;
            Some(HeadNorm::PerHead(Norm::Layer { eps, bias: Bias::Absent }))
        }
        _ => None,
    };
    let mut reading = llama::read("stablelm", config, &class, |attention| {
        attention.qkv_bias = qkv_bias;
        attention.qk_norm = head_norm;
    })?;
    if config.flag("use_parallel_residual")? == Some(true) {
        reading.spec.block = Block::ParallelOneNorm;
    }
    Ok(Reading { names: NAMES, ..reading })
}

const NAMES: Names = Names { place, ..llama::NAMES };

fn place(spec: &DecoderSpec, role: Role) -> Place {
    match role {
        Role::Layer(_, LayerRole::QueryNorm) => {
            Place::of(&["model.layers.{layer}.self_attn.q_layernorm.norms.{head}.weight"]).by_head()
        }
        Role::Layer(_, LayerRole::KeyNorm) => {
            Place::of(&["model.layers.{layer}.self_attn.k_layernorm.norms.{head}.weight"]).by_head()
        }
        _ => llama::place(spec, role),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{heads, spec_of};
    use crate::model::spec::{Bias, Block, HeadNorm, Norm};

    #[test]
    fn the_large_one_is_parallel_and_norms_its_heads() {
        let spec = spec_of("StableLmForCausalLM", json!({}));
        let norm = Norm::Layer { eps: 1e-5, bias: Bias::Absent };
        assert_eq!(
            (spec.block, heads(&spec).qk_norm),
            (Block::ParallelOneNorm, Some(HeadNorm::PerHead(norm)))
        );
    }

    #[test]
    fn first_files_have_other_keys() {
        let plain = json!({
            "use_parallel_residual": null, "qk_layernorm": null, "use_qkv_bias": null, "partial_rotary_factor": null,
            "layer_norm_eps": null
        });
        let mut first = plain.clone();
        first["rope_pct"] = json!(0.25);
        first["norm_eps"] = json!(1e-5);
        first["architectures"] = json!(["StableLMEpochForCausalLM"]);
        let spec = spec_of("StableLmForCausalLM", plain);
        assert_eq!(spec_of("StableLmForCausalLM", first), spec);
        assert_eq!(
            (spec.block, heads(&spec).qk_norm, heads(&spec).qkv_bias),
            (Block::Serial, None, Bias::Absent)
        );
        assert_eq!((spec.ropes()[0].width, spec.norm), (4, Norm::Layer { eps: 1e-5, bias: Bias::Present }));
    }

    #[test]
    fn both_dialects_say_the_same() {
        let new = json!({
            "partial_rotary_factor": null,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
        });
        assert_eq!(spec_of("StableLmForCausalLM", new), spec_of("StableLmForCausalLM", json!({})));
    }
}
