//! Arrivals become requests: limits, slots, and which of a router's claims are true.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::{Arrival, Engine, Placement, Prepared};
use crate::batch::{Batch, Dropped, GeneratedText, Generation, NewRequest, Request, Tokens};
use crate::error::{Error, Result};
use crate::ids::RequestId;
use crate::pool::{Lease, PROBE_SLOTS, Pool, RouterClaim, Tag};
use crate::sampling::FinishReason;

/// What became of a Prefill's arrivals.
pub(super) struct Admitted {
    /// Requests that run.
    pub(super) requests: Vec<Request>,
    /// The ends of those that were refused on their own.
    pub(super) refusals: Vec<Generation>,
}

impl Engine {
    /// Admits what can be admitted. Where others would suffer for one request's fault (requests of the same call,
    /// or a batch to be merged with), the culprit ends alone, with a generation that says why; the protocol has no
    /// error for one request. Alone, its error is the call's.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a request id that occurs twice, and the first refusal where nobody is left to protect.
    pub(super) fn admit(&mut self, arrivals: Vec<Arrival>, merge: Option<&Batch>) -> Result<Admitted> {
        let running = merge.map_or(&[][..], Batch::requests);
        let mut ids: BTreeSet<RequestId> = running.iter().map(Request::id).collect();
        for arrival in &arrivals {
            if !ids.insert(arrival.id) {
                return Err(Error::Invalid(format!("request id {} occurs twice", arrival.id)));
            }
        }
        let mut admitted = Admitted { requests: Vec::new(), refusals: Vec::new() };
        let mut first_error = None;
        let mut notices = Vec::new();
        for Arrival { id, prepared } in arrivals {
            match prepared.and_then(|prepared| self.admit_one(id, prepared)) {
                Ok(request) => admitted.requests.push(request),
                Err(error) => {
                    notices.push(format!("request {id} was refused: {error}"));
                    admitted.refusals.push(refusal(id, &error, self.stand_in_token()));
                    first_error.get_or_insert(error);
                }
            }
        }
        match first_error {
            // Told by the call itself.
            Some(error) if admitted.requests.is_empty() && merge.is_none() => Err(error),
            _ => {
                self.notices.append(&mut notices);
                Ok(admitted)
            }
        }
    }

    fn admit_one(&mut self, id: RequestId, prepared: Prepared) -> Result<Request> {
        let prompt_len = prepared.prompt.len();
        let n_positions = self.check_limits(&prepared)?;
        let info = self.executor.info();
        let regime = info.regime;
        let chain = self.pool.chain();
        let mut before = Tag::NONE;
        let tag = |(position, &token): (usize, &u32)| {
            before = chain.next(before, token, regime.salt(prompt_len as u32, position as u32));
            before
        };
        let tags: Vec<Tag> = prepared.prompt.iter().enumerate().map(tag).collect();
        let (lease, is_own, n_cached, claimed) = match &prepared.placement {
            _ if id == RequestId::PROBE => (self.lease_probe(n_positions)?, true, 0, 0),
            Placement::Own => (self.reclaiming(|pool| pool.lease_own(n_positions))?, true, 0, 0),
            Placement::Router { slots, cache_len } => {
                let (lease, n_cached, claimed) =
                    self.lease_claimed(id, slots, *cache_len, &tags, n_positions)?;
                (lease, false, n_cached, claimed)
            }
        };
        // The router counts its chunk from what it believes to be cached.
        let first_until = match prepared.chunk_len {
            Some(len) => claimed.saturating_add(len as usize),
            None => prompt_len,
        };
        let new = NewRequest {
            id,
            prompt: prepared.prompt,
            tags,
            n_cached,
            first_until,
            lease,
            is_own,
            sampling: prepared.sampling,
            stopping: prepared.stopping,
            prompt_logprobs: prepared.prompt_logprobs,
        };
        Ok(Request::new(new, chain, regime))
    }

    /// The number of positions that a request computes: the last token is never fed back.
    fn check_limits(&self, prepared: &Prepared) -> Result<usize> {
        let capacity = self.capacity();
        let vocab = self.executor.info().vocab;
        let (prompt_len, max_new) = (prepared.prompt.len(), prepared.stopping.max_new_tokens() as usize);
        if prompt_len == 0 {
            return Err(Error::Invalid("the prompt has no tokens".into()));
        }
        if let Some(&id) = prepared.prompt.iter().find(|&&id| id >= vocab) {
            return Err(Error::Invalid(format!("token {id} is beyond the model's vocabulary of {vocab}")));
        }
        let max_total = capacity.max_total_tokens as usize;
        if prompt_len > capacity.max_input_tokens as usize || prompt_len.saturating_add(max_new) > max_total {
            return Err(Error::Invalid(format!(
                "{prompt_len} prompt tokens and {max_new} new ones exceed the limits: {} prompt tokens, {max_total} in all",
                capacity.max_input_tokens
            )));
        }
        Ok(prompt_len + max_new - 1)
    }

    /// Leases a router's slots; with how many leading positions are computed already, and how many it claims.
    fn lease_claimed(
        &mut self,
        id: RequestId,
        slots: &[u32],
        cache_len: u32,
        tags: &[Tag],
        n_positions: usize,
    ) -> Result<(Lease, usize, usize)> {
        let named = slots.get(..n_positions).ok_or_else(|| {
            Error::Invalid(format!(
                "{} slots are too few for {} prompt tokens and the new ones: {n_positions} are needed",
                slots.len(),
                tags.len()
            ))
        })?;
        let claimed = (cache_len as usize).min(tags.len() - 1);
        let claim = RouterClaim { slots: named, tags, cache_len };
        let leased = self.reclaiming(|pool| pool.lease_router(&claim))?;
        let n_cached = claimed.min(leased.n_valid as usize);
        if n_cached < claimed {
            self.notices.push(format!(
                "request {id}: of {claimed} tokens said to be cached {n_cached} are; the rest is recomputed, {} of them elsewhere",
                leased.n_replaced
            ));
        }
        Ok((leased.lease, n_cached, claimed))
    }

    /// A probe is small and runs on slots kept for it, whatever its list says.
    fn lease_probe(&self, n_positions: usize) -> Result<Lease> {
        if n_positions > PROBE_SLOTS as usize {
            return Err(Error::Invalid(format!(
                "request id {} is a probe's, and {n_positions} positions are more than a probe's {PROBE_SLOTS}",
                RequestId::PROBE
            )));
        }
        self.pool.lease_probe(n_positions)
    }

    /// Leases slots, if need be those of batches on own slots that seem forgotten.
    fn reclaiming<T>(&mut self, lease: impl Fn(&Pool) -> Result<T>) -> Result<T> {
        loop {
            let shortage = match lease(&self.pool) {
                Err(shortage @ Error::Exhausted(_)) => shortage,
                other => return other,
            };
            let idle = self.config.reclaimable_after;
            match self.store.drop_idlest(Instant::now(), idle, Batch::is_own) {
                Some(dropped) => self.tell_dropped(dropped, "slots ran short", idle),
                None => return Err(shortage),
            }
        }
    }

    /// Lanes ran out: those of batches on own slots that seem forgotten come back, and of any batch that nobody asked
    /// for in a long time, as when a router died and nobody took its place.
    pub(super) fn reclaim_lanes(&mut self) {
        let now = Instant::now();
        let (soon, late) = (self.config.reclaimable_after, self.config.abandoned_after);
        while self.lanes.n_free() == 0 {
            let dropped = (self.store.drop_idlest(now, soon, Batch::is_own).map(|dropped| (dropped, soon)))
                .or_else(|| self.store.drop_idlest(now, late, |_| true).map(|dropped| (dropped, late)));
            let Some((dropped, idle)) = dropped else { return };
            self.tell_dropped(dropped, "lanes ran short", idle);
        }
    }

    pub(super) fn tell_dropped(&mut self, dropped: Dropped, why: &str, idle: Duration) {
        let Dropped { id, n_requests } = dropped;
        self.notices.push(format!(
            "batch {id} with {n_requests} requests was dropped: {why}, and nobody asked for it in {idle:?}"
        ));
    }

    /// An id for tokens that no model chose.
    pub(super) fn stand_in_token(&self) -> u32 {
        self.config.eos.first().copied().unwrap_or(0)
    }
}

/// The end of a request that never ran: its text says why.
fn refusal(id: RequestId, error: &Error, token: u32) -> Generation {
    let text = format!("[request refused: {error}]");
    Generation {
        request: id,
        prefill_tokens: None,
        tokens: Tokens {
            ids: vec![token],
            logprobs: vec![0.0],
            texts: vec![text.clone()],
            is_special: vec![false],
        },
        generated_text: Some(GeneratedText {
            text,
            n_tokens: 1,
            finish_reason: FinishReason::EndOfText,
            seed: None,
        }),
        top_tokens: Vec::new(),
    }
}
