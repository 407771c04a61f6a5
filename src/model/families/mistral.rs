//! Mistral (`modeling_mistral.py`): LLaMA's shape with a sliding window in v0.1 and a head width of its own in Nemo.

use super::llama::{self, CLASS, Class};
use super::{Family, shape};

/// Mistral.
pub(super) const MISTRAL: Family = Family {
    architectures: &["MistralForCausalLM"],
    model_types: &["mistral"],
    read: |config| {
        let class = Class { kv_heads: Some(8), max_positions: 131_072, ..CLASS };
        let mut reading = llama::read("mistral", config, &class, |_| ())?;
        let spec = &mut reading.spec;
        let sliding = shape::windowed(shape::window(config, Some(4096))?, spec.max_positions);
        shape::slide(config, &mut spec.layers, sliding, |_| true)?;
        Ok(reading)
    },
};

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::model::families::resolve;
    use crate::model::families::tests::{heads, masks};
    use crate::model::spec::{DecoderSpec, Mask};

    fn spec(change: Value) -> DecoderSpec {
        let mut config = json!({
            "architectures": ["MistralForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
            "num_attention_heads": 16, "num_hidden_layers": 3, "vocab_size": 100, "head_dim": 4
        });
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        resolve(&config).unwrap().spec
    }

    #[test]
    fn absent_keys_are_those_of_the_class() {
        let spec = spec(json!({}));
        assert_eq!((heads(&spec).kv_heads, heads(&spec).head_dim), (8, 4));
        assert_eq!(spec.max_positions, 131_072);
        assert_eq!(masks(&spec), [Mask::Window { window: 4096 }; 3]);
    }

    #[test]
    fn windows() {
        assert_eq!(masks(&spec(json!({"sliding_window": null}))), [Mask::Causal; 3]);
        assert_eq!(masks(&spec(json!({"sliding_window": 24}))), [Mask::Window { window: 24 }; 3]);
        // The window of a short model is never reached.
        let short = json!({"sliding_window": 4096, "max_position_embeddings": 4096});
        assert_eq!(masks(&spec(short)), [Mask::Causal; 3]);
        let listed = json!({
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]
        });
        let window = Mask::Window { window: 24 };
        assert_eq!(masks(&spec(listed)), [window, Mask::Causal, window]);
    }

    #[test]
    fn no_kv_heads_at_all_means_multi_head() {
        assert_eq!(heads(&spec(json!({"num_key_value_heads": null}))).kv_heads, 16);
    }
}
