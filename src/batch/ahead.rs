//! A step that runs before anybody asks for it: which requests are in it, and what becomes of its outcome.
//!
//! Each request in it knows its row, and keeps what was sampled there until the call that asks for it. The outcome of
//! a request that has ended meanwhile, or was filtered out or dropped, is nobody's.

use super::Batch;
use super::plan::SampledRows;
use crate::backend::step::{Sampled, StepInput, StepOutput};
use crate::error::{Error, Result};
use crate::pool::Pool;

/// How far a request's next token is, ahead of the call that asks for it.
pub(super) enum Ahead {
    /// It is computed when it is asked for.
    Nothing,
    /// The step under way samples it, as its `row`-th.
    UnderWay {
        /// Of the step.
        row: usize,
    },
    /// The step has ended.
    Done(Result<Sampled>),
}

impl Batch {
    /// Plans the decode that follows a step which sampled `sampled`, before these tokens are accepted, and marks the
    /// requests in it: all but those that end with their token for certain. One that a stop sequence ends is surplus.
    /// `None` if nobody is left, or a request has prompt tokens to compute or waits for a lane.
    pub fn plan_ahead(&mut self, sampled: &SampledRows, pool: &Pool) -> Option<StepInput> {
        let n_live = self.requests.iter().filter(|request| !request.has_ended()).count();
        if sampled.len() != n_live {
            return None;
        }
        let mut rows = Vec::with_capacity(n_live);
        for (index, sampled) in sampled {
            rows.extend(self.requests[*index].plan_ahead(sampled, rows.len(), pool));
        }
        (!rows.is_empty()).then(|| StepInput { rows, ..StepInput::default() })
    }

    /// Takes the marks of [`Batch::plan_ahead`] back: the step does not run.
    pub fn forget_ahead(&mut self) {
        self.requests.iter_mut().for_each(|request| drop(request.take_ahead()));
    }

    /// Whether the step under way is the next one of some of the requests.
    pub fn is_ahead(&self) -> bool {
        self.requests.iter().any(|request| request.row_ahead().is_some())
    }

    /// Keeps the outcome of the step under way, each request its own.
    pub fn keep_ahead(&mut self, outcome: &Result<StepOutput>) {
        for request in &mut self.requests {
            if let Some(row) = request.row_ahead() {
                let sampled = outcome.as_ref().map_err(Error::clone).and_then(|output| {
                    let sampled = output.sampled.get(row).cloned();
                    sampled.ok_or_else(|| Error::Bug(format!("a step returned no token for row {row}")))
                });
                request.keep_ahead(sampled);
            }
        }
    }

    /// Takes what was kept: what is computed, and what was sampled.
    ///
    /// # Errors
    /// Why the step failed, if it did.
    pub fn apply_ahead(&mut self, pool: &Pool) -> Result<SampledRows> {
        let mut rows = SampledRows::new();
        for (index, request) in self.requests.iter_mut().enumerate() {
            if let Ahead::Done(sampled) = request.take_ahead() {
                rows.push((index, sampled?));
                let position = request.computed();
                request.advance(pool, position, position + 1);
            }
        }
        Ok(rows)
    }
}
