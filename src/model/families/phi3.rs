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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::resolve;
    use crate::model::families::tests::{config_of, masks, refusal_of, spec_of};
    use crate::model::spec::{Mask, RopeScaling};

    #[test]
    fn all_names_of_longrope() {
        let spec = spec_of("Phi3ForCausalLM", json!({}));
        let RopeScaling::LongRope { short, long, original, amplitude } = &spec.ropes()[0].scaling else {
            panic!("{spec:?}");
        };
        assert_eq!((short.len(), long[2], *original, spec.ropes()[0].width), (3, 4.0, 32, 6));
        // sqrt(1 + ln(128/32) / ln 32)
        assert!((amplitude - 1.4f64.sqrt()).abs() < 1e-12);
        for name in ["longrope", "yarn"] {
            let mut config = config_of("Phi3ForCausalLM", json!({}));
            config["rope_scaling"]["type"] = json!(name);
            assert_eq!(resolve(&config).unwrap().spec, spec, "{name}");
        }
        let notes = resolve(&config_of("Phi3ForCausalLM", json!({}))).unwrap().notes;
        assert!(notes[0].contains("longrope"), "{notes:?}");
    }

    #[test]
    fn windows() {
        // A window beyond all positions is none.
        assert_eq!(masks(&spec_of("Phi3ForCausalLM", json!({}))), [Mask::Causal; 3]);
        let short = spec_of("Phi3ForCausalLM", json!({"sliding_window": 23}));
        assert_eq!(masks(&short), [Mask::Window { window: 23 }; 3]);
    }

    #[test]
    fn the_small_one_is_refused_by_name() {
        let refusal = refusal_of("Phi3ForCausalLM", json!({"architectures": ["Phi3SmallForCausalLM"]}));
        assert_eq!(
            refusal,
            "the architecture Phi3SmallForCausalLM is not served: its attention is block-sparse"
        );
    }
}
