//! Tensor name → role → a rank's part of it.

use std::ops::Range;

use super::checkpoint::StoredTensor;

/// A rank's part of a stored tensor: a rectangle of it, seen in place. A vector is a matrix of one column.
#[derive(Clone)]
pub struct TensorPart {
    /// The whole tensor.
    pub tensor: StoredTensor,
    /// Rows (dimension 0) that the rank holds.
    pub rows: Range<usize>,
    /// Columns (dimension 1) that the rank holds.
    pub columns: Range<usize>,
}
