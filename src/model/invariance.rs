//! A request's tokens are its own: alone, batched, chunked, with a cached prefix, and on several ranks they are
//! the same, greedy and drawn. On one rank the log-probabilities have the same bits too.

mod random;
mod variants;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use self::random::{Random, led};
use self::variants::{plain, variants};
use super::checkpoint::DType;
use super::executor::Executor;
use super::leader::Leader;
use super::names::{LayerRole, MlpRole, Role};
use super::partition::Shard;
use super::{Device, Options, PoolSize, load};
use crate::backend::random::philox;
use crate::backend::step::*;
use crate::error::Error;
use crate::ids::Lane;

/// Of the pool.
const N_SLOTS: u32 = 400;
const OPTIONS: Options = Options {
    device: Device::Cpu,
    n_ranks: 1,
    pool: PoolSize::Slots(N_SLOTS as usize),
    n_lanes: 6,
    max_step_tokens: 120,
    graphs: false,
    fault: None,
};

/// A thread belongs to the cores of one rank.
fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap())
}

#[derive(Clone)]
struct Request {
    prompt: Vec<u32>,
    sampling: SamplingParams,
    slots: Vec<u32>,
    /// Positions whose keys and values another request has stored in the same slots.
    cached: u32,
    /// Fed again from here, all the same.
    start: u32,
}

const N_NEW: usize = 12;

/// Requests on slots in no order.
fn requests() -> Vec<Request> {
    let draw = |seed| SamplingParams {
        choice: Choice::Draw { seed },
        temperature: 1.5,
        top_p: 0.95,
        top_n: 3,
        ..SamplingParams::GREEDY
    };
    let penalised = SamplingParams {
        repetition_penalty: 1.3,
        frequency_penalty: 0.7,
        watermark: Some(Watermark { gamma: 0.5, delta: 1.0 }),
        ..SamplingParams::GREEDY
    };
    let samplings = [SamplingParams::GREEDY, draw(1), penalised, draw(u64::MAX), SamplingParams::GREEDY];
    let mut free = (1..N_SLOTS).map(|slot| slot * 7 % N_SLOTS).filter(|&slot| slot != 0);
    let lengths = [9, 1, 23, 17, 40];
    let request = |(number, (len, sampling)): (u32, (u32, SamplingParams))| Request {
        prompt: (0..len).map(|i| philox([i, number, 0, 0], [5, 5])[0] % 101).collect(),
        sampling,
        slots: free.by_ref().take(len as usize + N_NEW - 1).collect(),
        cached: 0,
        start: 0,
    };
    (0..).zip(lengths.into_iter().zip(samplings)).map(request).collect()
}

/// Feeds up to `chunk` tokens of a prompt at once; request `i` comes `i · stagger` steps after the first.
fn serve(executor: &mut dyn Executor, requests: &[Request], chunk: u32, stagger: usize) -> Vec<Vec<Sampled>> {
    let mut fed: Vec<Option<u32>> = vec![None; requests.len()];
    let mut outputs = vec![Vec::new(); requests.len()];
    for time in 0.. {
        let mut step = StepInput::default();
        let mut sampling = Vec::new();
        for (i, request) in requests.iter().enumerate() {
            if time < i * stagger || outputs[i].len() == N_NEW {
                continue;
            }
            let lane = Lane(i as u32);
            let prompt_len = request.prompt.len() as u32;
            let start = fed[i].unwrap_or_else(|| {
                let (slots, prompt, sampling) =
                    (request.slots.clone(), request.prompt.clone(), request.sampling);
                step.starts.push(LaneStart { lane, slots, prompt, sampling });
                request.start
            });
            let feed = if start < prompt_len {
                let len = chunk.min(prompt_len - start);
                step.prompt_tokens.extend(&request.prompt[start as usize..(start + len) as usize]);
                Feed::Prompt { len }
            } else {
                Feed::Last
            };
            let mut row = Row { lane, start, feed, store_from: request.cached, sample: false, n_targets: 0 };
            fed[i] = Some(start + row.len());
            row.sample = start + row.len() >= prompt_len;
            sampling.extend(row.sample.then_some(i));
            step.rows.push(row);
        }
        if step.rows.is_empty() && time >= requests.len() * stagger {
            break;
        }
        executor.submit(step).unwrap();
        for (i, sampled) in sampling.into_iter().zip(executor.wait().unwrap().sampled) {
            outputs[i].push(sampled);
        }
    }
    outputs
}

fn alone(executor: &mut dyn Executor, requests: &[Request], chunk: u32) -> Vec<Vec<Sampled>> {
    requests.iter().flat_map(|request| serve(executor, std::slice::from_ref(request), chunk, 0)).collect()
}

fn ids(outputs: &[Vec<Sampled>]) -> Vec<Vec<u32>> {
    let id = |sampled: &Sampled| match sampled {
        Sampled::Token { id, .. } => *id,
        Sampled::NoDistribution => u32::MAX,
    };
    outputs.iter().map(|outputs| outputs.iter().map(id).collect()).collect()
}

#[test]
fn alone_batched_and_chunked_give_the_same_bits() {
    let dtypes = [DType::F32, DType::BF16, DType::F16];
    let plain = dtypes.map(|dtype| ("plain", plain(), dtype));
    let others = variants().into_iter().map(|(name, spec)| (name, spec, DType::F32));
    for (seed, (name, spec, dtype)) in (1..).zip(plain.into_iter().chain(others)) {
        let mut executor = Arc::new(Random::new(spec, seed, dtype)).load(1);
        let requests = requests();
        let expected = alone(&mut *executor, &requests, 100);
        let distinct: std::collections::BTreeSet<_> = ids(&expected).into_iter().flatten().collect();
        assert!(distinct.len() > 10, "{name}: one that always says the same proves nothing: {distinct:?}");
        for chunk in [1, 2, 3, 7, 16] {
            assert_eq!(alone(&mut *executor, &requests, chunk), expected, "{name}, chunks of {chunk}");
        }
        for (chunk, stagger) in [(100, 0), (100, 2), (5, 0), (3, 1), (1, 3)] {
            let batched = serve(&mut *executor, &requests, chunk, stagger);
            assert_eq!(batched, expected, "{name}, chunks of {chunk}, {stagger} steps apart");
        }
    }
}

#[test]
fn a_cached_prefix_gives_the_same_bits_and_is_not_rewritten() {
    let plain = [("plain", plain())];
    for (name, spec) in plain.into_iter().chain(variants()) {
        let mut executor = Arc::new(Random::new(spec, 4, DType::BF16)).load(1);
        let requests = requests();
        let expected = alone(&mut *executor, &requests, 100);
        for (cached, start) in [(1, 1), (8, 8), (22, 22), (23, 22), (10, 4), (23, 0)] {
            // Stored by the first; the second has slots of its own from `cached` on.
            let mut second = requests[2].clone();
            let own = requests[4].slots.iter().copied();
            let n_own = second.slots.len() - cached as usize;
            second.slots.splice(cached as usize.., own.take(n_own)).for_each(drop);
            (second.cached, second.start) = (cached, start);
            serve(&mut *executor, &requests[2..3], 100, 0);
            for chunk in [100, 3] {
                let got = serve(&mut *executor, std::slice::from_ref(&second), chunk, 0);
                assert_eq!(got[0], expected[2], "{name}: {cached} cached, fed from {start}");
            }
        }
    }
}

#[test]
fn ranks_give_the_same_tokens() {
    let plain = [DType::F32, DType::BF16].map(|dtype| ("plain", plain(), dtype));
    let others = variants().into_iter().map(|(name, spec)| (name, spec, DType::F32));
    for (seed, (name, spec, dtype)) in (5..).zip(plain.into_iter().chain(others)) {
        let model = Arc::new(Random::new(spec, seed, dtype));
        let requests = requests();
        let expected = ids(&alone(&mut *model.load(1), &requests, 100));
        for n_ranks in [2, 4] {
            let mut executor = model.load(n_ranks);
            let what = format!("{name} on {n_ranks} ranks");
            assert_eq!(ids(&alone(&mut *executor, &requests, 7)), expected, "{what}");
            assert_eq!(ids(&serve(&mut *executor, &requests, 100, 1)), expected, "{what}, batched");
        }
        for n_ranks in [1, 2, 4] {
            let tokens = on_a_thread(|| {
                let mut led = model.load_led(Options { n_ranks, ..OPTIONS }).unwrap();
                ids(&serve(&mut led, &requests, 100, 1))
            });
            assert_eq!(tokens, expected, "{n_ranks} ranks, led");
        }
    }
}

/// The last rank fails at its second step: the leader says so for this step and for all after it, and nobody waits.
#[test]
fn a_follower_that_fails_is_heard() {
    let model = Arc::new(Random::new(plain(), 12, DType::F32));
    for n_ranks in [1, 2, 4] {
        let fault = "rank-error@2".parse().ok();
        let step = || StepInput {
            rows: vec![Row {
                lane: Lane(0),
                start: 0,
                feed: Feed::Prompt { len: 1 },
                store_from: 0,
                sample: true,
                n_targets: 0,
            }],
            prompt_tokens: vec![1],
            ..StepInput::default()
        };
        let sampling = SamplingParams::GREEDY;
        let begin = LaneStart { lane: Lane(0), slots: vec![1, 2], prompt: vec![1], sampling };
        let expected = format!("rank {} failed in step 2: a fault was injected", n_ranks - 1);
        on_a_thread(|| {
            let mut led = model.load_led(Options { n_ranks, fault, ..OPTIONS }).unwrap();
            led.submit(StepInput { starts: vec![begin], ..step() }).unwrap();
            led.wait().unwrap();
            for _ in 0..2 {
                let outcome = led.submit(step()).and_then(|()| led.wait());
                assert_eq!(outcome, Err(Error::DeviceLost(expected.clone())));
            }
        });
    }
}

#[test]
fn a_rank_that_cannot_load_keeps_nobody_waiting() {
    let model = Arc::new(Random::new(plain(), 13, DType::F32));
    for failing in [0, 1, 3] {
        let model = Arc::clone(&model);
        let options = Options { n_ranks: 4, ..OPTIONS };
        let n_asked = AtomicUsize::new(0);
        let parts = Box::new(move |role, shard: Shard| {
            let is_torn = role == Role::Layer(2, LayerRole::Mlp(MlpRole::Down)) && shard.rank == failing;
            // Asked for first to count its bytes.
            match is_torn && n_asked.fetch_add(1, Ordering::Relaxed) > 0 {
                true => Err(Error::Checkpoint("torn".into())),
                false => model.part(role, shard),
            }
        });
        let loaded = on_a_thread(|| Leader::load(led(4), plain(), parts, options, &|_, _| {}).map(drop));
        let Err(error) = loaded else { panic!("loaded") };
        assert!(error.to_string().contains("torn"), "{error}");
    }
}

#[test]
fn two_steps_may_be_under_way() {
    let mut executor = Arc::new(Random::new(plain(), 7, DType::F32)).load(2);
    let request = requests().swap_remove(0);
    let expected = ids(&alone(&mut *executor, std::slice::from_ref(&request), 100)).swap_remove(0);
    let n = request.prompt.len() as u32;
    let row = |start, feed| Row { lane: Lane(0), start, feed, store_from: 0, sample: true, n_targets: 0 };
    let decode = |start| StepInput { rows: vec![row(start, Feed::Last)], ..StepInput::default() };
    let (prompt, slots, sampling) = (request.prompt.clone(), request.slots, request.sampling);
    let prefill = StepInput {
        starts: vec![LaneStart { lane: Lane(0), slots, prompt, sampling }],
        rows: vec![row(0, Feed::Prompt { len: n })],
        prompt_tokens: request.prompt,
        targets: vec![],
    };
    executor.submit(prefill).unwrap();
    let mut outputs = Vec::new();
    for i in 0..N_NEW as u32 - 1 {
        executor.submit(decode(n + i)).unwrap();
        assert!(matches!(executor.submit(decode(n + i + 1)), Err(Error::Bug(_))));
        outputs.extend(executor.wait().unwrap().sampled);
    }
    outputs.extend(executor.wait().unwrap().sampled);
    assert_eq!(ids(&[outputs]), [expected]);
    assert!(matches!(executor.wait(), Err(Error::Bug(_))));
}

/// Log-probabilities of the prompt, in more rows than logits are computed for at a time.
#[test]
fn target_logprobs_do_not_depend_on_chunks_and_follow_the_logits() {
    let model = Arc::new(Random::new(plain(), 8, DType::F32));
    let request = requests().swap_remove(4);
    let targets_by = |n_ranks, chunk: u32| {
        let mut executor = model.load(n_ranks);
        let (mut logprobs, mut fed) = (Vec::new(), 0);
        while fed < 40 {
            let len = chunk.min(40 - fed);
            let (prompt, slots) = (request.prompt.clone(), request.slots.clone());
            let start = LaneStart { lane: Lane(3), slots, prompt, sampling: request.sampling };
            let targets = &request.prompt[fed as usize + 1..(fed as usize + 1 + len as usize).min(40)];
            let feed = Feed::Prompt { len };
            let n_targets = targets.len() as u32;
            let step = StepInput {
                starts: if fed == 0 { vec![start] } else { vec![] },
                rows: vec![Row {
                    lane: Lane(3),
                    start: fed,
                    feed,
                    store_from: 0,
                    sample: fed + len == 40,
                    n_targets,
                }],
                prompt_tokens: request.prompt[fed as usize..(fed + len) as usize].to_vec(),
                targets: targets.to_vec(),
            };
            executor.submit(step).unwrap();
            logprobs.extend(executor.wait().unwrap().target_logprobs);
            fed += len;
        }
        logprobs
    };
    let expected = targets_by(1, 40);
    assert_eq!(expected.len(), 39);
    assert!(expected.iter().all(|logprob| *logprob < 0.0 && logprob.is_finite()));
    assert_eq!(targets_by(1, 7), expected);
    for (ours, expected) in targets_by(2, 11).iter().zip(&expected) {
        assert!((ours - expected).abs() < 1e-4);
    }
    // The last position's, as a greedy choice with alternatives reports it.
    let listed = Request {
        prompt: request.prompt[..39].to_vec(),
        sampling: SamplingParams { top_n: 101, ..SamplingParams::GREEDY },
        ..request.clone()
    };
    let outputs = alone(&mut *model.load(1), &[listed], 100);
    let Sampled::Token { top, .. } = &outputs[0][0] else { panic!() };
    let (_, logprob) = top.iter().find(|(id, _)| *id == request.prompt[39]).unwrap();
    assert_eq!(*logprob, expected[38]);
}

#[test]
fn a_rank_that_fails_ends_the_step_on_all() {
    let model = Arc::new(Random::new(plain(), 9, DType::F32));
    let parts = move |role, shard: Shard| {
        let mut part = model.part(role, shard)?;
        if role == Role::Head && shard.rank == 1 {
            part = part.cut_rows(0..part.rows.len() - 1);
        }
        Ok(part)
    };
    let mut executor = load(plain(), parts, Options { n_ranks: 2, ..OPTIONS }, &|_, _| {}).unwrap();
    let request = requests().swap_remove(1);
    let prefill = StepInput {
        starts: vec![LaneStart {
            lane: Lane(0),
            slots: request.slots,
            prompt: request.prompt.clone(),
            sampling: request.sampling,
        }],
        rows: vec![Row {
            lane: Lane(0),
            start: 0,
            feed: Feed::Prompt { len: 1 },
            store_from: 0,
            sample: true,
            n_targets: 0,
        }],
        prompt_tokens: request.prompt,
        targets: vec![],
    };
    for _ in 0..2 {
        executor.submit(prefill.clone()).unwrap();
        let Err(Error::DeviceLost(text)) = executor.wait() else { panic!("no error") };
        assert!(text.starts_with("rank 0 failed in step 1: ranks disagree"), "{text}");
    }
}

#[test]
fn loading_reports_every_byte() {
    let model = Arc::new(Random::new(plain(), 10, DType::BF16));
    for n_ranks in [1, 2, 4] {
        let heard = std::cell::RefCell::new(Vec::new());
        let parts = {
            let model = Arc::clone(&model);
            move |role, shard| model.part(role, shard)
        };
        let progress = |done, total| heard.borrow_mut().push((done, total));
        let executor = load(plain(), parts, Options { n_ranks, ..OPTIONS }, &progress).unwrap();
        let heard = heard.into_inner();
        let total = executor.info().weight_bytes;
        assert_eq!(heard.last(), Some(&(total, total)));
        assert!(heard.is_sorted());
        assert_eq!(executor.info().dtype, "float32", "what the CPU computes in");
        let kv_heads = n_ranks.max(2) as u64;
        assert_eq!(executor.info().kv_bytes_per_slot, 2 * 3 * kv_heads * 10 * 4);
    }
}

#[test]
fn heads_that_cannot_be_shared_out_are_refused() {
    let model = Arc::new(Random::new(plain(), 11, DType::F32));
    for (n_ranks, fits) in [(1, true), (2, true), (3, false), (4, true), (5, false), (8, true), (16, false)] {
        let parts = {
            let model = Arc::clone(&model);
            move |role, shard| model.part(role, shard)
        };
        let loaded = load(plain(), parts, Options { n_ranks, ..OPTIONS }, &|_, _| {});
        match loaded {
            Ok(_) => assert!(fits, "{n_ranks} ranks were accepted"),
            Err(error) => {
                assert!(!fits && matches!(error, Error::Unsupported(_)), "{n_ranks} ranks: {error}")
            }
        }
    }
}
