//! The engine's thread: commands, loop, handle.

use std::sync::Arc;
use std::time::Duration;

use super::call::{Capacity, EngineStats, PrefillCall, StepAnswer, WarmupCall};
use super::pulse::Pulse;
use crate::batch::CachedBatch;
use crate::error::Result;
use crate::ids::{BatchId, Protocol, RequestId};
use crate::model::executor::{Executor, ModelInfo};
use crate::text::Tokenizer;

/// What the engine is configured with.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Slots kept for requests that the shard places itself; the router is told of the rest.
    pub own_slots: u32,
    /// Prompt tokens in one step before a Warmup says otherwise.
    pub max_prefill_tokens: u32,
    /// A batch on own slots that nobody asked for in this time is dropped.
    pub abandoned_after: Duration,
}

/// The way to the engine; cheap to clone. Calls are served one after the other, in order of arrival.
#[derive(Clone)]
pub struct EngineHandle {}

impl EngineHandle {
    /// Starts the thread, which builds its executor there; returns when the model is loaded.
    ///
    /// # Errors
    /// What `build` returned, or [`crate::error::Error::Bug`] if it panicked.
    pub fn start(
        _config: EngineConfig,
        _tokenizer: Arc<Tokenizer>,
        _build: impl FnOnce() -> Result<Box<dyn Executor>> + Send + 'static,
    ) -> Result<EngineHandle> {
        todo!()
    }

    /// The model.
    pub fn model(&self) -> &ModelInfo {
        todo!()
    }

    /// The limits of the last Warmup, or those before one: longest prompt, longest prompt and output.
    pub fn capacity(&self) -> Capacity {
        todo!()
    }

    /// How the engine is, without asking it.
    pub fn pulse(&self) -> &Arc<Pulse> {
        todo!()
    }

    /// Sizes everything and drops every batch.
    pub async fn warmup(&self, _call: WarmupCall) -> Result<Capacity> {
        todo!()
    }

    /// Starts requests.
    pub async fn prefill(&self, _call: PrefillCall) -> Result<StepAnswer> {
        todo!()
    }

    /// Runs the next step of batches, concatenated in this order.
    pub async fn decode(&self, _batches: Vec<BatchId>) -> Result<StepAnswer> {
        todo!()
    }

    /// Keeps the listed requests of a batch, in this order.
    pub async fn filter(&self, _batch: BatchId, _keep: Vec<RequestId>) -> Result<CachedBatch> {
        todo!()
    }

    /// Drops a batch; unknown ones are no error. `None`: every batch of every protocol.
    pub async fn clear(&self, _protocol: Protocol, _number: Option<u64>) -> Result<()> {
        todo!()
    }

    /// Checks pool and lanes (free + held = total) and tells what is held.
    ///
    /// # Errors
    /// [`crate::error::Error::Bug`] when something leaked.
    pub async fn check_integrity(&self) -> Result<EngineStats> {
        todo!()
    }

    /// Refuses new calls from now on, finishes what is queued, ends the thread, and waits for it.
    pub async fn stop(&self) {
        todo!()
    }
}
