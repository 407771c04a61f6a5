//! Model folders with something wrong: exit code 1 and one sentence that names it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::{TensorView, serialize};
use serde_json::Value;

use crate::support::fixture;
use crate::support::process::Serving;

/// Takes a part of a fixture apart; the sentence must hold these words.
struct Case {
    name: &'static str,
    fixture: &'static str,
    damage: Box<dyn Fn(&Path)>,
    words: &'static [&'static str],
}

fn case(
    name: &'static str,
    fixture: &'static str,
    words: &'static [&'static str],
    damage: impl Fn(&Path) + 'static,
) -> Case {
    Case { name, fixture, damage: Box::new(damage), words }
}

fn remove(file: &'static str) -> impl Fn(&Path) {
    move |folder| fs::remove_file(folder.join(file)).unwrap()
}

fn write(file: &'static str, text: &'static [u8]) -> impl Fn(&Path) {
    move |folder| fs::write(folder.join(file), text).unwrap()
}

/// Takes the weights away, and puts a file of `fixtures/torch` in their place, or the first `share` of it.
fn torch(source: &'static str, share: f64) -> impl Fn(&Path) {
    move |folder| {
        fs::remove_file(folder.join("model.safetensors")).unwrap();
        fs::copy(fixture("torch").join(source), folder.join("pytorch_model.bin")).unwrap();
        truncate("pytorch_model.bin", share)(folder);
    }
}

/// Takes `tokenizer.json` away, and puts a file of `fixtures/tokenizers` in its place, or the first `share` of it.
fn vocabulary(kind: &'static str, file: &'static str, share: f64) -> impl Fn(&Path) {
    move |folder| {
        fs::remove_file(folder.join("tokenizer.json")).unwrap();
        fs::copy(fixture("tokenizers").join(kind).join(file), folder.join(file)).unwrap();
        truncate(file, share)(folder);
    }
}

/// Keeps a share of a file's bytes.
fn truncate(file: &'static str, share: f64) -> impl Fn(&Path) {
    move |folder| {
        let bytes = fs::read(folder.join(file)).unwrap();
        fs::write(folder.join(file), &bytes[..(bytes.len() as f64 * share) as usize]).unwrap();
    }
}

fn configure(key: &'static str, value: Value) -> impl Fn(&Path) {
    move |folder| {
        let path = folder.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value.clone();
        fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
    }
}

type Tensors<'a> = BTreeMap<String, TensorView<'a>>;

/// Rewrites the weights.
fn retensor(change: impl Fn(&mut Tensors<'_>)) -> impl Fn(&Path) {
    move |folder| {
        let path = folder.join("model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let stored = SafeTensors::deserialize(&bytes).unwrap();
        let mut tensors: Tensors<'_> = stored.iter().map(|(name, view)| (name.to_owned(), view)).collect();
        change(&mut tensors);
        fs::write(&path, serialize(tensors, None).unwrap()).unwrap();
    }
}

const UP: &str = "model.layers.1.mlp.up_proj.weight";

fn transposed(tensors: &mut Tensors<'_>) {
    let up = tensors.remove(UP).unwrap();
    let shape: Vec<usize> = up.shape().iter().rev().copied().collect();
    let data: &[u8] = Box::leak(up.data().to_vec().into_boxed_slice());
    tensors.insert(UP.into(), TensorView::new(up.dtype(), shape, data).unwrap());
}

fn of_integers(tensors: &mut Tensors<'_>) {
    let up = tensors.remove(UP).unwrap();
    let data: &[u8] = Box::leak(up.data().to_vec().into_boxed_slice());
    tensors.insert(UP.into(), TensorView::new(safetensors::Dtype::I32, up.shape().to_vec(), data).unwrap());
}

fn cases() -> Vec<Case> {
    vec![
        case("nothing", "llama", &["config.json"], |folder| {
            fs::remove_dir_all(folder).unwrap();
            fs::create_dir(folder).unwrap();
        }),
        case("no config", "llama", &["config.json"], remove("config.json")),
        case("no weights", "llama", &["safetensors"], remove("model.safetensors")),
        case("no tokenizer", "llama", &["tokenizer"], remove("tokenizer.json")),
        case("cut config", "llama", &["config.json"], truncate("config.json", 0.5)),
        case("cut weights", "llama", &["model.safetensors"], truncate("model.safetensors", 0.5)),
        case("cut header", "llama", &["model.safetensors"], truncate("model.safetensors", 0.001)),
        case("empty weights", "llama", &["model.safetensors"], truncate("model.safetensors", 0.0)),
        case("cut tokenizer", "llama", &["tokenizer.json"], truncate("tokenizer.json", 0.5)),
        case("config is a list", "llama", &["config", "list"], write("config.json", b"[1, 2]")),
        case("garbled config", "llama", &["config.json"], write("config.json", b"\xff\xfe{}")),
        case("garbled weights", "llama", &["model.safetensors"], write("model.safetensors", &[0xff; 5000])),
        case("html for weights", "llama", &["model.safetensors"], |folder| {
            fs::write(folder.join("model.safetensors"), "<!DOCTYPE html>".repeat(99)).unwrap();
        }),
        case("garbled tokenizer", "llama", &["tokenizer.json"], write("tokenizer.json", b"{\"model\": 3}")),
        case("garbled end", "llama", &["generation_config.json"], write("generation_config.json", b"{")),
        case("unknown family", "llama", &["Mamba9ForCausalLM"], |folder| {
            configure("model_type", "mamba9".into())(folder);
            configure("architectures", serde_json::json!(["Mamba9ForCausalLM"]))(folder);
        }),
        case("other layers", "llama", &["model.layers."], configure("num_hidden_layers", 77.into())),
        case("negative layers", "llama", &["num_hidden_layers"], configure("num_hidden_layers", (-1).into())),
        case("huge layers", "llama", &[], configure("num_hidden_layers", u64::MAX.into())),
        case("huge hidden", "llama", &[], configure("hidden_size", (1_u64 << 60).into())),
        case("other width", "llama", &["mlp"], configure("intermediate_size", 7.into())),
        case("other heads", "llama", &[], configure("num_attention_heads", 3.into())),
        case("no heads", "llama", &["num_attention_heads"], configure("num_attention_heads", 0.into())),
        case("other vocab", "llama", &["embed_tokens"], configure("vocab_size", 12345.into())),
        case("infinite eps", "llama", &["rms_norm_eps"], configure("rms_norm_eps", 1e300.into())),
        case("missing tensor", "llama", &[UP], retensor(|tensors| drop(tensors.remove(UP)))),
        case("transposed tensor", "llama", &[UP], retensor(transposed)),
        case("tensor of integers", "llama", &[UP], retensor(of_integers)),
        case("code for weights", "llama", &["pytorch_model.bin", "posix.system"], torch("code.bin", 1.0)),
        case("old torch file", "llama", &["pytorch_model.bin", "before 1.6"], torch("legacy.bin", 1.0)),
        case("cut torch file", "llama", &["pytorch_model.bin"], torch("nested.bin", 0.9)),
        case("empty torch file", "llama", &["pytorch_model.bin"], torch("nested.bin", 0.0)),
        case("endless tensor", "llama", &["pytorch_model.bin", "tensor", "big"], torch("repeated.bin", 1.0)),
        case("another model's torch file", "llama", &["embed_tokens"], torch("nested.bin", 1.0)),
        case("missing torch file", "llama", &["pytorch_model-7.bin"], |folder| {
            remove("model.safetensors")(folder);
            let index = r#"{"weight_map": {"model.norm.weight": "pytorch_model-7.bin"}}"#;
            fs::write(folder.join("pytorch_model.bin.index.json"), index).unwrap();
        }),
        case("cut pieces", "llama", &["tokenizer.model"], vocabulary("sp-bpe", "tokenizer.model", 0.5)),
        case("no pieces", "llama", &["tokenizer.model"], vocabulary("sp-bpe", "tokenizer.model", 0.0)),
        case("cut ranks", "llama", &["qwen.tiktoken"], vocabulary("qwen", "qwen.tiktoken", 0.1)),
        case("no ranks", "llama", &["qwen.tiktoken"], vocabulary("qwen", "qwen.tiktoken", 0.0)),
        case("missing file", "llama-sharded", &["00002"], remove("model-00002-of-00003.safetensors")),
        case("cut index", "llama-sharded", &["index"], truncate("model.safetensors.index.json", 0.5)),
        case("index that leaves", "llama-sharded", &["index"], |folder| {
            let index = r#"{"weight_map": {"model.norm.weight": "../../../etc/passwd"}}"#;
            fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
        }),
    ]
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn a_broken_model_is_one_sentence_that_names_what_is_wrong() {
    let mut wrong = Vec::new();
    for Case { name, fixture: source, damage, words } in cases() {
        let model = tempfile::tempdir().unwrap();
        copy(&fixture(source), model.path());
        damage(model.path());
        let mut serving = Serving::start(&[model.path().to_str().unwrap(), "--json-output"], &[]);
        let ended = serving.wait();
        let last = ended.json_texts().pop().unwrap_or_default();
        let is_one_sentence = !last.is_empty() && !last.contains('\n') && last.len() < 400;
        let is_named = words.iter().all(|word| last.contains(word));
        let is_quiet = !ended.stderr.contains("panicked") && !ended.stdout.contains("panicked");
        if ended.code != Some(1) || !is_one_sentence || !is_named || !is_quiet {
            wrong.push(format!("{name}: {:?}: {last:?}\n{}", ended.code, ended.stderr));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Shapes are told with both numbers.
#[test]
fn a_wrong_shape_is_told_with_the_numbers() {
    let model = tempfile::tempdir().unwrap();
    copy(&fixture("llama"), model.path());
    let config: Value = serde_json::from_slice(&fs::read(model.path().join("config.json")).unwrap()).unwrap();
    let hidden = config["hidden_size"].to_string();
    configure("vocab_size", 777.into())(model.path());
    let ended = Serving::start(&[model.path().to_str().unwrap()], &[]).wait();
    let last = ended.last_line();
    let vocab = config["vocab_size"].to_string();
    assert!(["777", hidden.as_str(), vocab.as_str()].iter().all(|number| last.contains(number)), "{last}");
}
