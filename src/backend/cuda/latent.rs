//! Latent attention on the GPU: `kernels/latent.h`, line by line, and what it is called with.

use std::ffi::{c_int, c_void};

use cudarc::driver::sys::CUstream;

use super::device::{Buffer, launched};
use super::ffi::{AttendPrefill, DecodeRow};
use super::norm::{NormWeight, kind_code};
use super::step::Step;
use super::tensor::Tensor;
use super::{Cuda, Kv, dtype_code};
use crate::backend::LinearPart;
use crate::error::{Error, Result};
use crate::model::spec::{LatentAttention, Norm};
use crate::model::weights::TensorPart;

#[repr(C)]
struct StoreLatent {
    queries: *const c_void,
    queries_stride: i64,
    absorbed: *mut c_void,
    absorbed_stride: i64,
    latents: *const c_void,
    latents_stride: i64,
    norm_weight: *const c_void,
    eps: f32,
    angles: *const f32,
    stores: *const i32,
    cache: *mut c_void,
    tokens: i32,
    heads: i32,
    nope_dim: i32,
    rope_dim: i32,
    kv_rank: i32,
    dtype: i32,
}

#[repr(C)]
pub struct AttendLatent {
    pub q: *const c_void,
    pub q_stride: i64,
    pub out: *mut c_void,
    pub out_stride: i64,
    pub cache: *const c_void,
    pub slots: *const u32,
    pub slots_stride: i64,
    pub rows: *const DecodeRow,
    pub n_rows: *const i32,
    pub max_rows: i32,
    pub heads: i32,
    pub kv_rank: i32,
    pub rope_dim: i32,
    pub window: i32,
    pub scale: f32,
    pub only_last_is_new: i32,
    pub plan: *const i32,
    pub workspace: *mut c_void,
    pub dtype: i32,
}

#[repr(C)]
pub struct PlanLatent {
    pub rows: *const DecodeRow,
    pub n_rows: *const i32,
    pub max_rows: i32,
    pub window: i32,
    pub heads: i32,
    pub row_width: i32,
    pub plan: *mut i32,
}

#[repr(C)]
struct LinearHeads {
    weight: *const c_void,
    x: *const c_void,
    x_stride: i64,
    x_head_stride: i64,
    out: *mut c_void,
    out_stride: i64,
    out_head_stride: i64,
    rows: i32,
    heads: i32,
    outputs: i32,
    inputs: i32,
    dtype: i32,
}

unsafe extern "C" {
    fn kv_store_latent(params: *const StoreLatent, stream: CUstream) -> c_int;
    fn kv_linear_heads(params: *const LinearHeads, stream: CUstream) -> c_int;
    pub fn kv_attend_latent_workspace_bytes(max_rows: i32, heads: i32, row_width: i32) -> i64;
    pub fn kv_plan_latent(params: *const PlanLatent, stream: CUstream) -> c_int;
    pub fn kv_attend_latent(params: *const AttendLatent, stream: CUstream) -> c_int;
    pub fn kv_attend_latent_prefill(params: *const AttendPrefill, kv_rank: i32, stream: CUstream) -> c_int;
}

/// A linear layer for each head.
pub struct HeadWeight {
    /// `[heads, outputs, padded inputs]`.
    numbers: Buffer,
    heads: usize,
    outputs: usize,
    inputs: usize,
}

/// Whether the kernels serve such attention.
///
/// # Errors
/// [`Error::Unsupported`] with a sentence.
pub fn supports(attention: &LatentAttention) -> Result<()> {
    let LatentAttention { kv_rank, rope_dim, norm, .. } = *attention;
    if !matches!(norm, Norm::Rms { .. }) {
        return Err(Error::Unsupported(format!("a latent's norm of another kind than RMS: {norm:?}")));
    }
    // What a block of threads has shared memory for.
    const MOST: usize = 8192;
    if kv_rank + rope_dim > MOST {
        let width = kv_rank + rope_dim;
        return Err(Error::Unsupported(format!("a latent of {width} numbers: the GPU takes {MOST} at most")));
    }
    Ok(())
}

impl Cuda {
    /// Takes a linear layer for each head to the device.
    pub(super) fn new_head_weight(&self, heads: &[TensorPart]) -> Result<HeadWeight> {
        let outputs = heads.first().map_or(0, |head| head.rows.len());
        if let Some(other) = heads.iter().find(|head| head.rows.len() != outputs) {
            let text = format!("heads of {outputs} and {} rows in one layer", other.rows.len());
            return Err(Error::Checkpoint(text));
        }
        let parts: Vec<_> =
            heads.iter().map(|head| LinearPart { weight: head.clone(), bias: None }).collect();
        let weight = self.uploader()?.weight(&parts, 1.0)?;
        Ok(HeadWeight { heads: heads.len(), outputs, inputs: weight.inputs, numbers: weight.numbers })
    }

    /// Each head's product; see [`crate::backend::Backend::linear_heads`].
    pub(super) fn run_linear_heads(
        &self,
        weight: &HeadWeight,
        rows: usize,
        x: &Tensor,
        out: &Tensor,
    ) -> Result<()> {
        let HeadWeight { heads, outputs, inputs, .. } = *weight;
        let params = LinearHeads {
            weight: weight.numbers.ptr(),
            x: x.ptr(),
            x_stride: x.stride as i64,
            x_head_stride: (x.width / heads.max(1)) as i64,
            out: out.ptr(),
            out_stride: out.stride as i64,
            out_head_stride: (out.width / heads.max(1)) as i64,
            rows: rows as i32,
            heads: heads as i32,
            outputs: outputs as i32,
            inputs: inputs as i32,
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: tensors have so many rows of all heads; see `Tensor`.
        launched("linear_heads", unsafe { kv_linear_heads(&params, self.device.stream()) })
    }

    /// Turns, norms and stores; see [`crate::backend::Backend::store_latent`].
    #[allow(clippy::too_many_arguments)]
    pub(super) fn run_store_latent(
        &self,
        attention: &LatentAttention,
        norm: &NormWeight,
        step: &Step,
        queries: &Tensor,
        absorbed: &Tensor,
        latents: &Tensor,
        kv: &Kv,
    ) -> Result<()> {
        // A decoder with latents has one rotary embedding.
        let (angles, half) = step.angles(0)?;
        let LatentAttention { heads, nope_dim, rope_dim, kv_rank, .. } = *attention;
        if (2 * half, norm.width) != (rope_dim, kv_rank) {
            let text =
                format!("{half} angles and a norm of {} for a latent of {kv_rank}+{rope_dim}", norm.width);
            return Err(Error::Bug(text));
        }
        let params = StoreLatent {
            queries: queries.ptr(),
            queries_stride: queries.stride as i64,
            absorbed: absorbed.ptr(),
            absorbed_stride: absorbed.stride as i64,
            latents: latents.ptr(),
            latents_stride: latents.stride as i64,
            norm_weight: norm.of_heads().weight,
            eps: kind_code(norm.kind).1,
            angles,
            stores: step.stores(),
            cache: kv.keys.ptr(),
            tokens: step.n_tokens() as i32,
            heads: heads as i32,
            nope_dim: nope_dim as i32,
            rope_dim: rope_dim as i32,
            kv_rank: kv_rank as i32,
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: the executor has checked the slots; tensors have a row for every token.
        launched("store_latent", unsafe { kv_store_latent(&params, self.device.stream()) })
    }
}
