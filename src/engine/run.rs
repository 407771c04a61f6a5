//! Prefill and Decode: merge, plan, run, answer.

use std::collections::BTreeSet;
use std::time::Instant;

use super::admit::Admitted;
use super::{Engine, PrefillCall, StepAnswer, Timings, unknown};
use crate::backend::step::{Sampled, StepInput, StepOutput};
use crate::batch::{Batch, SampledRows, concatenate};
use crate::error::{Error, Result};
use crate::ids::BatchId;
use crate::model::executor::Executor;

/// What running a batch produced, and how much was run.
pub(super) struct Ran {
    sampled: SampledRows,
    n_tokens: usize,
    n_rows: usize,
}

impl Engine {
    /// Starts requests. The batch to merge with is taken first: a router that sees the call fail never mentions it
    /// again, so it must not stay.
    pub(super) fn prefill(&mut self, call: PrefillCall) -> Result<StepAnswer> {
        // A batch id that comes again means that whoever used it is done with it.
        if call.merge != Some(call.batch) {
            self.store.remove(call.batch);
        }
        let older = match call.merge {
            Some(id) => Some(self.store.take(id).ok_or_else(|| unknown(id))?),
            None => None,
        };
        let Admitted { requests, refusals } = self.admit(call.arrivals, older.as_ref())?;
        let n_new = requests.len();
        let newer = Batch::new(call.batch, requests);
        let merging = Instant::now();
        let (batch, concat_ns) = match older {
            Some(older) => (concatenate(vec![older, newer])?, Some(nanoseconds(merging))),
            None => (newer, None),
        };
        let mut answer = self.step(batch, n_new)?;
        answer.timings.concat_ns = concat_ns;
        answer.generations.extend(refusals);
        Ok(answer)
    }

    /// Runs the next step of cached batches. A handle that is wrong costs nobody's batch.
    pub(super) fn decode(&mut self, ids: &[BatchId]) -> Result<StepAnswer> {
        let merging = Instant::now();
        let mut members = BTreeSet::new();
        for (index, id) in ids.iter().enumerate() {
            if ids[..index].contains(id) {
                return Err(Error::Invalid(format!("batch {id} is named twice")));
            }
            let batch = self.store.get(*id).ok_or_else(|| unknown(*id))?;
            // A batch holds each id once.
            if ids.len() == 1 {
                break;
            }
            if let Some(twice) = batch.requests().iter().find(|request| !members.insert(request.id())) {
                return Err(Error::Invalid(format!("request {} is in two of the batches", twice.id())));
            }
        }
        let batch = concatenate(ids.iter().filter_map(|id| self.store.take(*id)).collect())?;
        let concat_ns = (ids.len() > 1).then(|| nanoseconds(merging));
        let mut answer = self.step(batch, 0)?;
        answer.timings.concat_ns = concat_ns;
        Ok(answer)
    }

    /// Runs a batch and stores it, if some of it still lives. On failure it is gone.
    fn step(&mut self, mut batch: Batch, n_new: usize) -> Result<StepAnswer> {
        let began = Instant::now();
        let ran = self.run(&mut batch, n_new)?;
        let forward_ns = nanoseconds(began);
        self.run_ahead(&mut batch, &ran.sampled);
        let answering = Instant::now();
        for (index, _) in ran.sampled.iter().filter(|(_, sampled)| *sampled == Sampled::NoDistribution) {
            let id = batch.requests()[*index].id();
            self.notices.push(format!("request {id} was ended: its logits are no numbers"));
        }
        let generations = batch.accept(ran.sampled, &self.tokenizer, self.stand_in_token());
        let stored = (!batch.has_ended()).then(|| batch.describe(&self.pool, self.budget));
        if stored.is_some() {
            self.store.insert(batch, Instant::now());
        }
        let timings = Timings {
            forward_ns,
            decode_ns: nanoseconds(answering),
            concat_ns: None,
            n_tokens: ran.n_tokens as u32,
            n_rows: ran.n_rows as u32,
        };
        Ok(StepAnswer { generations, batch: stored, timings, notices: std::mem::take(&mut self.notices) })
    }

    /// Computes what a call asks of each request, in as many passes as it takes, but for what has run ahead of it.
    pub(super) fn run(&mut self, batch: &mut Batch, n_new: usize) -> Result<Ran> {
        if batch.waits_for_a_lane() && self.lanes.n_free() == 0 {
            self.reclaim_lanes();
        }
        let plan = batch.plan(n_new, self.budget);
        let mut ran = Ran { sampled: Vec::new(), n_tokens: 0, n_rows: 0 };
        while let Some(mut pass) = batch.next_pass(&plan, &self.pool, &self.lanes, self.budget) {
            let input = pass.take_input();
            ran.n_tokens += input.n_tokens();
            ran.n_rows += input.rows.len();
            let output = self.execute(input, batch)?;
            ran.sampled.extend(batch.apply(&pass, output, &self.pool)?);
        }
        if batch.is_ahead() {
            self.collect_unasked(batch);
        }
        let ahead = batch.apply_ahead(&self.pool)?;
        // Decodes, a token a row; this call's answer is the first to tell of them.
        ran.n_tokens += ahead.len();
        ran.n_rows += ahead.len();
        ran.sampled.extend(ahead);
        ran.sampled.sort_by_key(|(index, _)| *index);
        Ok(ran)
    }

    /// Runs a step behind the one that runs unasked, whose outcome comes first.
    fn execute(&mut self, input: StepInput, batch: &mut Batch) -> Result<StepOutput> {
        let submitted = self.submit(input);
        self.collect_unasked(batch);
        submitted?;
        self.wait()
    }

    pub(super) fn submit(&mut self, input: StepInput) -> Result<()> {
        self.watched(|executor| executor.submit(input))
    }

    pub(super) fn wait(&mut self) -> Result<StepOutput> {
        self.watched(|executor| executor.wait())
    }

    fn watched<T>(&mut self, work: impl FnOnce(&mut dyn Executor) -> Result<T>) -> Result<T> {
        self.pulse.begin_step();
        let outcome = work(&mut *self.executor);
        self.pulse.end_step();
        // Calls are still answered, each with this error, until whoever feels the pulse ends the process.
        if let Err(lost @ Error::DeviceLost(_)) = &outcome {
            self.pulse.die(lost.clone());
        }
        outcome
    }
}

pub(super) fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
