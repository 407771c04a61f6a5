//! A model's files: safetensors, memory-mapped and never copied.

use std::{ops::Range, sync::Arc};

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
    /// Little-endian numbers, row-major.
    pub fn bytes(&self) -> &[u8] {
        &(*self.file).as_ref()[self.range.clone()]
    }
}
