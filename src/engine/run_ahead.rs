//! Run-ahead: once a step's tokens are known, the next one for the same batch is submitted, before the answer is
//! detokenised, sent, routed and asked for again; meanwhile the device is not idle.
//!
//! Nothing depends on it. Steps run in the order in which they are submitted, so the slots and the lane of a request
//! that turns out to have ended may be given to another at once: whatever that one writes comes later. Positions that
//! the step writes are marked as being written before it is submitted, and believed only once its outcome is taken by
//! the request that still holds them.
//!
//! At most one step runs unasked. A failure of it is kept, and told by the call that asks for the batch. The pulse
//! counts its time only while a call waits for it: a step that hangs is found when it, or any later one, is asked for,
//! and an engine that nobody asks is idle.

use super::Engine;
use crate::batch::{Batch, SampledRows};
use crate::error::{Error, Result};
use crate::ids::BatchId;

/// The step under way that nobody has asked for.
pub(super) struct Unasked {
    /// Whose next step it is; the batch may be gone.
    batch: BatchId,
    n_rows: usize,
}

impl Engine {
    /// Submits the next step of a batch whose last one sampled `sampled`, where that is a decode.
    pub(super) fn run_ahead(&mut self, batch: &mut Batch, sampled: &SampledRows) {
        if !self.config.run_ahead || self.unasked.is_some() {
            return;
        }
        let Some(input) = batch.plan_ahead(sampled, &self.pool) else { return };
        let n_rows = input.rows.len();
        match self.submit(input) {
            Ok(()) => self.unasked = Some(Unasked { batch: batch.id(), n_rows }),
            // The call that asks submits it again, and tells why that fails.
            Err(_) => batch.forget_ahead(),
        }
    }

    /// Waits for the unasked step, if there is one. Its outcome is kept in the batch in hand or the stored one, whichever
    /// it is of.
    pub(super) fn collect_unasked(&mut self, in_hand: &mut Batch) {
        let Some(Unasked { batch, n_rows }) = self.unasked.take() else { return };
        let outcome = self.wait().and_then(|output| match output.sampled.len() {
            n if n == n_rows => Ok(output),
            n => Err(Error::Bug(format!("a step returned {n} tokens, asked for {n_rows}"))),
        });
        in_hand.keep_ahead(&outcome);
        if let Some(stored) = self.store.get_mut(batch) {
            stored.keep_ahead(&outcome);
        }
    }

    /// Checks that no request waits for a step that is not under way.
    pub(super) fn check_unasked(&self) -> Result<()> {
        let under_way = self.unasked.as_ref().map(|unasked| unasked.batch);
        match self.store.batches().find(|batch| batch.is_ahead() && under_way != Some(batch.id())) {
            Some(batch) => {
                Err(Error::Bug(format!("batch {} waits for a step that does not run", batch.id())))
            }
            None => Ok(()),
        }
    }
}
