//! Norms on the GPU.

use std::ffi::c_void;

use super::device::{Buffer, launched};
use super::tensor::Tensor;
use super::{Cuda, dtype_code, ffi};
use crate::error::{Error, Result};
use crate::model::spec::Norm;
use crate::model::weights::TensorPart;

/// A norm with its weight.
pub struct NormWeight {
    /// Which norm.
    pub kind: Norm,
    weight: Buffer,
    bias: Option<Buffer>,
    /// Numbers that it is over.
    pub width: usize,
    /// Heads with a weight of their own; 1 where all share one.
    n_heads: usize,
}

impl NormWeight {
    fn bias_ptr(&self) -> *const c_void {
        self.bias.as_ref().map_or(std::ptr::null(), |bias| bias.ptr())
    }

    /// As the norm of each head.
    pub fn of_heads(&self) -> ffi::HeadNorm {
        let head_stride = if self.n_heads > 1 { self.width as i32 } else { 0 };
        ffi::HeadNorm { weight: self.weight.ptr(), head_stride }
    }
}

/// The kind as the kernels know it, and what is added to the variance.
pub fn kind_code(kind: Norm) -> (i32, f32) {
    match kind {
        Norm::Rms { eps } => (ffi::KV_RMS, eps),
        Norm::RmsOnePlus { eps } => (ffi::KV_RMS_ONE_PLUS, eps),
        Norm::Layer { eps, .. } => (ffi::KV_LAYER, eps),
    }
}

impl Cuda {
    /// Takes a norm's `[width]` or `[heads, width]` numbers to the device.
    pub(super) fn new_norm(
        &self,
        kind: Norm,
        weight: &TensorPart,
        bias: Option<&TensorPart>,
    ) -> Result<NormWeight> {
        let shape = |part: &TensorPart| (part.rows.len(), part.columns.len());
        if let Some(bias) = bias.filter(|bias| shape(bias) != shape(weight)) {
            let text = format!("a norm's bias of {:?} for a weight of {:?}", shape(bias), shape(weight));
            return Err(Error::Checkpoint(text));
        }
        let (n_heads, width) = match shape(weight) {
            (width, 1) => (1, width),
            heads => heads,
        };
        let uploader = self.uploader()?;
        let (weight, bias) = (uploader.vector(weight)?, bias.map(|bias| uploader.vector(bias)).transpose()?);
        Ok(NormWeight { kind, weight, bias, width, n_heads })
    }

    /// `out = norm(x)`, or `out += norm(x)`.
    pub(super) fn run_norm(
        &self,
        norm: &NormWeight,
        rows: usize,
        x: &Tensor,
        out: &Tensor,
        add: bool,
    ) -> Result<()> {
        let (kind, eps) = kind_code(norm.kind);
        let params = ffi::NormRows {
            x: x.ptr(),
            x_stride: x.stride as i64,
            weight: norm.weight.ptr(),
            bias: norm.bias_ptr(),
            out: out.ptr(),
            out_stride: out.stride as i64,
            rows: rows as i32,
            width: norm.width as i32,
            eps,
            kind,
            add: i32::from(add),
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: both tensors have so many rows of the norm's width.
        launched("norm", unsafe { ffi::kv_norm(&params, self.device.stream()) })
    }
}
