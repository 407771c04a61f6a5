//! Weights as they are stored, and how they are widened.

use super::sum::LANES;
use crate::backend::LinearPart;
use crate::error::{Error, Result};
use crate::model::checkpoint::DType;
use crate::model::weights::TensorPart;

/// A linear layer, or a table of rows: blocks of stored rows, one after the other.
pub struct Weight {
    parts: Vec<TensorPart>,
    /// `[rows]`, or empty.
    pub bias: Vec<f32>,
    rows: usize,
    columns: usize,
}

impl Weight {
    /// Refers to the stored parts; biases are widened.
    pub fn new(parts: &[LinearPart]) -> Result<Weight> {
        let rows = parts.iter().map(|part| part.weight.rows.len()).sum();
        let columns = parts.first().map_or(0, |part| part.weight.columns.len());
        for LinearPart { weight, .. } in parts {
            check(weight)?;
            if weight.columns.len() != columns {
                let text = format!("parts of {columns} and {} columns in one layer", weight.columns.len());
                return Err(Error::Checkpoint(text));
            }
        }
        let mut bias = Vec::new();
        if parts.iter().any(|part| part.bias.is_some()) {
            for part in parts {
                let rows = part.weight.rows.len();
                let part_bias = part.bias.as_ref().map_or_else(|| Ok(vec![0.0; rows]), vector)?;
                if part_bias.len() != rows {
                    return Err(Error::Checkpoint(format!(
                        "a bias of {} for {rows} outputs",
                        part_bias.len()
                    )));
                }
                bias.extend(part_bias);
            }
        }
        Ok(Weight { parts: parts.iter().map(|part| part.weight.clone()).collect(), bias, rows, columns })
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The number of the first row in the whole tensor.
    pub fn first_row(&self) -> usize {
        self.parts.first().map_or(0, |part| part.rows.start)
    }

    /// Widens a row.
    #[inline(always)]
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        let rows = self.rows_from(row);
        widen(rows.dtype, rows.get(0), out);
    }

    /// The stored rows from `row` on, up to the end of the part that they lie in.
    #[inline(always)]
    pub fn rows_from(&self, mut row: usize) -> StoredRows<'_> {
        for part in &self.parts {
            if row < part.rows.len() {
                return StoredRows::new(part, row);
            }
            row -= part.rows.len();
        }
        StoredRows { dtype: DType::F32, bytes: &[], stride: 0, width: 0, count: 0 }
    }
}

/// Rows of one part, one after the other. Found once for all of them: what a tensor's bytes lie in (a map of a file,
/// or memory) is asked through a pointer to a function.
pub struct StoredRows<'a> {
    /// Of all rows.
    pub dtype: DType,
    /// From the first row's first number on.
    bytes: &'a [u8],
    /// Bytes from a row to the next.
    stride: usize,
    /// Bytes of a row.
    width: usize,
    /// Rows.
    pub count: usize,
}

impl<'a> StoredRows<'a> {
    fn new(part: &'a TensorPart, row: usize) -> StoredRows<'a> {
        let size = size_of_dtype(part.tensor.dtype);
        let stride = stored_columns(part) * size;
        let at = (part.rows.start + row) * stride + part.columns.start * size;
        StoredRows {
            dtype: part.tensor.dtype,
            bytes: part.tensor.bytes().get(at..).unwrap_or_default(),
            stride,
            width: part.columns.len() * size,
            count: part.rows.len() - row,
        }
    }

    /// The bytes of a row, counted from the first of these.
    #[inline(always)]
    pub fn get(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.stride..][..self.width]
    }
}

/// Widens a vector.
pub fn vector(part: &TensorPart) -> Result<Vec<f32>> {
    check(part)?;
    let mut out = vec![0.0; part.rows.len() * part.columns.len()];
    if !part.columns.is_empty() {
        let rows = StoredRows::new(part, 0);
        for (row, out) in out.chunks_exact_mut(part.columns.len()).enumerate() {
            widen(rows.dtype, rows.get(row), out);
        }
    }
    Ok(out)
}

/// Bytes of a number.
pub fn size_of_dtype(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 4,
        DType::F16 | DType::BF16 => 2,
    }
}

fn stored_columns(part: &TensorPart) -> usize {
    part.tensor.shape.get(1).copied().unwrap_or(1)
}

/// Whether the part lies within its tensor, and the tensor's bytes are all there.
fn check(part: &TensorPart) -> Result<()> {
    let shape = &part.tensor.shape;
    let (rows, columns) = (shape.first().copied().unwrap_or(0), stored_columns(part));
    let bytes = rows.checked_mul(columns).and_then(|n| n.checked_mul(size_of_dtype(part.tensor.dtype)));
    let inside = part.rows.start <= part.rows.end
        && part.rows.end <= rows
        && part.columns.start <= part.columns.end
        && part.columns.end <= columns;
    if shape.len() > 2 || !inside || bytes != Some(part.tensor.bytes().len()) {
        return Err(Error::Checkpoint(format!(
            "rows {:?} and columns {:?} of a tensor of shape {shape:?} in {} bytes",
            part.rows,
            part.columns,
            part.tensor.bytes().len()
        )));
    }
    Ok(())
}

/// How numbers are stored: eight of them are a chunk of `BYTES`. Bytes, since nothing aligns them.
pub trait Stored<const BYTES: usize> {
    /// Its numbers.
    fn widen(chunk: &[u8; BYTES]) -> [f32; LANES];
}

/// IEEE single.
pub struct F32;

/// IEEE half.
pub struct F16;

/// The upper half of a single.
pub struct BF16;

impl Stored<32> for F32 {
    #[inline(always)]
    fn widen(chunk: &[u8; 32]) -> [f32; LANES] {
        let (words, _) = chunk.as_chunks::<4>();
        std::array::from_fn(|i| f32::from_le_bytes(words[i]))
    }
}

impl Stored<16> for F16 {
    #[inline(always)]
    fn widen(chunk: &[u8; 16]) -> [f32; LANES] {
        let (halves, _) = chunk.as_chunks::<2>();
        std::array::from_fn(|i| widen_half(u16::from_le_bytes(halves[i])))
    }
}

impl Stored<16> for BF16 {
    #[inline(always)]
    fn widen(chunk: &[u8; 16]) -> [f32; LANES] {
        let (halves, _) = chunk.as_chunks::<2>();
        std::array::from_fn(|i| f32::from_bits(u32::from(u16::from_le_bytes(halves[i])) << 16))
    }
}

/// A last chunk, with zeros behind it.
#[inline(always)]
pub fn pad<const BYTES: usize>(rest: &[u8]) -> [u8; BYTES] {
    std::array::from_fn(|i| rest.get(i).copied().unwrap_or(0))
}

/// Without a branch, so that eight widen at once: the bits, moved to a single's places, are too small by 2¹¹².
#[inline(always)]
fn widen_half(half: u16) -> f32 {
    let magnitude = f32::from_bits(u32::from(half & 0x7FFF) << 13) * 2f32.powi(112);
    let special = if half & 0x7C00 == 0x7C00 { 0x7F80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | u32::from(half & 0x8000) << 16)
}

#[inline(always)]
fn widen(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => widen_as::<F32, _>(bytes, out),
        DType::F16 => widen_as::<F16, _>(bytes, out),
        DType::BF16 => widen_as::<BF16, _>(bytes, out),
    }
}

#[inline(always)]
fn widen_as<S: Stored<BYTES>, const BYTES: usize>(bytes: &[u8], out: &mut [f32]) {
    let (chunks, rest) = bytes.as_chunks::<BYTES>();
    let (out_chunks, out_rest) = out.as_chunks_mut::<LANES>();
    for (out, chunk) in out_chunks.iter_mut().zip(chunks) {
        *out = S::widen(chunk);
    }
    let last = S::widen(&pad(rest));
    out_rest.copy_from_slice(&last[..out_rest.len()]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::checkpoint::StoredTensor;

    #[test]
    fn every_half_widens_to_its_value() {
        for bits in 0..=u16::MAX {
            let (ours, expected) = (widen_half(bits), half::f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == expected.to_bits() || ours.is_nan() && expected.is_nan(), "{bits:#x}");
        }
    }

    #[test]
    fn a_part_outside_its_tensor_is_refused() {
        let tensor = StoredTensor::from_bytes(DType::F32, vec![4, 3], vec![0; 48]).unwrap();
        for (rows, columns) in [(0..5, 0..3), (0..4, 1..4), (0..4, 0..usize::MAX)] {
            let weight = TensorPart { tensor: tensor.clone(), rows, columns };
            assert!(matches!(Weight::new(&[LinearPart { weight, bias: None }]), Err(Error::Checkpoint(_))));
        }
    }
}
