//! Qwen 3, dense and with experts (`modeling_qwen3.py`, `modeling_qwen3_moe.py`): LLaMA's shape with a norm over each
//! head's query and key.

use super::config::Config;
use super::llama::{self, CLASS, Class};
use super::{Family, Reading, qwen2, shape};
use crate::error::Result;
use crate::model::spec::{Bias, Experts, Groups, HeadNorm, Mlp, Router, limits};

/// Qwen 3.
pub(super) const QWEN3: Family = Family {
    architectures: &["Qwen3ForCausalLM"],
    model_types: &["qwen3"],
    read: |config| {
        let class = Class { head_dim: Some(128), kv_heads: Some(32), ..CLASS };
        let mut reading = read("qwen3", config, class)?;
        qwen2::read_windows(config, &mut reading.spec)?;
        Ok(reading)
    },
};

/// Qwen 3 with experts.
pub(super) const QWEN3_MOE: Family = Family {
    architectures: &["Qwen3MoeForCausalLM"],
    model_types: &["qwen3_moe"],
    read: |config| {
        let mut reading = read("qwen3_moe", config, Class { kv_heads: Some(4), ..CLASS })?;
        let spec = &mut reading.spec;
        let used = config.flag("use_sliding_window")?.unwrap_or(false);
        let window = shape::window(config, Some(4096))?.filter(|_| used);
        let sliding = shape::windowed(window, spec.max_positions);
        shape::slide(config, &mut spec.layers, sliding, |_| true)?;
        let experts = Mlp::Experts(experts(config)?);
        let dense = config.indices("mlp_only_layers", limits::LAYERS)?.unwrap_or_default();
        let step = config.count("decoder_sparse_step", limits::LAYERS)?.unwrap_or(1);
        for (number, layer) in spec.layers.iter_mut().enumerate() {
            if (number + 1).is_multiple_of(step) && !dense.contains(&number) {
                layer.mlp = experts;
            }
        }
        Ok(reading)
    },
};

fn read(family: &'static str, config: &Config<'_>, class: Class) -> Result<Reading> {
    let class = Class { max_positions: 32_768, ..class };
    let bias = shape::bias(config.flag("attention_bias")?.unwrap_or(false));
    let norm = shape::rms(shape::eps(config, class.eps_key, class.eps)?);
    llama::read(family, config, &class, |attention| {
        attention.qkv_bias = bias;
        attention.out_bias = bias;
        attention.qk_norm = Some(HeadNorm::Shared(norm));
    })
}

fn experts(config: &Config<'_>) -> Result<Experts> {
    let renormalised = config.flag("norm_topk_prob")?.unwrap_or(false);
    let n_experts = config.either("num_experts", "num_local_experts");
    Ok(Experts {
        n_experts: config.required_count(n_experts, limits::EXPERTS)?,
        n_chosen: config.required_count("num_experts_per_tok", limits::EXPERTS)?,
        width: config.required_count("moe_intermediate_size", limits::WIDTH)?,
        activation: shape::activation(config, "hidden_act", "silu")?,
        bias: Bias::Absent,
        router: if renormalised {
            Router::SoftmaxRenormalised
        } else {
            Router::Softmax { factor: 1.0, groups: Groups { n: 1, n_used: 1 } }
        },
        shared_width: 0,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::families::tests::{heads, spec_of};
    use crate::model::spec::{Groups, HeadNorm, Mlp, Norm, Router};

    #[test]
    fn heads_have_a_width_and_a_norm_of_their_own() {
        let spec = spec_of("Qwen3ForCausalLM", json!({"head_dim": null}));
        let attention = heads(&spec);
        assert_eq!((attention.head_dim, attention.kv_heads), (128, 2));
        assert_eq!(attention.qk_norm, Some(HeadNorm::Shared(Norm::Rms { eps: 1e-6 })));
    }

    #[test]
    fn which_layers_are_dense() {
        let dense = |change| -> Vec<bool> {
            let layers = spec_of("Qwen3MoeForCausalLM", change).layers;
            layers.iter().map(|layer| matches!(layer.mlp, Mlp::Gated { width: 64, .. })).collect()
        };
        assert_eq!(dense(json!({})), [false, true, false]);
        assert_eq!(dense(json!({"mlp_only_layers": []})), [false; 3]);
        assert_eq!(dense(json!({"mlp_only_layers": null, "decoder_sparse_step": 2})), [true, false, true]);
    }

    #[test]
    fn weights_are_renormalised_where_the_file_says_so() {
        let router = |change| match spec_of("Qwen3MoeForCausalLM", change).layers[0].mlp {
            Mlp::Experts(experts) => experts.router,
            other => panic!("{other:?}"),
        };
        assert_eq!(router(json!({})), Router::SoftmaxRenormalised);
        let groups = Groups { n: 1, n_used: 1 };
        assert_eq!(router(json!({"norm_topk_prob": null})), Router::Softmax { factor: 1.0, groups });
    }
}
