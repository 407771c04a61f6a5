//! The one thread that owns pool, batches and executor.
//!
//! A step takes its batches out of the store, runs, and puts the result back; a failure drops them, and dropping
//! returns their slots and lanes. The next step may be under way before it is asked for.

mod admit;
mod call;
mod pulse;
mod run;
mod run_ahead;
mod thread;
mod warmup;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::batch::{Batch, Budget, CachedBatch, Lanes, Request, Store};
use crate::config::own_slots_of;
use crate::error::{Error, Result};
use crate::ids::{BatchId, Protocol, RequestId};
use crate::model::executor::Executor;
use crate::pool::Pool;
use crate::text::Tokenizer;
use run_ahead::Unasked;

pub use call::{
    Arrival, Capacity, EngineStats, Placement, PrefillCall, Prepared, StepAnswer, Timings, WarmupCall,
};
pub use pulse::{Condition, Pulse};
pub use thread::EngineHandle;

/// What the engine is configured with.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Slots kept for requests that the shard places itself, if not as [`own_slots_of`] has it; the router is told of the
    /// rest.
    pub own_slots: Option<u32>,
    /// Prompt tokens in one step before a Warmup says otherwise.
    pub max_prefill_tokens: u32,
    /// The model's end-of-text ids.
    pub eos: Arc<[u32]>,
    /// A batch on own slots that nobody asked for in this time is dropped.
    pub abandoned_after: Duration,
    /// When own slots run short, the batch on them that nobody asked for longest goes, after this time at least.
    pub reclaimable_after: Duration,
    /// Whether a batch's next decode is submitted before it is asked for.
    pub run_ahead: bool,
}

/// Whether an engine can run a model of these sizes; asked before it is loaded. `n_lanes` counts a probe's.
///
/// # Errors
/// [`Error::Precondition`] with the numbers.
pub fn check_sizes(n_slots: u32, own_slots: u32, n_lanes: u32, max_step_tokens: u32) -> Result<()> {
    Pool::check_sizes(n_slots, own_slots)?;
    if n_lanes < 2 || max_step_tokens < n_lanes {
        return Err(Error::Precondition(format!(
            "{n_lanes} lanes, a probe's among them, and steps of {max_step_tokens} tokens: at least 2 lanes are \
             needed, and a token of a step for each"
        )));
    }
    Ok(())
}

/// The engine's state, on its thread.
struct Engine {
    config: EngineConfig,
    tokenizer: Arc<Tokenizer>,
    pulse: Arc<Pulse>,
    executor: Box<dyn Executor>,
    pool: Pool,
    lanes: Lanes,
    store: Store,
    budget: Budget,
    /// The step that was submitted before it was asked for, while it is under way.
    unasked: Option<Unasked>,
    /// Shared with the handles, which read limits without asking.
    capacity: Arc<Mutex<Capacity>>,
    /// What happened that no answer has carried yet.
    notices: Vec<String>,
}

impl Engine {
    fn new(
        config: EngineConfig,
        tokenizer: Arc<Tokenizer>,
        pulse: Arc<Pulse>,
        executor: Box<dyn Executor>,
    ) -> Result<Engine> {
        let info = executor.info();
        let own_slots = own_slots_of(config.own_slots, info.n_slots);
        check_sizes(info.n_slots, own_slots, info.n_lanes, info.max_step_tokens)?;
        let pool = Pool::new(info.n_slots, own_slots)?;
        let max_total_tokens = info.max_positions.min(pool.n_router_slots());
        let capacity = Capacity {
            max_supported_total_tokens: pool.n_router_slots(),
            max_input_tokens: max_total_tokens.saturating_sub(1),
            max_total_tokens,
        };
        Ok(Engine {
            lanes: Lanes::new(info.n_lanes),
            budget: Budget {
                max_prefill_tokens: config.max_prefill_tokens as usize,
                max_step_tokens: info.max_step_tokens as usize,
            },
            pool,
            store: Store::default(),
            unasked: None,
            capacity: Arc::new(Mutex::new(capacity)),
            notices: Vec::new(),
            config,
            tokenizer,
            pulse,
            executor,
        })
    }

    fn capacity(&self) -> Capacity {
        *self.capacity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the listed requests. A batch that keeps none is dropped.
    fn filter(&mut self, id: BatchId, keep: &[RequestId]) -> Result<CachedBatch> {
        if keep.is_empty() {
            return Err(Error::Invalid(format!("no request of batch {id} is to be kept; clear it instead")));
        }
        let mut batch = self.store.take(id).ok_or_else(|| unknown(id))?;
        batch.filter(keep);
        let description = batch.describe(&self.pool, self.budget);
        if !batch.requests().is_empty() {
            self.store.insert(batch, Instant::now());
        }
        Ok(description)
    }

    /// Drops one batch, or all of both protocols: then the router that knew of them is gone, with its prefix cache.
    fn clear(&mut self, protocol: Protocol, number: Option<u64>) {
        match number {
            Some(number) => self.store.remove(BatchId { protocol, number }),
            None => {
                self.store.clear();
                self.pool.reset();
            }
        }
    }

    fn drop_abandoned(&mut self) {
        let idle = self.config.abandoned_after;
        for dropped in self.store.drop_abandoned(Instant::now(), idle) {
            self.tell_dropped(dropped, "it is on own slots", idle);
        }
    }

    /// Checks pool and lanes against what the stored batches hold. Between calls nothing else holds any, not even a
    /// step that runs unasked.
    fn check_integrity(&self) -> Result<EngineStats> {
        self.check_unasked()?;
        let batches = || self.store.batches();
        let n_holdings = batches().flat_map(Batch::leases).map(|lease| lease.slots().len()).sum();
        self.pool.check_integrity(n_holdings)?;
        let n_lanes = batches().flat_map(Batch::requests).filter(|request| request.has_lane()).count();
        self.lanes.check_integrity(n_lanes)?;
        let n_requests: usize = batches().map(|batch| batch.requests().len()).sum();
        Ok(EngineStats {
            n_slots: self.pool.n_slots(),
            n_leased: self.pool.n_leased(),
            n_lanes_taken: self.lanes.n_taken(),
            n_batches: batches().count() as u32,
            n_requests: n_requests as u32,
            n_live: batches().flat_map(Batch::requests).filter(|request| !Request::has_ended(request)).count()
                as u32,
        })
    }
}

fn unknown(id: BatchId) -> Error {
    Error::UnknownBatch(format!("batch {id} is not here"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_cannot_work_are_refused_before_anything_is_loaded() {
        assert_eq!(check_sizes(4096, 1024, 65, 4161), Ok(()));
        assert_eq!(check_sizes(4, 2, 2, 2), Ok(()));
        for (n_slots, own_slots, n_lanes, max_step_tokens) in [
            (1, 0, 65, 4161),
            (100, 100, 65, 100),
            (100, 99, 65, 100),
            (4096, 0, 65, 100),
            (100, 50, 1, 10),
            (100, 50, 65, 64),
        ] {
            let refused = check_sizes(n_slots, own_slots, n_lanes, max_step_tokens);
            assert!(matches!(refused, Err(Error::Precondition(_))), "{refused:?}");
        }
    }
}
