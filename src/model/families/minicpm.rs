//! MiniCPM-2B (`modeling_minicpm.py`): LLaMA's shape with three multipliers: of the embedding, of each branch, and of the
//! hidden state that meets the head.

use super::llama::{self, CLASS, Class};
use super::{Family, shape};
use crate::error::Error;
use crate::model::spec::limits;

/// Bounds of a multiplier; published ones lie between 0.1 and 100.
const MULTIPLIERS: (f64, f64) = (1e-6, 1e6);

/// MiniCPM.
pub(super) const MINICPM: Family = Family {
    architectures: &["MiniCPMForCausalLM"],
    model_types: &["minicpm"],
    read: |config| {
        let multiplier =
            |key| Ok::<f64, Error>(config.number(key, MULTIPLIERS.0, MULTIPLIERS.1)?.unwrap_or(1.0));
        let bias = shape::bias(config.flag("attention_bias")?.unwrap_or(false));
        // The first files leave out tie_word_embeddings, which their class then takes as true.
        let mut reading = llama::read("minicpm", config, &Class { tied: true, ..CLASS }, |attention| {
            attention.qkv_bias = bias;
            attention.out_bias = bias;
        })?;
        let spec = &mut reading.spec;
        spec.embedding.multiplier = multiplier("scale_emb")? as f32;
        spec.branch_multiplier = (multiplier("scale_depth")? / (spec.layers() as f64).sqrt()) as f32;
        let base_width = config.count("dim_model_base", limits::HIDDEN)?.unwrap_or(1);
        spec.logits.multiplier = (base_width as f64 / spec.hidden as f64) as f32;
        Ok(reading)
    },
};

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{refusal_of, spec_of};
    use crate::model::spec::{Head, RopeScaling};

    #[test]
    fn multipliers() {
        let spec = spec_of("MiniCPMForCausalLM", json!({}));
        assert_eq!((spec.embedding.multiplier, spec.logits.multiplier), (12.0, 0.25));
        assert!((spec.branch_multiplier - 1.4 / 3f32.sqrt()).abs() < 1e-6);
        let refusal = refusal_of("MiniCPMForCausalLM", json!({"scale_depth": 0}));
        assert!(refusal.contains("scale_depth is 0"), "{refusal}");
    }

    #[test]
    fn tied_unless_the_file_says_otherwise() {
        assert_eq!(spec_of("MiniCPMForCausalLM", json!({})).head, Head::Tied);
        let long = json!({"tie_word_embeddings": false, "rope_scaling": {"type": "dynamic", "factor": 4.0}});
        let spec = spec_of("MiniCPMForCausalLM", long);
        assert_eq!(spec.head, Head::Untied);
        assert_eq!(spec.ropes()[0].scaling, RopeScaling::Dynamic { factor: 4.0, original: 2048 });
    }
}
