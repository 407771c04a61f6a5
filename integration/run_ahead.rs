//! The step that runs before it is asked for: what it saves, and what becomes of it when the router asks for something
//! else. Tokens are those of an engine that never runs ahead.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvshard::backend::step::{Feed, SamplingParams, StepInput, StepOutput};
use kvshard::engine::{
    Arrival, Condition, EngineHandle, EngineStats, Placement, PrefillCall, Prepared, StepAnswer, WarmupCall,
};
use kvshard::error::{Error, Result};
use kvshard::ids::{BatchId, Protocol, RequestId};
use kvshard::model::executor::{Executor, ModelInfo};
use kvshard::sampling::{FinishReason, RawStopping};

use crate::support::engine::{Patience, start_engine_around};
use crate::support::{EngineOptions, fixture};

const OPTIONS: EngineOptions = EngineOptions {
    n_ranks: 2,
    n_slots: 600,
    own_slots: 300,
    n_lanes: 8,
    max_prefill_tokens: 100,
    max_step_tokens: 100,
    run_ahead: true,
};

/// What the engine has asked of its executor.
#[derive(Default)]
struct Seen {
    /// Of each step the prompt tokens and the decodes.
    submitted: Vec<(usize, usize)>,
    n_waited: usize,
    /// Steps that a test has looked at.
    n_looked_at: usize,
}

/// The real executor, which tells what it sees, and fails where it is told to.
struct Witness {
    inner: Box<dyn Executor>,
    seen: Arc<Mutex<Seen>>,
    fault: Fault,
}

/// What happens to one step, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Never,
    NotStarted(usize),
    Failed(usize),
    Lost(usize),
    Slow(usize),
}

impl Executor for Witness {
    fn info(&self) -> &ModelInfo {
        self.inner.info()
    }

    fn submit(&mut self, step: StepInput) -> Result<()> {
        let mut seen = self.seen.lock().unwrap();
        let decodes = step.rows.iter().filter(|row| row.feed == Feed::Last).count();
        seen.submitted.push((step.prompt_tokens.len(), decodes));
        assert!(seen.submitted.len() - seen.n_waited <= 2, "more than two steps under way");
        if self.fault == Fault::NotStarted(seen.submitted.len()) {
            seen.submitted.pop();
            self.fault = Fault::Never;
            return Err(Error::Device("not started on purpose".into()));
        }
        self.inner.submit(step)
    }

    fn wait(&mut self) -> Result<StepOutput> {
        let output = self.inner.wait()?;
        let step = {
            let mut seen = self.seen.lock().unwrap();
            seen.n_waited += 1;
            seen.n_waited
        };
        match self.fault {
            Fault::Failed(at) if at == step => Err(Error::Device("failed on purpose".into())),
            Fault::Lost(at) if at <= step => Err(Error::DeviceLost("lost on purpose".into())),
            Fault::Slow(at) if at == step => {
                std::thread::sleep(Duration::from_millis(50));
                Ok(output)
            }
            _ => Ok(output),
        }
    }

    fn free_bytes(&self) -> Option<u64> {
        self.inner.free_bytes()
    }
}

/// A request as the tests send it.
#[derive(Debug, Clone)]
struct Asked {
    id: u64,
    prompt: Vec<u32>,
    max_new_tokens: u32,
    stop: Option<String>,
    eos: Vec<u32>,
    placement: Placement,
}

impl Asked {
    fn new(id: u64, max_new_tokens: u32) -> Asked {
        let prompt = (0..12 + id as u32).map(|position| 5 + (position * 7 + id as u32 * 31) % 290).collect();
        Asked { id, prompt, max_new_tokens, stop: None, eos: Vec::new(), placement: Placement::Own }
    }

    fn arrival(&self) -> Arrival {
        let stopping = RawStopping {
            max_new_tokens: self.max_new_tokens,
            stop_sequences: self.stop.iter().cloned().collect(),
            ignore_eos: false,
        };
        let prepared = Prepared {
            prompt: self.prompt.clone(),
            sampling: SamplingParams::GREEDY,
            stopping: stopping.validate(&self.eos.as_slice().into()).unwrap(),
            prompt_logprobs: false,
            placement: self.placement.clone(),
            chunk_len: None,
        };
        Arrival { id: RequestId(self.id), prepared: Ok(prepared) }
    }
}

struct Caller {
    engine: EngineHandle,
    runtime: tokio::runtime::Runtime,
    seen: Arc<Mutex<Seen>>,
}

impl Caller {
    fn start(run_ahead: bool, fault: Fault, patience: Patience) -> Caller {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let told = seen.clone();
        let options = EngineOptions { run_ahead, ..OPTIONS };
        let engine = start_engine_around(&fixture("llama"), options, patience, move |inner| {
            Box::new(Witness { inner, seen: told, fault })
        });
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        Caller { engine, runtime, seen }
    }

    fn new() -> Caller {
        Self::start(true, Fault::Never, Patience::EVER)
    }

    fn failing(fault: Fault) -> Caller {
        Self::start(true, fault, Patience::EVER)
    }

    fn prefill(&self, batch: u64, asked: &[&Asked], merge: Option<u64>) -> Result<StepAnswer> {
        let arrivals = asked.iter().map(|asked| asked.arrival()).collect();
        let call = PrefillCall { batch: v3(batch), arrivals, merge: merge.map(v3) };
        self.runtime.block_on(self.engine.prefill(call))
    }

    fn decode(&self, batches: &[u64]) -> Result<StepAnswer> {
        self.runtime.block_on(self.engine.decode(batches.iter().copied().map(v3).collect()))
    }

    fn filter(&self, batch: u64, keep: &[u64]) {
        let keep = keep.iter().copied().map(RequestId).collect();
        self.runtime.block_on(self.engine.filter(v3(batch), keep)).unwrap();
    }

    fn clear(&self, batch: Option<u64>) {
        self.runtime.block_on(self.engine.clear(Protocol::V3, batch)).unwrap();
    }

    fn stats(&self) -> EngineStats {
        self.runtime.block_on(self.engine.check_integrity()).unwrap()
    }

    /// Prompt tokens and decodes of each step since the last look.
    fn submitted(&self) -> Vec<(usize, usize)> {
        let seen = &mut *self.seen.lock().unwrap();
        let looked_at = std::mem::replace(&mut seen.n_looked_at, seen.submitted.len());
        seen.submitted[looked_at..].to_vec()
    }

    fn n_under_way(&self) -> usize {
        let seen = self.seen.lock().unwrap();
        seen.submitted.len() - seen.n_waited
    }

    /// Nothing is held once everything is cleared.
    fn finish(self) {
        self.stats();
        self.clear(None);
        let stats = self.stats();
        assert_eq!((stats.n_leased, stats.n_lanes_taken, stats.n_batches), (0, 0, 0), "{stats:?}");
    }
}

fn v3(number: u64) -> BatchId {
    BatchId { protocol: Protocol::V3, number }
}

/// A request's tokens, their log-probabilities' bits, and their texts.
#[derive(Debug, Clone, Default, PartialEq)]
struct Got {
    ids: Vec<u32>,
    logprobs: Vec<u32>,
    texts: Vec<String>,
    end: Option<FinishReason>,
}

impl Got {
    fn add(&mut self, id: u64, answer: &StepAnswer) {
        for news in answer.generations.iter().filter(|news| news.request.0 == id) {
            assert!(self.end.is_none(), "news of request {id} after its end");
            self.ids.extend(&news.tokens.ids);
            self.logprobs.extend(news.tokens.logprobs.iter().map(|logprob| logprob.to_bits()));
            self.texts.extend(news.tokens.texts.iter().cloned());
            self.end = news.generated_text.as_ref().map(|text| text.finish_reason);
        }
    }
}

/// Answers of calls, and what each request has got from them.
fn got(answers: &[StepAnswer], id: u64) -> Got {
    let mut got = Got::default();
    answers.iter().for_each(|answer| got.add(id, answer));
    got
}

/// What a request gets from an engine that never runs ahead.
fn alone(asked: &Asked) -> Got {
    let caller = Caller::start(false, Fault::Never, Patience::EVER);
    let asked = Asked { placement: Placement::Own, ..asked.clone() };
    let mut answers = vec![caller.prefill(0, &[&asked], None).unwrap()];
    while answers.last().unwrap().batch.is_some() {
        assert_eq!(caller.n_under_way(), 0);
        answers.push(caller.decode(&[0]).unwrap());
    }
    caller.finish();
    got(&answers, asked.id)
}

/// A request that a stop sequence ends at its `n`-th token, and what it gets.
fn stopping(id: u64, n: usize) -> (Asked, Got) {
    let asked = Asked::new(id, 20);
    let free = alone(&asked);
    let stop = free.texts[n - 1].clone();
    let is_first = free.texts[..n - 1].iter().all(|text| !text.ends_with(&stop));
    assert!(!stop.is_empty() && is_first, "choose another token: {:?}", free.texts);
    let asked = Asked { stop: Some(stop), ..asked };
    let expected = alone(&asked);
    assert_eq!((expected.ids.as_slice(), expected.end), (&free.ids[..n], Some(FinishReason::StopSequence)));
    (asked, expected)
}

#[test]
fn the_next_step_is_under_way_when_the_answer_comes_and_none_behind_the_last() {
    let caller = Caller::new();
    let (first, second) = (Asked::new(1, 3), Asked::new(2, 5));
    let mut answers = vec![caller.prefill(1, &[&first, &second], None).unwrap()];
    assert_eq!(caller.submitted(), [(27, 0), (0, 2)]);
    let mut decodes = Vec::new();
    while answers.last().unwrap().batch.is_some() {
        assert_eq!(caller.n_under_way(), 1);
        answers.push(caller.decode(&[1]).unwrap());
        let timings = answers.last().unwrap().timings;
        decodes.push((timings.n_rows, timings.n_tokens));
    }
    // The first request's budget ends with its third token, so nothing is run for a fourth.
    assert_eq!(caller.submitted(), [(0, 2), (0, 1), (0, 1)]);
    assert_eq!(decodes, [(2, 2), (2, 2), (1, 1), (1, 1)]);
    assert_eq!(caller.n_under_way(), 0);
    assert_eq!((got(&answers, 1), got(&answers, 2)), (alone(&first), alone(&second)));
    caller.finish();
}

#[test]
fn an_end_of_text_token_is_not_fed() {
    let free = alone(&Asked::new(1, 6));
    let asked = Asked { eos: vec![free.ids[2]], ..Asked::new(1, 6) };
    let n = 1 + free.ids.iter().position(|id| asked.eos.contains(id)).unwrap();
    let caller = Caller::new();
    let mut answers = vec![caller.prefill(1, &[&asked], None).unwrap()];
    while answers.last().unwrap().batch.is_some() {
        answers.push(caller.decode(&[1]).unwrap());
    }
    assert_eq!(got(&answers, 1).end, Some(FinishReason::EndOfText));
    assert_eq!((caller.submitted().len(), caller.n_under_way()), (n, 0));
    caller.finish();
}

#[test]
fn a_prompt_in_chunks_is_run_as_it_is_asked_for() {
    let caller = Caller::new();
    let long = Asked { prompt: (5..205).collect(), ..Asked::new(1, 3) };
    let mut arrival = long.arrival();
    arrival.prepared.as_mut().unwrap().chunk_len = Some(50);
    let call = PrefillCall { batch: v3(1), arrivals: vec![arrival], merge: None };
    let mut answers = vec![caller.runtime.block_on(caller.engine.prefill(call)).unwrap()];
    assert_eq!((caller.submitted(), caller.n_under_way()), (vec![(50, 0)], 0));
    answers.push(caller.decode(&[1]).unwrap());
    assert_eq!((caller.submitted(), caller.n_under_way()), (vec![(100, 0)], 0));
    answers.push(caller.decode(&[1]).unwrap());
    assert_eq!((caller.submitted(), caller.n_under_way()), (vec![(50, 0), (0, 1)], 1));
    answers.extend([caller.decode(&[1]).unwrap(), caller.decode(&[1]).unwrap()]);
    assert_eq!(got(&answers, 1), alone(&long));
    caller.finish();
}

/// Its slots and lane are given to the next request while the surplus row still runs.
#[test]
fn a_stop_sequence_makes_a_surplus_row_whose_token_is_nobodys() {
    let (stopped, expected) = stopping(1, 3);
    let (other, next) = (Asked::new(2, 9), Asked::new(3, 7));
    let caller = Caller::new();
    let mut answers = vec![caller.prefill(1, &[&stopped, &other], None).unwrap()];
    answers.push(caller.decode(&[1]).unwrap());
    answers.push(caller.decode(&[1]).unwrap());
    assert_eq!(got(&answers, 1), expected);
    // The third token's text was not known when it was fed.
    assert_eq!(caller.submitted().last(), Some(&(0, 2)));
    let held = caller.stats();
    assert_eq!((held.n_live, held.n_lanes_taken), (1, 1));
    caller.filter(1, &[2]);
    answers.push(caller.prefill(2, &[&next], Some(1)).unwrap());
    assert_eq!(answers.last().unwrap().generations.len(), 2);
    while answers.last().unwrap().batch.is_some() {
        answers.push(caller.decode(&[1]).unwrap());
    }
    assert_eq!((got(&answers, 2), got(&answers, 3)), (alone(&other), alone(&next)));
    assert_eq!(got(&answers, 1), expected);
    caller.finish();
}

#[test]
fn rows_that_are_filtered_out_while_they_run_are_dropped() {
    let asked: Vec<Asked> = (1..=4).map(|id| Asked::new(id, 8)).collect();
    let caller = Caller::new();
    let mut answers = vec![caller.prefill(1, &asked.iter().collect::<Vec<_>>(), None).unwrap()];
    answers.push(caller.decode(&[1]).unwrap());
    // In another order, too.
    caller.filter(1, &[4, 2]);
    let joining = Asked::new(5, 4);
    answers.push(caller.decode(&[1]).unwrap());
    let ids: Vec<u64> = answers.last().unwrap().generations.iter().map(|news| news.request.0).collect();
    assert_eq!(ids, [4, 2]);
    caller.filter(1, &[2]);
    answers.push(caller.prefill(2, &[&joining], Some(1)).unwrap());
    while answers.last().unwrap().batch.is_some() {
        answers.push(caller.decode(&[1]).unwrap());
    }
    assert_eq!((got(&answers, 2), got(&answers, 5)), (alone(&asked[1]), alone(&joining)));
    let cut_off = got(&answers, 4);
    assert_eq!(cut_off.ids, alone(&asked[3]).ids[..3]);
    caller.finish();
}

#[test]
fn a_prefill_that_merges_runs_its_new_rows_only() {
    let (old, new) = (Asked::new(1, 6), Asked::new(2, 4));
    let caller = Caller::new();
    let mut answers = vec![caller.prefill(1, &[&old], None).unwrap()];
    caller.submitted();
    answers.push(caller.prefill(2, &[&new], Some(1)).unwrap());
    assert_eq!(caller.submitted(), [(14, 0), (0, 2)]);
    let merged = answers.last().unwrap();
    let ids: Vec<u64> = merged.generations.iter().map(|news| news.request.0).collect();
    assert_eq!((ids, merged.timings.n_rows, merged.timings.n_tokens), (vec![1, 2], 2, 15));
    while answers.last().unwrap().batch.is_some() {
        answers.push(caller.decode(&[1]).unwrap());
    }
    assert_eq!((got(&answers, 1), got(&answers, 2)), (alone(&old), alone(&new)));
    caller.finish();
}

/// As routers do that cannot merge in Prefill: a batch's outcome waits while another one is prefilled.
#[test]
fn decodes_of_several_batches_take_what_ran_ahead_and_run_the_rest() {
    let asked: Vec<Asked> = (1..=3).map(|id| Asked::new(id, 10)).collect();
    let caller = Caller::new();
    let mut answers = vec![caller.prefill(1, &[&asked[0]], None).unwrap()];
    answers.push(caller.prefill(2, &[&asked[1]], None).unwrap());
    assert_eq!(caller.submitted(), [(13, 0), (0, 1), (14, 0), (0, 1)]);
    answers.push(caller.decode(&[1, 2]).unwrap());
    assert_eq!(caller.submitted(), [(0, 2)]);
    // The outcome of the first two is kept while the third is prefilled. Its next step runs unasked then, so that
    // nothing more runs ahead for them.
    answers.push(caller.prefill(3, &[&asked[2]], None).unwrap());
    answers.push(caller.decode(&[1]).unwrap());
    assert_eq!(caller.submitted(), [(15, 0), (0, 1)]);
    assert_eq!(caller.n_under_way(), 1);
    // The later batch first: the result is named after it, and its rows come first.
    answers.push(caller.decode(&[3, 1]).unwrap());
    assert_eq!(caller.submitted(), [(0, 2), (0, 3)]);
    let ids: Vec<u64> = answers.last().unwrap().generations.iter().map(|news| news.request.0).collect();
    assert_eq!(ids, [3, 1, 2]);
    while answers.last().unwrap().batch.is_some() {
        answers.push(caller.decode(&[3]).unwrap());
    }
    for asked in &asked {
        assert_eq!(got(&answers, asked.id), alone(asked), "request {}", asked.id);
    }
    caller.finish();
}

#[test]
fn what_is_cleared_replaced_or_warmed_over_while_it_runs_is_forgotten() {
    let (first, second) = (Asked::new(1, 10), Asked::new(2, 4));
    let expected = alone(&second);
    for all in [false, true] {
        let caller = Caller::new();
        caller.prefill(1, &[&first], None).unwrap();
        caller.clear((!all).then_some(1));
        let stats = caller.stats();
        assert_eq!((stats.n_leased, stats.n_lanes_taken, stats.n_batches), (0, 0, 0));
        assert_eq!(caller.n_under_way(), 1);
        assert!(matches!(caller.decode(&[1]), Err(Error::UnknownBatch(_))));
        // On the same slots and the same lane, behind the step that nobody wants; then under the id of a batch whose
        // next step runs.
        caller.prefill(1, &[&first], None).unwrap();
        let mut answers = vec![caller.prefill(1, &[&second], None).unwrap()];
        while answers.last().unwrap().batch.is_some() {
            answers.push(caller.decode(&[1]).unwrap());
        }
        assert_eq!(got(&answers, 2), expected);
        caller.prefill(1, &[&first], None).unwrap();
        let warmup = WarmupCall {
            arrivals: vec![second.arrival()],
            max_input_tokens: None,
            max_prefill_tokens: 50,
            max_total_tokens: None,
        };
        caller.runtime.block_on(caller.engine.warmup(warmup)).unwrap();
        assert_eq!((caller.n_under_way(), caller.stats().n_batches), (0, 0));
        let mut answers = vec![caller.prefill(1, &[&second], None).unwrap()];
        while answers.last().unwrap().batch.is_some() {
            answers.push(caller.decode(&[1]).unwrap());
        }
        assert_eq!(got(&answers, 2), expected);
        caller.finish();
    }
}

#[test]
fn an_abandoned_batch_is_dropped_while_its_next_step_runs() {
    let soon = Patience { abandoned_after: Duration::from_millis(5), reclaimable_after: Duration::ZERO };
    let caller = Caller::start(true, Fault::Never, soon);
    caller.prefill(1, &[&Asked::new(1, 10)], None).unwrap();
    assert_eq!(caller.n_under_way(), 1);
    std::thread::sleep(Duration::from_millis(10));
    let stats = caller.stats();
    assert_eq!((stats.n_batches, stats.n_leased, stats.n_lanes_taken), (0, 0, 0));
    let last = Asked::new(2, 1);
    let answers = [caller.prefill(2, &[&last], None).unwrap()];
    assert_eq!((got(&answers, 2), caller.n_under_way()), (alone(&last), 0));
    caller.finish();
}

#[test]
fn a_failure_ahead_is_told_by_the_call_that_asks_for_it() {
    let (asked, other) = (Asked::new(1, 10), Asked::new(2, 4));
    let failed = Error::Device("failed on purpose".into());
    // By a Decode, and by a Prefill that merges.
    for merge in [false, true] {
        let caller = Caller::failing(Fault::Failed(2));
        caller.prefill(1, &[&asked], None).unwrap();
        let answer = if merge { caller.prefill(2, &[&other], Some(1)) } else { caller.decode(&[1]) };
        assert_eq!(answer.map(drop), Err(failed.clone()));
        let stats = caller.stats();
        assert_eq!((stats.n_batches, stats.n_leased, stats.n_lanes_taken), (0, 0, 0));
        assert!(matches!(caller.decode(&[1]), Err(Error::UnknownBatch(_))));
        caller.finish();
    }
    // Found while another batch is served, which it does not concern; the failed one can still be filtered.
    let caller = Caller::failing(Fault::Failed(2));
    caller.prefill(1, &[&asked, &Asked::new(3, 10)], None).unwrap();
    let mut answers = vec![caller.prefill(2, &[&other], None).unwrap()];
    answers.push(caller.decode(&[2]).unwrap());
    caller.filter(1, &[3]);
    assert_eq!(caller.decode(&[1]).map(drop), Err(failed));
    while answers.last().unwrap().batch.is_some() {
        answers.push(caller.decode(&[2]).unwrap());
    }
    assert_eq!(got(&answers, 2), alone(&other));
    caller.finish();
    // Nobody asks for it any more.
    let caller = Caller::failing(Fault::Failed(2));
    caller.prefill(1, &[&asked], None).unwrap();
    caller.clear(Some(1));
    let answers = [caller.prefill(2, &[&Asked::new(2, 1)], None).unwrap()];
    assert_eq!(got(&answers, 2).ids, alone(&other).ids[..1]);
    caller.finish();
}

#[test]
fn a_step_that_cannot_be_started_ahead_is_started_when_it_is_asked_for() {
    let asked = Asked::new(1, 5);
    let caller = Caller::failing(Fault::NotStarted(2));
    let mut answers = vec![caller.prefill(1, &[&asked], None).unwrap()];
    assert_eq!(caller.n_under_way(), 0);
    while answers.last().unwrap().batch.is_some() {
        answers.push(caller.decode(&[1]).unwrap());
    }
    assert_eq!(got(&answers, 1), alone(&asked));
    caller.finish();
}

#[test]
fn a_device_lost_ahead_ends_the_engine_when_it_is_found() {
    let caller = Caller::failing(Fault::Lost(2));
    caller.prefill(1, &[&Asked::new(1, 5)], None).unwrap();
    assert_eq!(caller.engine.pulse().condition(), Condition::Idle);
    let lost = Error::DeviceLost("lost on purpose".into());
    assert_eq!(caller.decode(&[1]).map(drop), Err(lost.clone()));
    assert_eq!(caller.engine.pulse().condition(), Condition::Dead(lost));
    caller.finish();
}

#[test]
fn a_step_counts_as_running_while_somebody_waits_for_it() {
    let caller = Caller::failing(Fault::Slow(2));
    caller.prefill(1, &[&Asked::new(1, 3)], None).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let pulse = caller.engine.pulse().clone();
    assert_eq!(pulse.condition(), Condition::Idle);
    let feeling = std::thread::spawn(move || {
        loop {
            match pulse.condition() {
                Condition::Stepping(time) if time > Duration::from_millis(10) => return,
                _ => std::thread::yield_now(),
            }
        }
    });
    caller.decode(&[1]).unwrap();
    feeling.join().unwrap();
    caller.finish();
}

/// A surplus row writes where an earlier request's KV was: whoever claims that prefix later gets it recomputed.
#[test]
fn what_a_surplus_row_overwrote_is_not_believed() {
    let (stopped, expected) = stopping(1, 4);
    let n_shared = stopped.prompt.len() + 3;
    // The same tokens up to the one that stops, then others.
    let mut prompt = stopped.prompt.clone();
    prompt.extend(&expected.ids[..3]);
    prompt.extend((0..10).map(|index| (expected.ids[3] + 17 + index * 5) % 290));
    let longer = Asked { prompt, ..Asked::new(2, 5) };
    let on = |asked: &Asked, cache_len| {
        let slots = (1..asked.prompt.len() as u32 + asked.max_new_tokens).collect();
        Asked { placement: Placement::Router { slots, cache_len }, ..asked.clone() }
    };
    let of_longer = alone(&longer);
    for filtered in [false, true] {
        let caller = Caller::new();
        let run = |asked: &Asked| {
            let mut answers = vec![caller.prefill(9, &[asked], None).unwrap()];
            while answers.last().unwrap().batch.is_some() {
                answers.push(caller.decode(&[9]).unwrap());
            }
            (got(&answers, asked.id), answers[0].notices.clone())
        };
        assert_eq!(run(&on(&longer, 0)).0, of_longer);
        let surplus = if filtered { Asked { stop: None, ..stopped.clone() } } else { stopped.clone() };
        // All of its prompt is there already.
        let mut answers = vec![caller.prefill(1, &[&on(&surplus, n_shared as u32)], None).unwrap()];
        for _ in 0..3 {
            answers.push(caller.decode(&[1]).unwrap());
        }
        if filtered {
            caller.clear(Some(1));
        }
        assert_eq!(got(&answers, 1).ids, expected.ids);
        assert_eq!((caller.n_under_way(), caller.stats().n_batches), (1, 0));
        let (got, notices) = run(&on(&longer, 1000));
        assert_eq!(got, of_longer, "filtered: {filtered}");
        let all = longer.prompt.len() - 1;
        let told = format!("request 2: of {all} tokens said to be cached {n_shared} are");
        assert!(notices[0].starts_with(&told), "{notices:?}");
        // Recomputed, it is believed.
        let (got, notices) = run(&on(&longer, all as u32));
        assert_eq!((got, notices), (of_longer.clone(), Vec::new()));
        caller.finish();
    }
}
