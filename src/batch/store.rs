//! Batches between calls.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Batch;
use crate::ids::{BatchId, Protocol};

/// Cached batches by handle. A batch is in the store or in a step, never both.
#[derive(Default)]
pub struct Store {
    batches: BTreeMap<BatchId, Stored>,
}

struct Stored {
    batch: Batch,
    /// Whether the shard placed some of its requests: nobody else frees their slots if the caller is gone.
    is_own: bool,
    asked: Instant,
}

impl Store {
    /// Puts a batch in, asked for at `now`. A batch of the same handle is replaced.
    pub fn insert(&mut self, batch: Batch, is_own: bool, now: Instant) {
        self.batches.insert(batch.id(), Stored { batch, is_own, asked: now });
    }

    /// Takes a batch out, with whether it is on the shard's own slots.
    pub fn take(&mut self, id: BatchId) -> Option<(Batch, bool)> {
        self.batches.remove(&id).map(|stored| (stored.batch, stored.is_own))
    }

    /// Whether the batch is here.
    pub fn contains(&self, id: BatchId) -> bool {
        self.batches.contains_key(&id)
    }

    /// Drops a batch, if it is here.
    pub fn remove(&mut self, id: BatchId) {
        self.batches.remove(&id);
    }

    /// Drops every batch.
    pub fn clear(&mut self) {
        self.batches.clear();
    }

    /// Drops the batches of one protocol.
    pub fn clear_protocol(&mut self, protocol: Protocol) {
        self.batches.retain(|id, _| id.protocol != protocol);
    }

    /// Every batch, by handle.
    pub fn batches(&self) -> impl Iterator<Item = &Batch> {
        self.batches.values().map(|stored| &stored.batch)
    }

    /// Drops batches on own slots that nobody asked for in `idle`; their handles and sizes.
    pub fn drop_abandoned(&mut self, now: Instant, idle: Duration) -> Vec<(BatchId, usize)> {
        let abandoned: Vec<BatchId> = (self.batches.iter())
            .filter(|(_, stored)| stored.is_own && now.saturating_duration_since(stored.asked) >= idle)
            .map(|(id, _)| *id)
            .collect();
        let removed =
            abandoned.into_iter().filter_map(|id| self.batches.remove(&id).map(|stored| (id, stored)));
        removed.map(|(id, stored)| (id, stored.batch.requests().len())).collect()
    }

    /// Drops the batch on own slots that was asked for longest ago, if that is at least `idle`.
    pub fn drop_idlest(&mut self, now: Instant, idle: Duration) -> Option<(BatchId, usize)> {
        let (&id, stored) =
            self.batches.iter().filter(|(_, stored)| stored.is_own).min_by_key(|(_, stored)| stored.asked)?;
        if now.saturating_duration_since(stored.asked) < idle {
            return None;
        }
        let removed = self.batches.remove(&id)?;
        Some((id, removed.batch.requests().len()))
    }
}
