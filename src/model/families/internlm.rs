//! InternLM v1 (`modeling_internlm.py`): LLaMA's shape with biases on all of attention.

use super::config::Config;
use super::llama::{self, CLASS};
use super::positions::{MAX_BASE, MIN_BASE};
use super::{Family, Reading, shape};
use crate::error::{Error, Result};
use crate::model::spec::{Positions, RopeScaling};

/// InternLM v1.
pub(super) const INTERNLM: Family = Family {
    architectures: &["InternLMForCausalLM"],
    model_types: &["internlm"],
    read: |config| {
        let bias = shape::bias(config.flag("bias")?.unwrap_or(true));
        let mut reading = llama::read("internlm", config, &CLASS, |attention| {
            attention.qkv_bias = bias;
            attention.out_bias = bias;
        })?;
        read_rotary(config, &mut reading)?;
        Ok(reading)
    },
};

/// Later revisions describe the embedding in `rotary`. Its `dynamic` equals no scaling up to
/// `max_position_embeddings`. Beyond, the reference rotates every cached key anew for each length, which no cache of
/// rotated keys can follow, so positions end there.
fn read_rotary(config: &Config<'_>, reading: &mut Reading) -> Result<()> {
    let Some(rotary) = config.section("rotary")? else { return Ok(()) };
    let spec = &mut reading.spec;
    let Positions::Rope(ropes) = &mut spec.positions else { return Ok(()) };
    if ropes.iter().any(|rope| rope.scaling != RopeScaling::Unscaled) {
        return Err(Error::Checkpoint("the config has both rotary and rope_scaling".to_owned()));
    }
    if let Some(base) = rotary.number("base", MIN_BASE, MAX_BASE)? {
        ropes.iter_mut().for_each(|rope| rope.base = base);
    }
    match rotary.text("type")?.unwrap_or("dynamic") {
        "origin" => Ok(()),
        "dynamic" => {
            reading.notes.push(format!(
                "dynamic rotary embedding: sequences end at {} tokens, below which it equals the plain one",
                spec.max_positions
            ));
            Ok(())
        }
        other => Err(Error::Unsupported(format!("the rotary type {other:.40} is not served in this family"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::model::families::tests::heads;
    use crate::model::families::{Resolved, resolve};
    use crate::model::spec::{Bias, Positions, Rope, RopeScaling};

    fn resolved(change: Value) -> Resolved {
        let mut config = json!({
            "architectures": ["InternLMForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
            "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 100
        });
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        resolve(&config).unwrap()
    }

    #[test]
    fn attention_has_biases_unless_told_otherwise() {
        let spec = resolved(json!({})).spec;
        let attention = heads(&spec);
        assert_eq!(
            (attention.qkv_bias, attention.out_bias, attention.kv_heads),
            (Bias::Present, Bias::Present, 4)
        );
        assert_eq!(heads(&resolved(json!({"bias": false})).spec).out_bias, Bias::Absent);
    }

    #[test]
    fn dynamic_rotary_is_plain_up_to_the_declared_positions() {
        let dynamic = resolved(json!({"rotary": {"base": 20000, "type": "dynamic"}}));
        assert_eq!(
            dynamic.spec.positions,
            Positions::Rope(vec![Rope { base: 2e4, width: 8, scaling: RopeScaling::Unscaled }])
        );
        assert_eq!(dynamic.spec.max_positions, 2048);
        assert!(dynamic.notes[0].contains("end at 2048 tokens"), "{:?}", dynamic.notes);
        assert!(resolved(json!({"rotary": {"base": 20000, "type": "origin"}})).notes.is_empty());
    }
}
