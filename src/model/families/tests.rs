//! Whatever a file holds, it is a model or a sentence.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};

use super::*;
use crate::model::checkpoint::Checkpoint;
use crate::model::names::roles;
use crate::model::partition::Shard;
use crate::model::plan::{MemoryPlan, PlanOptions};
use crate::model::rope::Frequencies;
use crate::model::spec::{Attention, HeadAttention, Mask};
use crate::model::weights::Weights;

/// The heads of a decoder that has such.
pub(super) fn heads(spec: &DecoderSpec) -> HeadAttention {
    match spec.attention {
        Attention::Heads(heads) => heads,
        Attention::Latent(latent) => panic!("{latent:?}"),
    }
}

/// The masks of all layers.
pub(super) fn masks(spec: &DecoderSpec) -> Vec<Mask> {
    spec.layers.iter().map(|layer| layer.mask).collect()
}

/// A file of each family, tiny and in the old dialect, with its peculiarities, and the keys that it cannot do without.
#[derive(Deserialize)]
struct Tiny {
    required: Vec<String>,
    config: Value,
}

fn tiny() -> Vec<Tiny> {
    serde_json::from_str(include_str!("tests/tiny.json")).unwrap()
}

/// The tiny file of every family.
pub(crate) fn tiny_configs() -> Vec<Value> {
    tiny().into_iter().map(|tiny| tiny.config).collect()
}

/// The tiny file of an architecture, with other values for some keys.
pub(super) fn config_of(architecture: &str, change: Value) -> Value {
    let mut files = tiny().into_iter();
    let tiny = files.find(|tiny| tiny.config["architectures"][0] == architecture);
    let mut config = tiny.expect(architecture).config;
    config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    config
}

/// The decoder that such a file describes.
pub(super) fn spec_of(architecture: &str, change: Value) -> DecoderSpec {
    resolve(&config_of(architecture, change)).unwrap().spec
}

/// Why such a file describes none.
pub(super) fn refusal_of(architecture: &str, change: Value) -> String {
    resolve(&config_of(architecture, change)).unwrap_err().to_string()
}

/// Files that use every key that some family reads.
fn sound_configs() -> Vec<Value> {
    let sizes = json!({
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 3, "vocab_size": 100, "head_dim": 8,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "torch_dtype": "float16",
        "hidden_act": "silu", "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": true,
        "sliding_window": 24, "use_sliding_window": true, "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"]
    });
    let scalings = [
        json!(null),
        json!({"rope_type": "default"}),
        json!({"type": "linear", "factor": 4.0}),
        json!({"type": "dynamic", "factor": 2.0}),
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}),
        json!({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32,
               "beta_slow": 1, "truncate": true, "mscale": 1.0, "mscale_all_dim": 0.7}),
        json!({"type": "longrope", "short_factor": [1, 1, 1, 2], "long_factor": [1, 2, 3, 4],
               "original_max_position_embeddings": 64, "attention_factor": 1.1}),
    ];
    let scaled = scalings.into_iter().map(|scaling| {
        let mut config = sizes.clone();
        config["architectures"] = json!(["LlamaForCausalLM"]);
        config["rope_scaling"] = scaling;
        config
    });
    let mut new_dialect = sizes.clone();
    new_dialect["architectures"] = json!(["Qwen2ForCausalLM"]);
    new_dialect["rope_parameters"] =
        json!({"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 1.0});
    let by_layer = json!({
        "rope_scaling": null,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}
        }
    });
    let tiny = tiny().into_iter().map(|tiny| tiny.config);
    scaled.chain(tiny).chain([new_dialect, config_of("Gemma3ForCausalLM", by_layer)]).collect()
}

/// What a hostile or careless writer puts in a value's place.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (0u64..=1 << 26).prop_map(Value::from),
        (0u64..=8).prop_map(Value::from),
        (-1.0f64..1e7).prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
        prop_oneof!["linear", "dynamic", "yarn", "longrope", "llama3", "default", "su"].prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| prop::collection::vec(inner, 0..4).prop_map(Value::from))
}

/// Puts `value` at the key of that number, among all keys of the file and of its sections.
fn replace(config: &mut Value, number: usize, value: Value) {
    let mut places: Vec<(Option<String>, String)> = Vec::new();
    for (key, inner) in config.as_object().unwrap() {
        places.push((None, key.clone()));
        let section = inner.as_object().into_iter().flatten();
        places.extend(section.map(|(inner, _)| (Some(key.clone()), inner.clone())));
    }
    let (section, key) = places.swap_remove(number % places.len());
    match section {
        Some(section) => config[section][key] = value,
        None => config[key] = value,
    }
}

/// Everything that is computed from a config alone: it must neither panic nor take long.
fn exercise(config: &Value) {
    match resolve(config) {
        Ok(resolved) => {
            resolved.spec.check().unwrap();
            for rope in resolved.spec.ropes() {
                let frequencies = Frequencies::new(rope);
                for len in [1, 64, 65, resolved.spec.max_positions as u32] {
                    let (frequencies, amplitude) = frequencies.for_position(len, 0);
                    assert!(frequencies.iter().all(|f| f.is_finite()), "{config}");
                    assert!(amplitude.is_finite() && amplitude > 0.0, "{config}");
                }
            }
            let _ = MemoryPlan::new(&resolved, None, &PlanOptions::default());
        }
        Err(error) => {
            let text = error.to_string();
            assert!(!text.is_empty() && text.len() < 400 && !text.contains('\n'), "{text}");
        }
    }
}

#[test]
fn sound_configs_resolve() {
    for config in sound_configs() {
        let resolved = resolve(&config);
        assert!(resolved.is_ok(), "{config}: {}", resolved.unwrap_err());
        exercise(&config);
    }
}

#[test]
fn every_family_has_a_fixture() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/integration/fixtures");
    let configs =
        std::fs::read_dir(folder).unwrap().filter_map(|entry| read_config(&entry.unwrap().path()).ok());
    let fixtures: Vec<Value> = configs.map(|config| config["architectures"][0].clone()).collect();
    for family in FAMILIES {
        let has_one = family.architectures.iter().any(|name| fixtures.iter().any(|fixture| fixture == name));
        assert!(has_one, "{:?}", family.architectures);
    }
}

#[test]
fn a_missing_or_wrong_key_is_named() {
    for Tiny { required, config } in tiny() {
        for key in required {
            let mut without = config.clone();
            without.as_object_mut().unwrap().remove(&key);
            let refusal = resolve(&without).expect_err(&key).to_string();
            assert!(refusal.contains(&key), "{without}: {refusal}");
            for wrong in [json!("7"), json!(-1), json!([]), json!(1e300)] {
                let mut changed = config.clone();
                changed[&key] = wrong;
                let refusal = resolve(&changed).expect_err(&key).to_string();
                assert!(refusal.contains(&key), "{changed}: {refusal}");
            }
        }
    }
}

#[test]
fn unknown_rope_types_are_refused() {
    let turning = tiny().into_iter().filter(|tiny| tiny.config.get("rope_scaling").is_some());
    for mut config in turning.map(|tiny| tiny.config).chain([config_of("FalconForCausalLM", json!({}))]) {
        config["rope_scaling"] = json!({"type": "ntk", "factor": 2.0});
        let refusal = resolve(&config).unwrap_err().to_string();
        assert!(refusal.contains("the rope type ntk is not served"), "{config}: {refusal}");
    }
}

/// In a checkpoint of each family every number has one role: fused tensors are taken apart whole.
#[test]
fn places_cover_a_checkpoint_once() {
    for Tiny { config, .. } in tiny() {
        let Resolved { spec, names, .. } = resolve(&config).unwrap();
        let checkpoint = Checkpoint::dummy(&spec, &names, DType::F32, 1).unwrap();
        let weights = Weights::open(&checkpoint, &spec, &names).unwrap();
        let stored = checkpoint.names().map(|name| checkpoint.tensor(name).unwrap().unwrap().n_elements());
        assert_eq!(spec.n_parameters(), stored.sum::<usize>() as u64, "{}", spec.family);
        let mut seen = BTreeSet::new();
        for role in roles(&spec) {
            let part = weights.part(role, Shard::WHOLE).unwrap();
            let first = part.tensor.bytes().as_ptr() as usize + 4 * part.first;
            for row in part.rows.iter() {
                for column in part.columns.iter() {
                    let place = first + 4 * (row * part.row_stride + column * part.column_stride);
                    // Tensors of a norm for each head are joined in memory of their own.
                    assert!(seen.insert(place), "{} {role:?}", spec.family);
                }
            }
        }
    }
}

#[test]
fn a_checkpoint_of_another_size_is_told_by_a_tensor() {
    for Tiny { config, .. } in tiny() {
        let Resolved { spec, names, .. } = resolve(&config).unwrap();
        let checkpoint = Checkpoint::dummy(&spec, &names, DType::BF16, 1).unwrap();
        let refusal = |change: fn(&mut DecoderSpec)| {
            let mut other = spec.clone();
            change(&mut other);
            Weights::open(&checkpoint, &other, &names).unwrap_err().to_string()
        };
        let deeper = refusal(|spec| spec.layers.extend(spec.layers.last().cloned()));
        assert!(deeper.contains(".3.") || deeper.contains(".7."), "{}: {deeper}", spec.family);
        assert!(deeper.ends_with("is missing"), "{deeper}");
        let larger = refusal(|spec| spec.vocab += 1);
        assert!(larger.contains("has the shape [100, ") && larger.contains("expected [101, "), "{larger}");
        let shallower = refusal(|spec| spec.layers.truncate(1));
        assert!(shallower.contains("has no place in a"), "{shallower}");
    }
}

/// Published configurations, written by us from the published facts, with the parameters of their checkpoints and the
/// bytes of a token's keys and values in bf16.
#[test]
fn published_models_have_their_published_sizes() {
    #[derive(Deserialize)]
    struct Published {
        name: String,
        parameters: u64,
        kv_bytes_per_token: u64,
        config: Value,
    }
    let published: Vec<Published> = serde_json::from_str(include_str!("tests/published.json")).unwrap();
    assert_eq!(published.len(), 52);
    for Published { name, parameters, kv_bytes_per_token, config } in published {
        let Resolved { spec, .. } = resolve(&config).unwrap_or_else(|error| panic!("{name}: {error}"));
        let found = (spec.n_parameters(), 2 * spec.kv_elements_per_token());
        assert_eq!(found, (parameters, kv_bytes_per_token), "{name}");
    }
}

#[test]
fn a_family_is_named_once() {
    let mut names: Vec<&str> = FAMILIES.iter().flat_map(|family| family.architectures).copied().collect();
    names.sort_unstable();
    assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "{names:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn changed_configs_are_models_or_sentences(
        choice in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<usize>(), any_value()), 1..4),
    ) {
        let mut configs = sound_configs();
        let mut config = configs.swap_remove(choice.index(configs.len()));
        for (number, value) in changes {
            replace(&mut config, number, value);
        }
        exercise(&config);
    }

    #[test]
    fn cut_and_garbled_text_is_no_json_or_a_sentence(
        choice in any::<prop::sample::Index>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        keep in any::<prop::sample::Index>(),
    ) {
        let configs = sound_configs();
        let mut text = serde_json::to_vec(&configs[choice.index(configs.len())]).unwrap();
        for (place, byte) in flips {
            let place = place.index(text.len());
            text[place] = byte;
        }
        text.truncate(keep.index(text.len()) + 1);
        if let Ok(config) = serde_json::from_slice::<Value>(&text) {
            exercise(&config);
        }
    }
}
