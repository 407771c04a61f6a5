//! A router's ways with an engine: requests alone, together, joining one another, in chunks, on cached prefixes, and
//! after others were filtered out.

use std::collections::BTreeMap;

use kvshard::backend::step::{Choice, SamplingParams, Watermark};
use kvshard::batch::Generation;
use kvshard::engine::{Arrival, EngineHandle, Placement, PrefillCall, Prepared, StepAnswer};
use kvshard::ids::{BatchId, Protocol, RequestId};
use kvshard::sampling::RawStopping;

/// What a client asks for.
#[derive(Clone)]
pub struct Asked {
    pub prompt: Vec<u32>,
    pub sampling: SamplingParams,
    pub max_new_tokens: u32,
}

impl Asked {
    pub fn n_positions(&self) -> u32 {
        self.prompt.len() as u32 + self.max_new_tokens - 1
    }
}

/// What a request got: ids, and the bits of their log-probabilities; its tokens', then their alternatives'.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Got {
    pub ids: Vec<u32>,
    pub logprobs: Vec<u32>,
    pub top_ids: Vec<u32>,
    pub top_logprobs: Vec<u32>,
}

/// Every way of choosing tokens.
pub fn samplings() -> Vec<SamplingParams> {
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
pub fn prompt(text: u32, len: u32) -> Vec<u32> {
    (0..len).map(|position| 5 + (position * 7 + text * (position / 5 + 1) * 3) % 290).collect()
}

/// A request for every way of choosing tokens, of different lengths.
pub fn all() -> Vec<Asked> {
    let lengths = [33, 1, 17, 40, 9, 26, 58, 5, 21];
    let asked = |(index, (sampling, len)): (u32, (SamplingParams, u32))| Asked {
        prompt: prompt(index, len),
        sampling,
        max_new_tokens: 8 + index,
    };
    (0..).zip(samplings().into_iter().zip(lengths)).map(asked).collect()
}

/// An engine, and a router's way with it.
pub struct Driver {
    pub engine: EngineHandle,
    pub runtime: tokio::runtime::Runtime,
    next: u64,
    got: BTreeMap<u64, Got>,
    over: Vec<u64>,
}

impl Driver {
    pub fn new(engine: EngineHandle) -> Driver {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
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
    pub fn alone(&mut self, asked: &[Asked]) -> Vec<Got> {
        asked.iter().map(|asked| self.one(asked, Placement::Own, None)).collect()
    }

    pub fn one(&mut self, asked: &Asked, placement: Placement, chunk_len: Option<u32>) -> Got {
        let arrival = self.arrival(asked, placement, chunk_len);
        let id = arrival.id.0;
        let batch = self.prefill(vec![arrival], None);
        self.finish(batch);
        self.got.remove(&id).unwrap()
    }

    /// All requests in one Prefill.
    pub fn together(&mut self, asked: &[Asked]) -> Vec<Got> {
        let arrivals: Vec<Arrival> = asked.iter().map(|asked| self.own(asked)).collect();
        let ids: Vec<u64> = arrivals.iter().map(|arrival| arrival.id.0).collect();
        let batch = self.prefill(arrivals, None);
        self.finish(batch);
        ids.iter().map(|id| self.got.remove(id).unwrap()).collect()
    }

    /// Requests that join a running batch, one after the other, the last chunk of each cut off.
    pub fn one_after_the_other(&mut self, asked: &[Asked]) -> Vec<Got> {
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
    pub fn after_filter(&mut self, asked: &[Asked], others: &[Asked]) -> Vec<Got> {
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
    pub fn cached(&mut self, asked: &Asked, n_shared: u32, claimed: u32, chunk_len: Option<u32>) -> Got {
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
