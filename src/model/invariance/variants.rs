//! Small decoders that have, together, every variant of every axis.

use crate::model::spec::*;

/// The axes of LLaMA, with biases and windows.
pub fn plain() -> DecoderSpec {
    let mlp = Mlp::Gated { activation: Activation::Silu, width: 88, bias: Bias::Present };
    let layer = |mask| Layer { mask, rope: 0, mlp };
    DecoderSpec {
        family: "random",
        vocab: 101,
        hidden: 60,
        max_positions: 64,
        embedding: Embedding::PLAIN,
        norm: Norm::Rms { eps: 1e-5 },
        block: Block::Serial,
        branch_multiplier: 1.0,
        positions: Positions::Rope(vec![UNSCALED]),
        attention: Attention::Heads(HEADS),
        layers: vec![layer(Mask::Causal), layer(Mask::Window { window: 5 }), layer(Mask::Causal)],
        head: Head::Untied,
        logits: Logits::PLAIN,
    }
}

const UNSCALED: Rope = Rope { base: 10_000.0, width: 10, scaling: RopeScaling::Unscaled };

const HEADS: HeadAttention = HeadAttention {
    heads: 8,
    kv_heads: 2,
    head_dim: 10,
    qkv_bias: Bias::Present,
    out_bias: Bias::Present,
    qk_norm: None,
    scale: 0.316_227_76,
    softcap: None,
    sinks: Sinks::Absent,
    log_n: None,
};

const LAYER_NORM: Norm = Norm::Layer { eps: 1e-5, bias: Bias::Present };

const LATENT: LatentAttention = LatentAttention {
    heads: 4,
    query_rank: Some(24),
    kv_rank: 36,
    nope_dim: 12,
    rope_dim: 10,
    value_dim: 14,
    scale: 0.27,
    norm: Norm::Rms { eps: 1e-6 },
};

const EXPERTS: Experts = Experts {
    n_experts: 8,
    n_chosen: 3,
    width: 20,
    activation: Activation::Silu,
    bias: Bias::Absent,
    router: Router::SoftmaxRenormalised,
    shared_width: 0,
};

/// Gives the last layers another MLP.
fn with_mlps(mlp: Mlp, first: usize) -> Vec<Layer> {
    let mut layers = plain().layers;
    layers[first..].iter_mut().for_each(|layer| layer.mlp = mlp);
    layers
}

/// By the family that they are most like.
pub fn variants() -> Vec<(&'static str, DecoderSpec)> {
    let plain_mlp = |activation| Mlp::Plain { activation, width: 88, bias: Bias::Present };
    let bloom = DecoderSpec {
        norm: LAYER_NORM,
        embedding: Embedding { norm: Some(LAYER_NORM), ..Embedding::PLAIN },
        positions: Positions::Alibi,
        attention: Attention::Heads(HeadAttention { heads: 12, kv_heads: 12, ..HEADS }),
        layers: with_mlps(plain_mlp(Activation::GeluTanh), 0),
        head: Head::Tied,
        ..plain()
    };
    let starcoder = DecoderSpec {
        norm: LAYER_NORM,
        positions: Positions::Learned,
        attention: Attention::Heads(HeadAttention { kv_heads: 1, ..HEADS }),
        layers: with_mlps(plain_mlp(Activation::Gelu), 0),
        ..plain()
    };
    let qwen = DecoderSpec {
        positions: Positions::Rope(vec![Rope {
            scaling: RopeScaling::PromptNtk { trained: 16 },
            ..UNSCALED
        }]),
        attention: Attention::Heads(HeadAttention { log_n: Some(16), ..HEADS }),
        ..plain()
    };
    let minicpm = DecoderSpec {
        embedding: Embedding { multiplier: 2.5, norm: None },
        branch_multiplier: 0.4,
        positions: Positions::Rope(vec![Rope { width: 6, ..UNSCALED }]),
        head: Head::Normalised,
        logits: Logits { multiplier: 4.0, softcap: None },
        ..plain()
    };
    let cohere = DecoderSpec {
        norm: Norm::Layer { eps: 1e-5, bias: Bias::Absent },
        block: Block::ParallelOneNorm,
        attention: Attention::Heads(HeadAttention {
            qk_norm: Some(HeadNorm::PerHead(Norm::Layer { eps: 1e-5, bias: Bias::Absent })),
            ..HEADS
        }),
        ..plain()
    };
    let falcon = DecoderSpec {
        norm: LAYER_NORM,
        block: Block::ParallelTwoNorms,
        layers: with_mlps(plain_mlp(Activation::Gelu), 0),
        ..plain()
    };
    let mut gemma = DecoderSpec {
        norm: Norm::RmsOnePlus { eps: 1e-6 },
        block: Block::SerialPostNorms,
        positions: Positions::Rope(vec![
            UNSCALED,
            Rope { base: 1e6, scaling: RopeScaling::Linear { factor: 8.0 }, ..UNSCALED },
        ]),
        attention: Attention::Heads(HeadAttention {
            qk_norm: Some(HeadNorm::Shared(Norm::RmsOnePlus { eps: 1e-6 })),
            softcap: Some(5.0),
            ..HEADS
        }),
        layers: with_mlps(Mlp::Gated { activation: Activation::GeluTanh, width: 92, bias: Bias::Absent }, 0),
        logits: Logits { multiplier: 1.0, softcap: Some(3.0) },
        ..plain()
    };
    gemma.layers[1].rope = 1;
    let mixtral = DecoderSpec { layers: with_mlps(Mlp::Experts(EXPERTS), 0), ..plain() };
    let gpt_oss = DecoderSpec {
        attention: Attention::Heads(HeadAttention { sinks: Sinks::Present, ..HEADS }),
        layers: with_mlps(
            Mlp::Experts(Experts {
                activation: Activation::ClampedSwiglu { limit: 1.5 },
                bias: Bias::Present,
                router: Router::SoftmaxOfChosen,
                ..EXPERTS
            }),
            0,
        ),
        ..plain()
    };
    let of_groups = |router| Experts { router, shared_width: 28, ..EXPERTS };
    let groups = Groups { n: 4, n_used: 2 };
    let deepseek2 = DecoderSpec {
        attention: Attention::Latent(LATENT),
        layers: with_mlps(Mlp::Experts(of_groups(Router::Softmax { factor: 3.0, groups })), 1),
        ..plain()
    };
    let deepseek3 = DecoderSpec {
        attention: Attention::Latent(LatentAttention { query_rank: None, ..LATENT }),
        layers: with_mlps(Mlp::Experts(of_groups(Router::Sigmoid { factor: 2.5, groups })), 1),
        ..plain()
    };
    vec![
        ("bloom", bloom),
        ("starcoder", starcoder),
        ("qwen", qwen),
        ("minicpm", minicpm),
        ("cohere", cohere),
        ("falcon", falcon),
        ("gemma", gemma),
        ("mixtral", mixtral),
        ("gpt-oss", gpt_oss),
        ("deepseek2", deepseek2),
        ("deepseek3", deepseek3),
    ]
}
