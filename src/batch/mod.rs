//! Batches of requests: built, planned into steps, advanced by their outcome, merged, filtered.

mod ahead;
mod answer;
mod lanes;
mod plan;
mod request;
mod store;

pub use answer::{CachedBatch, GeneratedText, Generation, Tokens};
pub use lanes::{Claimant, LaneLease, Lanes};
pub use plan::{Budget, Pass, Plan, SampledRows};
pub use request::{NewRequest, Request};
pub use store::{Dropped, Store};

use std::cell::Cell;
use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::ids::{BatchId, RequestId};
use crate::pool::{Lease, Pool};
use crate::text::Tokenizer;

/// Requests that step together, in the router's order, each id once. Ended ones stay listed until they are filtered out.
pub struct Batch {
    id: BatchId,
    requests: Vec<Request>,
    /// Distinct slots under the requests' leases, while no lease has come or gone since they were counted.
    n_slots: Cell<Option<u32>>,
}

impl Batch {
    /// A batch of new requests.
    pub fn new(id: BatchId, requests: Vec<Request>) -> Batch {
        Batch { id, requests, n_slots: Cell::new(None) }
    }

    /// The router's handle.
    pub fn id(&self) -> BatchId {
        self.id
    }

    /// Every request, ended ones included.
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// Whether every request has ended.
    pub fn has_ended(&self) -> bool {
        self.requests.iter().all(Request::has_ended)
    }

    /// Whether the shard placed some of its live requests: nobody else frees their slots if the caller is gone.
    pub fn is_own(&self) -> bool {
        self.requests.iter().any(|request| request.is_own() && !request.has_ended())
    }

    /// Whether a live request has no place on the device yet.
    pub fn waits_for_a_lane(&self) -> bool {
        self.requests.iter().any(|request| !request.has_ended() && !request.has_lane())
    }

    /// Leases of the live requests.
    pub fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.requests.iter().filter_map(Request::lease)
    }

    /// Appends another batch's requests; the id stays.
    pub fn append(&mut self, mut newer: Batch) {
        self.requests.append(&mut newer.requests);
        self.n_slots.set(None);
    }

    /// Keeps the listed requests, in the list's order; ids that it does not hold are ignored.
    pub fn filter(&mut self, keep: &[RequestId]) {
        let mut by_id: BTreeMap<RequestId, Request> =
            self.requests.drain(..).map(|request| (request.id(), request)).collect();
        self.requests.extend(keep.iter().filter_map(|id| by_id.remove(id)));
        self.n_slots.set(None);
    }

    /// Gives sampled tokens to their requests, in batch order; the news for the router. `eos` stands in for the
    /// token of a request whose logits were no numbers.
    pub fn accept(&mut self, sampled: SampledRows, tokenizer: &Tokenizer, eos: u32) -> Vec<Generation> {
        let generations: Vec<Generation> = sampled
            .into_iter()
            .map(|(index, token)| self.requests[index].accept(token, tokenizer, eos))
            .collect();
        if generations.iter().any(|generation| generation.generated_text.is_some()) {
            self.n_slots.set(None);
        }
        generations
    }

    /// What the router is told of the batch.
    pub fn describe(&self, pool: &Pool, budget: Budget) -> CachedBatch {
        let n_slots = self.n_slots.get().unwrap_or_else(|| pool.n_distinct(self.leases()));
        self.n_slots.set(Some(n_slots));
        CachedBatch {
            id: self.id,
            request_ids: self.requests.iter().map(Request::id).collect(),
            max_tokens: n_slots,
            current_tokens: self.current_tokens(budget),
        }
    }
}

/// Concatenates batches in this order; the result keeps the first one's id.
///
/// # Errors
/// [`Error::Invalid`] for no batch at all.
pub fn concatenate(batches: Vec<Batch>) -> Result<Batch> {
    let mut batches = batches.into_iter();
    let mut first = batches.next().ok_or_else(|| Error::Invalid("no batch is named".into()))?;
    batches.for_each(|batch| first.append(batch));
    Ok(first)
}
