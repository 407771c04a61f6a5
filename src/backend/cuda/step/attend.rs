//! Attention of a step's rows.

use super::{Mixed, Mode, Step};
use crate::backend::cuda::device::{Buffer, launched};
use crate::backend::cuda::latent::{self, AttendLatent, PlanLatent};
use crate::backend::cuda::tensor::Tensor;
use crate::backend::cuda::{Cuda, Kv, dtype_code, ffi};
use crate::backend::{Heads, Scores};
use crate::error::{Error, Result};
use crate::model::spec::{LatentAttention, Mask};

/// Widest heads of [`Step::attend`]: what is wider is a cached latent as one KV head.
pub(super) const MAX_HEAD_DIM: usize = 256;

impl Step {
    /// How the keys of rows of one token are cut among blocks, for each mask.
    pub(super) fn plan_decode(&self) -> Result<()> {
        let Some((rows, n_rows, max_rows)) = self.decode_rows() else { return Ok(()) };
        let Heads { heads, kv_heads, head_dim } = self.shape.heads;
        for (mask, plan) in &self.attention {
            if head_dim > MAX_HEAD_DIM {
                let params = PlanLatent {
                    rows,
                    n_rows,
                    max_rows: max_rows as i32,
                    window: window(*mask),
                    heads: heads as i32,
                    row_width: head_dim as i32,
                    plan: plan.ptr(),
                };
                // SAFETY: the arrays are sized for the largest step.
                launched("plan_latent", unsafe { latent::kv_plan_latent(&params, self.device.stream()) })?;
                continue;
            }
            let params = ffi::PlanDecode {
                rows,
                n_rows,
                max_rows: max_rows as i32,
                window: window(*mask),
                heads: heads as i32,
                kv_heads: kv_heads as i32,
                head_dim: head_dim as i32,
                plan: plan.ptr(),
            };
            // SAFETY: the arrays are sized for the largest step.
            launched("plan_decode", unsafe { ffi::kv_plan_decode(&params, self.device.stream()) })?;
        }
        Ok(())
    }

    /// Attention of every row.
    pub fn attend(
        &self,
        scores: &Scores<'_, Cuda>,
        q: (*const u8, usize),
        kv: &Kv,
        out: (*mut u8, usize),
    ) -> Result<()> {
        let Scores { scale, softcap, mask, slopes, sinks } = *scores;
        let Heads { heads, kv_heads, head_dim } = self.shape.heads;
        let cache = ffi::Cache {
            keys: kv.keys.ptr(),
            values: kv.values.ptr(),
            slots: self.lanes.slots.ptr(),
            slots_stride: self.shape.max_positions as i64,
        };
        let numbers = |vector: Option<&Buffer>| vector.map_or(std::ptr::null(), |vector| vector.ptr::<f32>());
        let scores = ffi::Scores {
            scale,
            softcap: softcap.unwrap_or(0.0),
            window: window(mask),
            alibi: numbers(slopes),
            sinks: numbers(sinks),
        };
        if let Some(params) = self.prefill(q, out, cache, scores) {
            // SAFETY: the executor has checked lanes, positions and slots; tensors hold the step's tokens.
            launched("attend_prefill", unsafe { ffi::kv_attend_prefill(&params, self.device.stream()) })?;
        }
        let Some((rows, n_rows, max_rows)) = self.decode_rows() else { return Ok(()) };
        let plan = self.plan(mask)?;
        let params = ffi::AttendDecode {
            q: q.0.cast(),
            q_stride: q.1 as i64,
            out: out.0.cast(),
            out_stride: out.1 as i64,
            cache,
            scores,
            rows,
            n_rows,
            max_rows: max_rows as i32,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            head_dim: head_dim as i32,
            plan: plan.ptr(),
            workspace: self.attend_workspace.ptr(),
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: as above.
        launched("attend_decode", unsafe { ffi::kv_attend_decode(&params, self.device.stream()) })
    }

    /// Attention of every row over cached latents.
    pub fn attend_latent(
        &self,
        attention: &LatentAttention,
        mask: Mask,
        absorbed: &Tensor,
        kv: &Kv,
        out: &Tensor,
    ) -> Result<()> {
        let LatentAttention { heads, kv_rank, rope_dim, scale, .. } = *attention;
        let slots_stride = self.shape.max_positions as i64;
        let cache = ffi::Cache {
            keys: kv.keys.ptr(),
            values: std::ptr::null(),
            slots: self.lanes.slots.ptr(),
            slots_stride,
        };
        let scores = ffi::Scores {
            scale,
            softcap: 0.0,
            window: window(mask),
            alibi: std::ptr::null(),
            sinks: std::ptr::null(),
        };
        let q = (absorbed.ptr::<u8>().cast_const(), absorbed.stride);
        if let Some(params) = self.prefill(q, (out.ptr(), out.stride), cache, scores) {
            let stream = self.device.stream();
            // SAFETY: the executor has checked lanes, positions and slots; tensors hold the step's tokens.
            let status = unsafe { latent::kv_attend_latent_prefill(&params, kv_rank as i32, stream) };
            launched("attend_latent_prefill", status)?;
        }
        let Some((rows, n_rows, max_rows)) = self.decode_rows() else { return Ok(()) };
        let params = AttendLatent {
            q: absorbed.ptr(),
            q_stride: absorbed.stride as i64,
            out: out.ptr(),
            out_stride: out.stride as i64,
            cache: kv.keys.ptr(),
            slots: self.lanes.slots.ptr(),
            slots_stride,
            rows,
            n_rows,
            max_rows: max_rows as i32,
            heads: heads as i32,
            kv_rank: kv_rank as i32,
            rope_dim: rope_dim as i32,
            window: window(mask),
            scale,
            only_last_is_new: 1,
            plan: self.plan(mask)?.ptr(),
            workspace: self.attend_workspace.ptr(),
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: as above.
        launched("attend_latent", unsafe { latent::kv_attend_latent(&params, self.device.stream()) })
    }

    /// How the keys under a mask are cut.
    fn plan(&self, mask: Mask) -> Result<&Buffer> {
        let plan = self.attention.iter().find(|(planned, _)| *planned == mask);
        let (_, plan) = plan.ok_or_else(|| Error::Bug(format!("no plan was made for {mask:?}")))?;
        Ok(plan)
    }

    /// Attention of rows of more than one token, where there are any.
    fn prefill(
        &self,
        q: (*const u8, usize),
        out: (*mut u8, usize),
        cache: ffi::Cache,
        scores: ffi::Scores,
    ) -> Option<ffi::AttendPrefill> {
        let Mode::Mixed(Mixed { n_tiles: n_tiles @ 1.., at, .. }) = self.mode else { return None };
        let Heads { heads, kv_heads, head_dim } = self.shape.heads;
        Some(ffi::AttendPrefill {
            q: q.0.cast(),
            q_stride: q.1 as i64,
            out: out.0.cast(),
            out_stride: out.1 as i64,
            cache,
            scores,
            rows: self.staged(at.prefill_rows),
            tiles: self.staged(at.tiles),
            n_tiles: n_tiles as i32,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            head_dim: head_dim as i32,
            dtype: dtype_code(self.dtype),
        })
    }
}

fn window(mask: Mask) -> i32 {
    match mask {
        Mask::Causal => 0,
        Mask::Window { window } => i32::try_from(window).unwrap_or(0),
    }
}
