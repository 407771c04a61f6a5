//! Batches between calls.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Batch;
use crate::ids::BatchId;

/// Cached batches by handle. A batch is in the store or in a call's step, never both.
#[derive(Default)]
pub struct Store {
    batches: BTreeMap<BatchId, Stored>,
}

struct Stored {
    batch: Batch,
    asked: Instant,
}

/// A batch that was dropped unasked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dropped {
    /// Its handle.
    pub id: BatchId,
    /// Requests it held.
    pub n_requests: usize,
}

impl Store {
    /// Puts a batch in, asked for at `now`. A batch of the same handle is replaced.
    pub fn insert(&mut self, batch: Batch, now: Instant) {
        self.batches.insert(batch.id(), Stored { batch, asked: now });
    }

    /// Takes a batch out.
    pub fn take(&mut self, id: BatchId) -> Option<Batch> {
        self.batches.remove(&id).map(|stored| stored.batch)
    }

    /// A batch, if it is here.
    pub fn get(&self, id: BatchId) -> Option<&Batch> {
        self.batches.get(&id).map(|stored| &stored.batch)
    }

    /// A batch, if it is here.
    pub fn get_mut(&mut self, id: BatchId) -> Option<&mut Batch> {
        self.batches.get_mut(&id).map(|stored| &mut stored.batch)
    }

    /// Drops a batch, if it is here.
    pub fn remove(&mut self, id: BatchId) {
        self.batches.remove(&id);
    }

    /// Drops every batch.
    pub fn clear(&mut self) {
        self.batches.clear();
    }

    /// Every batch, by handle.
    pub fn batches(&self) -> impl Iterator<Item = &Batch> {
        self.batches.values().map(|stored| &stored.batch)
    }

    /// Drops batches on own slots that nobody asked for in `idle`.
    pub fn drop_abandoned(&mut self, now: Instant, idle: Duration) -> Vec<Dropped> {
        std::iter::from_fn(|| self.drop_idlest(now, idle, Batch::is_own)).collect()
    }

    /// Drops the batch that was asked for longest ago, of those that `may_go`, if that is at least `idle`.
    pub fn drop_idlest(
        &mut self,
        now: Instant,
        idle: Duration,
        may_go: impl Fn(&Batch) -> bool,
    ) -> Option<Dropped> {
        let candidates = self.batches.iter().filter(|(_, stored)| may_go(&stored.batch));
        let (&id, stored) = candidates.min_by_key(|(_, stored)| stored.asked)?;
        if now.saturating_duration_since(stored.asked) < idle {
            return None;
        }
        let removed = self.batches.remove(&id)?;
        Some(Dropped { id, n_requests: removed.batch.requests().len() })
    }
}
