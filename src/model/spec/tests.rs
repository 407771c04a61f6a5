//! Specs from which tests depart, and the tests of theirs.

use super::*;

/// A decoder of a few thousand weights, from which tests depart.
pub(crate) fn tiny() -> DecoderSpec {
    let mlp = Mlp::Gated { activation: Activation::Silu, width: 12, bias: Bias::Absent };
    DecoderSpec {
        family: "llama",
        vocab: 11,
        hidden: 8,
        max_positions: 64,
        embedding: Embedding::PLAIN,
        norm: Norm::Rms { eps: 1e-5 },
        block: Block::Serial,
        branch_multiplier: 1.0,
        positions: Positions::Rope(vec![Rope { base: 10_000.0, width: 4, scaling: RopeScaling::Unscaled }]),
        attention: Attention::Heads(HeadAttention {
            heads: 4,
            kv_heads: 2,
            head_dim: 4,
            qkv_bias: Bias::Absent,
            out_bias: Bias::Absent,
            qk_norm: None,
            scale: 0.5,
            softcap: None,
            sinks: Sinks::Absent,
            log_n: None,
        }),
        layers: vec![Layer { mask: Mask::Causal, rope: 0, mlp }; 2],
        head: Head::Untied,
        logits: Logits::PLAIN,
    }
}

/// As [`tiny`], with latent attention.
pub(crate) fn latent() -> DecoderSpec {
    let attention = LatentAttention {
        heads: 4,
        query_rank: Some(6),
        kv_rank: 5,
        nope_dim: 3,
        rope_dim: 4,
        value_dim: 2,
        scale: 0.4,
        norm: Norm::Rms { eps: 1e-6 },
    };
    DecoderSpec { attention: Attention::Latent(attention), ..tiny() }
}

/// As [`tiny`], with experts in all layers but the first.
pub(crate) fn experts(router: Router) -> DecoderSpec {
    let mut spec = tiny();
    spec.layers[1].mlp = Mlp::Experts(Experts {
        n_experts: 4,
        n_chosen: 2,
        width: 8,
        activation: Activation::Silu,
        bias: Bias::Absent,
        router,
        shared_width: 4,
    });
    spec
}

fn heads(spec: &mut DecoderSpec) -> &mut HeadAttention {
    match &mut spec.attention {
        Attention::Heads(heads) => heads,
        Attention::Latent(latent) => panic!("{latent:?}"),
    }
}

#[test]
fn parameters_are_those_of_the_shapes() {
    let spec = tiny();
    let layer = 8 + 16 * 8 + 2 * 8 * 8 + 8 * 16 + 8 + 3 * 12 * 8;
    assert_eq!(spec.n_parameters(), 2 * 11 * 8 + 2 * layer + 8);
    assert_eq!(DecoderSpec { head: Head::Tied, ..spec }.n_parameters(), 11 * 8 + 2 * layer + 8);
}

#[test]
fn every_axis_counts_its_tensors() {
    let plain = tiny().n_parameters();
    let grown = |change: fn(&mut DecoderSpec)| {
        let mut spec = tiny();
        change(&mut spec);
        spec.check().unwrap();
        spec.n_parameters() as i64 - plain as i64
    };
    assert_eq!(grown(|spec| spec.norm = Norm::Layer { eps: 1e-5, bias: Bias::Present }), 5 * 8);
    assert_eq!(grown(|spec| spec.embedding.norm = Some(Norm::Layer { eps: 1e-5, bias: Bias::Present })), 16);
    assert_eq!(grown(|spec| spec.positions = Positions::Learned), 64 * 8);
    assert_eq!(grown(|spec| spec.block = Block::SerialPostNorms), 2 * 2 * 8);
    assert_eq!(grown(|spec| spec.block = Block::ParallelOneNorm), -2 * 8);
    assert_eq!(
        grown(|spec| heads(spec).qk_norm = Some(HeadNorm::Shared(Norm::Rms { eps: 1e-6 }))),
        2 * 2 * 4
    );
    assert_eq!(
        grown(|spec| heads(spec).qk_norm = Some(HeadNorm::PerHead(Norm::Rms { eps: 1e-6 }))),
        2 * (4 + 2) * 4
    );
    assert_eq!(grown(|spec| heads(spec).sinks = Sinks::Present), 2 * 4);
    assert_eq!(grown(|spec| heads(spec).qkv_bias = Bias::Present), 2 * (4 + 2 * 2) * 4);
    let plain_mlp = Mlp::Plain { activation: Activation::Gelu, width: 12, bias: Bias::Present };
    let with_plain =
        |mlp| DecoderSpec { layers: vec![Layer { mlp, ..tiny().layers[0].clone() }; 2], ..tiny() };
    assert_eq!(with_plain(plain_mlp).n_parameters() + 2 * 12 * 8, plain + 2 * (12 + 8));
    let in_latent = 6 * 8 + 6 + 4 * 7 * 6 + 9 * 8 + 5 + 4 * 3 * 5 + 4 * 2 * 5 + 8 * 4 * 2;
    let in_heads = 16 * 8 + 2 * 8 * 8 + 8 * 16;
    assert_eq!(latent().n_parameters() + 2 * in_heads, plain + 2 * in_latent);
    assert_eq!(latent().kv_elements_per_token(), 2 * 9);
    assert_eq!(tiny().kv_elements_per_token(), 2 * 2 * 2 * 4);
    let routed = experts(Router::Sigmoid { factor: 2.5, groups: Groups { n: 2, n_used: 1 } });
    routed.check().unwrap();
    let in_experts = 4 * 8 + 4 + 4 * 3 * 8 * 8 + 3 * 4 * 8;
    assert_eq!(routed.n_parameters() + 3 * 12 * 8, plain + in_experts);
}

#[test]
fn the_largest_sizes_do_not_overflow() {
    let mut spec = tiny();
    spec.vocab = limits::VOCAB;
    spec.hidden = limits::HIDDEN;
    spec.max_positions = limits::POSITIONS;
    let kv_heads = limits::HEADS;
    let largest =
        HeadAttention { heads: kv_heads, kv_heads, head_dim: limits::HEAD_DIM, ..*heads(&mut spec) };
    spec.attention = Attention::Heads(largest);
    let mlp = Mlp::Gated { activation: Activation::Silu, width: limits::WIDTH, bias: Bias::Present };
    spec.layers = vec![Layer { mask: Mask::Causal, rope: 0, mlp }; limits::LAYERS];
    spec.check().unwrap();
    // Four bytes each still count in 64 bits.
    assert!(spec.n_parameters() < u64::MAX / 4);
    assert!(spec.kv_elements_per_token().checked_mul(4 * limits::POSITIONS as u64).is_some());
}

#[test]
fn relations_are_checked() {
    let refusal = |change: fn(&mut DecoderSpec)| {
        let mut spec = tiny();
        change(&mut spec);
        spec.check().unwrap_err().to_string()
    };
    tiny().check().unwrap();
    latent().check().unwrap();
    assert_eq!(refusal(|spec| heads(spec).kv_heads = 3), "4 query heads do not divide among 3 KV heads");
    let turned = |spec: &mut DecoderSpec, width| {
        let Positions::Rope(ropes) = &mut spec.positions else { panic!("{spec:?}") };
        ropes[0].width = width;
    };
    let mut odd = tiny();
    turned(&mut odd, 3);
    assert!(odd.check().unwrap_err().to_string().contains("turn 3 numbers of a head of 4"));
    turned(&mut odd, 6);
    assert!(odd.check().unwrap_err().to_string().contains("turn 6 numbers of a head of 4"));
    assert!(refusal(|spec| spec.layers.clear()).contains("layers is 0"));
    assert!(refusal(|spec| spec.vocab = usize::MAX).contains("vocabulary"));
    assert!(refusal(|spec| spec.layers[1].mask = Mask::Window { window: 0 }).contains("window of 0"));
    assert!(refusal(|spec| spec.layers[1].rope = 1).contains("rotary embedding 1 of 1"));
    assert!(refusal(|spec| spec.branch_multiplier = f32::NAN).contains("multiplier of branches is NaN"));
    let routed = |groups, n_chosen| {
        let mut spec = experts(Router::Softmax { factor: 1.0, groups });
        let Mlp::Experts(experts) = &mut spec.layers[1].mlp else { panic!("{spec:?}") };
        experts.n_chosen = n_chosen;
        spec.check().map_err(|error| error.to_string())
    };
    assert_eq!(routed(Groups { n: 2, n_used: 1 }, 2), Ok(()));
    assert!(routed(Groups { n: 3, n_used: 1 }, 1).unwrap_err().contains("do not divide among 3 groups"));
    assert!(routed(Groups { n: 2, n_used: 1 }, 3).unwrap_err().contains("1 groups of 2 experts for 3"));
    assert!(routed(Groups { n: 1, n_used: 1 }, 5).unwrap_err().contains("experts a token is 5"));
    let learned = DecoderSpec { positions: Positions::Learned, ..latent() };
    assert!(learned.check().unwrap_err().to_string().contains("latent attention with positions Learned"));
}
