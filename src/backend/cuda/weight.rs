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
use crate::model::checkpoint::{DType, Random};
use crate::model::weights::TensorPart;

/// A linear layer, or a table of rows.
pub struct Weight {
    /// `[outputs, stride]`, zeros beyond the inputs.
    pub numbers: Buffer,
    /// `[outputs]`.
    pub bias: Option<Buffer>,
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
    /// Pinned memory, from the first tensor that is copied until all have been.
    staging: RefCell<Option<Staging>>,
}

struct Staging {
    buffers: [Pinned<u16>; 2],
    /// When the copy out of each has ended.
    copied: [Option<cudarc::driver::CudaEvent>; 2],
    turn: usize,
}

impl Staging {
    fn new(device: &Device) -> Result<Staging> {
        let buffers = [device.pinned(STAGED_NUMBERS)?, device.pinned(STAGED_NUMBERS)?];
        Ok(Staging { buffers, copied: [None, None], turn: 0 })
    }
}

/// Numbers of a staging buffer.
const STAGED_NUMBERS: usize = 32 << 20;
/// Numbers that one core stages at a time.
const CHUNK_NUMBERS: usize = 1 << 19;

impl Uploader {
    /// Stages numbers of a 16-bit dtype.
    pub fn new(device: &Device, dtype: DType) -> Uploader {
        Uploader { device: device.clone(), dtype, staging: RefCell::default() }
    }

    /// Gives the pinned memory back.
    pub fn finish(&self) -> Result<()> {
        self.device.synchronize()?;
        drop(self.staging.take());
        Ok(())
    }

    /// Blocks of rows, one below the other.
    pub fn weight(&self, parts: &[LinearPart]) -> Result<Weight> {
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
                self.rows(of_part, bias, row, 1)?;
            }
            row += weight.rows.len();
        }
        Ok(Weight { numbers, bias, outputs, inputs, stride, first_row: first.weight.rows.start })
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
            let numbers = vec![self.round(value); part.rows.len() * part.columns.len()];
            return self
                .stage(numbers.len(), to, row * stride, |range, out| out.copy_from_slice(&numbers[range]));
        };
        let params = ffi::FillRandom {
            out: to.at(row * stride * 2),
            out_stride: stride as i64,
            rows: part.rows.len() as i64,
            columns: part.columns.len() as i64,
            first_row: part.rows.start as i64,
            first_column: part.columns.start as i64,
            all_columns: all_columns(part) as i64,
            stream,
            reach,
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: the buffer has the rows, `stride` apart.
        launched("fill_random", unsafe { ffi::kv_fill_random(&params, self.device.stream()) })
    }

    fn copy(&self, part: &TensorPart, to: &Buffer, row: usize, stride: usize) -> Result<()> {
        let (width, stored) = (part.columns.len(), part.tensor.dtype);
        let size = stored.size_bytes();
        let from_stride = all_columns(part) * size;
        let bytes = part.tensor.bytes();
        let wanted = (part.rows.end - 1) * from_stride + part.columns.end * size;
        if wanted > bytes.len() {
            let text = format!("a tensor of {} bytes, of which {wanted} are wanted", bytes.len());
            return Err(Error::Checkpoint(text));
        }
        // Whole rows at a time, padded as they lie on the device.
        let rows_at_once = (STAGED_NUMBERS / stride).max(1);
        if stride > STAGED_NUMBERS {
            return Err(Error::Unsupported(format!("a row of {width} numbers")));
        }
        let dtype = self.dtype;
        for first in (0..part.rows.len()).step_by(rows_at_once) {
            let n_rows = rows_at_once.min(part.rows.len() - first);
            let row_bytes = |row: usize| {
                let at = (part.rows.start + first + row) * from_stride + part.columns.start * size;
                &bytes[at..at + width * size]
            };
            self.stage(n_rows * stride, to, (row + first) * stride, |range, out| {
                let rows = range.start / stride..range.end.div_ceil(stride);
                for row in rows {
                    // The part of the row that lies in this chunk.
                    let begin = range.start.max(row * stride);
                    let end = range.end.min((row + 1) * stride);
                    let columns = begin - row * stride..(end - row * stride).min(width);
                    let out = &mut out[begin - range.start..end - range.start];
                    let (held, padding) = out.split_at_mut(columns.len().min(out.len()));
                    let row_bytes = row_bytes(row);
                    if !columns.is_empty() {
                        let from = &row_bytes[columns.start * size..columns.end * size];
                        round_all(stored, dtype, from, held);
                    }
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
        let mut staging = self.staging.borrow_mut();
        let staging = match &mut *staging {
            Some(staging) => staging,
            none => none.insert(Staging::new(&self.device)?),
        };
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

fn all_columns(part: &TensorPart) -> usize {
    part.tensor.shape.get(1).copied().unwrap_or(1)
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
