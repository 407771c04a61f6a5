//! Rows taken by number, and what is done to each number of a row.

use std::ffi::c_void;

use super::device::launched;
use super::tensor::Tensor;
use super::weight::Weight;
use super::{Cuda, dtype_code, ffi};
use crate::error::Result;
use crate::model::spec::Logits;

/// Rows that are wanted of a table: `out = multiplier · row`, or `out += multiplier · row`.
pub struct Taken {
    /// Its address.
    pub table: *const c_void,
    /// Numbers from row to row.
    pub stride: usize,
    /// Rows that it has; others count as zeros.
    pub table_rows: usize,
    /// The number of its first row.
    pub first: usize,
    /// Numbers of a row.
    pub width: usize,
    /// `[n]` numbers of rows, on the device.
    pub wanted: *const u32,
    /// How many.
    pub n: usize,
    /// What they are multiplied by.
    pub multiplier: f32,
    /// Whether they are added.
    pub add: bool,
}

impl Taken {
    /// Of a weight, as they are.
    pub fn of(table: &Weight, wanted: *const u32, n: usize) -> Taken {
        Taken {
            table: table.numbers.ptr(),
            stride: table.stride,
            table_rows: table.outputs,
            first: table.first_row,
            width: table.inputs,
            wanted,
            n,
            multiplier: 1.0,
            add: false,
        }
    }

    /// Of a tensor in use up to a row, as they are.
    pub fn of_tensor(x: &Tensor, rows: usize, wanted: *const u32, n: usize) -> Taken {
        let (table, stride, width) = (x.ptr(), x.stride, x.width);
        Taken { table, stride, table_rows: rows, first: 0, width, wanted, n, multiplier: 1.0, add: false }
    }
}

impl Cuda {
    /// Takes rows of a table.
    pub(super) fn take_rows(&self, rows: &Taken, out: &Tensor) -> Result<()> {
        let params = ffi::TakeRows {
            table: rows.table,
            table_stride: rows.stride as i64,
            wanted: rows.wanted,
            rows: rows.n as i32,
            first: rows.first as u32,
            table_rows: rows.table_rows as u32,
            out: out.ptr(),
            out_stride: out.stride as i64,
            width: rows.width as i32,
            add: i32::from(rows.add),
            multiplier: rows.multiplier,
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: wanted rows are inside their table, or count as zeros; `out` has as many rows as are wanted.
        launched("take_rows", unsafe { ffi::kv_take_rows(&params, self.device.stream()) })
    }

    /// `out += multiplier · x`
    pub(super) fn add_rows(&self, multiplier: f32, rows: usize, x: &Tensor, out: &Tensor) -> Result<()> {
        let params = ffi::AddRows {
            x: x.ptr(),
            x_stride: x.stride as i64,
            out: out.ptr(),
            out_stride: out.stride as i64,
            rows: rows as i32,
            width: out.width as i32,
            multiplier,
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: both tensors have so many rows of that width.
        launched("add_rows", unsafe { ffi::kv_add_rows(&params, self.device.stream()) })
    }

    /// `logits = softcap(multiplier · logits)`
    pub(super) fn run_warp(&self, warp: Logits, rows: usize, logits: &Tensor) -> Result<()> {
        let params = ffi::WarpLogits {
            logits: logits.ptr(),
            stride: logits.stride as i64,
            rows: rows as i32,
            width: logits.width as i32,
            multiplier: warp.multiplier,
            softcap: warp.softcap.unwrap_or(0.0),
        };
        // SAFETY: logits are f32, and there are so many rows.
        launched("warp_logits", unsafe { ffi::kv_warp_logits(&params, self.device.stream()) })
    }
}
