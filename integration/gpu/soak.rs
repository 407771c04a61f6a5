//! Random traffic of many clients on the real server: every greedy answer is right, the pool is whole at the end, and
//! the GPU's memory stays as it is.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvshard::backend::step::{StepInput, StepOutput};
use kvshard::error::Result;
use kvshard::model::Device;
use kvshard::model::checkpoint::DType;
use kvshard::model::executor::{Executor, ModelInfo};
use kvshard::text::Tokenizer;

use crate::card;
use crate::noise::{Noise, Seen};
use crate::rescore::deficits;
use crate::support::EngineOptions;
use crate::support::shard::TestShard;
use crate::visitor::{Visit, Visitor};

/// Seconds of traffic of each soak.
const SECONDS: &str = "KVSHARD_SOAK_SECONDS";
const DEFAULT_SECONDS: u64 = 3;

const POOL: u32 = 32_768;
const OWN_SLOTS: u32 = 20_000;
const N_VISITORS: u32 = 6;
/// Steps between two looks at the memory.
const STEPS_A_LOOK: usize = 200;
/// What a driver may take late, for its own.
const MEMORY_SLACK: u64 = 16 << 20;

/// The real executor, and what it saw.
struct Watched {
    inner: Box<dyn Executor>,
    watch: Arc<Mutex<Watch>>,
}

#[derive(Debug, Default)]
struct Watch {
    n_steps: usize,
    most_rows: usize,
    free_bytes: Vec<u64>,
}

impl Executor for Watched {
    fn info(&self) -> &ModelInfo {
        self.inner.info()
    }

    fn submit(&mut self, step: StepInput) -> Result<()> {
        let mut watch = self.watch.lock().unwrap();
        watch.most_rows = watch.most_rows.max(step.rows.len());
        if watch.n_steps.is_multiple_of(STEPS_A_LOOK) {
            watch.free_bytes.extend(self.inner.free_bytes());
        }
        watch.n_steps += 1;
        self.inner.submit(step)
    }

    fn wait(&mut self) -> Result<StepOutput> {
        self.inner.wait()
    }

    fn free_bytes(&self) -> Option<u64> {
        self.inner.free_bytes()
    }
}

/// Traffic until `end`; what each visitor got. The books are balanced afterwards, which [`TestShard::finish`] checks.
async fn traffic(model: &Path, dtype: DType, seconds: u64, watch: Arc<Mutex<Watch>>) -> Vec<Visit> {
    let (pool, own) = (POOL.to_string(), OWN_SLOTS.to_string());
    let mut flags = vec!["--device", "cuda", "--dtype", dtype.name(), "--pool-tokens", &pool];
    flags.extend(["--own-slots", &own, "--max-lanes", "48", "--max-batch-prefill-tokens", "256"]);
    let shard = TestShard::start_around(model, &flags, |inner| Box::new(Watched { inner, watch })).await;
    let tokenizer = Arc::new(Tokenizer::load(model).unwrap());
    // The router first: the shard lends no slots of a router that it knows.
    let placing = Visitor::placing(0, shard.connect().await, tokenizer.clone(), POOL - OWN_SLOTS).await;
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut visits = vec![tokio::spawn(placing.stay(end))];
    for number in 1..N_VISITORS {
        let visitor = Visitor::new(number, shard.connect().await, tokenizer.clone());
        visits.push(tokio::spawn(visitor.stay(end)));
    }
    let mut ended = Vec::new();
    for visit in visits {
        ended.push(visit.await.unwrap());
    }
    shard.finish().await;
    ended
}

fn soak(name: &str, dtype: DType, seconds: u64) {
    let folder = card::model_folder(name);
    let watch = Arc::new(Mutex::new(Watch::default()));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let visits = runtime.block_on(traffic(&folder, dtype, seconds, watch.clone()));
    let watch = watch.lock().unwrap();
    let (least, most) = (watch.free_bytes.iter().min().unwrap(), watch.free_bytes.iter().max().unwrap());
    assert!(most - least <= MEMORY_SLACK, "free bytes went from {most} to {least}: {:?}", watch.free_bytes);
    let total = |count: fn(&Visit) -> usize| visits.iter().map(count).sum::<usize>();
    println!(
        "{name} {dtype}: {} requests by {} calls, {} tokens in {} steps of up to {} rows, {} cut off, {} refused, \
         {} tokens claimed; free memory within {} KiB",
        total(|visit| visit.n_requests),
        total(|visit| visit.n_calls),
        total(|visit| visit.n_tokens),
        watch.n_steps,
        watch.most_rows,
        total(|visit| visit.n_cut_off),
        total(|visit| visit.n_refused),
        total(|visit| visit.n_claimed),
        (most - least) >> 10
    );
    let answers: BTreeSet<_> = visits.iter().flat_map(|visit| &visit.answers).collect();
    let sizes = EngineOptions {
        n_ranks: 1,
        n_slots: 1024,
        own_slots: 0,
        n_lanes: 1,
        max_prefill_tokens: 512,
        max_step_tokens: 512,
        run_ahead: false,
    };
    let mut executor = card::load(&folder, Device::Cuda { dtype }, sizes).unwrap();
    let mut seen = Seen::default();
    for answer in &answers {
        for (index, deficit) in
            deficits(&mut *executor, &answer.prompt, &answer.output).into_iter().enumerate()
        {
            assert!(
                deficit <= Noise::of(dtype).margin,
                "{name} in {dtype}: token {index} is {deficit} below the likeliest in {answer:?}"
            );
            seen.add(deficit.max(0.0));
        }
    }
    println!(
        "{name} {dtype}: {} greedy answers of {} tokens, scored alone, at most {:.4} below the likeliest",
        answers.len(),
        seen.n(),
        seen.largest()
    );
    assert!(answers.len() > 20, "hardly anything was answered");
}

fn seconds() -> u64 {
    std::env::var(SECONDS).map_or(DEFAULT_SECONDS, |text| text.parse().expect("a number of seconds"))
}

#[test]
fn soak_of_the_trained_model() {
    let _gpu = card::alone();
    soak("demo", DType::BF16, seconds());
}

/// Frequencies depend on the length, so that a prefix may not be what the router takes it for.
#[test]
fn soak_of_a_fixture_with_two_lengths() {
    let _gpu = card::alone();
    soak("llama-longrope", DType::F16, seconds().div_ceil(4));
}
