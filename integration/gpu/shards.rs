//! Several GPUs as one: all that holds on one GPU, on two and on four where there are so many.

use std::time::{Duration, Instant};

use kvshard::backend::cuda::{self, Cuda, World};
use kvshard::model::Device;
use kvshard::model::checkpoint::DType;
use kvshard::model::families;
use kvshard::model::leader::{Leader, Open};
use kvshard::model::partition::{Partition, Shard};

use crate::card::{self, Card, DTYPES};
use crate::noise::{Noise, Seen};
use crate::rescore::deficits;
use crate::support::EngineOptions;
use crate::support::driver::Driver;
use crate::support::golden::Golden;
use crate::support::process::Serving;
use crate::support::shard::{decode, prefill, request};
use crate::{company, golden, identical};

/// Numbers of ranks that can be had here.
fn worlds() -> Vec<usize> {
    let n_gpus = cuda::count();
    assert!(n_gpus >= 2, "this test needs two GPUs, and there are {n_gpus}");
    [2, 4].into_iter().filter(|&n| n <= n_gpus).collect()
}

/// A model's heads divide among so many ranks.
fn divides(name: &str, n_ranks: usize) -> bool {
    let spec = families::resolve(&families::read_config(&card::model_folder(name)).unwrap()).unwrap().spec;
    Partition::new(&spec, Shard { rank: 0, world: n_ranks }).is_ok()
}

#[test]
fn goldens() {
    let _gpu = card::alone();
    for n_ranks in worlds() {
        let fixtures: Vec<String> =
            golden::fixtures().into_iter().filter(|name| divides(name, n_ranks)).collect();
        assert!(!fixtures.is_empty(), "no fixture can be cut for {n_ranks} ranks");
        DTYPES.into_iter().for_each(|dtype| golden::check_all(fixtures.clone(), dtype, n_ranks));
    }
}

/// As where GPUs cannot see each other's memory.
#[test]
fn nccl_serves_as_well() {
    let _gpu = card::alone();
    let (name, dtype, n_ranks) = ("llama-bias", DType::BF16, 2);
    let golden = Golden::open(name);
    let executor = golden.executor_by(Device::Cuda { dtype }, n_ranks, |spec, parts, options| {
        let world = World::by_nccl(n_ranks)?;
        let open = |rank| -> Open<Cuda> {
            let world = world.clone();
            Box::new(move || Cuda::of_world(&world, rank, dtype))
        };
        let opens = (0..n_ranks).map(open).collect();
        Ok(Box::new(Leader::load(opens, spec, parts, options, &|_, _| ())?))
    });
    let links = executor.info().links.clone();
    assert!(links.as_ref().is_some_and(|links| links.contains("NCCL")), "{links:?}");
    golden::check_by(executor, &golden, name, dtype, "2 ranks by NCCL");
}

#[test]
fn a_graph_computes_what_its_ops_compute() {
    let _gpu = card::alone();
    for n_ranks in worlds() {
        for (name, dtype) in [("demo", DType::BF16), ("llama-longrope", DType::F16)] {
            identical::graphed_or_not(name, dtype, n_ranks);
        }
    }
}

#[test]
fn running_ahead_changes_nothing() {
    let _gpu = card::alone();
    worlds().into_iter().for_each(|n_ranks| identical::ahead_or_not("demo", DType::BF16, n_ranks));
}

#[test]
fn company_changes_no_more_than_rounding_does() {
    let _gpu = card::alone();
    worlds().into_iter().for_each(|n_ranks| company::check("demo", DType::BF16, n_ranks));
}

/// Sums are made in another order: every token of several GPUs is the likeliest on one, within noise.
#[test]
fn tokens_are_those_of_one_gpu() {
    let _gpu = card::alone();
    let asked = company::greedy();
    for (name, dtype) in [("demo", DType::BF16), ("demo", DType::F16)] {
        let mut one = Card::load(name, dtype, company::SIZES);
        let expected = Driver::new(one.engine(|_| ())).alone(&asked);
        for n_ranks in worlds() {
            let several = Card::load(name, dtype, EngineOptions { n_ranks, ..company::SIZES });
            let got = Driver::new(several.engine(|_| ())).together(&asked);
            let (mut seen, mut n_same) = (Seen::default(), 0);
            for ((asked, got), expected) in asked.iter().zip(&got).zip(&expected) {
                n_same += usize::from(got.ids == expected.ids);
                let deficits = deficits(&mut one, &asked.prompt, &got.ids);
                deficits.into_iter().for_each(|deficit| seen.add(deficit.max(0.0)));
            }
            println!(
                "{name:15} {dtype:8} {n_ranks} ranks {} tokens, {:.4} below one GPU's likeliest at most; {n_same} of {} \
                 answers are the same",
                seen.n(),
                seen.largest(),
                asked.len()
            );
            assert!(seen.n() > 100 && seen.largest() <= Noise::of(dtype).margin, "{seen:?}");
        }
    }
}

/// A rank that fails in mid-decode takes the process along within seconds: its caller's call fails, the last line says
/// which rank, which step and why, and the exit code is not 0.
#[test]
fn a_failing_rank_ends_the_process() {
    let _gpu = card::alone();
    assert!(worlds().contains(&2));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for (fault, code, cause) in [
        ("rank-error@4", 7, "giving up: rank 1 failed in step 4: a fault was injected"),
        ("rank-hang@4", 4, "giving up: rank 1 has not begun step 4: a step has been running for 6"),
    ] {
        runtime.block_on(ends_by(fault, code, cause));
    }
}

async fn ends_by(fault: &str, code: i32, cause: &str) {
    let libraries = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    let model = card::model_folder("demo");
    let mut arguments = vec![model.to_str().unwrap()];
    arguments.extend(["--num-shard", "2", "--device", "cuda", "--dtype", "bfloat16", "--max-lanes", "8"]);
    arguments.extend(["--pool-tokens", "4096", "--json-output", "--step-timeout", "1"]);
    arguments.extend(["--inject-fault", fault]);
    let mut serving = Serving::start(&arguments, &[("LD_LIBRARY_PATH", &libraries)]);
    serving.wait_until_ready(0);
    let mut client = serving.client().await;
    client.prefill(prefill(1, vec![request(1, "Once upon a time", 40)], None)).await.unwrap();
    let mut failing = Instant::now();
    while client.decode(decode(&[1])).await.is_ok() {
        failing = Instant::now();
    }
    let ended = serving.wait();
    let took = failing.elapsed();
    assert_eq!(ended.code, Some(code), "{fault}: {ended:?}");
    let texts = ended.json_texts();
    assert!(texts.last().is_some_and(|last| last.starts_with(cause)), "{fault}: {texts:?}");
    println!("{fault}: the process ended after {:.2} s", took.as_secs_f64());
    assert!(took < Duration::from_secs(10), "{took:?}");
}
