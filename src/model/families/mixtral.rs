//! Mixtral (`modeling_mixtral.py`): Mistral with eight experts in every layer.

use super::config::Config;
use super::llama::{self, CLASS, Class};
use super::shape::MAX_EXPERTS;
use super::{Family, Reading, shape};
use crate::error::Result;
use crate::model::spec::{Bias, Experts, Mlp, Router, limits};

/// Mixtral.
pub(super) const MIXTRAL: Family =
    Family { architectures: &["MixtralForCausalLM"], model_types: &["mixtral"], read };

fn read(config: &Config<'_>) -> Result<Reading> {
    let class = Class { kv_heads: Some(8), max_positions: 131_072, rope_base: 1e6, eps: 1e-5, ..CLASS };
    let mut reading = llama::read("mixtral", config, &class, |_| ())?;
    let spec = &mut reading.spec;
    let experts = Mlp::Experts(Experts {
        n_experts: config.required_count("num_local_experts", MAX_EXPERTS)?,
        n_chosen: config.required_count("num_experts_per_tok", MAX_EXPERTS)?,
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
