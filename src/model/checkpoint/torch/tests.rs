use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::super::tests::touch;
use super::super::{Checkpoint, FileDtype};
use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/fixtures/torch").join(name)
}

fn read(name: &str) -> Vec<u8> {
    fs::read(fixture(name)).unwrap()
}

fn refusal(file: Vec<u8>) -> String {
    Checkpoint::from_torch_bytes(file).unwrap_err().to_string()
}

/// All tensors of a checkpoint, row-major.
fn contents(checkpoint: &Checkpoint) -> BTreeMap<&str, (FileDtype, Vec<usize>, Vec<u8>)> {
    let contents = |entry: &Entry| {
        let Entry { dtype, shape, file, range, .. } = entry.in_row_major_order().unwrap();
        (dtype, shape, (*file).as_ref()[range].to_vec())
    };
    checkpoint.tensors.iter().map(|(name, entry)| (name.as_str(), contents(entry))).collect()
}

#[test]
fn every_dtype_and_view_has_the_bytes_that_torch_wrote_as_safetensors() {
    let found = Checkpoint::open(&fixture("assorted")).unwrap();
    let expected = Checkpoint::from_bytes(read("assorted/expected.safetensors")).unwrap();
    assert_eq!(contents(&found), contents(&expected));
    assert_eq!(found.names().count(), 19);
    touch(&found);
    let names = Checkpoint::from_torch_bytes(read("nested.bin")).unwrap();
    assert_eq!(names.names().collect::<Vec<_>>(), ["a.weight"]);
}

#[test]
fn tensors_are_seen_in_place() {
    let file = read("assorted/pytorch_model-00001-of-00002.bin");
    let entries: BTreeMap<String, Entry> = parse("x", Arc::new(file)).unwrap().into_iter().collect();
    let range = |name: &str| entries[name].range.clone();
    assert_eq!(range("embed.weight"), range("head.weight"));
    assert_eq!(range("q.weight").end, range("k.weight").start);
    assert_eq!(range("embed.weight").start % 64, 0, "storages are padded");
    let strided: Vec<&String> = entries.keys().filter(|name| entries[*name].strides.is_some()).collect();
    assert_eq!(strided, ["every_second.weight", "up.weight"]);
}

#[test]
fn what_is_no_state_dict_is_refused_by_name() {
    assert_eq!(
        refusal(read("legacy.bin")),
        "the file is in the format that torch wrote before 1.6; load it with torch and save it again"
    );
    let told = refusal(read("code.bin"));
    assert!(told.contains("it asks for \"posix.system\"; only what state dicts are made of"), "{told}");
    let told = refusal(read("repeated.bin"));
    assert!(told.contains("tensor \"big\": the shape [1099511627776] with the strides [0]"), "{told}");
    for file in [Vec::new(), b"PK".to_vec(), vec![0; 100], read("assorted/expected.safetensors")] {
        assert!(refusal(file).contains("the directory at its end is missing"));
    }
}

/// An archive of files without compression.
struct Zip {
    files: Vec<(String, Vec<u8>)>,
    /// Bytes to overwrite in the `n`th entry of the directory.
    patches: Vec<(usize, usize, Vec<u8>)>,
    /// Whether sizes and offsets are written in 64 bits.
    is_wide: bool,
}

impl Zip {
    fn of(pickle: &[u8], storages: &[(&str, &[u8])]) -> Zip {
        let mut files = vec![("m/data.pkl".to_owned(), pickle.to_vec())];
        files.extend(storages.iter().map(|(key, bytes)| (format!("m/data/{key}"), bytes.to_vec())));
        Zip { files, patches: Vec::new(), is_wide: false }
    }

    fn patched(mut self, entry: usize, at: usize, bytes: &[u8]) -> Zip {
        self.patches.push((entry, at, bytes.to_vec()));
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let (mut archive, mut directory) = (Vec::new(), Vec::new());
        for (number, (name, contents)) in self.files.iter().enumerate() {
            let (size, offset) = (contents.len() as u32, archive.len() as u32);
            let narrow = |number: u32| if self.is_wide { u32::MAX } else { number }.to_le_bytes();
            let extra = match self.is_wide {
                true => [&[1, 0, 24, 0][..], &wide(size), &wide(size), &wide(offset)].concat(),
                false => Vec::new(),
            };
            let mut entry = b"PK\x01\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
            entry.extend([narrow(size), narrow(size)].concat());
            entry.extend([(name.len() as u16).to_le_bytes(), (extra.len() as u16).to_le_bytes()].concat());
            entry.extend([0; 10]);
            entry.extend(narrow(offset));
            entry.extend(name.as_bytes());
            entry.extend(extra);
            for (_, at, bytes) in self.patches.iter().filter(|patch| patch.0 == number) {
                entry[*at..at + bytes.len()].copy_from_slice(bytes);
            }
            directory.extend(entry);
            archive.extend(b"PK\x03\x04");
            archive.extend([0; 22]);
            archive.extend((name.len() as u32).to_le_bytes());
            archive.extend(name.as_bytes());
            archive.extend(contents);
        }
        let offset = archive.len() as u32;
        archive.extend(&directory);
        if self.is_wide {
            let (n_files, size) = (wide(self.files.len() as u32), wide(directory.len() as u32));
            let record = wide(archive.len() as u32);
            archive.extend([&b"PK\x06\x06"[..], &[0; 20], &n_files, &n_files, &size, &wide(offset)].concat());
            archive.extend([&b"PK\x06\x07\0\0\0\0"[..], &record, &[1, 0, 0, 0]].concat());
            archive.extend(b"PK\x05\x06\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0");
            return archive;
        }
        archive.extend(b"PK\x05\x06\0\0\0\0\0\0");
        archive.extend((self.files.len() as u16).to_le_bytes());
        archive.extend((directory.len() as u32).to_le_bytes());
        archive.extend(offset.to_le_bytes());
        archive.extend([0; 2]);
        archive
    }
}

fn wide(number: u32) -> [u8; 8] {
    u64::from(number).to_le_bytes()
}

/// The pickle of `{"x": tensor}`, four single numbers in storage "0".
fn pickle_of(offset: u8, shape: &[u8], strides: &[u8]) -> Vec<u8> {
    let tuple = |sizes: &[u8]| {
        [b"(".to_vec(), sizes.iter().flat_map(|size| [b'K', *size]).collect(), b"t".to_vec()].concat()
    };
    [
        b"\x80\x02}U\x01xctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQK"
            .to_vec(),
        vec![offset],
        tuple(shape),
        tuple(strides),
        b"\x89}tRs.".to_vec(),
    ]
    .concat()
}

const NUMBERS: (&str, &[u8]) = ("0", &[7; 16]);

#[test]
fn an_archive_that_lies_is_refused() {
    let whole = || Zip::of(&pickle_of(0, &[2, 2], &[2, 1]), &[NUMBERS]);
    let checkpoint = Checkpoint::from_torch_bytes(whole().bytes()).unwrap();
    assert_eq!(checkpoint.tensor("x").unwrap().unwrap().bytes(), [7; 16]);

    let told = |zip: Zip| refusal(zip.bytes());
    let number = |number: u32| number.to_le_bytes();
    for (zip, words) in [
        (whole().patched(1, 10, &[8]), "\"m/data/0\" in it is compressed (method 8)"),
        (whole().patched(1, 8, &[1]), "is encrypted"),
        (whole().patched(1, 24, &number(15)), "is said to have 15 bytes, and 16 as they are stored"),
        (whole().patched(1, 42, &number(1)), "is said to be at 1, 16 bytes long, where it is not"),
        (whole().patched(1, 42, &number(u32::MAX - 1)), "where it is not"),
        (whole().patched(1, 42, &number(u32::MAX)), "is cut short"),
        (whole().patched(1, 28, &[200]), "its directory is cut short"),
        (whole().patched(0, 0, b"XX"), "its directory is cut short"),
        (whole().patched(1, 46, b"\xff"), "is no UTF-8"),
        // Another file's local header.
        (whole().patched(1, 42, &number(0)), "where it is not"),
        (Zip::of(b"", &[NUMBERS, NUMBERS]), "it holds \"m/data/0\" twice"),
        (Zip::of(&pickle_of(0, &[4], &[1]), &[]), "its storage \"0\" is not in the archive"),
        (Zip::of(&pickle_of(0, &[4], &[1]), &[("0", &[0; 12])]), "has 12 bytes for 4 numbers of 4 bytes"),
        (Zip::of(b"", &[NUMBERS]), "at byte 0 of its pickle, it is cut short"),
        (
            Zip { files: vec![("data.pkl".into(), vec![])], patches: vec![], is_wide: false },
            "does not hold one data.pkl",
        ),
        (
            Zip { files: vec![("a/b/data.pkl".into(), vec![])], patches: vec![], is_wide: false },
            "does not hold one data.pkl",
        ),
    ] {
        let told = told(zip);
        assert!(
            told.starts_with("the file is not a whole file of torch.save: ") && told.contains(words),
            "{told}"
        );
    }
    let mut both = whole();
    both.files.push(("n/data.pkl".to_owned(), vec![]));
    assert!(told(both).contains("does not hold one data.pkl"));
    let mut big_endian = whole();
    big_endian.files.push(("m/byteorder".to_owned(), b"big".to_vec()));
    assert!(told(big_endian).contains("not little-endian"));
    // Sizes that both lie: the file would overlap the one behind it.
    let mut long = whole();
    long.files.swap(0, 1);
    let long = long.patched(0, 20, &number(60)).patched(0, 24, &number(60));
    assert!(told(long).contains("some of its files overlap"));
}

/// As archives of more than 4 GiB have it.
#[test]
fn numbers_of_64_bits_are_read_and_not_believed() {
    let whole = Zip { is_wide: true, ..Zip::of(&pickle_of(0, &[4], &[1]), &[NUMBERS]) };
    let checkpoint = Checkpoint::from_torch_bytes(whole.bytes()).unwrap();
    assert_eq!(checkpoint.tensor("x").unwrap().unwrap().bytes(), [7; 16]);
    // The entry's name has 8 bytes; sizes and offset are behind it and 4 bytes of the extra field's header.
    let first = 46 + "m/data/0".len() + 4;
    for (at, bytes, words) in [
        (
            first,
            &u64::MAX.to_le_bytes()[..],
            "is said to have 18446744073709551615 bytes, and 16 as they are stored",
        ),
        (first + 16, &(1u64 << 63).to_le_bytes(), "is said to be at 9223372036854775808, 16 bytes long"),
        (first - 4, &[2], "the entry of \"m/data/0\" is cut short"),
        (first - 2, &[20], "the entry of \"m/data/0\" is cut short"),
    ] {
        let zip =
            Zip { files: whole.files.clone(), patches: Vec::new(), is_wide: true }.patched(1, at, bytes);
        let told = refusal(zip.bytes());
        assert!(told.contains(words), "{told}");
    }
    let mut file = whole.bytes();
    let record = file.len() - 22 - 20 - 56;
    file[record + 48..record + 56].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(refusal(file.clone()).contains("its directory is said to be at 18446744073709551615"));
    file[record + 48..record + 56].copy_from_slice(&0u64.to_le_bytes());
    assert!(refusal(file).contains("its directory is cut short"));
}

#[test]
fn a_record_of_the_directory_that_lies_is_refused() {
    let whole = Zip::of(&pickle_of(0, &[4], &[1]), &[NUMBERS]).bytes();
    let end = whole.len() - 22;
    let with = |at: usize, bytes: &[u8]| {
        let mut file = whole.clone();
        file[end + at..end + at + bytes.len()].copy_from_slice(bytes);
        refusal(file)
    };
    assert!(with(10, &[1]).contains("bytes more than its 1 files take"));
    assert!(with(10, &[3]).contains("it claims 3 files, number 2 is not whole"));
    assert!(with(12, &[0xFF; 4]).contains("its directory is said to be at"));
    assert!(with(16, &[0xFF; 4]).contains("its directory is said to be at 4294967295"));
    assert!(with(20, &[1]).contains("the directory at its end is missing"));
    let behind = [&whole[..], b"more"].concat();
    assert!(refusal(behind).contains("the directory at its end is missing"));
    // A comment is allowed.
    let mut commented = [&whole[..], b"more"].concat();
    commented[end + 20] = 4;
    assert!(Checkpoint::from_torch_bytes(commented).is_ok());
}

#[test]
fn views_outside_their_storage_are_refused() {
    let open = |offset, shape: &[u8], strides: &[u8]| {
        Checkpoint::from_torch_bytes(Zip::of(&pickle_of(offset, shape, strides), &[NUMBERS]).bytes())
    };
    for (offset, shape, strides) in [
        (0, &[4][..], &[1][..]),
        (2, &[2], &[1]),
        (4, &[0], &[9]),
        (0, &[2, 2], &[1, 2]),
        (3, &[1, 1], &[9, 9]),
    ] {
        touch(&open(offset, shape, strides).unwrap());
    }
    for (offset, shape, strides) in [
        (1, &[4][..], &[1][..]),
        (0, &[5], &[1]),
        (0, &[2], &[4]),
        (5, &[], &[]),
        (0, &[3, 2], &[1, 1]),
        (5, &[0], &[1]),
        (0, &[200, 200, 200], &[200, 200, 200]),
    ] {
        let told = open(offset, shape, strides).unwrap_err().to_string();
        assert!(told.contains("is not in a storage of 4 numbers"), "{told}");
    }
    let told = open(0, &[2, 2], &[1]).unwrap_err().to_string();
    assert!(told.contains("the tensor of the shape [2, 2] has the strides [1]"), "{told}");
}

/// Every byte of real files changed, and every length of them.
#[test]
fn a_garbled_file_is_refused_or_consistent() {
    let mut n_refused = 0;
    for name in ["assorted/pytorch_model-00001-of-00002.bin", "nested.bin", "code.bin"] {
        let whole = read(name);
        let mut file = whole.clone();
        for at in 0..whole.len() {
            for byte in [0, 0xFF, whole[at] ^ 1, whole[at] ^ 0x80, b'0', whole[at].wrapping_add(1)] {
                file[at] = byte;
                match Checkpoint::from_torch_bytes(file.clone()) {
                    Ok(checkpoint) => touch(&checkpoint),
                    Err(_) => n_refused += 1,
                }
            }
            file[at] = whole[at];
            assert!(Checkpoint::from_torch_bytes(whole[..at].to_vec()).is_err(), "{name} of {at} bytes");
        }
    }
    assert!(n_refused > 1000, "{n_refused}");
}
