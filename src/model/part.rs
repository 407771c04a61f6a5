//! Some rows and columns of a stored tensor, seen in place.

use std::ops::Range;

use rayon::prelude::*;

use super::checkpoint::StoredTensor;
use super::layout::View;
use super::runs::Runs;
use crate::error::{Error, Result};

/// Rows that are gathered together: where columns are what lies together, they share what memory is read at once.
const ROWS_AT_ONCE: usize = 32;

/// A matrix inside a stored tensor. A vector is a matrix of one column. Number `(i, j)` is the tensor's number
/// `first + rows[i] · row_stride + columns[j] · column_stride`.
#[derive(Debug, Clone)]
pub struct TensorPart {
    /// The whole tensor.
    pub tensor: StoredTensor,
    /// The tensor's number at stored row 0 and stored column 0.
    pub first: usize,
    /// Stored rows.
    pub rows: Runs,
    /// Numbers from a stored row to the next.
    pub row_stride: usize,
    /// Stored columns.
    pub columns: Runs,
    /// Numbers from a stored column to the next.
    pub column_stride: usize,
}

impl TensorPart {
    /// All of a tensor of one or two dimensions.
    pub fn whole(tensor: StoredTensor) -> TensorPart {
        let rows = tensor.shape.first().copied().unwrap_or(1);
        let columns = tensor.shape.get(1).copied().unwrap_or(1);
        TensorPart::rectangle(tensor, 0..rows, 0..columns)
    }

    /// Neighbouring rows and columns of a tensor of one or two dimensions.
    pub fn rectangle(tensor: StoredTensor, rows: Range<usize>, columns: Range<usize>) -> TensorPart {
        let row_stride = tensor.shape.get(1).copied().unwrap_or(1);
        let (rows, columns) = (Runs::range(rows), Runs::range(columns));
        TensorPart { tensor, first: 0, rows, row_stride, columns, column_stride: 1 }
    }

    /// A matrix inside a tensor.
    pub fn view(tensor: StoredTensor, view: View) -> TensorPart {
        let View { first, rows, row_stride, columns, column_stride } = view;
        TensorPart { tensor, first, rows, row_stride, columns, column_stride }
    }

    /// Some of its rows and columns, by their numbers.
    pub fn cut(&self, rows: Range<usize>, columns: Range<usize>) -> TensorPart {
        let (rows, columns) = (self.rows.slice(rows), self.columns.slice(columns));
        TensorPart { tensor: self.tensor.clone(), rows, columns, ..*self }
    }

    /// Some of its rows, by their numbers.
    pub fn cut_rows(&self, rows: Range<usize>) -> TensorPart {
        self.cut(rows, 0..self.columns.len())
    }

    /// Rows for columns.
    pub fn transposed(self) -> TensorPart {
        TensorPart {
            rows: self.columns,
            row_stride: self.column_stride,
            columns: self.rows,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// How many numbers.
    pub fn n_elements(&self) -> usize {
        self.rows.len() * self.columns.len()
    }

    /// The tensor's number at a stored row and a stored column.
    pub fn number(&self, stored_row: usize, stored_column: usize) -> usize {
        self.first + stored_row * self.row_stride + stored_column * self.column_stride
    }

    /// The bytes of a row are neighbours: whole rows may be copied.
    pub fn has_dense_rows(&self) -> bool {
        self.columns.len() <= 1 || self.column_stride == 1 && self.columns.as_range().is_some()
    }

    /// Checks that it lies within its tensor, and that the tensor's bytes are all there.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] with the sizes.
    pub fn check(&self) -> Result<()> {
        let shape = &self.tensor.shape;
        let elements = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
        let bytes = elements.and_then(|n| n.checked_mul(self.tensor.dtype.size_bytes()));
        let stored = self.tensor.random().is_some() || bytes == Some(self.tensor.bytes().len());
        let last = |places: &Runs, stride: usize| places.last().unwrap_or(0).checked_mul(stride);
        let end = last(&self.rows, self.row_stride)
            .zip(last(&self.columns, self.column_stride))
            .and_then(|(row, column)| self.first.checked_add(row)?.checked_add(column)?.checked_add(1));
        let is_empty = self.rows.is_empty() || self.columns.is_empty();
        if !stored || !is_empty && end.zip(elements).is_none_or(|(end, elements)| end > elements) {
            return Err(Error::Checkpoint(format!(
                "{} rows and {} columns do not lie in a tensor of shape {shape:?} in {} bytes",
                self.rows.len(),
                self.columns.len(),
                self.tensor.bytes().len()
            )));
        }
        Ok(())
    }

    /// The same numbers in memory, row after row. Where they are to be made, others of the same kind.
    ///
    /// # Errors
    /// As [`TensorPart::check`], and [`Error::Exhausted`] for a lack of memory.
    pub fn gathered(&self) -> Result<TensorPart> {
        self.check()?;
        let shape = vec![self.rows.len(), self.columns.len()];
        if let Some(random) = self.tensor.random() {
            let first =
                self.number(self.rows.iter().next().unwrap_or(0), self.columns.iter().next().unwrap_or(0));
            return Ok(TensorPart::whole(StoredTensor::unmade(self.tensor.dtype, shape, random.from(first))));
        }
        let size = self.tensor.dtype.size_bytes();
        let n_bytes = self.n_elements() * size;
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(n_bytes)
            .map_err(|_| Error::Exhausted(format!("no memory for {n_bytes} bytes of weights")))?;
        bytes.resize(n_bytes, 0);
        let stored = self.tensor.bytes();
        let rows: Vec<usize> = self.rows.iter().collect();
        let columns: Vec<usize> = self.columns.iter().collect();
        let width = columns.len() * size;
        bytes.par_chunks_mut((ROWS_AT_ONCE * width).max(1)).zip(rows.par_chunks(ROWS_AT_ONCE)).for_each(
            |(out, rows)| {
                for (j, &column) in columns.iter().enumerate() {
                    for (i, &row) in rows.iter().enumerate() {
                        let at = self.number(row, column) * size;
                        out[i * width + j * size..][..size].copy_from_slice(&stored[at..at + size]);
                    }
                }
            },
        );
        Ok(TensorPart::whole(StoredTensor::from_bytes(self.tensor.dtype, shape, bytes)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::checkpoint::{DType, Random};

    /// `[rows, columns]` of 0, 1, 2, ….
    fn counted(rows: usize, columns: usize) -> StoredTensor {
        let bytes = (0..rows * columns).flat_map(|i| (i as f32).to_le_bytes()).collect();
        StoredTensor::from_bytes(DType::F32, vec![rows, columns], bytes).unwrap()
    }

    fn numbers(part: &TensorPart) -> Vec<f32> {
        let gathered = part.gathered().unwrap();
        assert_eq!((gathered.rows.len(), gathered.columns.len()), (part.rows.len(), part.columns.len()));
        gathered.tensor.bytes().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    #[test]
    fn parts_of_parts_and_their_mirror() {
        let whole = TensorPart::whole(counted(4, 3));
        let part = whole.cut(1..4, 1..3);
        assert_eq!(numbers(&part), [4.0, 5.0, 7.0, 8.0, 10.0, 11.0]);
        assert_eq!(numbers(&part.cut_rows(2..3)), [10.0, 11.0]);
        let mirror = part.clone().transposed();
        assert_eq!(numbers(&mirror), [4.0, 7.0, 10.0, 5.0, 8.0, 11.0]);
        assert_eq!(numbers(&mirror.cut(1..2, 0..2)), [5.0, 8.0]);
        assert!(part.has_dense_rows() && !mirror.has_dense_rows());
        // A vector is a matrix of one column, and the other way round.
        assert!(TensorPart::whole(counted(4, 1)).transposed().has_dense_rows());
        assert_eq!(numbers(&whole.cut(2..2, 0..3)), [0f32; 0]);
    }

    #[test]
    fn what_lies_outside_the_tensor_is_refused() {
        let whole = TensorPart::whole(counted(4, 3));
        whole.check().unwrap();
        let outside = [
            TensorPart::rectangle(counted(4, 3), 0..5, 0..3),
            TensorPart::rectangle(counted(4, 3), 3..4, 1..4),
            TensorPart { first: 1, ..whole.clone() },
            TensorPart { row_stride: usize::MAX, ..whole.clone() },
            TensorPart { column_stride: 5, ..whole },
        ];
        for part in outside {
            let text = part.check().unwrap_err().to_string();
            assert!(text.contains("do not lie in a tensor of shape [4, 3] in 48 bytes"), "{text}");
            assert!(part.gathered().is_err());
        }
    }

    #[test]
    fn what_is_to_be_made_stays_so() {
        let random = Random::Uniform { stream: 100, reach: 2.0 };
        let part = TensorPart::whole(StoredTensor::unmade(DType::BF16, vec![4, 3], random)).cut(2..4, 1..2);
        let gathered = part.gathered().unwrap();
        assert_eq!(gathered.tensor.random(), Some(Random::Uniform { stream: 107, reach: 2.0 }));
        assert_eq!((gathered.rows.len(), gathered.columns.len()), (2, 1));
    }
}
