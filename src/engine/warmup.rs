//! Warmup: the limits, and one run of the largest step that a router will ask for.

use std::sync::PoisonError;

use super::{Arrival, Capacity, Engine, Prepared, WarmupCall};
use crate::batch::{Batch, NewRequest, Request};
use crate::error::{Error, Result};
use crate::ids::{BatchId, Protocol, RequestId};

impl Engine {
    /// Starts afresh: every batch is dropped, the limits are set, and the largest prefill runs once. A call that is
    /// refused for what it says changes nothing.
    pub(super) fn warmup(&mut self, call: WarmupCall) -> Result<Capacity> {
        let capacity = self.limits(&call)?;
        let prepared = |arrival: Arrival| Ok((arrival.id, arrival.prepared?));
        let arrivals: Vec<_> = call.arrivals.into_iter().map(prepared).collect::<Result<_>>()?;
        self.store.clear();
        self.pool.reset();
        self.budget.max_prefill_tokens = call.max_prefill_tokens as usize;
        *self.capacity.lock().unwrap_or_else(PoisonError::into_inner) = capacity;
        let mut arrivals = arrivals.into_iter().peekable();
        // No more at once than there are lanes.
        while arrivals.peek().is_some() {
            let together = arrivals.by_ref().take(self.lanes.n_free().max(1)).collect();
            self.run_largest(together)?;
        }
        self.pool.reset();
        Ok(capacity)
    }

    fn limits(&self, call: &WarmupCall) -> Result<Capacity> {
        let supported = self.pool.n_router_slots();
        let positions = self.executor.info().max_positions;
        if call.max_prefill_tokens == 0 || call.max_prefill_tokens > supported {
            return Err(Error::Precondition(format!(
                "max_batch_prefill_tokens {} is not between 1 and the pool's {supported} slots",
                call.max_prefill_tokens
            )));
        }
        // One slot is reserved and the last token needs none, so a request of `supported` tokens still fits.
        let largest = positions.min(supported);
        let max_total_tokens = call.max_total_tokens.unwrap_or(largest);
        if max_total_tokens > largest || max_total_tokens < 2 {
            return Err(Error::Precondition(format!(
                "max_total_tokens {max_total_tokens} is not between 2 and {largest}: the model has {positions} positions, the pool {supported} slots"
            )));
        }
        let max_input_tokens = call.max_input_tokens.unwrap_or(max_total_tokens - 1);
        if max_input_tokens == 0 || max_input_tokens >= max_total_tokens {
            return Err(Error::Precondition(format!(
                "max_input_tokens {max_input_tokens} is not between 1 and {}, one less than max_total_tokens",
                max_total_tokens - 1
            )));
        }
        Ok(Capacity { max_supported_total_tokens: supported, max_input_tokens, max_total_tokens })
    }

    /// Runs prompts to their first token and forgets them.
    fn run_largest(&mut self, arrivals: Vec<(RequestId, Prepared)>) -> Result<()> {
        let longest = self.capacity().max_input_tokens as usize;
        let mut requests = Vec::with_capacity(arrivals.len());
        for (id, mut prepared) in arrivals {
            prepared.prompt.truncate(longest);
            let n_positions = prepared.prompt.len();
            if n_positions == 0 {
                continue;
            }
            let new = NewRequest {
                id,
                tags: Vec::new(),
                n_cached: 0,
                first_until: n_positions,
                lease: self.pool.lease_own(n_positions)?,
                is_own: true,
                prompt: prepared.prompt,
                sampling: prepared.sampling,
                stopping: prepared.stopping,
                prompt_logprobs: prepared.prompt_logprobs,
            };
            requests.push(Request::new(new, self.pool.chain(), self.executor.info().regime));
        }
        let n_new = requests.len();
        let mut batch = Batch::new(BatchId { protocol: Protocol::V3, number: 0 }, requests);
        self.run(&mut batch, n_new).map(drop)
    }
}
