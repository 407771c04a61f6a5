use super::*;
use crate::model::families::tests::tiny_configs;
use crate::model::families::{Resolved, resolve};
use crate::model::names::MlpRole;
use crate::model::runs::Runs;
use serde_json::{Value, json};

fn model(change: Value) -> Resolved {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 12, "vocab_size": 11,
        "attention_bias": true, "mlp_bias": true
    });
    config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    resolve(&config).unwrap()
}

fn dummy(model: &Resolved) -> Checkpoint {
    Checkpoint::dummy(&model.spec, &model.names, DType::BF16, 7).unwrap()
}

fn refusal(checkpoint: &Checkpoint, model: &Resolved) -> String {
    Weights::open(checkpoint, &model.spec, &model.names).unwrap_err().to_string()
}

#[test]
fn dummy_weights_fit_their_spec() {
    let model = model(json!({}));
    let weights = Weights::open(&dummy(&model), &model.spec, &model.names).unwrap();
    assert_eq!(weights.bytes(), 2 * model.spec.n_parameters());
    assert_eq!(weights.dtype(), DType::BF16);
}

#[test]
fn missing_misshapen_and_unexpected_tensors_are_named() {
    let small = model(json!({}));
    let deeper = model(json!({"num_hidden_layers": 3}));
    assert_eq!(refusal(&dummy(&small), &deeper), "tensor model.layers.2.input_layernorm.weight is missing");
    assert_eq!(
        refusal(&dummy(&deeper), &small),
        "tensor model.layers.2.input_layernorm.weight has no place in a llama decoder of 2 layers with this config"
    );
    let wider = model(json!({"intermediate_size": 16}));
    assert_eq!(
        refusal(&dummy(&small), &wider),
        "tensor model.layers.0.mlp.gate_proj.weight has the shape [12, 8], expected [16, 8]"
    );
    // A bias that the config denies would be dropped in silence otherwise.
    let plain = model(json!({"attention_bias": false}));
    let refusal = refusal(&dummy(&small), &plain);
    assert!(refusal.contains("model.layers.0.self_attn.k_proj.bias has no place"), "{refusal}");
}

/// Fused and stacked ones too.
#[test]
fn whatever_tensor_of_whatever_family_is_missing_is_named() {
    for config in tiny_configs() {
        let model = resolve(&config).unwrap();
        let whole = dummy(&model);
        for name in whole.names() {
            let refusal = refusal(&whole.without(name), &model);
            assert_eq!(refusal, format!("tensor {name} is missing"), "{}", model.spec.family);
        }
    }
}

#[test]
fn a_tied_head_is_the_embedding_even_beside_a_copy() {
    let (tied, untied) = (model(json!({"tie_word_embeddings": true})), model(json!({})));
    for checkpoint in [dummy(&tied), dummy(&untied)] {
        let weights = Weights::open(&checkpoint, &tied.spec, &tied.names).unwrap();
        let head = weights.part(Role::Head, Shard::WHOLE).unwrap();
        let embedding = weights.part(Role::Embedding, Shard::WHOLE).unwrap();
        assert_eq!(head.tensor.bytes().as_ptr(), embedding.tensor.bytes().as_ptr());
    }
    assert_eq!(refusal(&dummy(&tied), &untied), "tensor lm_head.weight is missing");
}

#[test]
fn a_role_outside_the_spec_is_a_fault_of_ours() {
    let model = model(json!({"attention_bias": false}));
    let weights = Weights::open(&dummy(&model), &model.spec, &model.names).unwrap();
    let error = weights.part(Role::Layer(0, LayerRole::OutputBias), Shard::WHOLE).unwrap_err();
    assert!(matches!(error, Error::Bug(_)), "{error}");
    assert!(weights.part(Role::Layer(2, LayerRole::Mlp(MlpRole::Gate)), Shard::WHOLE).is_err());
}

/// The parts of all ranks, put together, are the role: once, or more often where KV heads are copied.
#[test]
fn parts_put_together_are_the_role() {
    let llama = model(json!({}));
    let others = tiny_configs().iter().map(|config| resolve(config).unwrap()).collect::<Vec<_>>();
    for model in std::iter::once(llama).chain(others) {
        let (spec, names) = (&model.spec, &model.names);
        let weights = Weights::open(&dummy(&model), spec, names).unwrap();
        for world in [1, 2, 4] {
            let Ok(parts) = (0..world)
                .map(|rank| Partition::new(spec, Shard { rank, world }))
                .collect::<Result<Vec<_>>>()
            else {
                continue;
            };
            for role in roles(spec) {
                let whole = weights.part(role, Shard::WHOLE).unwrap();
                let numbers = |part: &TensorPart| {
                    part.check().unwrap();
                    let rows = part.rows.iter().collect::<Vec<_>>();
                    rows.into_iter()
                        .flat_map(|row| part.columns.iter().map(move |column| (row, column)))
                        .map(|(row, column)| part.number(row, column))
                        .collect::<Vec<_>>()
                };
                let mut seen = BTreeMap::new();
                for rank in 0..parts.len() {
                    let part = weights.part(role, Shard { rank, world }).unwrap();
                    numbers(&part).into_iter().for_each(|number| *seen.entry(number).or_insert(0) += 1);
                }
                let copies = match role.cut(spec) {
                    Cut::Whole => world,
                    Cut::KvHeadRows => (world / spec.attention.kv_heads()).max(1),
                    _ => 1,
                };
                let expected = numbers(&whole).into_iter().map(|number| (number, copies)).collect();
                assert_eq!(seen, expected, "{} {role:?} among {world}", spec.family);
            }
        }
    }
}

#[test]
fn a_rank_s_output_columns_are_its_query_rows() {
    let model = model(json!({}));
    let weights = Weights::open(&dummy(&model), &model.spec, &model.names).unwrap();
    let width = model.spec.layers[1].mlp.width();
    for rank in 0..4 {
        let shard = Shard { rank, world: 4 };
        let part = |role| weights.part(Role::Layer(1, role), shard).unwrap();
        assert_eq!(part(LayerRole::Query).rows, part(LayerRole::Output).columns);
        assert_eq!(part(LayerRole::QueryBias).rows, part(LayerRole::Query).rows);
        assert_eq!(part(LayerRole::Mlp(MlpRole::Up)).rows, part(LayerRole::Mlp(MlpRole::Down)).columns);
        assert_eq!(part(LayerRole::Mlp(MlpRole::Up)).rows.len(), width / 4);
        assert_eq!(part(LayerRole::Mlp(MlpRole::DownBias)).rows, Runs::range(0..8));
    }
}
