use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use safetensors::tensor::{TensorView, serialize};
use tempfile::TempDir;

use super::*;
use crate::model::spec::tests::tiny;

const SINGLE_FILE: &str = Format::Safetensors.single();
const INDEX_FILE: &str = Format::Safetensors.index();

/// A file of 16- and 32-bit tensors with different contents.
fn file() -> Vec<u8> {
    let tensors: Vec<(&str, FileDtype, Vec<usize>)> = vec![
        ("a", FileDtype::F32, vec![2, 3]),
        ("b", FileDtype::BF16, vec![5]),
        ("c", FileDtype::F16, vec![2, 2]),
        ("d", FileDtype::I64, vec![1]),
        ("e", FileDtype::F32, vec![0, 4]),
    ];
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .enumerate()
        .map(|(i, (_, dtype, shape))| {
            vec![i as u8 + 1; shape.iter().product::<usize>() * dtype.bitsize() / 8]
        })
        .collect();
    let views = tensors.iter().zip(&data).map(|((name, dtype, shape), data)| {
        (name.to_string(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    serialize(views, None).unwrap()
}

/// A file with this header and this many bytes of data.
fn with_header(header: &str, n_data_bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + n_data_bytes, 0);
    file
}

fn refusal(file: Vec<u8>) -> String {
    Checkpoint::from_bytes(file).unwrap_err().to_string()
}

/// Reads all that a checkpoint offers.
pub(super) fn touch(checkpoint: &Checkpoint) {
    for name in checkpoint.names() {
        if let Ok(tensor) = checkpoint.tensor(name) {
            let tensor = tensor.unwrap();
            assert_eq!(tensor.bytes().len(), tensor.n_elements() * tensor.dtype.size_bytes());
            assert_eq!(tensor.n_elements(), tensor.shape.iter().product::<usize>());
            assert!(tensor.bytes().as_ptr().addr().is_multiple_of(tensor.dtype.size_bytes()));
        }
    }
}

#[test]
fn tensors_are_found_by_name() {
    let checkpoint = Checkpoint::from_bytes(file()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c", "d", "e"]);
    let a = checkpoint.tensor("a").unwrap().unwrap();
    assert_eq!((a.dtype, a.shape.as_slice(), a.bytes()), (DType::F32, &[2, 3][..], &[1; 24][..]));
    assert_eq!(checkpoint.tensor("b").unwrap().unwrap().bytes(), [2; 10]);
    assert_eq!(checkpoint.tensor("e").unwrap().unwrap().n_elements(), 0);
    assert!(checkpoint.tensor("f").unwrap().is_none());
    let error = checkpoint.tensor("d").unwrap_err().to_string();
    assert_eq!(error, "tensor d is stored as I64; float32, float16 and bfloat16 can be read");
    touch(&checkpoint);
}

#[test]
fn a_misaligned_tensor_is_copied_to_an_aligned_place() {
    let header = concat!(
        r#"{"x":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},"#,
        r#""y":{"dtype":"F32","shape":[2],"data_offsets":[2,10]}} "#
    );
    for padding in 0..4 {
        let mut file = with_header(&format!("{header}{}", " ".repeat(padding)), 10);
        let last = file.len() - 1;
        file[last] = 9;
        let checkpoint = Checkpoint::from_bytes(file).unwrap();
        assert_eq!(checkpoint.tensor("y").unwrap().unwrap().bytes(), [0, 0, 0, 0, 0, 0, 0, 9]);
        touch(&checkpoint);
    }
}

#[test]
fn files_that_lie_are_refused() {
    let whole = file();
    assert!(refusal(Vec::new()).contains("it has 0 bytes, its header alone needs 8"));
    assert!(refusal(whole[..whole.len() - 1].to_vec()).contains("bytes follow the header"));
    assert!(refusal([whole.as_slice(), &[0]].concat()).contains("bytes follow the header"));
    assert!(refusal(u64::MAX.to_le_bytes().to_vec()).contains("its header claims 18446744073709551615"));
    assert!(refusal([&whole[..8], b"{}"].concat()).contains("its header claims"));
    let header = |offsets: &str, shape: &str| {
        format!(r#"{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    for (header, n_data_bytes) in [
        (header("[0,8]", "[1]"), 8),                                    // shape and length disagree
        (header("[4,8]", "[1]"), 8),                                    // a hole
        (header("[8,4]", "[1]"), 8),                                    // backwards
        (header("[0,4]", "[1]"), 0),                                    // beyond the file
        (header("[0,18446744073709551615]", "[4611686018427387903]"), 4), // far beyond
        (header("[0,4]", "[9223372036854775808,9223372036854775808]"), 4),
        (header("[0,-4]", "[1]"), 4),
        (r#"{"x":{"dtype":"F32","shape":[1]}}"#.to_owned(), 4),
        (r#"{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#.to_owned(), 4),
        (r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}"#
            .to_owned(), 4),
        ("[]".to_owned(), 0),
        ("".to_owned(), 0),
    ] {
        let refusal = refusal(with_header(&header, n_data_bytes));
        assert!(refusal.contains("not a whole safetensors file"), "{header}: {refusal}");
    }
    let mut file = with_header("{}", 0);
    file[8] = 0xff;
    assert!(refusal(file).contains("not a whole safetensors file"));
}

/// Tensors end to end, whose sizes in bits fit in 64 bits and whose ends, with the header, do not.
#[test]
fn offsets_that_overflow_together_are_refused() {
    let n = (1u64 << 61) - 1;
    let entry = |i: u64| {
        let (start, end) = (i * n, (i + 1) * n);
        format!(r#""t{i}":{{"dtype":"U8","shape":[{n}],"data_offsets":[{start},{end}]}}"#)
    };
    let entries: Vec<String> = (0..8).map(entry).collect();
    let refusal = refusal(with_header(&format!("{{{}}}", entries.join(",")), 16));
    assert!(refusal.contains("16 bytes follow the header"), "{refusal}");
}

pub(super) fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = TempDir::new().unwrap();
    for (name, contents) in files {
        fs::write(folder.path().join(name), contents).unwrap();
    }
    folder
}

fn open_refusal(files: &[(&str, &[u8])]) -> String {
    Checkpoint::open(folder(files).path()).unwrap_err().to_string()
}

#[test]
fn a_folder_is_mapped_whole_or_by_its_index() {
    let single = folder(&[(SINGLE_FILE, &file())]);
    assert_eq!(Checkpoint::open(single.path()).unwrap().names().count(), 5);
    let index =
        br#"{"metadata": {"total_size": 1}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
    let sharded = folder(&[("one.safetensors", &file()), ("two.safetensors", &file()), (INDEX_FILE, index)]);
    let checkpoint = Checkpoint::open(sharded.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
    // The map outlives the names of its files.
    drop(sharded);
    assert_eq!(checkpoint.tensor("b").unwrap().unwrap().bytes(), [2; 10]);
}

#[test]
fn safetensors_go_before_torch_files_and_both_kinds_have_an_index() {
    let torch = include_bytes!("../../../integration/fixtures/torch/nested.bin");
    let index = br#"{"weight_map": {"a.weight": "x.bin"}}"#;
    let names = |files: &[(&str, &[u8])]| {
        let checkpoint = Checkpoint::open(folder(files).path()).unwrap();
        checkpoint.names().map(str::to_owned).collect::<Vec<_>>()
    };
    let (single, listed) = ((Format::Torch.single(), &torch[..]), (Format::Torch.index(), &index[..]));
    assert_eq!(names(&[single]), ["a.weight"]);
    assert_eq!(names(&[listed, ("x.bin", torch)]), ["a.weight"]);
    assert_eq!(names(&[single, listed, (SINGLE_FILE, &file())]).len(), 5);
    let absent = br#"{"weight_map": {"b": "x.bin"}}"#;
    let told = open_refusal(&[(Format::Torch.index(), absent), ("x.bin", torch)]);
    assert_eq!(told, "pytorch_model.bin.index.json says that tensor b is in x.bin, which does not hold it");
}

#[test]
fn an_index_that_lies_is_refused() {
    assert!(open_refusal(&[]).contains("neither model.safetensors nor"));
    assert!(open_refusal(&[(INDEX_FILE, b"{")]).contains("cannot be read"));
    assert!(open_refusal(&[(INDEX_FILE, b"{\"weight_map\": [1]}")]).contains("cannot be read"));
    let missing = br#"{"weight_map": {"a": "gone.safetensors"}}"#;
    assert!(open_refusal(&[(INDEX_FILE, missing)]).contains("gone.safetensors cannot be opened"));
    let absent = br#"{"weight_map": {"z": "one.safetensors"}}"#;
    assert_eq!(
        open_refusal(&[(INDEX_FILE, absent), ("one.safetensors", &file())]),
        format!("{INDEX_FILE} says that tensor z is in one.safetensors, which does not hold it")
    );
    for path in ["../one.safetensors", "/etc/passwd", "", ".", "..", "sub/one.safetensors", "a\\u0000b"] {
        let index = format!(r#"{{"weight_map": {{"a": "{path}"}}}}"#);
        let refusal = open_refusal(&[(INDEX_FILE, index.as_bytes())]);
        assert!(
            refusal.contains("not a file of its folder") || refusal.contains("cannot be opened"),
            "{refusal}"
        );
    }
    let folder_in_place = folder(&[(INDEX_FILE, br#"{"weight_map": {"a": "sub"}}"#)]);
    fs::create_dir(folder_in_place.path().join("sub")).unwrap();
    assert_eq!(Checkpoint::open(folder_in_place.path()).unwrap_err().to_string(), "sub is not a file");
}

#[test]
fn long_files_are_not_read() {
    let folder = folder(&[("config.json", b"12345")]);
    let path: PathBuf = folder.path().join("config.json");
    assert_eq!(read_limited(&path, "config.json", 5).unwrap(), b"12345");
    let refusal = read_limited(&path, "config.json", 4).unwrap_err().to_string();
    assert_eq!(refusal, "config.json has 5 bytes, at most 4 are read");
}

#[test]
fn dummy_weights_are_seeded_and_of_the_right_scale() {
    let mut spec = tiny();
    (spec.vocab, spec.hidden) = (300, 400);
    let names = crate::model::families::resolve(&serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 12, "vocab_size": 10
    }))
    .unwrap()
    .names;
    let bytes = |seed, name: &str| {
        let checkpoint = Checkpoint::dummy(&spec, &names, DType::F32, seed).unwrap();
        checkpoint.tensor(name).unwrap().unwrap().bytes().to_vec()
    };
    let head = bytes(1, "lm_head.weight");
    assert_eq!(head, bytes(1, "lm_head.weight"));
    assert_ne!(head, bytes(2, "lm_head.weight"));
    assert_ne!(head, bytes(1, "model.embed_tokens.weight"));
    let values: Vec<f64> =
        head.chunks_exact(4).map(|x| f64::from(f32::from_le_bytes(x.try_into().unwrap()))).collect();
    let variance = values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64;
    assert!((variance * 400.0 - 1.0).abs() < 0.02, "{variance}");
    assert!((values.iter().sum::<f64>() / values.len() as f64).abs() < 1e-3);
    let norm = bytes(1, "model.norm.weight");
    assert!(norm.chunks_exact(4).all(|x| x == 1f32.to_le_bytes()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_garbled_file_is_refused_or_consistent(
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        in_header in any::<bool>(),
        keep in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut file = file();
        let header_len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let reach = if in_header { 8 + header_len } else { file.len() };
        for (place, byte) in flips {
            file[place.index(reach)] = byte;
        }
        if let Some(keep) = keep {
            file.truncate(keep.index(file.len()));
        }
        if let Ok(checkpoint) = Checkpoint::from_bytes(file) {
            touch(&checkpoint);
        }
    }

    #[test]
    fn numbers_of_a_header_are_not_believed(
        shape in prop::collection::vec(prop_oneof![0u64..5, any::<u64>()], 0..4),
        offsets in prop::collection::vec(prop_oneof![0u64..40, any::<u64>()], 0..4),
        dtype in prop_oneof![Just("F32"), Just("BF16"), Just("F4"), Just("U8"), Just("?")],
        n_data_bytes in 0usize..40,
    ) {
        let header = serde_json::json!({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}});
        if let Ok(checkpoint) = Checkpoint::from_bytes(with_header(&header.to_string(), n_data_bytes)) {
            touch(&checkpoint);
        }
    }
}
