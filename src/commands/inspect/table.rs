//! A decoder's spec as rows of a table.

use std::fmt::Write as _;

use crate::model::spec::{
    Activation, Attention, Bias, Block, DecoderSpec, Experts, Groups, Head, HeadAttention, HeadNorm,
    LatentAttention, Layer, Mask, Mlp, Norm, Positions, Rope, RopeScaling, Router, Sinks,
};

/// What a decoder is, a row for each axis: a title and a description. What a spec does not have has no row.
pub(super) fn rows(spec: &DecoderSpec) -> Vec<(&'static str, String)> {
    let mut rows = vec![
        ("layers", spec.layers().to_string()),
        ("hidden", spec.hidden.to_string()),
        ("vocabulary", spec.vocab.to_string()),
        ("positions", positions(spec)),
        ("norm", norm(spec.norm)),
        ("block", block(spec)),
    ];
    let embedding = [
        (spec.embedding.multiplier != 1.0).then(|| format!("times {}", number(spec.embedding.multiplier))),
        spec.embedding.norm.map(|of_embedding| format!("then {}", norm(of_embedding))),
    ];
    rows.extend(joined(embedding).map(|text| ("embedding", text)));
    rows.extend(match &spec.attention {
        Attention::Heads(heads) => attention(heads),
        Attention::Latent(latent) => latent_attention(latent),
    });
    if !spec.ropes().is_empty() {
        rows.push((
            "rotary",
            by_layer(&spec.layers, |layer| layer.rope, |&number| rope(&spec.ropes()[number])),
        ));
    }
    rows.push(("mask", by_layer(&spec.layers, |layer| layer.mask, |mask| mask_of(*mask))));
    rows.push(("mlp", by_layer(&spec.layers, |layer| layer.mlp, |kind| mlp(*kind))));
    rows.push(("head", head(spec)));
    rows
}

/// Weights that a token passes: of experts, the chosen ones.
pub(super) fn active_parameters(spec: &DecoderSpec) -> u64 {
    let idle = |layer: &Layer| match layer.mlp {
        Mlp::Experts(experts) => {
            let biases = if experts.bias == Bias::Present { 2 * experts.width + spec.hidden } else { 0 };
            let expert = (3 * experts.width * spec.hidden + biases) as u64;
            (experts.n_experts - experts.n_chosen) as u64 * expert
        }
        Mlp::Gated { .. } | Mlp::Plain { .. } => 0,
    };
    spec.n_parameters() - spec.layers.iter().map(idle).sum::<u64>()
}

fn positions(spec: &DecoderSpec) -> String {
    let how = match spec.positions {
        Positions::Rope(_) => "rotary",
        Positions::Alibi => "ALiBi",
        Positions::Learned => "a learned table",
    };
    format!("{}, {how}", spec.max_positions)
}

fn norm(norm: Norm) -> String {
    match norm {
        Norm::Rms { eps } => format!("root mean square, eps {eps:e}"),
        Norm::RmsOnePlus { eps } => format!("root mean square, weights plus 1, eps {eps:e}"),
        Norm::Layer { eps, bias } => format!("mean and variance, {} biases, eps {eps:e}", with(bias)),
    }
}

fn block(spec: &DecoderSpec) -> String {
    let shape = match spec.block {
        Block::Serial => "serial, a norm before each branch",
        Block::SerialPostNorms => "serial, norms before and after each branch",
        Block::ParallelOneNorm => "parallel, one norm for both branches",
        Block::ParallelTwoNorms => "parallel, a norm before each branch",
    };
    let factor = spec.branch_multiplier;
    if factor == 1.0 { shape.to_owned() } else { format!("{shape}; branches times {}", number(factor)) }
}

fn attention(attention: &HeadAttention) -> Vec<(&'static str, String)> {
    let HeadAttention { heads, kv_heads, head_dim, .. } = *attention;
    let kv = if kv_heads == 1 { "1 KV head".to_owned() } else { format!("{kv_heads} KV heads") };
    let mut rows = vec![("attention", format!("{heads} heads, {kv}, {head_dim} wide"))];
    let scores = [
        Some(format!("times {}", number(attention.scale))),
        attention.softcap.map(|cap| format!("capped at {}", number(cap))),
        (attention.sinks == Sinks::Present).then(|| "a sink for each head".to_owned()),
        attention.log_n.map(|length| format!("queries beyond {length} scaled by their position's logarithm")),
    ];
    rows.extend(joined(scores).map(|text| ("scores", text)));
    rows.extend(attention.qk_norm.map(|kind| {
        let (of_heads, which) = match kind {
            HeadNorm::Shared(norm) => (norm, "one for all heads"),
            HeadNorm::PerHead(norm) => (norm, "each head its own"),
        };
        ("head norms", format!("{}; {which}", norm(of_heads)))
    }));
    let biases = [
        (attention.qkv_bias == Bias::Present).then(|| "queries, keys, values".to_owned()),
        (attention.out_bias == Bias::Present).then(|| "output".to_owned()),
    ];
    rows.extend(joined(biases).map(|text| ("biases", text)));
    rows
}

fn latent_attention(latent: &LatentAttention) -> Vec<(&'static str, String)> {
    let LatentAttention { heads, kv_rank, nope_dim, rope_dim, value_dim, .. } = *latent;
    let queries = match latent.query_rank {
        Some(rank) => format!("of a latent of {rank}"),
        None => "of the hidden state".to_owned(),
    };
    vec![
        ("attention", format!("latent, {heads} heads; cached: {kv_rank} and a key of {rope_dim} that turns")),
        ("queries", format!("{nope_dim} + {rope_dim} wide, {queries}; values {value_dim} wide")),
        ("scores", format!("times {}", number(latent.scale))),
    ]
}

fn rope(rope: &Rope) -> String {
    let scaling = match &rope.scaling {
        RopeScaling::Unscaled => String::new(),
        RopeScaling::Linear { factor } => format!(", linear {factor}"),
        RopeScaling::Dynamic { factor, original } => format!(", dynamic {factor} beyond {original}"),
        RopeScaling::PromptNtk { trained } => format!(", by the prompt's length beyond {trained}"),
        RopeScaling::Llama3 { factor, original, .. } => format!(", llama3 {factor} of {original}"),
        RopeScaling::Yarn { factor, original, .. } => format!(", yarn {factor} of {original}"),
        RopeScaling::LongRope { original, .. } => format!(", longrope beyond {original}"),
    };
    format!("base {}, {} numbers of a head{scaling}", rope.base, rope.width)
}

fn mask_of(mask: Mask) -> String {
    match mask {
        Mask::Causal => "causal".to_owned(),
        Mask::Window { window } => format!("the last {window} tokens"),
    }
}

fn mlp(mlp: Mlp) -> String {
    match mlp {
        Mlp::Gated { activation, width, bias } => {
            format!("gated {}, {width} neurons{}", name(activation), and_biases(bias))
        }
        Mlp::Plain { activation, width, bias } => {
            format!("plain {}, {width} neurons{}", name(activation), and_biases(bias))
        }
        Mlp::Experts(experts) => experts_of(experts),
    }
}

fn experts_of(experts: Experts) -> String {
    let Experts { n_experts, n_chosen, width, activation, .. } = experts;
    let mut text = format!("{n_chosen} of {n_experts} experts, {}, {width} neurons", name(activation));
    text += and_biases(experts.bias);
    if experts.shared_width > 0 {
        let _ = write!(text, ", beside {} shared", experts.shared_width);
    }
    let (weights, groups) = match experts.router {
        Router::SoftmaxRenormalised => ("softmax, renormalised".to_owned(), None),
        Router::Softmax { factor, groups } => (format!("softmax times {}", number(factor)), Some(groups)),
        Router::Sigmoid { factor, groups } => {
            (format!("sigmoid, renormalised, times {}", number(factor)), Some(groups))
        }
        Router::SoftmaxOfChosen => ("softmax of the chosen".to_owned(), None),
    };
    let _ = write!(text, "; {weights}");
    if let Some(Groups { n, n_used }) = groups.filter(|groups| groups.n > 1) {
        let _ = write!(text, ", {n_used} of {n} groups");
    }
    text
}

fn head(spec: &DecoderSpec) -> String {
    let rows = match spec.head {
        Head::Tied => "the embedding",
        Head::Untied => "its own rows",
        Head::Normalised => "its own rows, of length 1",
    };
    let logits = [
        (spec.logits.multiplier != 1.0).then(|| format!("logits times {}", number(spec.logits.multiplier))),
        spec.logits.softcap.map(|cap| format!("logits capped at {}", number(cap))),
    ];
    joined([Some(rows.to_owned())].into_iter().chain(logits)).unwrap_or_default()
}

fn name(activation: Activation) -> String {
    match activation {
        Activation::Silu => "silu".to_owned(),
        Activation::GeluTanh => "gelu (tanh)".to_owned(),
        Activation::Gelu => "gelu".to_owned(),
        Activation::ClampedSwiglu { limit } => format!("swiglu clamped at {limit}"),
    }
}

fn with(bias: Bias) -> &'static str {
    match bias {
        Bias::Absent => "no",
        Bias::Present => "with",
    }
}

fn and_biases(bias: Bias) -> &'static str {
    match bias {
        Bias::Absent => "",
        Bias::Present => " with biases",
    }
}

/// A number as short as it can be told from others.
fn number(number: f32) -> String {
    let rounded = format!("{number:.5}");
    if rounded.contains('.') {
        rounded.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        rounded
    }
}

/// What is there, with commas.
fn joined(parts: impl IntoIterator<Item = Option<String>>) -> Option<String> {
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// What of a layer differs by layer: the rarer kinds with their layers, then the usual one.
fn by_layer<T: PartialEq>(
    layers: &[Layer],
    kind: impl Fn(&Layer) -> T,
    show: impl Fn(&T) -> String,
) -> String {
    let mut kinds: Vec<(T, Vec<usize>)> = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        let of_layer = kind(layer);
        match kinds.iter_mut().find(|(known, _)| *known == of_layer) {
            Some((_, numbers)) => numbers.push(number),
            None => kinds.push((of_layer, vec![number])),
        }
    }
    kinds.sort_by_key(|(_, numbers)| numbers.len());
    let Some(((usual, _), rarer)) = kinds.split_last() else { return String::new() };
    if rarer.is_empty() {
        return show(usual);
    }
    let mut text = String::new();
    for (kind, numbers) in rarer {
        let _ = write!(text, "on {} {}; ", listed(numbers), show(kind));
    }
    text + "else " + &show(usual)
}

/// Rising numbers, runs of equal steps told by their ends: `0`, `3-60`, `5, 11 .. 59`.
fn listed(numbers: &[usize]) -> String {
    let mut runs: Vec<String> = Vec::new();
    let mut rest = numbers;
    while let [first, others @ ..] = rest {
        let step = others.first().map_or(0, |second| second - first);
        let len = 1 + others.iter().zip(1..).take_while(|&(&number, i)| number == first + i * step).count();
        let last = first + (len - 1) * step;
        let len = if len > 2 {
            runs.push(match step {
                1 => format!("{first}-{last}"),
                _ => format!("{first}, {} .. {last}", first + step),
            });
            len
        } else {
            runs.push(first.to_string());
            1
        };
        rest = &rest[len..];
    }
    runs.join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::model::families::resolve;

    fn table(config: Value) -> Vec<String> {
        let spec = resolve(&config).unwrap().spec;
        rows(&spec).into_iter().map(|(title, text)| format!("{title}: {text}")).collect()
    }

    #[test]
    fn numbers_in_runs() {
        assert_eq!(listed(&[0]), "0");
        assert_eq!(listed(&[3, 4]), "3, 4");
        assert_eq!(listed(&[0, 1, 2, 7, 9, 11, 20]), "0-2, 7, 9 .. 11, 20");
        assert_eq!(listed(&[5, 11, 17, 23]), "5, 11 .. 23");
    }

    #[test]
    fn layers_that_differ() {
        let gemma = table(json!({
            "architectures": ["Gemma3ForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_attention_heads": 4, "num_hidden_layers": 12, "vocab_size": 100, "sliding_window": 8,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}
        }));
        let expected = [
            "layers: 12",
            "hidden: 64",
            "vocabulary: 100",
            "positions: 131072, rotary",
            "norm: root mean square, weights plus 1, eps 1e-6",
            "block: serial, norms before and after each branch",
            "embedding: times 8",
            "attention: 4 heads, 4 KV heads, 256 wide",
            "scores: times 0.0625",
            "head norms: root mean square, weights plus 1, eps 1e-6; one for all heads",
            "rotary: on 5, 11 base 1000000, 256 numbers of a head, linear 8; else base 10000, 256 numbers of a head",
            "mask: on 5, 11 causal; else the last 8 tokens",
            "mlp: gated gelu (tanh), 128 neurons",
            "head: the embedding",
        ];
        assert_eq!(gemma, expected);
    }

    #[test]
    fn latents_and_experts() {
        let config = json!({
            "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 27,
            "num_attention_heads": 16, "intermediate_size": 10944, "moe_intermediate_size": 1408,
            "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
            "q_lora_rank": null, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "vocab_size": 102400, "max_position_embeddings": 163840,
            "rope_scaling": {
                "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 0.707,
                "mscale_all_dim": 0.707
            }
        });
        let spec = resolve(&config).unwrap().spec;
        assert_eq!(active_parameters(&spec), 2_661_150_208);
        let table = table(config);
        for row in [
            "attention: latent, 16 heads; cached: 512 and a key of 64 that turns",
            "queries: 128 + 64 wide, of the hidden state; values 128 wide",
            "scores: times 0.11472",
            "rotary: base 10000, 64 numbers of a head, yarn 40 of 4096",
            "mlp: on 0 gated silu, 10944 neurons; else 6 of 64 experts, silu, 1408 neurons, beside 2816 shared; \
             softmax times 1",
        ] {
            assert!(table.iter().any(|found| found == row), "{row}: {table:#?}");
        }
    }
}
