//! Weights on their way to the GPU: read where they are mapped, rounded to the backend's dtype, staged in pinned memory.

use std::cell::RefCell;
use std::ops::Range;

use half::{bf16, f16};
use rayon::prelude::*;

use super::device::{Buffer, Device, Pinned, failed, launched};
use super::tensor::padded;
use super::{dtype_code, ffi};
use crate::backend::LinearPart;
use crate::error::{Error, Result};
use crate::model::checkpoint::{DType, Random, signed_unit};
use crate::model::weights::TensorPart;

/// A linear layer, or a table of rows.
pub struct Weight {
    /// `[outputs, stride]`, zeros beyond the inputs.
    pub numbers: Buffer,
    /// `[outputs]`, multiplied by `scale`.
    pub bias: Option<Buffer>,
    /// Multiplies products.
    pub scale: f32,
    /// Rows.
    pub outputs: usize,
    /// Numbers of a row.
    pub inputs: usize,
    /// Numbers from row to row.
    pub stride: usize,
    /// The number of the first row in the whole tensor.
    pub first_row: usize,
}

impl Weight {
    /// The bias's address, or null.
    pub fn bias_ptr<T>(&self) -> *const T {
        self.bias.as_ref().map_or(std::ptr::null(), |bias| bias.ptr::<T>())
    }
}

/// Takes tensors to the GPU. Two buffers take turns: one is filled while the other is copied.
pub struct Uploader {
    device: Device,
    dtype: DType,
    staging: RefCell<Staging>,
}

struct Staging {
    buffers: [Pinned<u16>; 2],
    /// When the copy out of each has ended.
    copied: [Option<cudarc::driver::CudaEvent>; 2],
    turn: usize,
}

/// Numbers of a staging buffer.
const STAGED_NUMBERS: usize = 32 << 20;
/// Numbers that lie apart and are brought together before they are rounded.
const GATHERED_NUMBERS: usize = 256;
/// Numbers that one core stages at a time.
const CHUNK_NUMBERS: usize = 1 << 19;

impl Uploader {
    /// Stages numbers of a 16-bit dtype.
    pub fn new(device: &Device, dtype: DType) -> Result<Uploader> {
        let buffers = [device.pinned(STAGED_NUMBERS)?, device.pinned(STAGED_NUMBERS)?];
        let staging = Staging { buffers, copied: [None, None], turn: 0 };
        Ok(Uploader { device: device.clone(), dtype, staging: RefCell::new(staging) })
    }

    /// Blocks of rows, one below the other; see [`crate::backend::Backend::weight`].
    pub fn weight(&self, parts: &[LinearPart], scale: f32) -> Result<Weight> {
        let outputs = parts.iter().map(|part| part.weight.rows.len()).sum();
        let first = parts.first().ok_or_else(|| Error::Bug("a layer without parts".into()))?;
        let inputs = first.weight.columns.len();
        let stride = padded(inputs);
        let numbers = self.device.alloc(outputs * stride * 2)?;
        let has_bias = parts.iter().any(|part| part.bias.is_some());
        let bias = has_bias.then(|| self.device.alloc(outputs * 2)).transpose()?;
        let mut row = 0;
        for LinearPart { weight, bias: of_part } in parts {
            if weight.columns.len() != inputs {
                let text = format!("parts of {inputs} and {} columns in one layer", weight.columns.len());
                return Err(Error::Checkpoint(text));
            }
            self.rows(weight, &numbers, row, stride)?;
            if let (Some(bias), Some(of_part)) = (&bias, of_part) {
                if of_part.rows.len() != weight.rows.len() {
                    let (n, outputs) = (of_part.rows.len(), weight.rows.len());
                    return Err(Error::Checkpoint(format!("a bias of {n} for {outputs} outputs")));
                }
                let scaled: Vec<u16> = widened(of_part)?.iter().map(|&x| self.round(scale * x)).collect();
                self.stage(scaled.len(), bias, row, |range, out| out.copy_from_slice(&scaled[range]))?;
            }
            row += weight.rows.len();
        }
        let first_row = first.weight.rows.as_range().map_or(0, |rows| rows.start);
        Ok(Weight { numbers, bias, scale, outputs, inputs, stride, first_row })
    }

    /// As [`Uploader::weight`] of one part, each row divided by its length.
    pub fn normalised_weight(&self, part: &LinearPart, scale: f32) -> Result<Weight> {
        let weight = self.weight(std::slice::from_ref(part), scale)?;
        let params = ffi::NormaliseRows {
            rows_of: weight.numbers.ptr(),
            stride: weight.stride as i64,
            rows: weight.outputs as i32,
            width: weight.inputs as i32,
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: the weight has so many rows.
        launched("normalise_rows", unsafe { ffi::kv_normalise_rows(&params, self.device.stream()) })?;
        Ok(weight)
    }

    /// Numbers in f32.
    pub fn singles(&self, numbers: &[f32]) -> Result<Buffer> {
        let buffer = self.device.alloc(size_of_val(numbers))?;
        self.device.upload(numbers, buffer.address())?;
        // The numbers are in ordinary memory, which must outlive the copy.
        self.device.synchronize()?;
        Ok(buffer)
    }

    /// A vector.
    pub fn vector(&self, part: &TensorPart) -> Result<Buffer> {
        let buffer = self.device.alloc(part.rows.len() * part.columns.len() * 2)?;
        self.rows(part, &buffer, 0, part.columns.len())?;
        Ok(buffer)
    }

    /// A rectangle of a tensor to rows from `row` on.
    fn rows(&self, part: &TensorPart, to: &Buffer, row: usize, stride: usize) -> Result<()> {
        if part.rows.is_empty() || part.columns.is_empty() {
            return Ok(());
        }
        match part.tensor.random() {
            Some(random) => self.fill(part, random, to, row, stride),
            None => self.copy(part, to, row, stride),
        }
    }

    fn fill(&self, part: &TensorPart, random: Random, to: &Buffer, row: usize, stride: usize) -> Result<()> {
        let Random::Uniform { stream, reach } = random else {
            let Random::Constant(value) = random else { return Ok(()) };
            let numbers = vec![self.round(value); part.n_elements()];
            return self
                .stage(numbers.len(), to, row * stride, |range, out| out.copy_from_slice(&numbers[range]));
        };
        let mut at_row = row;
        for rows in part.rows.runs() {
            let mut at_column = 0;
            for columns in part.columns.runs() {
                let params = ffi::FillRandom {
                    out: to.at((at_row * stride + at_column) * 2),
                    out_stride: stride as i64,
                    rows: rows.count as i64,
                    columns: columns.count as i64,
                    first: part.number(rows.first, columns.first) as i64,
                    row_step: (rows.step * part.row_stride) as i64,
                    column_step: (columns.step * part.column_stride) as i64,
                    stream,
                    reach,
                    dtype: dtype_code(self.dtype),
                };
                // SAFETY: the buffer has the rows, `stride` apart.
                launched("fill_random", unsafe { ffi::kv_fill_random(&params, self.device.stream()) })?;
                at_column += columns.count;
            }
            at_row += rows.count;
        }
        Ok(())
    }

    fn copy(&self, part: &TensorPart, to: &Buffer, row: usize, stride: usize) -> Result<()> {
        part.check()?;
        let width = part.columns.len();
        // Whole rows at a time, padded as they lie on the device.
        let rows_at_once = (STAGED_NUMBERS / stride).max(1);
        if stride > STAGED_NUMBERS {
            return Err(Error::Unsupported(format!("a row of {width} numbers")));
        }
        let dtype = self.dtype;
        for first in (0..part.rows.len()).step_by(rows_at_once) {
            let n_rows = rows_at_once.min(part.rows.len() - first);
            self.stage(n_rows * stride, to, (row + first) * stride, |range, out| {
                let rows = range.start / stride..range.end.div_ceil(stride);
                for row in rows {
                    // The part of the row that lies in this chunk.
                    let begin = range.start.max(row * stride);
                    let end = range.end.min((row + 1) * stride);
                    let columns = begin - row * stride..(end - row * stride).min(width);
                    let out = &mut out[begin - range.start..end - range.start];
                    let (held, padding) = out.split_at_mut(columns.len().min(out.len()));
                    round_columns(part, first + row, columns.start, dtype, held);
                    padding.fill(0);
                }
            })?;
        }
        Ok(())
    }

    /// Fills a staging buffer by chunks, on all cores, and queues its copy to `to`, `at` numbers from its start.
    fn stage(
        &self,
        n: usize,
        to: &Buffer,
        at: usize,
        fill: impl Fn(Range<usize>, &mut [u16]) + Sync,
    ) -> Result<()> {
        let staging = &mut *self.staging.borrow_mut();
        let turn = staging.turn;
        staging.turn = 1 - turn;
        if let Some(copied) = staging.copied[turn].take() {
            copied.synchronize().map_err(failed("copying weights"))?;
        }
        let buffer = &mut staging.buffers[turn].as_mut_slice()[..n];
        buffer.par_chunks_mut(CHUNK_NUMBERS).enumerate().for_each(|(chunk, out)| {
            let first = chunk * CHUNK_NUMBERS;
            fill(first..first + out.len(), out);
        });
        self.device.upload(buffer, to.address() + (at * 2) as u64)?;
        let event = self.device.cuda_stream().record_event(None).map_err(failed("copying weights"))?;
        staging.copied[turn] = Some(event);
        Ok(())
    }

    fn round(&self, value: f32) -> u16 {
        match self.dtype {
            DType::F16 => f16::from_f32(value).to_bits(),
            DType::BF16 | DType::F32 => bf16::from_f32(value).to_bits(),
        }
    }
}

/// Numbers of a row from a column on, as stored, to numbers as computed with. The part lies within its tensor.
fn round_columns(part: &TensorPart, row: usize, mut column: usize, dtype: DType, mut to: &mut [u16]) {
    let (stored, bytes) = (part.tensor.dtype, part.tensor.bytes());
    let size = stored.size_bytes();
    let Some(at_row) = part.rows.rest_from(row) else { return };
    while !to.is_empty()
        && let Some(run) = part.columns.rest_from(column)
    {
        let at = |i: usize| part.number(at_row.first, run.first + i * run.step) * size;
        let neighbours = run.step * part.column_stride == 1 || run.count == 1;
        let n = run.count.min(to.len()).min(if neighbours { usize::MAX } else { GATHERED_NUMBERS });
        let (held, rest) = to.split_at_mut(n);
        if neighbours {
            round_all(stored, dtype, &bytes[at(0)..][..n * size], held);
        } else {
            let mut gathered = [0u8; 4 * GATHERED_NUMBERS];
            for (i, number) in gathered.chunks_exact_mut(size).take(n).enumerate() {
                number.copy_from_slice(&bytes[at(i)..][..size]);
            }
            round_all(stored, dtype, &gathered[..n * size], held);
        }
        (column, to) = (column + n, rest);
    }
}

/// The numbers of a part in f32, row after row.
pub fn widened(part: &TensorPart) -> Result<Vec<f32>> {
    part.check()?;
    let places = || part.rows.iter().flat_map(|row| part.columns.iter().map(move |column| (row, column)));
    let numbers = places().map(|(row, column)| part.number(row, column));
    match part.tensor.random() {
        None => {}
        Some(Random::Constant(value)) => return Ok(vec![value; part.n_elements()]),
        Some(Random::Uniform { stream, reach }) => {
            let made = |number: usize| reach * signed_unit(stream.wrapping_add(number as u64));
            return Ok(numbers.map(made).collect());
        }
    }
    let (stored, bytes) = (part.tensor.dtype, part.tensor.bytes());
    let size = stored.size_bytes();
    let widen = |at: usize| match (stored, &bytes[at * size..][..size]) {
        (DType::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        (DType::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
        (_, number) => bf16::from_le_bytes([number[0], number[1]]).to_f32(),
    };
    Ok(numbers.map(widen).collect())
}

/// Numbers as stored to numbers as computed with.
fn round_all(stored: DType, dtype: DType, from: &[u8], to: &mut [u16]) {
    let halves = || from.chunks_exact(2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    let singles = || from.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let to_numbers = to.iter_mut();
    match (stored, dtype) {
        (DType::F16, DType::F16) | (DType::BF16, DType::BF16) => {
            bytemuck::cast_slice_mut::<u16, u8>(to).copy_from_slice(from);
        }
        (DType::F16, _) => {
            to_numbers
                .zip(halves())
                .for_each(|(to, bits)| *to = bf16::from_f32(f16::from_bits(bits).to_f32()).to_bits());
        }
        (DType::BF16, _) => {
            to_numbers
                .zip(halves())
                .for_each(|(to, bits)| *to = f16::from_f32(bf16::from_bits(bits).to_f32()).to_bits());
        }
        (DType::F32, DType::F16) => {
            to_numbers.zip(singles()).for_each(|(to, x)| *to = f16::from_f32(x).to_bits())
        }
        (DType::F32, _) => to_numbers.zip(singles()).for_each(|(to, x)| *to = bf16::from_f32(x).to_bits()),
    }
}
