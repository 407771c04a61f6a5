//! Where the arithmetic is the same, so is every bit: recorded or op by op, run ahead or not, and again.
//!
//! On one loaded model, since two loads may choose different algorithms.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread;

use kvshard::backend::cuda::{Cuda, World};
use kvshard::backend::step::{Feed, LaneStart, Row, Sampled, SamplingParams, StepInput, StepOutput};
use kvshard::ids::Lane;
use kvshard::model::checkpoint::{Checkpoint, DType};
use kvshard::model::executor::Progress;
use kvshard::model::families;
use kvshard::model::partition::Shard;
use kvshard::model::rank::Rank;
use kvshard::model::weights::Weights;
use kvshard::model::{Device, Options, PoolSize};

use crate::card::{self, Card, DTYPES};
use crate::support::EngineOptions;
use crate::support::driver::{Driver, all, prompt, samplings};

const N_NEW: u32 = 24;
const N_LANES: usize = 8;

/// Runs `body` on every rank of a model with graphs of up to [`N_LANES`] rows: each rank on its thread, all of them the
/// same steps. Only what rank 0 says of a step counts.
pub fn in_ranks(name: &str, dtype: DType, n_ranks: usize, body: impl Fn(&mut Rank<Cuda>, bool) + Sync) {
    let folder = card::model_folder(name);
    let model = families::resolve(&families::read_config(&folder).unwrap()).unwrap();
    let weights = Weights::open(&Checkpoint::open(&folder).unwrap(), &model.spec, &model.names).unwrap();
    let options = Options {
        device: Device::Cuda { dtype },
        n_ranks,
        pool: PoolSize::Slots(1 + N_LANES * 100),
        n_lanes: N_LANES,
        max_step_tokens: 512,
        graphs: true,
        fault: None,
    };
    let parts = move |role, shard| weights.part(role, shard);
    let (world, progress) = (World::new(n_ranks).unwrap(), Progress::new(n_ranks));
    let run = |number| {
        let shard = Shard { rank: number, world: n_ranks };
        let backend = Cuda::of_world(&world, number, dtype).unwrap();
        let mut rank =
            Rank::load(backend, shard, &model.spec, &parts, &options, &|_| (), &progress).unwrap().0;
        let ran = catch_unwind(AssertUnwindSafe(|| body(&mut rank, number == 0)));
        ran.unwrap_or_else(|panic| {
            rank.abort("a test failed");
            resume_unwind(panic)
        });
    };
    let run = &run;
    thread::scope(|scope| (0..n_ranks).for_each(|number| drop(scope.spawn(move || run(number)))));
}

/// How a decode step is run.
#[derive(Debug, Clone, Copy, PartialEq)]
enum By {
    Graph,
    Ops,
}

/// Prompts of so many requests in one step, the log-probabilities of their tokens too, then their decode steps.
fn generate(rank: &mut Rank<Cuda>, n_rows: u32, sampling: &[SamplingParams], by: By) -> Vec<StepOutput> {
    let mut input = StepInput::default();
    for n in 0..n_rows {
        // Some cross the length on which the frequencies of two fixtures depend, in their prompt or behind it.
        let prompt = prompt(n, [5, 60, 33, 70][n as usize % 4]);
        let (lane, len) = (Lane(n), prompt.len() as u32);
        let slots = (0..len + N_NEW - 1).map(|position| 1 + position * N_LANES as u32 + n).collect();
        let sampling = sampling[n as usize % sampling.len()];
        let feed = Feed::Prompt { len };
        input.rows.push(Row { lane, start: 0, feed, store_from: 0, sample: true, n_targets: len - 1 });
        input.prompt_tokens.extend(&prompt);
        input.targets.extend(&prompt[1..]);
        input.starts.push(LaneStart { lane, slots, prompt, sampling });
    }
    let lens: Vec<u32> = input.rows.iter().map(Row::len).collect();
    rank.submit(&input).unwrap();
    let mut outputs = vec![rank.output().unwrap()];
    for step in 0..N_NEW - 1 {
        let row = |(n, len): (u32, &u32)| Row {
            lane: Lane(n),
            start: len + step,
            feed: Feed::Last,
            store_from: 0,
            sample: true,
            n_targets: 0,
        };
        let rows = (0..).zip(&lens).map(row).collect();
        let input = StepInput { rows, ..StepInput::default() };
        match by {
            By::Graph => rank.submit(&input).unwrap(),
            By::Ops => rank.submit_eager(&input).unwrap(),
        }
        outputs.push(rank.output().unwrap());
    }
    outputs
}

/// Ids, and the bits of every log-probability.
fn bits(output: &StepOutput) -> Vec<u32> {
    let of_row = |sampled: &Sampled| match sampled {
        Sampled::Token { id, logprob, top } => {
            let top = top.iter().flat_map(|(id, logprob)| [*id, logprob.to_bits()]);
            [*id, logprob.to_bits()].into_iter().chain(top).collect::<Vec<u32>>()
        }
        Sampled::NoDistribution => panic!("no distribution"),
    };
    let targets = output.target_logprobs.iter().map(|logprob| logprob.to_bits());
    output.sampled.iter().flat_map(of_row).chain(targets).collect()
}

fn same(outputs: &[StepOutput], expected: &[StepOutput], what: &str) {
    for (step, (output, expected)) in outputs.iter().zip(expected).enumerate() {
        assert_eq!(bits(output), bits(expected), "{what}, step {step}");
    }
}

/// A model's steps recorded and op by op, on so many GPUs.
pub fn graphed_or_not(name: &str, dtype: DType, n_ranks: usize) {
    in_ranks(name, dtype, n_ranks, |rank, counts| {
        let check = |outputs: &[StepOutput], expected: &[StepOutput], what: &str| {
            if counts {
                same(outputs, expected, &format!("{name} in {dtype} on {n_ranks} GPUs, {what}"));
            }
        };
        let greedy = [SamplingParams { top_n: 5, ..SamplingParams::GREEDY }];
        for sampling in [&greedy[..], &samplings()] {
            // Buckets; then rows that fill none.
            for n_rows in [1, 2, 4, 8] {
                let expected = generate(rank, n_rows, sampling, By::Graph);
                for by in [By::Graph, By::Ops, By::Graph, By::Ops] {
                    check(
                        &generate(rank, n_rows, sampling, by),
                        &expected,
                        &format!("{n_rows} rows, {by:?}"),
                    );
                }
            }
            for n_rows in [3, 5, 7] {
                let expected = generate(rank, n_rows, sampling, By::Graph);
                let outputs = generate(rank, n_rows, sampling, By::Graph);
                check(&outputs, &expected, &format!("{n_rows} rows again"));
            }
        }
    });
}

#[test]
fn a_graph_computes_what_its_ops_compute() {
    let _gpu = card::alone();
    for name in ["demo", "mistral", "qwen2", "llama-dynamic", "llama-longrope"] {
        DTYPES.into_iter().for_each(|dtype| graphed_or_not(name, dtype, 1));
    }
}

/// A model's answers with the next step run ahead and not, on so many GPUs.
pub fn ahead_or_not(name: &str, dtype: DType, n_ranks: usize) {
    let sizes = EngineOptions {
        n_ranks,
        n_slots: 2000,
        own_slots: 1000,
        n_lanes: 16,
        max_prefill_tokens: 512,
        max_step_tokens: 512,
        run_ahead: false,
    };
    let card = Card::load(name, dtype, sizes);
    let got = [false, true, false, true].map(|run_ahead| {
        let mut driver = Driver::new(card.engine(|options| options.run_ahead = run_ahead));
        (driver.alone(&all()), driver.together(&all()))
    });
    for other in &got[1..] {
        assert_eq!(other, &got[0], "{name} in {dtype} on {n_ranks} GPUs");
    }
}

#[test]
fn running_ahead_changes_nothing() {
    let _gpu = card::alone();
    for (name, dtype) in [("demo", DType::BF16), ("demo", DType::F16), ("llama-longrope", DType::BF16)] {
        ahead_or_not(name, dtype, 1);
    }
}
