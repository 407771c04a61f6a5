//! Gemma 2 and the text models of Gemma 3 (`modeling_gemma2.py`, `modeling_gemma3.py`): norms before and after each
//! branch, an embedding scaled by the root of its width, windows on most layers. Gemma 2 caps scores and logits; Gemma 3
//! norms each head's query and key, and has a rotary embedding of its own on the layers with windows.

use super::config::Config;
use super::llama::{self, CLASS, Class};
use super::positions::{Rotary, Wanted, rope};
use super::{Family, Reading, shape};
use crate::error::Result;
use crate::model::layout::Place;
use crate::model::names::{LayerRole, Names, Role};
use crate::model::spec::{Block, DecoderSpec, HeadNorm, Norm, Positions, limits};

/// Gemma 2.
pub(super) const GEMMA2: Family = Family {
    architectures: &["Gemma2ForCausalLM"],
    model_types: &["gemma2"],
    read: |config| {
        let class = Class { max_positions: 8192, ..GEMMA };
        read("gemma2", config, &class, [Some(50.0), Some(30.0)], None, 2)
    },
};

/// Gemma 3.
pub(super) const GEMMA3: Family =
    Family { architectures: &["Gemma3ForCausalLM"], model_types: &["gemma3_text"], read: read_3 };

/// Gemma 3 beside a vision tower: its text model alone is served.
pub(super) const GEMMA3_WITH_VISION: Family = Family {
    architectures: &["Gemma3ForConditionalGeneration"],
    model_types: &["gemma3"],
    read: |config| {
        let text = config.section("text_config")?.ok_or_else(|| config.missing("text_config"))?;
        let mut reading = read_3(&text)?;
        reading.names.prefixes = &["language_model."];
        reading.names.ignores = |_, name| {
            name.starts_with("vision_tower.")
                || name.starts_with("multi_modal_projector.")
                || llama::ignores(name)
        };
        reading.notes.push("of text and pictures, only text is served".to_owned());
        Ok(reading)
    },
};

fn read_3(config: &Config<'_>) -> Result<Reading> {
    config.only("use_bidirectional_attention", false)?;
    let class = Class {
        // The sections inside larger files state what differs from the class.
        heads: Some(8),
        vocab: Some(262_208),
        max_positions: 131_072,
        rope_base: 1e6,
        rotary: rotary_by_layer,
        ..GEMMA
    };
    let eps = shape::eps(config, class.eps_key, class.eps)?;
    let period = config.count("sliding_window_pattern", limits::LAYERS)?.unwrap_or(6);
    read("gemma3", config, &class, [None, None], Some(HeadNorm::Shared(one_plus(eps))), period)
}

/// What both classes say.
const GEMMA: Class = Class {
    head_dim: Some(256),
    kv_heads: Some(4),
    norm: one_plus,
    activation_key: "hidden_activation",
    activation: "gelu_pytorch_tanh",
    tied: true,
    ..CLASS
};

fn one_plus(eps: f32) -> Norm {
    Norm::RmsOnePlus { eps }
}

/// Reads either, with the caps of scores and logits where the file is silent. Every `period`th layer sees the whole past,
/// where no list says otherwise.
fn read(
    family: &'static str,
    config: &Config<'_>,
    class: &Class,
    [score_cap, logit_cap]: [Option<f64>; 2],
    qk_norm: Option<HeadNorm>,
    period: usize,
) -> Result<Reading> {
    let bias = shape::bias(config.flag("attention_bias")?.unwrap_or(false));
    let softcap = shape::softcap(config, "attn_logit_softcapping", score_cap)?;
    let scalar = config.number("query_pre_attn_scalar", 1e-6, 1e9)?.unwrap_or(256.0);
    let mut reading = llama::read(family, config, class, |attention| {
        attention.qkv_bias = bias;
        attention.out_bias = bias;
        attention.softcap = softcap;
        attention.scale = scalar.powf(-0.5) as f32;
        attention.qk_norm = qk_norm;
    })?;
    let spec = &mut reading.spec;
    spec.block = Block::SerialPostNorms;
    spec.embedding.multiplier = (spec.hidden as f64).sqrt() as f32;
    spec.logits.softcap = shape::softcap(config, "final_logit_softcapping", logit_cap)?;
    let window = shape::windowed(shape::window(config, Some(4096))?, spec.max_positions);
    // Of one embedding for all layers, or of two.
    let local_rope = match &spec.positions {
        Positions::Rope(ropes) => ropes.len().saturating_sub(1),
        _ => 0,
    };
    let sliding = shape::sliding(config, spec.layers(), |layer| (layer + 1) % period != 0)?;
    for (layer, _) in spec.layers.iter_mut().zip(sliding).filter(|(_, slides)| *slides) {
        layer.mask = window;
        layer.rope = local_rope;
    }
    Ok(Reading { names: NAMES, ..reading })
}

/// The embeddings of global layers and of local ones. The file's number of positions is the stretched one already.
fn rotary_by_layer(config: &Config<'_>, wanted: &Wanted) -> Result<Rotary> {
    let (global, local) = match config.section("rope_parameters")? {
        Some(parameters) => (parameters.section("full_attention")?, parameters.section("sliding_attention")?),
        None => (config.section("rope_scaling")?, None),
    };
    let (global, _) = rope(config, global.as_ref(), "rope_theta", wanted)?;
    let (local, _) = rope(config, local.as_ref(), "rope_local_base_freq", &Wanted { base: 1e4, ..*wanted })?;
    Ok(Rotary { ropes: vec![global, local], max_positions: wanted.max_positions, notes: Vec::new() })
}

const NAMES: Names = Names { place, ..llama::NAMES };

fn place(spec: &DecoderSpec, role: Role) -> Place {
    let Role::Layer(_, part) = role else { return llama::place(spec, role) };
    match part {
        LayerRole::AttentionPostNorm => Place::of(&["model.layers.{layer}.post_attention_layernorm.weight"]),
        LayerRole::MlpNorm => Place::of(&["model.layers.{layer}.pre_feedforward_layernorm.weight"]),
        LayerRole::MlpPostNorm => Place::of(&["model.layers.{layer}.post_feedforward_layernorm.weight"]),
        _ => llama::place(spec, role),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{config_of, heads, masks, refusal_of, spec_of};
    use crate::model::families::{Resolved, resolve};
    use crate::model::names::Role;
    use crate::model::spec::{Block, HeadNorm, Mask, Norm, RopeScaling};

    #[test]
    fn gemma_2() {
        let spec = spec_of("Gemma2ForCausalLM", json!({}));
        let window = Mask::Window { window: 8 };
        assert_eq!(masks(&spec), [window, Mask::Causal, window]);
        assert_eq!((spec.block, spec.norm), (Block::SerialPostNorms, Norm::RmsOnePlus { eps: 1e-6 }));
        assert_eq!((spec.embedding.multiplier, heads(&spec).scale), (32f32.sqrt(), 24f32.powf(-0.5)));
        assert_eq!((heads(&spec).softcap, spec.logits.softcap), (Some(50.0), Some(30.0)));
        // Absent is the class's value, null is none.
        let bare = spec_of(
            "Gemma2ForCausalLM",
            json!({"attn_logit_softcapping": null, "final_logit_softcapping": 0}),
        );
        assert_eq!((heads(&bare).softcap, bare.logits.softcap), (None, None));
    }

    #[test]
    fn gemma_3_in_both_dialects() {
        let spec = spec_of("Gemma3ForCausalLM", json!({}));
        let (global, local) = (&spec.ropes()[0], &spec.ropes()[1]);
        assert_eq!((global.base, &global.scaling), (1e6, &RopeScaling::Linear { factor: 8.0 }));
        assert_eq!((local.base, &local.scaling), (1e4, &RopeScaling::Unscaled));
        let kinds: Vec<_> =
            spec.layers.iter().map(|layer| (layer.mask == Mask::Causal, layer.rope)).collect();
        let (windowed, whole) = ((false, 1), (true, 0));
        assert_eq!(kinds, [windowed, windowed, windowed, windowed, windowed, whole, windowed]);
        assert_eq!(heads(&spec).qk_norm, Some(HeadNorm::Shared(Norm::RmsOnePlus { eps: 1e-6 })));
        // The file's length is the stretched one already.
        assert_eq!((spec.max_positions, heads(&spec).softcap), (131_072, None));
        let new = json!({
            "rope_scaling": null, "rope_theta": null, "rope_local_base_freq": null, "sliding_window_pattern": null,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}
            },
            "layer_types": [
                "sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention",
                "sliding_attention", "full_attention", "sliding_attention"
            ]
        });
        assert_eq!(spec_of("Gemma3ForCausalLM", new), spec);
    }

    #[test]
    fn beside_a_vision_tower_the_text_model_is_served() {
        let mut config = config_of("Gemma3ForConditionalGeneration", json!({}));
        config["text_config"]["vocab_size"] = json!(null);
        let Resolved { spec, names, notes, .. } = resolve(&config).unwrap();
        assert_eq!((heads(&spec).heads, spec.vocab, spec.layers()), (8, 262_208, 7));
        let embedding = names.of(&spec, Role::Embedding, 0);
        assert_eq!(embedding, ["language_model.model.embed_tokens.weight"]);
        assert!((names.ignores)(&spec, "vision_tower.vision_model.post_layernorm.bias"));
        assert!(notes[0].contains("only text"), "{notes:?}");
    }

    #[test]
    fn what_is_no_text_decoder_is_refused() {
        let refusal = refusal_of("Gemma3ForCausalLM", json!({"use_bidirectional_attention": true}));
        assert!(refusal.contains("use_bidirectional_attention"), "{refusal}");
    }
}
