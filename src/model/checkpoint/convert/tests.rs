use std::path::Path;

use super::super::tests::folder;
use super::super::{Checkpoint, DType};
use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/fixtures/torch").join(name)
}

fn read(name: &str) -> Vec<u8> {
    fs::read(fixture(name)).unwrap()
}

fn quietly(folder: &Path) -> Result<Vec<String>> {
    convert(folder, &mut |_, _| ())
}

fn names_in(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// Three files as the hub has them.
fn assorted() -> tempfile::TempDir {
    let names = [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "pytorch_model.bin.index.json",
    ];
    let files = names.map(|name| (name, read(&format!("assorted/{name}"))));
    folder(&files.each_ref().map(|(name, bytes)| (*name, bytes.as_slice())))
}

#[test]
fn files_are_written_beside_with_an_index_and_hold_the_same_tensors() {
    let folder = assorted();
    let (before, mut reports) = (names_in(folder.path()), Vec::new());
    let written = convert(folder.path(), &mut |done, total| reports.push((done, total))).unwrap();
    assert_eq!(written, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
    let mut expected = [before, written, vec![Format::Safetensors.index().to_owned()]].concat();
    expected.sort();
    assert_eq!(names_in(folder.path()), expected, "nothing is left over");
    assert!(reports.is_sorted() && reports.last().is_some_and(|(done, total)| done == total), "{reports:?}");

    let converted = Checkpoint::open(folder.path()).unwrap();
    let stored = Checkpoint::from_bytes(read("assorted/expected.safetensors")).unwrap();
    for (name, entry) in &stored.tensors {
        let Some(found) = converted.tensors.get(name) else {
            assert_eq!(name, "head.weight", "only what is tied to another tensor is left out");
            continue;
        };
        let bytes = |entry: &Entry| (*entry.file).as_ref()[entry.range.clone()].to_vec();
        assert_eq!(
            (found.dtype, &found.shape, bytes(found)),
            (entry.dtype, &entry.shape, bytes(entry)),
            "{name}"
        );
        assert!(found.range.start.is_multiple_of(entry.dtype.bitsize() / 8), "{name}");
    }
    assert_eq!(quietly(folder.path()).unwrap(), [""; 0], "a second time there is nothing to do");
}

#[test]
fn a_single_file_becomes_one() {
    let folder = folder(&[("pytorch_model.bin", &read("nested.bin"))]);
    assert_eq!(quietly(folder.path()).unwrap(), ["model.safetensors"]);
    let converted = Checkpoint::open(folder.path()).unwrap();
    let tensor = converted.tensor("a.weight").unwrap().unwrap();
    assert_eq!((tensor.dtype, tensor.shape.as_slice(), tensor.bytes().len()), (DType::F32, &[4][..], 16));
    assert_eq!(names_in(folder.path()), ["model.safetensors", "pytorch_model.bin"]);
}

#[test]
fn what_cannot_be_converted_leaves_the_folder_as_it_is() {
    let index = br#"{"weight_map": {"a.weight": "a.bin", "b": "pytorch_a.bin"}}"#;
    let missing = br#"{"weight_map": {"b": "pytorch_model-1.bin"}}"#;
    let nested = read("nested.bin");
    for (files, words) in [
        (vec![("pytorch_model.bin", read("code.bin"))], "it asks for \"posix.system\""),
        (
            vec![("pytorch_model.bin", nested[..nested.len() - 1].to_vec())],
            "is not a whole file of torch.save",
        ),
        (vec![("pytorch_model.bin.index.json", missing.to_vec())], "pytorch_model-1.bin cannot be opened"),
        (
            vec![
                ("pytorch_model.bin.index.json", index.to_vec()),
                ("a.bin", nested.clone()),
                ("pytorch_a.bin", nested),
            ],
            "says that tensor b is in pytorch_a.bin, which does not hold it",
        ),
    ] {
        let folder = folder(&files.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect::<Vec<_>>());
        let before = names_in(folder.path());
        let told = quietly(folder.path()).unwrap_err().to_string();
        assert!(told.contains(words), "{told}");
        assert_eq!(names_in(folder.path()), before);
    }
    assert_eq!(quietly(folder(&[]).path()).unwrap(), [""; 0]);
}

/// A few numbers that are part of very many tensors.
#[test]
fn what_would_grow_beyond_measure_is_refused() {
    let tensors: Vec<(String, Entry)> =
        Format::Torch.parse("x", std::sync::Arc::new(read("nested.bin"))).unwrap();
    let view = |i: usize| {
        let (_, entry) = &tensors[0];
        // No two of them are the same.
        let shape = [vec![1; i], entry.shape.clone()].concat();
        (format!("view {i}"), Entry { shape, ..entry.clone() })
    };
    let files = |n: usize| BTreeMap::from([("x".to_owned(), (0..n).map(view).collect())]);
    assert!(check_growth(&files(100)).is_ok());
    let told = check_growth(&files(300)).unwrap_err().to_string();
    assert!(told.contains("its tensors take 4800 bytes, its file has 1698"), "{told}");
}

#[test]
fn two_files_do_not_get_one_name() {
    let index = br#"{"weight_map": {"a.weight": "a.bin", "embed.weight": "pytorch_a.bin"}}"#;
    let first = read("assorted/pytorch_model-00001-of-00002.bin");
    let files: [(&str, &[u8]); 3] =
        [("pytorch_model.bin.index.json", index), ("a.bin", &read("nested.bin")), ("pytorch_a.bin", &first)];
    let told = quietly(folder(&files).path()).unwrap_err().to_string();
    assert!(told.contains("that would get the same name"), "{told}");
}

#[test]
fn files_that_do_not_get_their_names_are_removed() {
    let folder = assorted();
    // A folder stands where the index would.
    fs::create_dir(folder.path().join(Format::Safetensors.index())).unwrap();
    let told = quietly(folder.path()).unwrap_err().to_string();
    assert!(told.starts_with("model.safetensors.index.json cannot be written"), "{told}");
    assert!(names_in(folder.path()).iter().all(|name| !name.ends_with(".partial")));
}
