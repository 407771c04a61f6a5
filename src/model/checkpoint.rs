//! A model's files: safetensors, or what `torch.save` writes, memory-mapped and not copied.
//!
//! A mapped file must not shrink while the process runs: the kernel answers a read beyond the new end with SIGBUS,
//! which ends the process. Replace a checkpoint by renaming new files over the old ones, which leaves the mapped
//! ones whole until they are dropped.

mod convert;
mod dummy;
mod pickle;
mod safetensors_file;
mod strides;
mod torch;
mod zip;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Component, Path};
use std::sync::Arc;

use safetensors::tensor::Dtype as FileDtype;
use serde::Deserialize;

pub use convert::convert;
pub use dummy::{Random, signed_unit};

use crate::error::{Error, Result};

/// Longest index: a line for each tensor of the largest header.
const MAX_INDEX_BYTES: u64 = 100_000_000;

/// How weights are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    /// What the safetensors crate writes.
    Safetensors,
    /// What `torch.save` writes: a zip archive with a pickle in it.
    Torch,
}

impl Format {
    /// In the order in which they are looked for.
    const ALL: [Format; 2] = [Format::Safetensors, Format::Torch];

    /// The file of a checkpoint in one piece.
    const fn single(self) -> &'static str {
        match self {
            Format::Safetensors => "model.safetensors",
            Format::Torch => "pytorch_model.bin",
        }
    }

    /// The list of a checkpoint in several files: tensor name → file name.
    const fn index(self) -> &'static str {
        match self {
            Format::Safetensors => "model.safetensors.index.json",
            Format::Torch => "pytorch_model.bin.index.json",
        }
    }

    /// The tensors of a file of this name, in the file's order.
    fn parse(self, name: &str, file: Backing) -> Result<Vec<(String, Entry)>> {
        match self {
            Format::Safetensors => safetensors_file::parse(name, file),
            Format::Torch => torch::parse(name, file),
        }
    }
}

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// The upper half of a single.
    BF16,
}

impl DType {
    /// Bytes of one number.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// The name that configs, flags and `Info` use: `float32`, `float16`, `bfloat16`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
        }
    }

    /// The dtype of a name that [`DType::name`] gives.
    pub fn from_name(name: &str) -> Option<DType> {
        [DType::F32, DType::F16, DType::BF16].into_iter().find(|dtype| dtype.name() == name)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where bytes live: a mapped file, or memory.
type Backing = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A tensor where it is stored. Cheap to clone; keeps its file mapped.
#[derive(Clone)]
pub struct StoredTensor {
    /// How its numbers are stored.
    pub dtype: DType,
    /// Outermost first.
    pub shape: Vec<usize>,
    file: Backing,
    range: Range<usize>,
    random: Option<Random>,
}

impl StoredTensor {
    /// A tensor in memory: `bytes` are little-endian numbers, row-major.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if `bytes` is not as long as dtype and shape say.
    pub fn from_bytes(dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Result<StoredTensor> {
        let expected = shape.iter().try_fold(dtype.size_bytes(), |n, &size| n.checked_mul(size));
        if expected != Some(bytes.len()) {
            let len = bytes.len();
            return Err(Error::Checkpoint(format!(
                "a {dtype} tensor of the shape {shape:?} does not have {len} bytes"
            )));
        }
        let range = 0..bytes.len();
        Ok(StoredTensor { dtype, shape, file: Arc::new(bytes), range, random: None }.aligned())
    }

    /// A tensor that is not stored but made.
    pub fn unmade(dtype: DType, shape: Vec<usize>, random: Random) -> StoredTensor {
        StoredTensor { dtype, shape, file: Arc::new(Vec::new()), range: 0..0, random: Some(random) }
    }

    /// Tensors of one dtype one after the other, as one of `shape`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where their dtypes differ or `shape` holds another number of numbers.
    pub fn stacked(tensors: &[StoredTensor], shape: Vec<usize>) -> Result<StoredTensor> {
        let Some(first) = tensors.first() else {
            return StoredTensor::from_bytes(DType::F32, shape, Vec::new());
        };
        if tensors.iter().any(|tensor| tensor.dtype != first.dtype) {
            let text = format!("tensors of {} numbers each differ in their dtypes", first.n_elements());
            return Err(Error::Checkpoint(text));
        }
        match first.random {
            Some(random) => Ok(StoredTensor::unmade(first.dtype, shape, random)),
            None => {
                let bytes = tensors.iter().flat_map(StoredTensor::bytes).copied().collect();
                StoredTensor::from_bytes(first.dtype, shape, bytes)
            }
        }
    }

    /// Little-endian numbers, row-major, at an address that is a multiple of the dtype's size; none where they are to be
    /// made, see [`StoredTensor::random`].
    pub fn bytes(&self) -> &[u8] {
        &(*self.file).as_ref()[self.range.clone()]
    }

    /// How the numbers are made, where they are not stored.
    pub fn random(&self) -> Option<Random> {
        self.random
    }

    /// Number of numbers.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The same tensor at an address that suits its dtype. Writers pad their headers, so files need this copy only
    /// where a 16-bit tensor of odd length stands before a 32-bit one.
    fn aligned(self) -> StoredTensor {
        if self.bytes().as_ptr().addr().is_multiple_of(self.dtype.size_bytes()) {
            return self;
        }
        let copy = Aligned::copy(self.bytes());
        let range = 0..copy.len;
        StoredTensor { file: Arc::new(copy), range, ..self }
    }
}

impl fmt::Debug for StoredTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoredTensor({} {:?})", self.dtype, self.shape)
    }
}

/// Bytes at an address that suits every dtype.
struct Aligned {
    words: Vec<u64>,
    len: usize,
}

impl Aligned {
    fn copy(bytes: &[u8]) -> Aligned {
        let mut words = vec![0u64; bytes.len().div_ceil(size_of::<u64>())];
        bytemuck::cast_slice_mut::<u64, u8>(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Aligned { words, len: bytes.len() }
    }
}

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }
}

/// A tensor of a file, in any dtype that the format knows.
#[derive(Clone)]
struct Entry {
    dtype: FileDtype,
    shape: Vec<usize>,
    /// Numbers from one index of a dimension to the next, where these are not a row-major tensor's.
    strides: Option<Vec<usize>>,
    file: Backing,
    range: Range<usize>,
    random: Option<Random>,
}

/// The tensors of a model, by name. Opening one reads headers only.
#[derive(Clone, Default)]
pub struct Checkpoint {
    tensors: BTreeMap<String, Entry>,
}

impl Checkpoint {
    /// Maps a folder's file of weights, or the files that its index lists: safetensors where there are any, else
    /// `pytorch_model*.bin`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for files that are missing, cut short or inconsistent.
    pub fn open(folder: &Path) -> Result<Checkpoint> {
        for format in Format::ALL {
            if folder.join(format.single()).is_file() {
                let tensors = map(folder, format, format.single())?;
                return Ok(Checkpoint { tensors: tensors.into_iter().collect() });
            }
            if folder.join(format.index()).is_file() {
                let index = Index::read(folder, format)?;
                let files = index.map(folder)?;
                return Ok(Checkpoint { tensors: files.into_values().flatten().collect() });
            }
        }
        let [safetensors, torch] =
            Format::ALL.map(|format| format!("{} nor {}", format.single(), format.index()));
        Err(Error::Checkpoint(format!("the model's folder has neither {safetensors}, nor {torch}")))
    }

    /// Reads one safetensors file from memory.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_bytes(file: Vec<u8>) -> Result<Checkpoint> {
        let tensors = Format::Safetensors.parse("the file", Arc::new(file))?;
        Ok(Checkpoint { tensors: tensors.into_iter().collect() })
    }

    /// Reads one file of `torch.save` from memory.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_torch_bytes(file: Vec<u8>) -> Result<Checkpoint> {
        let tensors = Format::Torch.parse("the file", Arc::new(file))?;
        Ok(Checkpoint { tensors: tensors.into_iter().collect() })
    }

    /// The names of all tensors, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The tensor of a name, if there is one; a copy of it where the file does not hold it row-major.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when its dtype is none of [`DType`], [`Error::Exhausted`] when a copy does not fit in memory.
    pub fn tensor(&self, name: &str) -> Result<Option<StoredTensor>> {
        let Some(entry) = self.tensors.get(name) else { return Ok(None) };
        let dtype = match entry.dtype {
            FileDtype::F32 => DType::F32,
            FileDtype::F16 => DType::F16,
            FileDtype::BF16 => DType::BF16,
            other => {
                return Err(Error::Checkpoint(format!(
                    "tensor {name} is stored as {other}; float32, float16 and bfloat16 can be read"
                )));
            }
        };
        let Entry { shape, file, range, random, .. } = entry.in_row_major_order()?;
        Ok(Some(StoredTensor { dtype, shape, file, range, random }.aligned()))
    }
}

#[cfg(test)]
impl Checkpoint {
    /// The same without one of its tensors.
    pub(crate) fn without(&self, name: &str) -> Checkpoint {
        let mut rest = self.clone();
        rest.tensors.remove(name).unwrap();
        rest
    }
}

impl Entry {
    /// The same tensor in row-major order, copied if it is stored in another.
    fn in_row_major_order(&self) -> Result<Entry> {
        let Some(strides) = &self.strides else { return Ok(self.clone()) };
        let stored = &(*self.file).as_ref()[self.range.clone()];
        let bytes = strides::gather(stored, self.dtype.bitsize() / 8, &self.shape, strides)?;
        Ok(Entry { strides: None, range: 0..bytes.len(), file: Arc::new(bytes), ..self.clone() })
    }
}

/// The list of a checkpoint in several files.
struct Index {
    format: Format,
    /// Tensor name → file name.
    weight_map: BTreeMap<String, String>,
}

impl Index {
    fn read(folder: &Path, format: Format) -> Result<Index> {
        /// The part of an index that is read.
        #[derive(Deserialize)]
        struct Written {
            weight_map: BTreeMap<String, String>,
        }
        let name = format.index();
        let text = read_limited(&folder.join(name), name, MAX_INDEX_BYTES)?;
        let Written { weight_map } = serde_json::from_slice(&text)
            .map_err(|error| Error::Checkpoint(format!("{name} cannot be read: {error}")))?;
        Ok(Index { format, weight_map })
    }

    /// Maps all files: file name → the tensors that the index says are in it, in the file's order.
    fn map(&self, folder: &Path) -> Result<BTreeMap<&str, Vec<(String, Entry)>>> {
        let mut files = BTreeMap::new();
        for file in self.weight_map.values() {
            if !files.contains_key(file.as_str()) {
                let mut tensors = map(folder, self.format, file)?;
                tensors.retain(|(name, _)| self.weight_map.get(name) == Some(file));
                files.insert(file.as_str(), tensors);
            }
        }
        let found: BTreeSet<&str> = files.values().flatten().map(|(name, _)| name.as_str()).collect();
        match self.weight_map.iter().find(|(name, _)| !found.contains(name.as_str())) {
            Some((name, file)) => Err(Error::Checkpoint(format!(
                "{} says that tensor {name} is in {file}, which does not hold it",
                self.format.index()
            ))),
            None => Ok(files),
        }
    }
}

/// Maps a file of a folder; an index is foreign input, so `name` must stay in the folder.
fn map(folder: &Path, format: Format, name: &str) -> Result<Vec<(String, Entry)>> {
    let mut parts = Path::new(name).components();
    if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
        return Err(Error::Checkpoint(format!(
            "{} names {name:?}, which is not a file of its folder",
            format.index()
        )));
    }
    let unreadable = |error| Error::Checkpoint(format!("{name} cannot be opened: {error}"));
    let path = folder.join(name);
    if !fs::metadata(&path).map_err(unreadable)?.is_file() {
        return Err(Error::Checkpoint(format!("{name} is not a file")));
    }
    let file = File::open(path).map_err(unreadable)?;
    // SAFETY: the map is private to this process and only read. That nobody shortens the file while it is mapped
    // is the operator's part, which the module's documentation states.
    #[allow(unsafe_code)]
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(unreadable)?;
    format.parse(name, Arc::new(map))
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checkpoint({} tensors)", self.tensors.len())
    }
}

impl From<DType> for FileDtype {
    fn from(dtype: DType) -> FileDtype {
        match dtype {
            DType::F32 => FileDtype::F32,
            DType::F16 => FileDtype::F16,
            DType::BF16 => FileDtype::BF16,
        }
    }
}

/// The beginning of a name in a foreign file, as a message can show it.
fn shown(name: &str) -> String {
    const MAX_CHARACTERS: usize = 100;
    match name.char_indices().nth(MAX_CHARACTERS) {
        Some((at, _)) => format!("{:?}…", &name[..at]),
        None => format!("{name:?}"),
    }
}

/// Reads a small file of a model's folder, refusing one that is too long to be what it should be.
///
/// # Errors
/// [`Error::Checkpoint`] when it is missing, unreadable or longer than `limit`.
pub fn read_limited(path: &Path, name: &str, limit: u64) -> Result<Vec<u8>> {
    let unreadable = |error| Error::Checkpoint(format!("{name} cannot be read: {error}"));
    let length = fs::metadata(path).map_err(unreadable)?.len();
    if length > limit {
        return Err(Error::Checkpoint(format!("{name} has {length} bytes, at most {limit} are read")));
    }
    fs::read(path).map_err(unreadable)
}

#[cfg(test)]
mod tests;
