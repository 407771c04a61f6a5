//! What happened in a load test, request by request and step by step.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Kinds of failure that are told apart; beyond them only their number counts.
const MAX_REASONS: usize = 8;

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// It has arrived.
    Waiting,
    /// The shard has it.
    Running,
    /// It has all of its tokens.
    Done,
    /// It ended otherwise.
    Failed,
}

/// A request, and when what of it came.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RequestRecord {
    pub(super) input_tokens: u32,
    /// As asked for.
    pub(super) output_tokens: u32,
    pub(super) arrived: Instant,
    /// Of the first token.
    pub(super) first: Option<Instant>,
    /// Of the last token so far.
    pub(super) last: Instant,
    /// Tokens that came.
    pub(super) n_tokens: u32,
    pub(super) state: State,
}

impl RequestRecord {
    /// A request that waits.
    pub(super) fn new(arrived: Instant, input_tokens: u32, output_tokens: u32) -> RequestRecord {
        let (first, last) = (None, arrived);
        RequestRecord {
            input_tokens,
            output_tokens,
            arrived,
            first,
            last,
            n_tokens: 0,
            state: State::Waiting,
        }
    }
}

/// Which call a step was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StepKind {
    Prefill,
    Decode,
}

/// A call that ran a step.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct StepRecord {
    pub(super) kind: StepKind,
    /// Requests that got a token.
    pub(super) n_rows: usize,
    pub(super) began: Instant,
    pub(super) answered: Instant,
    /// From its beginning to that of the next call, where both are Decodes with no other call between.
    pub(super) to_next: Option<Duration>,
    pub(super) forward_ns: u64,
    pub(super) decode_ns: u64,
    pub(super) total_ns: u64,
}

/// All of a load.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) began: Instant,
    pub(super) ended: Instant,
    pub(super) requests: Vec<RequestRecord>,
    n_ended: usize,
    /// Milliseconds between the news of a request.
    pub(super) gaps_ms: Vec<f64>,
    pub(super) steps: Vec<StepRecord>,
    /// Whether the last call was no step.
    is_interrupted: bool,
    /// Time spent on calls and for arrivals.
    pub(super) waited: Duration,
    pub(super) n_failed: usize,
    pub(super) reasons: BTreeMap<String, usize>,
    pub(super) n_checked: usize,
    /// Slots that a batch took, and those that its requests should have taken.
    pub(super) wrong_slots: Option<(u64, u64)>,
}

impl Record {
    /// Of a load that begins.
    pub(super) fn new(began: Instant) -> Record {
        Record {
            began,
            ended: began,
            requests: Vec::new(),
            n_ended: 0,
            gaps_ms: Vec::new(),
            steps: Vec::new(),
            is_interrupted: false,
            waited: Duration::ZERO,
            n_failed: 0,
            reasons: BTreeMap::new(),
            n_checked: 0,
            wrong_slots: None,
        }
    }

    /// Requests that have ended.
    pub(super) fn n_ended(&self) -> usize {
        self.n_ended + self.n_failed
    }

    /// A step was answered.
    pub(super) fn push_step(&mut self, step: StepRecord) {
        if let Some(before) = self.steps.last_mut()
            && [before.kind, step.kind] == [StepKind::Decode; 2]
            && !self.is_interrupted
        {
            before.to_next = Some(step.began - before.began);
        }
        self.is_interrupted = false;
        self.waited += step.answered - step.began;
        self.ended = step.answered;
        self.steps.push(step);
    }

    /// Time went by for another call, or for an arrival.
    pub(super) fn waited(&mut self, took: Duration) {
        self.is_interrupted = true;
        self.waited += took;
    }

    /// Tokens of a request came.
    pub(super) fn take_tokens(&mut self, index: usize, n_tokens: usize, now: Instant) {
        let request = &mut self.requests[index];
        if n_tokens == 0 {
            return;
        }
        match request.first {
            None => request.first = Some(now),
            Some(_) => self.gaps_ms.push(milliseconds(now - request.last)),
        }
        request.last = now;
        request.n_tokens = request.n_tokens.saturating_add(u32::try_from(n_tokens).unwrap_or(u32::MAX));
    }

    /// A request has all of its tokens.
    pub(super) fn finish(&mut self, index: usize) {
        self.requests[index].state = State::Done;
        self.n_ended += 1;
    }

    /// A request ended otherwise.
    pub(super) fn fail(&mut self, index: usize, reason: &str) {
        self.requests[index].state = State::Failed;
        self.n_failed += 1;
        if let Some(n) = self.reasons.get_mut(reason) {
            *n += 1;
        } else if self.reasons.len() < MAX_REASONS {
            self.reasons.insert(reason.to_owned(), 1);
        }
    }

    /// A batch takes so many slots, and should take so many.
    pub(super) fn check_slots(&mut self, taken: u64, expected: u64) {
        self.n_checked += 1;
        if taken != expected {
            self.wrong_slots.get_or_insert((taken, expected));
        }
    }
}

pub(super) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
