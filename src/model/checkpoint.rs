//! A model's files: safetensors, memory-mapped and never copied.

use std::{ops::Range, sync::Arc};

use crate::error::Result;

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

/// A tensor where it is stored. Cheap to clone; keeps its file mapped.
#[derive(Clone)]
pub struct StoredTensor {
    /// How its numbers are stored.
    pub dtype: DType,
    /// Outermost first.
    pub shape: Vec<usize>,
    file: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl StoredTensor {
    /// A tensor of its own bytes: little-endian numbers, row-major.
    pub fn from_bytes(dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Result<StoredTensor> {
        let range = 0..bytes.len();
        Ok(StoredTensor { dtype, shape, file: Arc::new(bytes), range })
    }

    /// Little-endian numbers, row-major.
    pub fn bytes(&self) -> &[u8] {
        &(*self.file).as_ref()[self.range.clone()]
    }
}
