//! Attention of a step's rows.

use super::{Mixed, Mode, Step};
use crate::backend::cuda::device::{Buffer, launched};
use crate::backend::cuda::{Cuda, Kv, dtype_code, ffi};
use crate::backend::{Heads, Scores};
use crate::error::{Error, Result};
use crate::model::spec::Mask;

impl Step {
    /// How the keys of rows of one token are cut among blocks, for each mask.
    pub(super) fn plan_decode(&self) -> Result<()> {
        let Some((rows, n_rows, max_rows)) = self.decode_rows() else { return Ok(()) };
        let Heads { heads, kv_heads, head_dim } = self.shape.heads;
        for (mask, plan) in &self.attention {
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
        if let Mode::Mixed(Mixed { n_tiles, at, .. }) = self.mode
            && n_tiles > 0
        {
            let params = ffi::AttendPrefill {
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
            };
            // SAFETY: the executor has checked lanes, positions and slots; tensors hold the step's tokens.
            launched("attend_prefill", unsafe { ffi::kv_attend_prefill(&params, self.device.stream()) })?;
        }
        let Some((rows, n_rows, max_rows)) = self.decode_rows() else { return Ok(()) };
        let plan = self.attention.iter().find(|(planned, _)| *planned == mask);
        let Some((_, plan)) = plan else {
            return Err(Error::Bug(format!("no plan was made for {mask:?}")));
        };
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
}

fn window(mask: Mask) -> i32 {
    match mask {
        Mask::Causal => 0,
        Mask::Window { window } => i32::try_from(window).unwrap_or(0),
    }
}
