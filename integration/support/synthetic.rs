//! Weights from a fixed generator, the same numbers as `../reference/synthetic.py`, whose head says how each is made:
//! fixtures with a `tensors.json` get their checkpoint at test time.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde::Deserialize;
use tempfile::TempDir;

/// A fixture's `tensors.json`.
#[derive(Deserialize)]
struct Tensors {
    seed: u64,
    tensors: BTreeMap<String, Tensor>,
}

/// How one tensor is made.
#[derive(Deserialize)]
struct Tensor {
    dtype: String,
    shape: Vec<usize>,
    scale: f32,
    offset: f32,
    /// Factors of the rows, repeated along the first dimension; none for 1.
    #[serde(default)]
    rows: Vec<f32>,
    /// Name of the tensor whose noise this one has, if not its own.
    like: Option<String>,
}

impl Tensor {
    /// The elements in row-major order, before they are rounded to the storage dtype.
    fn values(&self, seed: u64, name: &str) -> impl Iterator<Item = f32> + '_ {
        let key = self.like.as_deref().unwrap_or(name);
        let state = fnv1a64(&format!("{seed}:{key}"));
        let row_len = self.shape[1..].iter().product::<usize>();
        (0..self.shape.iter().product::<usize>()).map(move |index| {
            let scaled = noise(state, index as u64) * self.scale;
            let factor = self.rows.get((index / row_len) % self.rows.len().max(1));
            factor.map_or(scaled, |factor| scaled * factor) + self.offset
        })
    }

    /// The dtype and the little-endian bytes of the stored tensor.
    fn bytes(&self, seed: u64, name: &str) -> (Dtype, Vec<u8>) {
        let values = self.values(seed, name);
        match self.dtype.as_str() {
            "F32" => (Dtype::F32, values.flat_map(f32::to_le_bytes).collect()),
            "F16" => (Dtype::F16, values.flat_map(|x| f16::from_f32(x).to_le_bytes()).collect()),
            "BF16" => (Dtype::BF16, values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect()),
            other => panic!("{name} is stored as {other}"),
        }
    }
}

/// 64-bit FNV-1a hash of a text's bytes.
fn fnv1a64(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Element `index` of the noise of a state, in [−1, 1): the upper 24 bits of SplitMix64.
fn noise(state: u64, index: u64) -> f32 {
    let z = state.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let z = z ^ (z >> 31);
    (z >> 40) as f32 * 2f32.powi(-23) - 1.0
}

/// A folder as a user has it: the fixture's files, the checkpoint that its `tensors.json` describes, and the byte-level
/// tokenizer of the fixtures, whose 312 ids every vocabulary holds.
pub fn checkpoint(fixture: &Path) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = fixture.with_file_name("tokenizers").join("byte-level");
    for file in [tokenizer.as_path(), fixture].into_iter().flat_map(|from| fs::read_dir(from).unwrap()) {
        let file = file.unwrap();
        fs::copy(file.path(), folder.path().join(file.file_name())).unwrap();
    }
    let described = fs::read(fixture.join("tensors.json")).unwrap();
    let Tensors { seed, tensors } = serde_json::from_slice(&described).unwrap();
    let stored: BTreeMap<&str, (Dtype, Vec<u8>)> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.bytes(seed, name))).collect();
    let views = tensors.iter().map(|(name, tensor)| {
        let (dtype, bytes) = &stored[name.as_str()];
        (name, TensorView::new(*dtype, tensor.shape.clone(), bytes).unwrap())
    });
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    serialize_to_file(views, Some(metadata), &folder.path().join("model.safetensors")).unwrap();
    folder
}

/// Values that `synthetic.py` gave: a wrong generator is told from a wrong model.
#[test]
fn the_generator_is_that_of_the_reference() {
    assert_eq!(fnv1a64("1:a"), 0x4554_0418_180a_ba49);
    let tensor: Tensor = serde_json::from_str(
        r#"{"dtype": "BF16", "shape": [3, 2], "scale": 0.28125, "offset": 1.0, "rows": [1, 0.25], "like": "a"}"#,
    )
    .unwrap();
    let bits: Vec<u32> = tensor.values(1, "b").map(f32::to_bits).collect();
    assert_eq!(bits, [0x3f8f_1db3, 0x3f51_abd1, 0x3f84_a842, 0x3f7c_4cc3, 0x3f87_d983, 0x3f8f_f719]);
    let (dtype, bytes) = tensor.bytes(1, "b");
    let rounded = [0x3f8f_u16, 0x3f52, 0x3f85, 0x3f7c, 0x3f88, 0x3f90];
    assert_eq!((dtype, bytes), (Dtype::BF16, rounded.into_iter().flat_map(u16::to_le_bytes).collect()));
}
