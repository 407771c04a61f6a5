//! Random schedules of Prefill, Decode, FilterBatch and ClearCache against the plain oracle: whatever a router does,
//! each request gets the tokens that it would get alone, run ahead or not, and every slot and lane comes back.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use kvshard::backend::step::SamplingParams;
use kvshard::batch::Generation;
use kvshard::engine::{Arrival, EngineHandle, Placement, PrefillCall, Prepared, StepAnswer};
use kvshard::ids::{BatchId, Protocol, RequestId};
use kvshard::sampling::{FinishReason, RawStopping};
use proptest::prelude::*;

use crate::support::oracle::Oracle;
use crate::support::{EngineOptions, fixture, start_engine};

/// Small enough that slots and lanes run short now and then.
const OPTIONS: EngineOptions = EngineOptions {
    n_ranks: 1,
    n_slots: 220,
    own_slots: 90,
    n_lanes: 6,
    max_prefill_tokens: 16,
    max_step_tokens: 24,
    run_ahead: true,
};

#[derive(Debug, Clone)]
enum Action {
    /// New requests, merged with a running batch or not.
    Prefill {
        requests: Vec<NewRequest>,
        merge: Option<usize>,
    },
    /// A step of one batch, or of all of them together.
    Decode {
        batch: usize,
        all: bool,
    },
    /// Some clients of a batch are gone.
    Filter {
        batch: usize,
        keep: u8,
    },
    Clear {
        batch: usize,
    },
    ClearAll,
}

#[derive(Debug, Clone)]
struct NewRequest {
    /// Prompts are cut from a few texts, so that prefixes recur.
    text: u32,
    len: usize,
    max_new_tokens: u32,
    own: bool,
    /// What the router claims beyond what it knows to be cached: a lie.
    false_claim: usize,
    chunk: Option<u32>,
    /// Some letters end the output, whose next token may have been run ahead by then.
    stops: bool,
}

fn new_request() -> impl Strategy<Value = NewRequest> {
    let lie = prop_oneof![4 => Just(0usize), 1 => 1..20usize];
    let chunk = prop::option::weighted(0.4, 1..9u32);
    let own = prop::bool::weighted(0.3);
    (0..3u32, 1..30usize, 1..8u32, own, lie, chunk, any::<bool>()).prop_map(
        |(text, len, max_new_tokens, own, false_claim, chunk, stops)| NewRequest {
            text,
            len,
            max_new_tokens,
            own,
            false_claim,
            chunk,
            stops,
        },
    )
}

fn action() -> impl Strategy<Value = Action> {
    let prefill = (prop::collection::vec(new_request(), 1..4), prop::option::weighted(0.6, 0..3usize))
        .prop_map(|(requests, merge)| Action::Prefill { requests, merge });
    prop_oneof![
        5 => prefill,
        10 => (0..3usize, any::<bool>()).prop_map(|(batch, all)| Action::Decode { batch, all }),
        2 => (0..3usize, any::<u8>()).prop_map(|(batch, keep)| Action::Filter { batch, keep }),
        1 => (0..3usize).prop_map(|batch| Action::Clear { batch }),
        1 => Just(Action::ClearAll),
    ]
}

/// What is driven: a fixture, and on how many ranks.
#[derive(Debug, Clone, Copy)]
struct Subject {
    fixture: &'static str,
    n_ranks: usize,
    run_ahead: bool,
    /// Prompts are of ids below this one.
    n_ids: u32,
}

const LLAMA: Subject = Subject { fixture: "llama", n_ranks: 1, run_ahead: true, n_ids: 380 };
/// Biases, a tied head, and fewer KV heads than heads: on four ranks each KV head is there twice.
const QWEN2: Subject = Subject { fixture: "qwen2", n_ranks: 1, run_ahead: true, n_ids: 300 };

/// A router's memory: who owns which slot, which prefixes are cached, what each request has got so far.
struct Router {
    n_ids: u32,
    engine: EngineHandle,
    runtime: tokio::runtime::Runtime,
    free: VecDeque<u32>,
    /// Ended prompts and their slots.
    cached: Vec<(Vec<u32>, Vec<u32>)>,
    live: BTreeMap<u64, Live>,
    /// Running batches, by number: their requests.
    batches: BTreeMap<u64, Vec<u64>>,
    next: u64,
    ended: Vec<Live>,
}

struct Live {
    prompt: Vec<u32>,
    slots: Vec<u32>,
    output: Vec<u32>,
    max_new_tokens: u32,
    is_over: bool,
}

impl Router {
    fn new(subject: Subject) -> Router {
        let options = EngineOptions { n_ranks: subject.n_ranks, run_ahead: subject.run_ahead, ..OPTIONS };
        let engine = start_engine(&fixture(subject.fixture), options);
        Router {
            n_ids: subject.n_ids,
            engine,
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
            free: Self::all_slots(),
            cached: Vec::new(),
            live: BTreeMap::new(),
            batches: BTreeMap::new(),
            next: 0,
            ended: Vec::new(),
        }
    }

    /// Shows the shard that a router is there, so that it lends nobody the router's slots.
    fn attach(&mut self) {
        let request = NewRequest {
            text: 0,
            len: 1,
            max_new_tokens: 1,
            own: false,
            false_claim: 0,
            chunk: None,
            stops: false,
        };
        self.prefill(vec![request], None);
    }

    fn all_slots() -> VecDeque<u32> {
        (1..OPTIONS.n_slots - OPTIONS.own_slots).collect()
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Prefill { requests, merge } => self.prefill(requests, merge),
            Action::Decode { batch, all } => self.decode(batch, all),
            Action::Filter { batch, keep } => self.filter(batch, keep),
            Action::Clear { batch } => {
                if let Some(number) = self.pick(batch) {
                    self.runtime.block_on(self.engine.clear(Protocol::V3, Some(number))).unwrap();
                    self.lose_batch(number);
                }
            }
            Action::ClearAll => {
                self.runtime.block_on(self.engine.clear(Protocol::V3, None)).unwrap();
                for number in self.batches.keys().copied().collect::<Vec<_>>() {
                    self.lose_batch(number);
                }
                self.cached.clear();
                self.free = Self::all_slots();
                self.attach();
            }
        }
    }

    fn pick(&self, index: usize) -> Option<u64> {
        self.batches.keys().copied().nth(index.checked_rem(self.batches.len())?)
    }

    fn prefill(&mut self, requests: Vec<NewRequest>, merge: Option<usize>) {
        let merge = merge.and_then(|index| self.pick(index));
        let n = requests.len();
        let arrivals: Vec<Arrival> = (requests.into_iter().enumerate())
            .filter_map(|(index, request)| self.arrival(request, index + 1 == n))
            .collect();
        if arrivals.is_empty() {
            return;
        }
        let new: Vec<u64> = arrivals.iter().map(|arrival| arrival.id.0).collect();
        let number = self.next;
        self.next += 1;
        let call = PrefillCall { batch: v3(number), arrivals, merge: merge.map(v3) };
        let answer = self.runtime.block_on(self.engine.prefill(call));
        let mut members = merge.and_then(|number| self.batches.remove(&number)).unwrap_or_default();
        members.extend(&new);
        self.batches.insert(merge.unwrap_or(number), members);
        match answer {
            Ok(answer) => self.take(merge.unwrap_or(number), answer),
            // Only own slots can run short here; then the call fails for a batch that is not merged.
            Err(error) => {
                assert!(error.to_string().contains("slots of the shard's own"), "{error}");
                assert!(merge.is_none());
                self.lose_batch(number);
            }
        }
    }

    fn arrival(&mut self, request: NewRequest, last: bool) -> Option<Arrival> {
        let prompt: Vec<u32> = (0..request.len as u32)
            .map(|position| (position * 7 + request.text * (position / 5 + 1)) % self.n_ids)
            .collect();
        let n_positions = prompt.len() + request.max_new_tokens as usize - 1;
        let (placement, slots, claimed) = if request.own {
            (Placement::Own, Vec::new(), 0)
        } else {
            let (mut slots, known) = self.cached_prefix(&prompt);
            let fresh = n_positions - slots.len();
            if fresh > self.free.len() {
                self.evict(&slots);
            }
            let exclusive: Vec<u32> =
                (fresh <= self.free.len()).then(|| self.free.drain(..fresh).collect())?;
            slots.extend(&exclusive);
            let claimed = (known + request.false_claim).min(prompt.len() - 1) as u32;
            (Placement::Router { slots: slots.clone(), cache_len: claimed }, slots, claimed)
        };
        let left = prompt.len() as u32 - claimed;
        // As the router does: only the last request of a Prefill is cut, and only where something is left.
        let chunk_len = request.chunk.filter(|&chunk| last && chunk < left);
        let stops: &[&str] = if request.stops { &["e", "a", "o", "n"] } else { &[] };
        let stopping = RawStopping {
            max_new_tokens: request.max_new_tokens,
            stop_sequences: stops.iter().map(|stop| stop.to_string()).collect(),
            ignore_eos: true,
        };
        let id = self.next;
        self.next += 1;
        let live = Live {
            prompt: prompt.clone(),
            slots,
            output: Vec::new(),
            max_new_tokens: request.max_new_tokens,
            is_over: false,
        };
        self.live.insert(id, live);
        let prepared = Prepared {
            prompt,
            sampling: SamplingParams::GREEDY,
            stopping: stopping.validate(&[].into()).unwrap(),
            prompt_logprobs: false,
            placement,
            chunk_len,
        };
        Some(Arrival { id: RequestId(id), prepared: Ok(prepared) })
    }

    /// The longest cached prefix: its slots, and how many tokens may be claimed.
    fn cached_prefix(&self, prompt: &[u32]) -> (Vec<u32>, usize) {
        let common = |(cached, slots): &(Vec<u32>, Vec<u32>)| {
            let n = cached.iter().zip(prompt).take_while(|(a, b)| a == b).count();
            slots[..n].to_vec()
        };
        let slots = self.cached.iter().map(common).max_by_key(Vec::len).unwrap_or_default();
        let known = slots.len().min(prompt.len() - 1);
        (slots, known)
    }

    /// Frees the slots of cached prompts that nobody uses, nor is about to.
    fn evict(&mut self, about_to: &[u32]) {
        let used: BTreeSet<u32> =
            self.live.values().flat_map(|live| &live.slots).chain(about_to).copied().collect();
        let cached: BTreeSet<u32> = self.cached.iter().flat_map(|(_, slots)| slots).copied().collect();
        self.cached.retain(|(_, slots)| slots.iter().all(|slot| used.contains(slot)));
        self.free.extend(cached.difference(&used));
    }

    fn decode(&mut self, batch: usize, all: bool) {
        let Some(number) = self.pick(batch) else { return };
        let numbers: Vec<u64> = if all { self.batches.keys().copied().collect() } else { vec![number] };
        let ids = numbers.iter().copied().map(v3).collect();
        let answer = self.runtime.block_on(self.engine.decode(ids)).unwrap();
        let members = numbers.iter().flat_map(|number| self.batches.remove(number).unwrap()).collect();
        self.batches.insert(numbers[0], members);
        self.take(numbers[0], answer);
    }

    /// Takes an answer as the router does: news to the clients, then the ended ones are filtered out.
    fn take(&mut self, number: u64, answer: StepAnswer) {
        for Generation { request, tokens, generated_text, .. } in answer.generations {
            let live = self.live.get_mut(&request.0).expect("news of a request that lives");
            assert!(!live.is_over, "news of request {request} after its end");
            if tokens.texts[0].starts_with("[request refused") {
                assert!(tokens.texts[0].contains("slots of the shard's own"), "{}", tokens.texts[0]);
                live.output.clear();
                live.max_new_tokens = 0;
            } else {
                live.output.extend(tokens.ids);
            }
            live.is_over = generated_text.is_some();
            let stopped = generated_text.is_some_and(|text| text.finish_reason == FinishReason::StopSequence);
            assert_eq!(live.is_over, stopped || live.output.len() as u32 == live.max_new_tokens);
        }
        let members = &self.batches[&number];
        match &answer.batch {
            Some(batch) => {
                assert_eq!(batch.id, v3(number));
                let known: Vec<u64> = batch.request_ids.iter().map(|id| id.0).collect();
                assert!(known.iter().all(|id| members.contains(id)), "{known:?} {members:?}");
                let missing = members.iter().filter(|id| !known.contains(id));
                assert!(missing.into_iter().all(|id| self.live[id].is_over), "a live request was lost");
            }
            None => assert!(members.iter().all(|id| self.live[id].is_over), "a live batch was lost"),
        }
        let keep: Vec<u64> = members.iter().copied().filter(|id| !self.live[id].is_over).collect();
        self.keep(number, keep, answer.batch.is_some());
    }

    fn filter(&mut self, batch: usize, mask: u8) {
        let Some(number) = self.pick(batch) else { return };
        let members = self.batches[&number].iter().enumerate();
        let keep = members.filter(|(index, _)| mask & (1 << (index % 8)) != 0).map(|(_, &id)| id).collect();
        self.keep(number, keep, true);
    }

    fn keep(&mut self, number: u64, keep: Vec<u64>, is_stored: bool) {
        let members = self.batches[&number].clone();
        if keep.is_empty() {
            if is_stored {
                self.runtime.block_on(self.engine.clear(Protocol::V3, Some(number))).unwrap();
            }
            return self.lose_batch(number);
        }
        if keep.len() < members.len() {
            let ids = keep.iter().map(|&id| RequestId(id)).collect();
            let batch = self.runtime.block_on(self.engine.filter(v3(number), ids)).unwrap();
            assert_eq!(batch.request_ids.iter().map(|id| id.0).collect::<Vec<_>>(), keep);
        }
        members.iter().filter(|id| !keep.contains(id)).for_each(|id| self.lose(*id));
        self.batches.insert(number, keep);
    }

    fn lose_batch(&mut self, number: u64) {
        self.batches.remove(&number).unwrap_or_default().into_iter().for_each(|id| self.lose(id));
    }

    /// A request leaves: its prompt counts as cached from now on, whether it was ever computed or not.
    fn lose(&mut self, id: u64) {
        let Some(live) = self.live.remove(&id) else { return };
        if !live.slots.is_empty() {
            let (of_prompt, of_output) = live.slots.split_at(live.prompt.len());
            self.free.extend(of_output);
            self.cached.push((live.prompt.clone(), of_prompt.to_vec()));
        }
        self.ended.push(live);
    }

    /// Everything still running is cut off; then nothing may be held, and every token must be right. What each request
    /// got.
    fn finish(mut self, oracle: &Oracle) -> Vec<Vec<u32>> {
        let during = self.runtime.block_on(self.engine.check_integrity()).unwrap();
        assert_eq!(during.n_batches as usize, self.batches.len());
        for number in self.batches.keys().copied().collect::<Vec<_>>() {
            self.runtime.block_on(self.engine.clear(Protocol::V3, Some(number))).unwrap();
            self.lose_batch(number);
        }
        let after = self.runtime.block_on(self.engine.check_integrity()).unwrap();
        assert_eq!((after.n_leased, after.n_lanes_taken, after.n_requests), (0, 0, 0));
        for (index, ended) in self.ended.iter().enumerate().filter(|(_, ended)| !ended.output.is_empty()) {
            oracle.assert_greedy(&ended.prompt, &ended.output, 1e-4, &format!("request {index}"));
        }
        self.ended.into_iter().map(|ended| ended.output).collect()
    }
}

fn v3(number: u64) -> BatchId {
    BatchId { protocol: Protocol::V3, number }
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    prop::collection::vec(action(), 5..60)
}

fn drive(subject: Subject, actions: Vec<Action>) {
    let oracle = Oracle::open(&fixture(subject.fixture));
    let outputs = [true, false].map(|run_ahead| {
        let mut router = Router::new(Subject { run_ahead, ..subject });
        router.attach();
        actions.iter().cloned().for_each(|action| router.act(action));
        router.finish(&oracle)
    });
    assert_eq!(outputs[0], outputs[1], "run ahead, and not");
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(48))]
    #[test]
    fn every_schedule_gives_each_request_its_own_tokens(actions in actions()) {
        drive(LLAMA, actions);
    }
}

proptest! {
    #![proptest_config(cases(16))]
    #[test]
    fn every_schedule_on_another_family(actions in actions()) {
        drive(QWEN2, actions);
    }

    #[test]
    fn every_schedule_on_two_and_four_ranks(
        subject in prop::sample::select(vec![LLAMA, QWEN2]),
        n_ranks in prop::sample::select(vec![2, 4]),
        actions in actions(),
    ) {
        drive(Subject { n_ranks, ..subject }, actions);
    }
}
