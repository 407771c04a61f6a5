//! Weights as they are stored, and how they are widened.

use super::sum::{LANES, dot};
use crate::backend::LinearPart;
use crate::error::{Error, Result};
use crate::model::checkpoint::DType;
use crate::model::runs::Run;
use crate::model::weights::TensorPart;

/// A linear layer, or a table of rows: blocks of stored rows, one after the other.
pub struct Weight {
    /// Whole rows of each can be read where they lie.
    parts: Vec<TensorPart>,
    /// `[rows]`, or empty.
    bias: Vec<f32>,
    /// `[rows]` by which the products are divided, or empty.
    lengths: Vec<f32>,
    scale: f32,
    rows: usize,
    columns: usize,
}

impl Weight {
    /// Refers to the stored parts, or to copies where whole rows do not lie together; biases are widened.
    pub fn new(parts: &[LinearPart], scale: f32) -> Result<Weight> {
        let rows = parts.iter().map(|part| part.weight.rows.len()).sum();
        let columns = parts.first().map_or(0, |part| part.weight.columns.len());
        for LinearPart { weight, .. } in parts {
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
        let parts = parts.iter().map(|part| readable(&part.weight)).collect::<Result<_>>()?;
        Ok(Weight { parts, bias, lengths: Vec::new(), scale, rows, columns })
    }

    /// As [`Weight::new`], each row divided by its length, or by 1e−12 where that is smaller.
    pub fn normalised(part: &LinearPart, scale: f32) -> Result<Weight> {
        let mut weight = Weight::new(std::slice::from_ref(part), scale)?;
        let mut row = vec![0.0; weight.columns];
        let length = |number| {
            weight.widen_row(number, &mut row);
            dot(&row, &row).sqrt().max(1e-12)
        };
        weight.lengths = (0..weight.rows).map(length).collect();
        Ok(weight)
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
        self.parts.first().and_then(|part| part.rows.runs().first()).map_or(0, |run| run.first)
    }

    /// What an output is, from the product of its row with the inputs.
    #[inline(always)]
    pub fn output(&self, row: usize, product: f32) -> f32 {
        let product = self.lengths.get(row).map_or(product, |length| product / length);
        self.scale * self.bias.get(row).map_or(product, |bias| product + bias)
    }

    /// Widens a row.
    #[inline(always)]
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        let rows = self.rows_from(row);
        widen(rows.dtype, rows.get(0), out);
    }

    /// The stored rows from `row` on, up to the end of the run that they lie in.
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
        let run = part.rows.rest_from(row).unwrap_or(Run { first: 0, step: 0, count: 0 });
        let first_column = part.columns.runs().first().map_or(0, |run| run.first);
        let at = part.number(run.first, first_column) * size;
        StoredRows {
            dtype: part.tensor.dtype,
            bytes: part.tensor.bytes().get(at..).unwrap_or_default(),
            stride: run.step * part.row_stride * size,
            width: part.columns.len() * size,
            count: run.count,
        }
    }

    /// The bytes of a row, counted from the first of these.
    #[inline(always)]
    pub fn get(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.stride..][..self.width]
    }
}

/// Widens a vector, or a matrix row after row.
pub fn vector(part: &TensorPart) -> Result<Vec<f32>> {
    let part = readable(part)?;
    let mut out = vec![0.0; part.n_elements()];
    if !part.columns.is_empty() {
        for (row, out) in out.chunks_exact_mut(part.columns.len()).enumerate() {
            let rows = StoredRows::new(&part, row);
            widen(rows.dtype, rows.get(0), out);
        }
    }
    Ok(out)
}

/// A part whose whole rows lie together: itself, or a copy. It is all there.
fn readable(part: &TensorPart) -> Result<TensorPart> {
    if part.tensor.random().is_some() {
        return Err(Error::Bug("weights that the device is to make, on one that reads them".into()));
    }
    part.check()?;
    if part.has_dense_rows() { Ok(part.clone()) } else { part.gathered() }
}

/// Bytes of a number.
pub fn size_of_dtype(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 4,
        DType::F16 | DType::BF16 => 2,
    }
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
        for (rows, columns) in [(0..5, 0..3), (0..4, 1..4)] {
            let weight = TensorPart::rectangle(tensor.clone(), rows, columns);
            let loaded = Weight::new(&[LinearPart { weight, bias: None }], 1.0);
            assert!(matches!(loaded, Err(Error::Checkpoint(_))));
        }
    }
}
