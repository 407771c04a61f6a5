//! Sums over the ranks inside a recorded graph, by our own kernels and by NCCL; and how far apart ranks launch.

use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use kvshard::backend::cuda::{Cuda, World};
use kvshard::backend::{Backend, Heads, StepShape};
use kvshard::model::checkpoint::DType;
use kvshard::model::rope::Frequencies;
use kvshard::model::spec::Mask;

/// Numbers in a row.
const WIDTH: usize = 4096;
/// Bytes of a sum.
const SIZES: [usize; 9] = [1 << 13, 1 << 14, 1 << 15, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 23, 1 << 27];
const REPEATS: usize = 9;

/// Every size by every route: microseconds, the median of all ranks' repeats.
pub fn run(n_ranks: usize) {
    if n_ranks < 2 {
        return;
    }
    let own = World::new(n_ranks).map(|world| measure(&world, n_ranks));
    let nccl = World::by_nccl(n_ranks).map(|world| measure(&world, n_ranks));
    println!("\nsums over {n_ranks} GPUs, in a graph         own µs    NCCL µs");
    for (at, bytes) in SIZES.into_iter().enumerate() {
        let [own, nccl] = [&own, &nccl].map(|measured| match measured {
            Ok(Measured { times, .. }) => format!("{:>10.2}", times[at]),
            Err(_) => format!("{:>10}", "-"),
        });
        println!("{:<36} {own} {nccl}", format!("{} KiB", bytes >> 10));
    }
    nccl.as_ref().err().into_iter().for_each(|error| println!("NCCL: {error}"));
    if let Ok(Measured { spread_us, .. }) = own {
        println!("the ranks' launches of a graph lie {spread_us:.1} µs apart (median)");
    }
}

struct Measured {
    /// By size, of one sum.
    times: Vec<f64>,
    /// Between the first and the last rank whose launch has returned.
    spread_us: f64,
}

fn measure(world: &std::sync::Arc<World>, n_ranks: usize) -> Measured {
    let (barrier, launched) = (Barrier::new(n_ranks), Mutex::new(Vec::new()));
    let run = |rank| {
        let mut cuda = Cuda::of_world(world, rank, DType::BF16).expect("a GPU");
        cuda.attach().expect("attached");
        let mut x = cuda.tensor(SIZES[SIZES.len() - 1] / (2 * WIDTH), WIDTH).expect("memory");
        cuda.share(&mut x).expect("shared");
        let mut step = cuda.step(smallest_step()).expect("memory");
        cuda.meet(0).expect("all ranks");
        let mut times = Vec::new();
        for bytes in SIZES {
            let (rows, n) = (bytes / (2 * WIDTH), if bytes <= 1 << 22 { 256 } else { 16 });
            let sums = |_: &mut _| (0..n).try_for_each(|_| cuda.all_reduce(rows, &mut x));
            let graph = cuda.capture(1, &mut step, sums).expect("recorded").expect("a graph");
            cuda.meet(0).expect("all ranks");
            let mut of_size: Vec<Duration> = Vec::new();
            for _ in 0..REPEATS {
                barrier.wait();
                let began = Instant::now();
                cuda.replay(&graph, &mut step).expect("launched");
                let returned = Instant::now();
                cuda.meet(0).expect("all ranks");
                of_size.push(began.elapsed());
                launched.lock().expect("no panic").push(returned);
            }
            of_size.sort();
            times.push(of_size[REPEATS / 2].as_secs_f64() * 1e6 / n as f64);
        }
        times
    };
    let times = thread::scope(|scope| {
        let ranks: Vec<_> = (0..n_ranks).map(|rank| scope.spawn(move || run(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).next().expect("rank 0")
    });
    let mut launched = launched.into_inner().expect("no panic");
    launched.sort();
    let mut spreads: Vec<Duration> =
        launched.chunks(n_ranks).map(|of_all| of_all[n_ranks - 1] - of_all[0]).collect();
    spreads.sort();
    Measured { times, spread_us: spreads[spreads.len() / 2].as_secs_f64() * 1e6 }
}

fn smallest_step() -> StepShape {
    let spec = crate::resolve(&crate::published("Llama-3.1-8B")).spec;
    StepShape {
        max_tokens: 1,
        n_lanes: 1,
        max_positions: 16,
        vocab: 16,
        frequencies: spec.ropes().iter().map(Frequencies::new).collect(),
        masks: vec![Mask::Causal],
        heads: Heads { heads: 1, kv_heads: 1, head_dim: 128 },
    }
}
