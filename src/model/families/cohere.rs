//! Command-R, Command-R+ and Aya 23 (`modeling_cohere.py`): attention and MLP of one norm added at once, neighbours turn,
//! logits are multiplied.

use super::config::Config;
use super::llama::{self, CLASS, Class};
use super::{Family, Reading, shape};
use crate::error::Result;
use crate::model::layout::{Pairs, Place};
use crate::model::names::{LayerRole, Names, Role};
use crate::model::spec::{Attention, Bias, Block, DecoderSpec, HeadAttention, HeadNorm, Norm, limits};

/// Cohere's Command-R models.
pub(super) const COHERE: Family =
    Family { architectures: &["CohereForCausalLM"], model_types: &["cohere"], read };

/// A norm by mean and variance, without biases.
fn norm(eps: f32) -> Norm {
    Norm::Layer { eps, bias: Bias::Absent }
}

fn read(config: &Config<'_>) -> Result<Reading> {
    let class =
        Class { max_positions: 8192, norm, eps_key: "layer_norm_eps", eps: 1e-5, tied: true, ..CLASS };
    let bias = shape::bias(config.flag("attention_bias")?.unwrap_or(false));
    let qk_norm = match config.flag("use_qk_norm")? {
        Some(true) => Some(HeadNorm::PerHead(norm(shape::eps(config, class.eps_key, class.eps)?))),
        _ => None,
    };
    let mut reading = llama::read("cohere", config, &class, |attention| {
        attention.qkv_bias = bias;
        attention.out_bias = bias;
        attention.qk_norm = qk_norm;
    })?;
    let spec = &mut reading.spec;
    // Command-R's file states what its first code could do under one key, and what it was trained for under the other.
    if let Some(trained) = config.count("model_max_length", limits::POSITIONS)? {
        spec.max_positions = spec.max_positions.max(trained);
    }
    spec.block = Block::ParallelOneNorm;
    spec.logits.multiplier = config.number("logit_scale", 1e-6, 1e6)?.unwrap_or(0.0625) as f32;
    Ok(Reading { names: NAMES, ..reading })
}

const NAMES: Names = Names { place, ..llama::NAMES };

fn place(spec: &DecoderSpec, role: Role) -> Place {
    let place = llama::place(spec, role);
    let Attention::Heads(HeadAttention { head_dim, .. }) = spec.attention else { return place };
    use LayerRole::*;
    match role {
        Role::Layer(_, Query | QueryBias | QueryNorm | Key | KeyBias | KeyNorm) => {
            place.pairs(Pairs { head: head_dim, first: 0, width: head_dim })
        }
        _ => place,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{heads, spec_of};
    use crate::model::spec::{Bias, Block, Head, HeadNorm, Norm};

    #[test]
    fn command_r() {
        let spec = spec_of("CohereForCausalLM", json!({"use_qk_norm": null, "logit_scale": null}));
        assert_eq!((spec.block, spec.head, heads(&spec).qk_norm), (Block::ParallelOneNorm, Head::Tied, None));
        // The larger of the file's two lengths.
        assert_eq!((spec.logits.multiplier, spec.max_positions), (0.0625, 8192));
    }

    #[test]
    fn command_r_plus_norms_its_heads() {
        let spec = spec_of("CohereForCausalLM", json!({"model_max_length": 131_072}));
        let norm = Norm::Layer { eps: 1e-5, bias: Bias::Absent };
        assert_eq!((spec.norm, heads(&spec).qk_norm), (norm, Some(HeadNorm::PerHead(norm))));
        assert_eq!((spec.logits.multiplier, spec.max_positions), (0.25, 131_072));
    }
}
