use serde_json::{Value, json};

use crate::model::families::tests::heads;
use crate::model::families::{Resolved, resolve};
use crate::model::names::Role;
use crate::model::spec::{
    Activation, Bias, Head, Layer, Mask, Mlp, Norm, Positions, RampBounds, Rope, RopeScaling,
};

fn config(change: Value) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
        "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100
    });
    config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    config
}

fn resolved(change: Value) -> Resolved {
    resolve(&config(change)).unwrap()
}

fn refusal(change: Value) -> String {
    resolve(&config(change)).unwrap_err().to_string()
}

fn rope(change: Value) -> (Rope, usize) {
    let Resolved { spec, .. } = resolved(change);
    (spec.ropes()[0].clone(), spec.max_positions)
}

#[test]
fn absent_keys_are_those_of_the_class() {
    let Resolved { spec, dtype, notes, .. } = resolved(json!({}));
    let attention = heads(&spec);
    assert_eq!((attention.heads, attention.kv_heads, attention.head_dim), (4, 4, 8));
    assert_eq!((attention.qkv_bias, attention.out_bias), (Bias::Absent, Bias::Absent));
    let mlp = Mlp::Gated { activation: Activation::Silu, width: 64, bias: Bias::Absent };
    assert_eq!(spec.layers, vec![Layer { mask: Mask::Causal, rope: 0, mlp }; 2]);
    assert_eq!(spec.norm, Norm::Rms { eps: 1e-6 });
    assert_eq!(
        spec.positions,
        Positions::Rope(vec![Rope { base: 1e4, width: 8, scaling: RopeScaling::Unscaled }])
    );
    assert_eq!((spec.max_positions, spec.vocab, spec.head), (2048, 100, Head::Untied));
    assert_eq!((dtype, notes.len()), (None, 0));
}

#[test]
fn yi_under_its_first_name_has_its_own_defaults_and_aliases() {
    let yi = resolved(json!({"architectures": ["YiForCausalLM"], "model_type": "Yi"}));
    assert_eq!(yi.spec.family, "yi");
    let rope = &yi.spec.ropes()[0];
    assert_eq!((rope.base, heads(&yi.spec).kv_heads, yi.spec.max_positions), (5e6, 4, 4096));
    let norm = Role::Layer(3, crate::model::names::LayerRole::MlpNorm);
    assert_eq!(
        yi.names.of(&yi.spec, norm, 0),
        ["model.layers.3.post_attention_layernorm.weight", "model.layers.3.ln2.weight"]
    );
}

#[test]
fn both_dialects_say_the_same() {
    let old = json!({
        "rope_theta": 500000.0, "torch_dtype": "bfloat16", "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        }
    });
    let new = json!({
        "dtype": "bfloat16", "max_position_embeddings": 131072, "head_dim": 8,
        "rope_parameters": {
            "rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192
        }
    });
    let (old, new) = (resolved(old), resolved(new));
    assert_eq!(old.spec, new.spec);
    assert_eq!((old.dtype, old.spec.max_positions), (new.dtype, 131_072));
    let scaling =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192 };
    assert_eq!(new.spec.positions, Positions::Rope(vec![Rope { base: 5e5, width: 8, scaling }]));
    let default = rope(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 7}}));
    assert_eq!(default.0, Rope { base: 7.0, width: 8, scaling: RopeScaling::Unscaled });
}

#[test]
fn scalings_derive_the_positions() {
    let scaled = |scaling: Value| rope(json!({"max_position_embeddings": 512, "rope_scaling": scaling}));
    let (rope, positions) = scaled(json!({"type": "linear", "factor": 4.0}));
    assert_eq!((rope.scaling, positions), (RopeScaling::Linear { factor: 4.0 }, 2048));
    let (rope, positions) = scaled(json!({"type": "dynamic", "factor": 2.0}));
    assert_eq!((rope.scaling, positions), (RopeScaling::Dynamic { factor: 2.0, original: 512 }, 1024));
    let (rope, positions) = scaled(
        json!({"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 64, "truncate": false}),
    );
    let amplitude = 0.1 * 8f64.ln() + 1.0;
    let (beta_fast, beta_slow, ramp_bounds) = (32.0, 1.0, RampBounds::Exact);
    let yarn = RopeScaling::Yarn { factor: 8.0, beta_fast, beta_slow, original: 64, ramp_bounds, amplitude };
    assert_eq!((rope.scaling, positions), (yarn, 512));
    let (rope, positions) = scaled(json!({
        "type": "su", "short_factor": [1, 1, 1, 1], "long_factor": [1, 2, 3, 4],
        "original_max_position_embeddings": 64
    }));
    let RopeScaling::LongRope { short, long, original, amplitude } = rope.scaling else {
        panic!("{rope:?} is no longrope");
    };
    assert_eq!((short, long, original, positions), (vec![1.0; 4], vec![1.0, 2.0, 3.0, 4.0], 64, 512));
    assert!((amplitude - 1.224744871391589).abs() < 1e-12);
}

#[test]
fn amplitudes() {
    let yarn = |extra: Value| {
        let mut scaling =
            json!({"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096});
        scaling.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        match rope(json!({"rope_scaling": scaling})).0.scaling {
            RopeScaling::Yarn { amplitude, .. } => amplitude,
            other => panic!("{other:?} is no yarn"),
        }
    };
    assert_eq!(yarn(json!({"attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 2.0})), 1.5);
    assert!((yarn(json!({"mscale": 1.0, "mscale_all_dim": 0.707})) - 1.0857263992561355).abs() < 1e-12);
    assert!((yarn(json!({"mscale": 1.0, "mscale_all_dim": 0})) - (0.1 * 40f64.ln() + 1.0)).abs() < 1e-12);
}

#[test]
fn the_top_level_original_length_wins() {
    let (rope, _) = rope(json!({
        "max_position_embeddings": 512, "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [1, 2, 3, 4],
            "original_max_position_embeddings": 32, "factor": 2.0, "attention_factor": 1.25
        }
    }));
    let RopeScaling::LongRope { original, amplitude, .. } = rope.scaling else { panic!("{rope:?}") };
    assert_eq!((original, amplitude), (64, 1.25));
}

#[test]
fn what_makes_no_model_is_refused_in_a_sentence() {
    let cases = [
        (json!({"hidden_size": 0}), "hidden_size is 0, not a whole number from 1 to 1048576"),
        (json!({"hidden_size": 32.5}), "hidden_size is 32.5, not a whole number"),
        (json!({"hidden_size": "32"}), "hidden_size is \"32\", not a whole number"),
        (json!({"hidden_size": null}), "the config has no hidden_size"),
        (json!({"num_hidden_layers": -2}), "num_hidden_layers is -2"),
        (json!({"vocab_size": 1_000_000_000_000_000_000u64}), "vocab_size is 1000000000000000000"),
        (json!({"max_position_embeddings": 1e18}), "max_position_embeddings is 1e+18"),
        (json!({"num_attention_heads": 3}), "hidden_size 32 does not divide among 3 heads"),
        (json!({"num_key_value_heads": 3}), "4 query heads do not divide among 3 KV heads"),
        (json!({"head_dim": 7}), "turn 7 numbers of a head of 7"),
        (json!({"rms_norm_eps": -1e-6}), "rms_norm_eps is -1e-6"),
        (json!({"attention_bias": "no"}), "attention_bias is \"no\", not true or false"),
        (json!({"hidden_act": "relu"}), "the activation relu is not served"),
        (json!({"rope_theta": 0}), "rope_theta is 0"),
        (json!({"rope_scaling": {"factor": 2}}), "rope scaling has a factor but no type"),
        (json!({"rope_scaling": [2]}), "rope_scaling is a list of 1, not an object"),
        (json!({"rope_scaling": {"type": "ntk"}}), "the rope type ntk is not served"),
        (json!({"rope_scaling": {"type": "linear"}}), "the config has no rope_scaling.factor"),
        (json!({"rope_scaling": {"type": "linear", "factor": 1e300}}), "rope_scaling.factor is 1e+300"),
        (json!({"rope_scaling": {"type": "linear", "factor": 9e5}}), "stretched by 900000"),
        (json!({"rope_scaling": {"type": "dynamic", "factor": 0.5}}), "rope_scaling.factor is 0.5"),
        (
            json!({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}),
            "rope_scaling.short_factor is a list of 1, not a list of 4 numbers",
        ),
        (
            json!({"rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0
            }}),
            "low_freq_factor 4 is not below its high_freq_factor 1",
        ),
        (json!({"partial_rotary_factor": 0.5}), "over 0.5 of the head"),
        (json!({"rope_parameters": {"full_attention": {}}}), "differ by layer"),
        (json!({"quantization_config": {"quant_method": "gptq"}}), "quantized (gptq)"),
        (
            json!({"architectures": ["LlamaForTokenClassification"], "model_type": "llama"}),
            "is not served; the model types that are: llama, ",
        ),
        (json!({"architectures": [], "model_type": "gpt5"}), "the model type gpt5 is not served"),
        (json!({"architectures": null}), "neither architectures nor model_type"),
        (json!({"architectures": "LlamaForCausalLM"}), "not a list of strings"),
    ];
    for (change, expected) in cases {
        let refusal = refusal(change.clone());
        assert!(refusal.contains(expected), "{change}: {refusal}");
    }
}

#[test]
fn the_model_type_decides_where_no_architecture_is_named() {
    let by_type = resolved(json!({"architectures": [], "model_type": "internlm"}));
    assert_eq!(by_type.spec.family, "internlm");
}
