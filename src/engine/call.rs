//! What the engine is asked, and what it answers, in the core's own terms.

use crate::backend::step::SamplingParams;
use crate::batch::{CachedBatch, Generation};
use crate::error::Error;
use crate::ids::{BatchId, RequestId};
use crate::sampling::Stopping;

/// A request on its way into a batch: tokenised and checked, or refused on its own.
#[derive(Debug)]
pub struct Arrival {
    /// The router's number.
    pub id: RequestId,
    /// What became of it before the engine saw it.
    pub prepared: Result<Prepared, Error>,
}

/// A request ready to run.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The prompt's ids; at least one, each below the model's vocabulary.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// When the request ends.
    pub stopping: Stopping,
    /// Whether the answer carries the prompt's log-probabilities; false unless the operator enabled them.
    pub prompt_logprobs: bool,
    /// Where its KV goes.
    pub placement: Placement,
    /// Prompt tokens to compute in the first Prefill; `None` for all.
    pub chunk_len: Option<u32>,
}

/// Who chose a request's slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// The shard does.
    Own,
    /// The router did.
    Router {
        /// The slot of each position; at least `prompt_len + max_new_tokens − 1`.
        slots: Vec<u32>,
        /// Leading positions whose KV the router believes to be there already.
        cache_len: u32,
    },
}

/// Prefill: new requests, merged with a running batch if one is named.
#[derive(Debug)]
pub struct PrefillCall {
    /// The new batch.
    pub batch: BatchId,
    /// Its requests; at least one.
    pub arrivals: Vec<Arrival>,
    /// The running batch to merge with; the result keeps this one's id.
    pub merge: Option<BatchId>,
}

/// Warmup: the largest prefill the router will send, and the operator's limits.
#[derive(Debug)]
pub struct WarmupCall {
    /// The largest prefill. Ids need not differ.
    pub arrivals: Vec<Arrival>,
    /// Longest prompt, if the operator says.
    pub max_input_tokens: Option<u32>,
    /// Prompt tokens in one step.
    pub max_prefill_tokens: u32,
    /// Longest prompt and output together, if the operator says.
    pub max_total_tokens: Option<u32>,
}

/// What Warmup returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Slots that a router may hand out, slot 0 included: numbers below this one.
    pub max_supported_total_tokens: u32,
    /// Longest prompt.
    pub max_input_tokens: u32,
    /// Longest prompt and output together.
    pub max_total_tokens: u32,
}

/// The answer to Prefill and Decode.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepAnswer {
    /// News, in batch order; requests still prefilling have none.
    pub generations: Vec<Generation>,
    /// The batch as stored, or `None` when every request has ended.
    pub batch: Option<CachedBatch>,
    /// Where the time went.
    pub timings: Timings,
    /// What is worth telling an operator.
    pub notices: Vec<String>,
}

/// Parts of a call's time, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Planning, forward pass and sampling, until the tokens are on the host; of a step that ran ahead, what was left
    /// to wait for.
    pub forward_ns: u64,
    /// Detokenisation, stop checks and building the answer.
    pub decode_ns: u64,
    /// Merging batches; `None` if none were merged.
    pub concat_ns: Option<u64>,
    /// Tokens that were fed for the answer, prompt tokens included.
    pub n_tokens: u32,
    /// Rows that were run for it, ahead of the call or in it.
    pub n_rows: u32,
}

/// A look at the engine, for metrics and tests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Slots of the pool, slot 0 included.
    pub n_slots: u32,
    /// Slots under a lease.
    pub n_leased: u32,
    /// Lanes taken.
    pub n_lanes_taken: u32,
    /// Batches in the store.
    pub n_batches: u32,
    /// Requests in these batches, ended ones included.
    pub n_requests: u32,
    /// Requests in these batches that have not ended.
    pub n_live: u32,
}
