//! From a batch to steps, and from their outcome back.
//!
//! A call asks each request for some tokens: one of a decoding request, a chunk of a prompt. What exceeds the
//! device's step is run in several passes, each a step of its own; the answer comes when all have run.

use super::Batch;
use super::lanes::{Claimant, Lanes};
use crate::backend::step::{Feed, Row, Sampled, StepInput, StepOutput};
use crate::error::{Error, Result};
use crate::ids::RequestId;
use crate::pool::Pool;

/// How much of each request a call computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Prompt tokens that later chunks may take in one call, less one for each decoding request.
    pub max_prefill_tokens: usize,
    /// Most tokens of one pass.
    pub max_step_tokens: usize,
}

/// What a call is to compute, by request: positions up to which KV is wanted.
pub struct Plan {
    /// `[requests]`; equal to what is computed where nothing is to be done.
    until: Vec<usize>,
}

/// One step of a plan, and which request each of its rows is.
pub struct Pass {
    input: StepInput,
    rows: Vec<PassRow>,
}

#[derive(Clone, Copy)]
struct PassRow {
    request: usize,
    from: usize,
    store_from: usize,
    until: usize,
    sample: bool,
    n_targets: usize,
}

impl Pass {
    /// What the executor is to run; once.
    pub fn take_input(&mut self) -> StepInput {
        std::mem::take(&mut self.input)
    }
}

/// Tokens sampled in a call, by request.
pub type SampledRows = Vec<(usize, Sampled)>;

impl Batch {
    /// Plans a call. What runs ahead of it is not run again. Requests that are in their first Prefill (the last `n_new`) go as far as the router said;
    /// prompts begun earlier take what the budget leaves, oldest first.
    pub fn plan(&mut self, n_new: usize, budget: Budget) -> Plan {
        let first_new = self.requests.len().saturating_sub(n_new);
        let chunks = self.later_chunks(budget);
        let until = (self.requests.iter().zip(chunks).enumerate())
            .map(|(index, (request, chunk))| match request.has_ended() {
                true => request.computed(),
                false if request.has_run_ahead() => request.computed(),
                false if request.is_decoding() => request.computed() + 1,
                false if index >= first_new => request.first_until().max(request.computed()),
                false => request.computed() + chunk,
            })
            .collect();
        Plan { until }
    }

    /// The next pass of a plan; `None` when all is computed, or what is left waits for lanes.
    pub fn next_pass(&mut self, plan: &Plan, pool: &Pool, lanes: &Lanes, budget: Budget) -> Option<Pass> {
        let mut room = budget.max_step_tokens;
        let mut pass = Pass { input: StepInput::default(), rows: Vec::new() };
        for index in self.unfinished(plan) {
            if room > 0 && self.ensure_lane(index, pool, lanes, &mut pass.input) {
                let from = self.requests[index].computed();
                let until = plan.until[index].min(from + room);
                room -= until - from;
                self.add_row(index, from, until, pool, &mut pass);
            }
        }
        (!pass.rows.is_empty()).then_some(pass)
    }

    /// Takes a pass's outcome: what is computed, whose prompt has log-probabilities, and what was sampled.
    ///
    /// # Errors
    /// [`Error::Bug`] if the executor returned another number of results than asked for.
    pub fn apply(&mut self, pass: &Pass, output: StepOutput, pool: &Pool) -> Result<SampledRows> {
        let n_samples = pass.rows.iter().filter(|row| row.sample).count();
        let n_targets: usize = pass.rows.iter().map(|row| row.n_targets).sum();
        if output.sampled.len() != n_samples || output.target_logprobs.len() != n_targets {
            return Err(Error::Bug(format!(
                "a step returned {} tokens and {} log-probabilities, asked for {n_samples} and {n_targets}",
                output.sampled.len(),
                output.target_logprobs.len(),
            )));
        }
        let mut sampled = output.sampled.into_iter();
        let mut logprobs = output.target_logprobs.as_slice();
        let mut rows = SampledRows::new();
        for row in &pass.rows {
            let request = &mut self.requests[row.request];
            let (own, rest) = logprobs.split_at(row.n_targets);
            logprobs = rest;
            request.keep_prompt_logprobs(row.from, own);
            request.advance(pool, row.store_from, row.until);
            if row.sample {
                rows.extend(sampled.next().map(|token| (row.request, token)));
            }
        }
        Ok(rows)
    }

    /// Input tokens of the next call: what the router takes off its prefill budget. With requests waiting for a
    /// lane all of the budget, so that it admits no more.
    pub fn current_tokens(&self, budget: Budget) -> u32 {
        if self.waits_for_a_lane() {
            return budget.max_prefill_tokens as u32;
        }
        let decoding =
            self.requests.iter().filter(|request| !request.has_ended() && request.is_decoding()).count();
        (decoding + self.later_chunks(budget).into_iter().sum::<usize>()) as u32
    }

    /// `[requests]` the next chunk of each prompt begun earlier; 0 for the others.
    fn later_chunks(&self, budget: Budget) -> Vec<usize> {
        let live = self.requests.iter().filter(|request| !request.has_ended());
        let decoding = live.filter(|request| request.is_decoding()).count();
        // At least one token, or a full house of decoding requests would starve a prompt for ever.
        let mut room = budget.max_prefill_tokens.saturating_sub(decoding).max(1);
        let chunk = |request: &super::Request| {
            if request.has_ended() {
                return 0;
            }
            let chunk = request.prompt_left().min(room);
            room -= chunk;
            chunk
        };
        self.requests.iter().map(chunk).collect()
    }

    /// Requests with something left to compute, decoding ones first: a pass has room for a token of each lane.
    fn unfinished(&self, plan: &Plan) -> Vec<usize> {
        let mut left: Vec<usize> = (0..self.requests.len())
            .filter(|&index| self.requests[index].computed() < plan.until[index])
            .collect();
        left.sort_by_key(|&index| !self.requests[index].is_decoding());
        left
    }

    fn ensure_lane(&mut self, index: usize, pool: &Pool, lanes: &Lanes, input: &mut StepInput) -> bool {
        let request = &mut self.requests[index];
        if request.has_lane() {
            return true;
        }
        let claimant = match request.is_own() {
            _ if request.id() == RequestId::PROBE => Claimant::Probe,
            true => Claimant::Own { beside_router: pool.has_router() },
            false => Claimant::Router,
        };
        let start = lanes.take(claimant).and_then(|lane| request.take_lane(lane));
        let has_lane = start.is_some();
        input.starts.extend(start);
        has_lane
    }

    fn add_row(&mut self, index: usize, from: usize, until: usize, pool: &Pool, pass: &mut Pass) {
        let request = &mut self.requests[index];
        let store_from = request.begin_writing(pool, from, until);
        let Some(lane) = request.lane().map(|lane| lane.lane()) else { return };
        let input = &mut pass.input;
        let (feed, n_targets) = if request.is_decoding() {
            (Feed::Last, 0)
        } else {
            input.prompt_tokens.extend_from_slice(request.prompt(from, until));
            // Position p's logits tell of token p + 1; the last prompt token's tell of the output.
            let targets =
                if request.wants_prompt_logprobs() { request.prompt(from + 1, until + 1) } else { &[] };
            input.targets.extend_from_slice(targets);
            (Feed::Prompt { len: (until - from) as u32 }, targets.len())
        };
        let sample = request.is_decoding() || request.prompt_left() == until - from;
        input.rows.push(Row {
            lane,
            start: from as u32,
            feed,
            store_from: store_from as u32,
            sample,
            n_targets: n_targets as u32,
        });
        pass.rows.push(PassRow { request: index, from, store_from, until, sample, n_targets });
    }
}
