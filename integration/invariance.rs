//! A request's answer is its own, through the whole engine: alone, batched, in chunks, with a cached prefix, after
//! others have been filtered out, run ahead or not, and on several ranks it gets the same tokens. On one rank
//! log-probabilities have the same bits too; ranks sum in another order.

use std::collections::BTreeMap;

use kvshard::backend::step::{Choice, SamplingParams, Watermark};
use kvshard::batch::Generation;
use kvshard::engine::{Arrival, EngineHandle, Placement, PrefillCall, Prepared, StepAnswer};
use kvshard::ids::{BatchId, Protocol, RequestId};
use kvshard::sampling::RawStopping;

use crate::support::{EngineOptions, fixture, start_engine};

const OPTIONS: EngineOptions = EngineOptions {
    n_ranks: 1,
    n_slots: 2000,
    own_slots: 1000,
    n_lanes: 16,
    max_prefill_tokens: 1000,
    max_step_tokens: 1000,
    run_ahead: true,
};

#[derive(Clone)]
struct Asked {
    prompt: Vec<u32>,
    sampling: SamplingParams,
    max_new_tokens: u32,
}

impl Asked {
    fn n_positions(&self) -> u32 {
        self.prompt.len() as u32 + self.max_new_tokens - 1
    }
}

/// What a request got: ids, and the bits of their log-probabilities; its tokens', then their alternatives'.
#[derive(Debug, Clone, Default, PartialEq)]
struct Got {
    ids: Vec<u32>,
    logprobs: Vec<u32>,
    top_ids: Vec<u32>,
    top_logprobs: Vec<u32>,
}

/// Every way of choosing tokens.
fn samplings() -> Vec<SamplingParams> {
    let greedy = SamplingParams::GREEDY;
    let draw = |seed| SamplingParams { choice: Choice::Draw { seed }, temperature: 1.3, top_n: 4, ..greedy };
    let watermark = Some(Watermark { gamma: 0.5, delta: 2.0 });
    vec![
        greedy,
        draw(1),
        SamplingParams { top_k: 20, ..draw(2) },
        SamplingParams { top_p: 0.8, ..draw(3) },
        SamplingParams { typical_p: 0.7, ..draw(u64::MAX) },
        SamplingParams { top_k: 50, top_p: 0.9, typical_p: 0.9, ..draw(4) },
        SamplingParams { repetition_penalty: 1.4, frequency_penalty: 0.8, top_n: 2, ..greedy },
        SamplingParams { watermark, ..greedy },
        SamplingParams { watermark, repetition_penalty: 0.8, frequency_penalty: -0.5, ..draw(5) },
    ]
}

/// A prompt of ids that any fixture knows; prompts of one `text` are prefixes of each other.
fn prompt(text: u32, len: u32) -> Vec<u32> {
    (0..len).map(|position| 5 + (position * 7 + text * (position / 5 + 1) * 3) % 290).collect()
}

/// A request for every way of choosing tokens, of different lengths.
fn all() -> Vec<Asked> {
    let lengths = [33, 1, 17, 40, 9, 26, 58, 5, 21];
    let asked = |(index, (sampling, len)): (u32, (SamplingParams, u32))| Asked {
        prompt: prompt(index, len),
        sampling,
        max_new_tokens: 8 + index,
    };
    (0..).zip(samplings().into_iter().zip(lengths)).map(asked).collect()
}

/// An engine, and a router's way with it.
struct Driver {
    engine: EngineHandle,
    runtime: tokio::runtime::Runtime,
    next: u64,
    got: BTreeMap<u64, Got>,
    over: Vec<u64>,
}

impl Driver {
    fn new(fixture_name: &str, options: EngineOptions) -> Driver {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let engine = start_engine(&fixture(fixture_name), options);
        Driver { engine, runtime, next: 0, got: BTreeMap::new(), over: Vec::new() }
    }

    fn prefill(&mut self, arrivals: Vec<Arrival>, merge: Option<BatchId>) -> Option<BatchId> {
        let batch = BatchId { protocol: Protocol::V3, number: self.next };
        self.next += 1;
        let call = PrefillCall { batch, arrivals, merge };
        let answer = self.runtime.block_on(self.engine.prefill(call)).unwrap();
        self.take(answer)
    }

    fn decode(&mut self, batch: BatchId) -> Option<BatchId> {
        let answer = self.runtime.block_on(self.engine.decode(vec![batch])).unwrap();
        self.take(answer)
    }

    fn finish(&mut self, mut batch: Option<BatchId>) {
        while let Some(id) = batch {
            batch = self.decode(id);
        }
    }

    fn take(&mut self, answer: StepAnswer) -> Option<BatchId> {
        let bits = |logprobs: &[f32]| logprobs.iter().map(|logprob| logprob.to_bits()).collect::<Vec<_>>();
        for Generation { request, tokens, top_tokens, generated_text, .. } in answer.generations {
            let got = self.got.entry(request.0).or_default();
            got.ids.extend(&tokens.ids);
            got.logprobs.extend(bits(&tokens.logprobs));
            for top in top_tokens {
                got.top_ids.extend(top.ids);
                got.top_logprobs.extend(bits(&top.logprobs));
            }
            if generated_text.is_some() {
                self.over.push(request.0);
            }
        }
        answer.batch.map(|batch| batch.id)
    }

    fn arrival(&mut self, asked: &Asked, placement: Placement, chunk_len: Option<u32>) -> Arrival {
        let stopping =
            RawStopping { max_new_tokens: asked.max_new_tokens, stop_sequences: vec![], ignore_eos: true };
        let prepared = Prepared {
            prompt: asked.prompt.clone(),
            sampling: asked.sampling,
            stopping: stopping.validate(&[].into()).unwrap(),
            prompt_logprobs: false,
            placement,
            chunk_len,
        };
        let id = RequestId(self.next);
        self.next += 1;
        Arrival { id, prepared: Ok(prepared) }
    }

    fn own(&mut self, asked: &Asked) -> Arrival {
        self.arrival(asked, Placement::Own, None)
    }

    /// Each request by itself.
    fn alone(&mut self, asked: &[Asked]) -> Vec<Got> {
        asked.iter().map(|asked| self.one(asked, Placement::Own, None)).collect()
    }

    fn one(&mut self, asked: &Asked, placement: Placement, chunk_len: Option<u32>) -> Got {
        let arrival = self.arrival(asked, placement, chunk_len);
        let id = arrival.id.0;
        let batch = self.prefill(vec![arrival], None);
        self.finish(batch);
        self.got.remove(&id).unwrap()
    }

    /// All requests in one Prefill.
    fn together(&mut self, asked: &[Asked]) -> Vec<Got> {
        let arrivals: Vec<Arrival> = asked.iter().map(|asked| self.own(asked)).collect();
        let ids: Vec<u64> = arrivals.iter().map(|arrival| arrival.id.0).collect();
        let batch = self.prefill(arrivals, None);
        self.finish(batch);
        ids.iter().map(|id| self.got.remove(id).unwrap()).collect()
    }

    /// Requests that join a running batch, one after the other, the last chunk of each cut off.
    fn one_after_the_other(&mut self, asked: &[Asked]) -> Vec<Got> {
        let (mut running, mut ids) = (None, Vec::new());
        for asked in asked {
            let chunk_len = (asked.prompt.len() > 4).then_some(4);
            let arrival = self.arrival(asked, Placement::Own, chunk_len);
            ids.push(arrival.id.0);
            running = self.prefill(vec![arrival], running);
            running = running.and_then(|batch| self.decode(batch));
        }
        self.finish(running);
        ids.iter().map(|id| self.got.remove(id).unwrap()).collect()
    }

    /// Others run along for some steps, before and between the requests, and are filtered out.
    fn after_filter(&mut self, asked: &[Asked], others: &[Asked]) -> Vec<Got> {
        let (mut ids, mut arrivals) = (Vec::new(), Vec::new());
        for (index, asked) in asked.iter().enumerate() {
            let other = &others[index % others.len()];
            arrivals.push(self.own(&Asked { max_new_tokens: 50, ..other.clone() }));
            arrivals.push(self.own(asked));
            ids.push(self.next - 1);
        }
        let mut batch = self.prefill(arrivals, None).unwrap();
        for _ in 0..3 {
            batch = self.decode(batch).unwrap();
        }
        // In another order, too.
        let keep = ids.iter().rev().map(|&id| RequestId(id)).collect();
        self.runtime.block_on(self.engine.filter(batch, keep)).unwrap();
        self.finish(Some(batch));
        ids.iter().map(|id| self.got.remove(id).unwrap()).collect()
    }

    /// On a router's slots, of which the first hold the prompt's first `n_shared` tokens, as computed by a request for
    /// that many; `claimed` of them are said to.
    fn cached(&mut self, asked: &Asked, n_shared: u32, claimed: u32, chunk_len: Option<u32>) -> Got {
        let clear = self.engine.clear(Protocol::V3, None);
        self.runtime.block_on(clear).unwrap();
        let first = Asked {
            prompt: asked.prompt[..n_shared as usize].to_vec(),
            sampling: SamplingParams::GREEDY,
            max_new_tokens: 1,
        };
        self.one(&first, Placement::Router { slots: (1..=n_shared).collect(), cache_len: 0 }, None);
        let rest = asked.n_positions() - n_shared;
        let slots = (1..=n_shared).chain(500..500 + rest).collect();
        self.one(asked, Placement::Router { slots, cache_len: claimed }, chunk_len)
    }
}

fn same(got: &[Got], expected: &[Got], what: &str) {
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got, expected, "request {index}, {what}");
    }
}

/// Ids are equal, numbers nearly.
fn alike(got: &[Got], expected: &[Got], what: &str) {
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.ids, expected.ids, "request {index}, {what}");
        assert_eq!(got.top_ids, expected.top_ids, "request {index}, {what}");
        let numbers = |got: &Got| -> Vec<f32> {
            got.logprobs.iter().chain(&got.top_logprobs).map(|&bits| f32::from_bits(bits)).collect()
        };
        for (got, expected) in numbers(got).into_iter().zip(numbers(expected)) {
            assert!((got - expected).abs() < 1e-3, "request {index}, {what}: {got} and {expected}");
        }
    }
}

const FIXTURES: [&str; 5] = ["llama", "qwen2", "mistral", "llama-dynamic", "llama-longrope"];

#[test]
fn company_changes_nothing() {
    for name in FIXTURES {
        let asked = all();
        let expected = Driver::new(name, EngineOptions { run_ahead: false, ..OPTIONS }).alone(&asked);
        let mut driver = Driver::new(name, OPTIONS);
        let distinct: std::collections::BTreeSet<u32> =
            expected.iter().flat_map(|got| got.ids.clone()).collect();
        assert!(distinct.len() > 20, "{name}: a model that always says the same proves nothing");
        let lengths = expected.iter().map(|got| got.ids.len() as u32);
        assert!(lengths.eq(asked.iter().map(|asked| asked.max_new_tokens)));
        same(&driver.alone(&asked), &expected, "alone, run ahead");
        same(&driver.together(&asked), &expected, "together");
        same(&driver.one_after_the_other(&asked), &expected, "one after the other");
        for part in asked.chunks(3).zip(expected.chunks(3)) {
            same(&driver.after_filter(part.0, &asked), part.1, "after others were filtered out");
        }
        let stats = driver.runtime.block_on(driver.engine.check_integrity()).unwrap();
        assert_eq!((stats.n_leased, stats.n_lanes_taken, stats.n_batches), (0, 0, 0));
    }
}

#[test]
fn chunks_change_nothing() {
    for name in FIXTURES {
        let asked = all();
        let expected = Driver::new(name, OPTIONS).alone(&asked);
        for size in [1, 3, 16, 31] {
            let options =
                EngineOptions { max_prefill_tokens: size, max_step_tokens: size.max(16), ..OPTIONS };
            let mut driver = Driver::new(name, options);
            same(&driver.alone(&asked), &expected, &format!("{name}, chunks of {size}"));
            same(&driver.together(&asked), &expected, &format!("{name}, together in chunks of {size}"));
            same(&driver.one_after_the_other(&asked), &expected, &format!("{name}, joining by {size}"));
        }
    }
}

#[test]
fn a_cached_prefix_changes_nothing() {
    for name in FIXTURES {
        let mut driver = Driver::new(name, OPTIONS);
        let asked: Vec<Asked> = all().into_iter().filter(|asked| asked.prompt.len() > 8).collect();
        let expected = driver.alone(&asked);
        for (asked, expected) in asked.iter().zip(&expected) {
            let len = asked.prompt.len() as u32;
            for n_shared in [1, len / 2, len - 1, len] {
                for claimed in [0, n_shared.min(len - 1), len - 1] {
                    for chunk_len in [None, Some(2)] {
                        let got = driver.cached(asked, n_shared, claimed, chunk_len);
                        let what = format!("{name}: {n_shared} of {len} cached, {claimed} claimed");
                        same(&[got], std::slice::from_ref(expected), &what);
                    }
                }
            }
        }
    }
}

#[test]
fn ranks_change_no_token() {
    for name in FIXTURES {
        let asked = all();
        let expected = Driver::new(name, OPTIONS).alone(&asked);
        for n_ranks in [2, 4] {
            let mut driver = Driver::new(name, EngineOptions { n_ranks, ..OPTIONS });
            let on_ranks = driver.alone(&asked);
            alike(&on_ranks, &expected, &format!("{name} on {n_ranks} ranks"));
            // Among themselves they are as one rank is.
            same(&driver.together(&asked), &on_ranks, &format!("{name} together on {n_ranks} ranks"));
            same(
                &driver.one_after_the_other(&asked),
                &on_ranks,
                &format!("{name} joining on {n_ranks} ranks"),
            );
            let long = asked.iter().zip(&on_ranks).filter(|(asked, _)| asked.prompt.len() > 20);
            for (asked, expected) in long {
                let got = driver.cached(asked, 20, 20, None);
                same(&[got], std::slice::from_ref(expected), &format!("{name} cached on {n_ranks} ranks"));
            }
        }
    }
}

/// Where keys depend on the length of the sequence (both fixtures change theirs beyond 64 tokens), a prefix computed
/// within one length is not that of another, although its tokens are.
#[test]
fn a_prefix_is_not_taken_over_the_border_of_a_position_regime() {
    for name in ["llama-dynamic", "llama-longrope", "llama"] {
        let mut driver = Driver::new(name, OPTIONS);
        let of_len = |len, max_new_tokens| Asked {
            prompt: prompt(1, len),
            sampling: SamplingParams::GREEDY,
            max_new_tokens,
        };
        // The last crosses the border with its output, and so do the tags of what it has stored.
        let lengths = [(63, 1), (64, 1), (65, 1), (66, 9), (90, 5), (50, 40), (64, 20)];
        let asked: Vec<Asked> = lengths.into_iter().map(|(len, new)| of_len(len, new)).collect();
        let expected = driver.alone(&asked);
        // Every one on the same slots after every other, all of the prompt claimed.
        for before in &asked {
            for (asked, expected) in asked.iter().zip(&expected) {
                let clear = driver.engine.clear(Protocol::V3, None);
                driver.runtime.block_on(clear).unwrap();
                let slots = |asked: &Asked| (1..=asked.n_positions()).collect();
                driver.one(before, Placement::Router { slots: slots(before), cache_len: 0 }, None);
                let claimed = Placement::Router { slots: slots(asked), cache_len: 1000 };
                let got = driver.one(asked, claimed, None);
                let what = format!("{name}: {} after {}", asked.prompt.len(), before.prompt.len());
                same(&[got], std::slice::from_ref(expected), &what);
            }
        }
        // A router continues a text: prompt and output of the one before become the prompt.
        let (first, output) = (&asked[5], &expected[5]);
        let continued =
            Asked { prompt: first.prompt.iter().chain(&output.ids).copied().collect(), ..of_len(0, 10) };
        let alone = driver.alone(std::slice::from_ref(&continued));
        let slots = |asked: &Asked| (1..=asked.n_positions()).collect();
        driver.one(first, Placement::Router { slots: slots(first), cache_len: 0 }, None);
        let claimed = Placement::Router { slots: slots(&continued), cache_len: 1000 };
        same(&[driver.one(&continued, claimed, None)], &alone, &format!("{name}: a text continued"));
    }
}
