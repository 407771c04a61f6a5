//! Qwen 2 and 2.5 (`modeling_qwen2.py`): LLaMA's shape with biases on queries, keys and values.

use super::config::Config;
use super::llama::{self, CLASS, Class};
use super::{Family, shape};
use crate::error::Result;
use crate::model::spec::{Bias, DecoderSpec, limits};

/// Qwen 2.
pub(super) const QWEN2: Family = Family {
    architectures: &["Qwen2ForCausalLM"],
    model_types: &["qwen2"],
    read: |config| {
        let class = Class { kv_heads: Some(32), max_positions: 32_768, ..CLASS };
        let mut reading =
            llama::read("qwen2", config, &class, |attention| attention.qkv_bias = Bias::Present)?;
        read_windows(config, &mut reading.spec)?;
        Ok(reading)
    },
};

/// Windows act only where `use_sliding_window` says so, on the layers that `layer_types` lists or, in older files, on
/// those from `max_window_layers` on.
pub(super) fn read_windows(config: &Config<'_>, spec: &mut DecoderSpec) -> Result<()> {
    let used = config.flag("use_sliding_window")?.unwrap_or(false);
    let window = shape::window(config, Some(4096))?.filter(|_| used);
    let first = config.index("max_window_layers", limits::LAYERS)?.unwrap_or(28);
    let sliding = shape::windowed(window, spec.max_positions);
    shape::slide(config, &mut spec.layers, sliding, |layer| layer >= first)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::model::families::resolve;
    use crate::model::families::tests::{heads, masks};
    use crate::model::spec::{Bias, DecoderSpec, Mask};

    fn spec(change: Value) -> DecoderSpec {
        let mut config = json!({
            "architectures": ["Qwen2ForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
            "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 100
        });
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        resolve(&config).unwrap().spec
    }

    #[test]
    fn queries_keys_and_values_have_biases_and_nothing_else() {
        let spec = spec(json!({"attention_bias": false}));
        assert_eq!((heads(&spec).qkv_bias, heads(&spec).out_bias), (Bias::Present, Bias::Absent));
        assert_eq!(spec.max_positions, 32_768);
    }

    #[test]
    fn windows_act_only_where_they_are_used() {
        let window = Mask::Window { window: 24 };
        let off = json!({"use_sliding_window": false, "sliding_window": 24, "max_window_layers": 1});
        assert_eq!(masks(&spec(off)), [Mask::Causal; 3]);
        let on = json!({"use_sliding_window": true, "sliding_window": 24, "max_window_layers": 1});
        assert_eq!(masks(&spec(on)), [Mask::Causal, window, window]);
        let everywhere = json!({"use_sliding_window": true, "sliding_window": 24, "max_window_layers": 0});
        assert_eq!(masks(&spec(everywhere)), [window; 3]);
        let listed = json!({
            "use_sliding_window": true, "sliding_window": 24, "max_window_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"]
        });
        assert_eq!(masks(&spec(listed)), [Mask::Causal, window, Mask::Causal]);
    }

    #[test]
    fn yarn_as_the_readme_writes_it() {
        let spec = spec(json!({
            "max_position_embeddings": 32768,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
        }));
        assert_eq!(spec.max_positions, 131_072);
    }
}
