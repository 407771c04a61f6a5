//! Model folders as the hub has them: weights of `torch.save`, and vocabularies without a `tokenizer.json`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use kvshard::model::checkpoint::Checkpoint;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::fixture;
use crate::support::process::kvshard;

/// A copy of a fixture's small files.
fn folder_of(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture(name).join(file), folder.path().join(file)).unwrap();
    }
    folder
}

/// `yi-ln` with its weights as `torch.save` writes them.
fn torch_folder() -> TempDir {
    let folder = folder_of("yi-ln");
    let weights = fixture("torch").join("yi-ln/pytorch_model.bin");
    fs::copy(weights, folder.path().join("pytorch_model.bin")).unwrap();
    folder
}

/// What `kvshard generate` writes.
fn generate(folder: &Path, arguments: &[&str]) -> String {
    let model = folder.to_str().unwrap();
    let output = kvshard(&["generate", "--model", model]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The answers to the prompts that the golden results of `yi-ln` have as texts.
fn answers(folder: &Path) -> Vec<String> {
    let golden = fs::read(fixture("yi-ln").join("golden.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    let prompts = golden["prompts"].as_array().unwrap().iter().filter_map(|prompt| prompt["text"].as_str());
    prompts.map(|prompt| generate(folder, &["-n", "16", prompt])).collect()
}

fn download(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_text-generation-server"));
    command.arg("download-weights").arg(folder).args(["--extension", ".safetensors", "--json-output"]);
    command.args(arguments).env_clear().output().unwrap()
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn weights_of_torch_are_those_of_safetensors_bit_for_bit() {
    let open = |folder: &Path| Checkpoint::open(folder).unwrap();
    let (torch, safetensors) = (open(&fixture("torch").join("yi-ln")), open(&fixture("yi-ln")));
    assert!(torch.names().eq(safetensors.names()));
    for name in torch.names() {
        let read = |checkpoint: &Checkpoint| {
            let tensor = checkpoint.tensor(name).unwrap().unwrap();
            (tensor.dtype, tensor.shape.clone(), tensor.bytes().to_vec())
        };
        assert_eq!(read(&torch), read(&safetensors), "{name}");
    }
}

#[test]
fn answers_are_the_same_from_every_kind_of_file() {
    let expected = answers(&fixture("yi-ln"));
    assert_eq!(expected.len(), 2);
    let folder = torch_folder();
    assert_eq!(answers(folder.path()), expected, "from pytorch_model.bin");
    let converted = download(folder.path(), &["--auto-convert"]);
    assert_eq!(converted.status.code(), Some(0), "{}", told(&converted));
    assert!(told(&converted).contains("converted to model.safetensors"), "{}", told(&converted));
    fs::remove_file(folder.path().join("pytorch_model.bin")).unwrap();
    assert_eq!(answers(folder.path()), expected, "from what it was converted to");
}

#[test]
fn weights_stay_as_they_are_where_that_is_asked_for_or_cannot_be_helped() {
    let folder = torch_folder();
    let output = download(folder.path(), &["--no-auto-convert"]);
    assert_eq!((output.status.code(), told(&output).contains("converted")), (Some(0), false));
    assert!(!folder.path().join("model.safetensors").exists());
    // As in a folder that cannot be written to.
    fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    let output = download(folder.path(), &[]);
    assert_eq!(output.status.code(), Some(0), "{}", told(&output));
    assert!(told(&output).contains("pytorch_model*.bin stay as they are"), "{}", told(&output));

    let code = fixture("torch").join("code.bin");
    fs::copy(code, folder.path().join("pytorch_model.bin")).unwrap();
    let output = download(folder.path(), &[]);
    assert_eq!(output.status.code(), Some(1), "{}", told(&output));
    assert!(told(&output).contains("posix.system"), "{}", told(&output));
}

#[test]
fn a_folder_with_a_vocabulary_of_its_own_kind_generates() {
    for (kind, file) in
        [("sp-bpe", "tokenizer.model"), ("chatglm2", "tokenizer.model"), ("qwen", "qwen.tiktoken")]
    {
        let folder = folder_of("llama");
        fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
        for file in [file, "tokenizer_config.json"] {
            let from = fixture("tokenizers").join(kind).join(file);
            fs::copy(from, folder.path().join(file)).unwrap();
        }
        let config = folder.path().join("config.json");
        let mut written: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        written["vocab_size"] = 1024.into();
        fs::write(&config, written.to_string()).unwrap();
        let text = generate(folder.path(), &["--load-format", "dummy", "-n", "8", "The river runs"]);
        assert!(text.len() > 8, "{kind}: {text:?}");
    }
}
