//! Granite 3 (`modeling_granite.py`): LLaMA's shape with multipliers of the embedding, of scores, of each branch, and a
//! divisor of logits.

use super::llama::{self, CLASS, Class};
use super::{Family, shape};
use crate::error::Error;

/// Granite.
pub(super) const GRANITE: Family = Family {
    architectures: &["GraniteForCausalLM"],
    model_types: &["granite"],
    read: |config| {
        let flag = |key| Ok::<_, Error>(shape::bias(config.flag(key)?.unwrap_or(false)));
        let multiplier = |key| Ok::<_, Error>(config.number(key, 1e-6, 1e6)?.unwrap_or(1.0) as f32);
        let bias = flag("attention_bias")?;
        let scale = multiplier("attention_multiplier")?;
        let class = Class { mlp_bias: flag("mlp_bias")?, ..CLASS };
        let mut reading = llama::read("granite", config, &class, |attention| {
            attention.qkv_bias = bias;
            attention.out_bias = bias;
            attention.scale = scale;
        })?;
        let spec = &mut reading.spec;
        spec.embedding.multiplier = multiplier("embedding_multiplier")?;
        spec.branch_multiplier = multiplier("residual_multiplier")?;
        spec.logits.multiplier = 1.0 / multiplier("logits_scaling")?;
        Ok(reading)
    },
};
