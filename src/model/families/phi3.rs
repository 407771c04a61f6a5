//! Phi-3-mini, Phi-3.5-mini, Phi-4-mini and Phi-4 (`modeling_phi3.py`): LLaMA's shape with fused projections, and two sets
//! of rotary frequencies for long contexts.

use super::config::Config;
use super::llama::{self, CLASS, Class};
use super::{Family, Reading, shape};
use crate::error::Result;
use crate::model::layout::Place;
use crate::model::names::{LayerRole, MlpRole, Names, Role};
use crate::model::spec::DecoderSpec;

/// Phi-3.
pub(super) const PHI3: Family = Family { architectures: &["Phi3ForCausalLM"], model_types: &["phi3"], read };

fn read(config: &Config<'_>) -> Result<Reading> {
    let class = Class {
        max_positions: 4096,
        rope_part: Some(1.0),
        // What the first files called yarn was longrope.
        rope_aliases: &[("yarn", "longrope")],
        eps: 1e-5,
        ..CLASS
    };
    let mut reading = llama::read("phi3", config, &class, |_| ())?;
    let spec = &mut reading.spec;
    let sliding = shape::windowed(shape::window(config, None)?, spec.max_positions);
    shape::slide(config, &mut spec.layers, sliding, |_| true)?;
    Ok(Reading { names: NAMES, ..reading })
}

const NAMES: Names = Names { place, ..llama::NAMES };

fn place(spec: &DecoderSpec, role: Role) -> Place {
    let Role::Layer(layer, part) = role else { return llama::place(spec, role) };
    let qkv = |which| {
        Place::of(&["model.layers.{layer}.self_attn.qkv_proj.weight"]).block(1, &shape::qkv_rows(spec), which)
    };
    let gate_up = |which| {
        let width = spec.layers[layer].mlp.width();
        Place::of(&["model.layers.{layer}.mlp.gate_up_proj.weight"]).block(1, &[width, width], which)
    };
    match part {
        LayerRole::Query => qkv(0),
        LayerRole::Key => qkv(1),
        LayerRole::Value => qkv(2),
        LayerRole::Mlp(MlpRole::Gate) => gate_up(0),
        LayerRole::Mlp(MlpRole::Up) => gate_up(1),
        _ => llama::place(spec, role),
    }
}
