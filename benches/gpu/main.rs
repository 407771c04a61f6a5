//! Steps on GPUs, start to next start, with random weights: how far from the floor?
//!
//! Sampling, log-probabilities and the advance of lanes are inside. Keys and values are those of real prompts, in the slots
//! that a fresh pool deals out: a request's side by side, one request after the other. With `scattered`, every token lies
//! far from its neighbours, all over the pool; its pages are then more than a GPU's address translation holds.
//!
//! Arguments: `[decode] [prefill] [gap] [collectives]`, all but the last where none is given; `scattered`; `lanes=N` and
//! `longest=N` bound the rows and contexts of decode steps; `ranks=N` cuts the model for so many GPUs; `shape=BLOOM-7b1`, or
//! a path that ends in `.json`, is another shape than Llama-3.1-8B's. `$OUT` names a folder for the results as JSON.

#![allow(missing_docs)]

mod collectives;

use std::time::{Duration, Instant};

use kvshard::backend::step::{Feed, LaneStart, Row, Sampled, SamplingParams, StepInput};
use kvshard::ids::Lane;
use kvshard::model::checkpoint::{Checkpoint, DType};
use kvshard::model::executor::Executor;
use kvshard::model::families::{self, Resolved};
use kvshard::model::spec::{Attention, DecoderSpec, Head, Mlp};
use kvshard::model::weights::Weights;
use kvshard::model::{self, Device, Options, PoolSize};
use serde_json::json;

/// Bytes a second of a large copy on an H200.
const BANDWIDTH: f64 = 4.3e12;
/// Floating-point operations a second of cuBLAS's products of this shape.
const PRODUCTS: f64 = 680e12;
/// Of the best attention.
const ATTENTION: f64 = 600e12;
const STEP_TOKENS: usize = 8192;
/// Prompts that keys and values are made of, in tokens.
const FILLING: usize = 2048;
/// Slots of a lane beyond the context at which it is measured.
const SPARE: usize = 64;
/// How long the GPU rests after prompts were made: prefill leaves it hot, with clocks that a decoding GPU does not have.
const REST: Duration = Duration::from_secs(2);

/// The config of a published shape.
fn published(name: &str) -> serde_json::Value {
    let shapes = include_str!("../../src/model/families/tests/published.json");
    let shapes: Vec<serde_json::Value> = serde_json::from_str(shapes).expect("JSON");
    let shape = shapes.into_iter().find(|shape| shape["name"] == name);
    shape.expect("the name of a published shape")["config"].clone()
}

/// What is measured, and how many slots it takes.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    /// GPUs; what follows of weights, bytes and operations is one's share.
    ranks: usize,
    /// Most rows of a decode step.
    lanes: usize,
    /// Longest context of a decode step.
    longest: usize,
    vocab: usize,
    /// Weights that a step multiplies by.
    weights: f64,
    /// Of these, in layers.
    layer_weights: f64,
    /// Of these, of experts.
    expert_weights: f64,
    /// Share of the experts that a token chooses.
    chosen: f64,
    /// Keys and values of a token, in bytes.
    kv: f64,
    /// Floating-point operations of a query and a key in all layers.
    attention: f64,
    /// Whether a request's tokens lie apart.
    scattered: bool,
}

impl Sizes {
    fn new(spec: &DecoderSpec, ranks: usize, lanes: usize, longest: usize, scattered: bool) -> Sizes {
        let (table, kv) = ((spec.vocab * spec.hidden) as f64, spec.kv_elements_per_token() as f64 * 2.0);
        let tables = if spec.head == Head::Tied { 1.0 } else { 2.0 };
        let layer_weights = spec.n_parameters() as f64 - tables * table;
        let share = 1.0 / ranks as f64;
        let (attention, kv) = match spec.attention {
            Attention::Heads(heads) => (4 * heads.heads * heads.head_dim, kv * share),
            // Every rank keeps the whole latent.
            Attention::Latent(latent) => (4 * latent.heads * latent.row_width(), kv),
        };
        let attention = (attention * spec.layers.len()) as f64 * share;
        let (mut expert_weights, mut chosen) = (0.0, 1.0);
        for layer in &spec.layers {
            if let Mlp::Experts(experts) = layer.mlp {
                expert_weights += (3 * spec.hidden * experts.width * experts.n_experts) as f64 * share;
                chosen = experts.n_chosen as f64 / experts.n_experts as f64;
            }
        }
        let (vocab, weights) = (spec.vocab, (layer_weights + table) * share);
        let layer_weights = layer_weights * share;
        Sizes {
            ranks,
            lanes,
            longest,
            vocab,
            weights,
            layer_weights,
            expert_weights,
            chosen,
            kv,
            attention,
            scattered,
        }
    }

    /// Bytes of weights that a step reads: of experts, those that its rows touch when each chooses at random.
    fn read(&self, rows: usize) -> f64 {
        let untouched = (1.0 - self.chosen).powi(rows as i32);
        2.0 * (self.weights - untouched * self.expert_weights)
    }

    /// Of `weights`, those that a token is multiplied by.
    fn active(&self, weights: f64) -> f64 {
        weights - (1.0 - self.chosen) * self.expert_weights
    }

    fn n_slots(&self) -> usize {
        (self.lanes * (self.longest + SPARE)).max(STEP_TOKENS).next_multiple_of(FILLING) + 1
    }
}

fn resolve(config: &serde_json::Value) -> Resolved {
    let mut model = families::resolve(config).expect("a config of a known family");
    // Slot tables of no more than is run here.
    model.spec.max_positions = model.spec.max_positions.min(1 << 14);
    model
}

struct Bench {
    executor: Box<dyn Executor>,
    sizes: Sizes,
    /// Places of the pool, from its first on, that hold keys and values.
    n_filled: usize,
    rows: Vec<serde_json::Value>,
}

fn main() {
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let is_part = |argument: &&String| !argument.contains(['=', '.']) && *argument != "scattered";
    let has = |name: &str| wanted.iter().any(|argument| argument == name);
    let wants = |name: &str| !wanted.iter().any(|argument| is_part(&argument)) || has(name);
    let size = |name: &str, usual| {
        let value = wanted.iter().find_map(|argument| argument.strip_prefix(name)?.strip_prefix('='));
        value.map_or(usual, |value| value.parse().expect("a number"))
    };
    let n_ranks = size("ranks", 1);
    if has("collectives") {
        collectives::run(n_ranks);
    }
    if !["decode", "prefill", "gap"].into_iter().any(wants) {
        return;
    }
    let file = wanted.iter().find(|argument| argument.ends_with(".json"));
    let shape = wanted.iter().find_map(|argument| argument.strip_prefix("shape="));
    let config = match file {
        Some(path) => serde_json::from_str(&std::fs::read_to_string(path).expect("a config")).expect("JSON"),
        None => published(shape.unwrap_or("Llama-3.1-8B")),
    };
    let began = Instant::now();
    let model = resolve(&config);
    let (lanes, longest) = (size("lanes", 256), size("longest", 2048));
    let sizes = Sizes::new(&model.spec, n_ranks, lanes, longest, has("scattered"));
    let checkpoint = Checkpoint::dummy_unmade(&model.spec, &model.names, DType::BF16, 1);
    let weights = Weights::open(&checkpoint, &model.spec, &model.names).expect("weights of this spec");
    let options = Options {
        device: Device::Cuda { dtype: DType::BF16 },
        n_ranks,
        pool: PoolSize::Slots(sizes.n_slots()),
        n_lanes: sizes.lanes,
        max_step_tokens: STEP_TOKENS,
        graphs: true,
        fault: None,
    };
    let parts = move |role, shard| weights.part(role, shard);
    let executor = match model::load(model.spec, parts, options, &|_, _| ()) {
        Ok(executor) => executor,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    };
    executor.info().links.iter().for_each(|links| println!("{links}"));
    println!("loaded, measured and recorded in {:.2} s", began.elapsed().as_secs_f64());
    let mut bench = Bench { executor, sizes, n_filled: 0, rows: Vec::new() };
    if wants("decode") {
        bench.decodes();
    }
    if wants("gap") {
        bench.gaps();
    }
    if wants("prefill") {
        bench.prefills();
    }
    if let Some(folder) = std::env::var_os("OUT") {
        let text = serde_json::to_string_pretty(&bench.rows).expect("JSON");
        std::fs::write(std::path::Path::new(&folder).join("gpu.json"), text).expect("a file in $OUT");
    }
}

impl Sizes {
    /// The slot of a place in the pool. Scattered, neighbours lie far apart, and no slot comes twice.
    fn slot(&self, place: usize) -> u32 {
        const STRIDE: usize = 7919;
        let n = self.n_slots() - 1;
        (if self.scattered { place * STRIDE % n } else { place }) as u32 + 1
    }

    fn prompt(&self, lane: usize, len: usize) -> Vec<u32> {
        (0..len).map(|i| ((lane * 7 + i * 31 + i * i) % self.vocab) as u32).collect()
    }

    /// A lane whose positions lie from a place on.
    fn start(&self, lane: usize, place: usize, len: usize, n_slots: usize) -> LaneStart {
        LaneStart {
            lane: Lane(lane as u32),
            slots: (place..place + n_slots).map(|place| self.slot(place)).collect(),
            prompt: self.prompt(lane, len),
            sampling: SamplingParams::GREEDY,
        }
    }
}

impl Bench {
    fn run(&mut self, step: StepInput) -> Vec<Sampled> {
        self.executor.submit(step).expect("submitted");
        self.executor.wait().expect("a step").sampled
    }

    /// `n` prompts to their first token, side by side from a place on.
    fn prefill_step(&self, n: usize, len: usize, place: usize) -> StepInput {
        let mut input = StepInput::default();
        for lane in 0..n {
            let tokens = self.sizes.prompt(lane, len);
            let feed = Feed::Prompt { len: len as u32 };
            let lane_id = Lane(lane as u32);
            input.rows.push(Row { lane: lane_id, start: 0, feed, store_from: 0, sample: true, n_targets: 0 });
            input.prompt_tokens.extend(tokens);
            input.starts.push(self.sizes.start(lane, place + lane * len, len, len));
        }
        input
    }

    fn prefills(&mut self) {
        println!("\nprefill               floor ms     ms   of floor   tokens/s");
        for (n, len) in [(1, 512), (1, 2048), (1, 8192), (8, 1024)] {
            let time = median(12, || {
                let step = self.prefill_step(n, len, 0);
                let began = Instant::now();
                self.run(step);
                began.elapsed()
            });
            let tokens = (n * len) as f64;
            let operations = 2.0 * self.sizes.active(self.sizes.layer_weights) * tokens / PRODUCTS;
            let attention = self.sizes.attention * tokens * len as f64 / 2.0 / ATTENTION;
            let floor = ((operations + attention).max(self.sizes.read(n * len) / BANDWIDTH)) * 1e3;
            println!(
                "{:<20} {floor:>9.2} {time:>7.2} {:>9.2}x {:>10.0}",
                format!("{n} x {len}"),
                time / floor,
                tokens / time * 1e3
            );
            self.rows.push(json!({"what": "prefill", "ranks": self.sizes.ranks, "rows": n, "len": len, "ms": time, "floor_ms": floor}));
        }
    }

    /// Makes keys and values in the pool's first places, by prompts that are rounded up to whole steps.
    fn fill(&mut self, n_places: usize) {
        if n_places <= self.n_filled {
            return;
        }
        let at_once = (STEP_TOKENS / FILLING).min(self.sizes.lanes);
        while self.n_filled < n_places {
            let room = (self.sizes.n_slots() - 1 - self.n_filled) / FILLING;
            let n = at_once.min(room);
            self.run(self.prefill_step(n, FILLING, self.n_filled));
            self.n_filled += n * FILLING;
        }
        std::thread::sleep(REST);
    }

    /// Lanes whose next token is at position `context − 1`, their keys and values in place.
    fn at_context(&mut self, n: usize, context: usize) {
        let room = context + SPARE;
        self.fill(n * room);
        let mut input = StepInput::default();
        for lane in 0..n {
            let begin = self.sizes.start(lane, lane * room, context - 1, room);
            input.prompt_tokens.push(begin.prompt[context - 2]);
            let (start, feed) = (context as u32 - 2, Feed::Prompt { len: 1 });
            let lane = Lane(lane as u32);
            input.rows.push(Row { lane, start, feed, store_from: start, sample: true, n_targets: 0 });
            input.starts.push(begin);
        }
        self.run(input);
    }

    fn decode_step(n: usize, position: usize) -> StepInput {
        let row = |lane| Row {
            lane: Lane(lane as u32),
            start: position as u32,
            feed: Feed::Last,
            store_from: position as u32,
            sample: true,
            n_targets: 0,
        };
        StepInput { rows: (0..n).map(row).collect(), ..StepInput::default() }
    }

    /// The next step is submitted before the one under way has ended: the device never waits.
    fn decodes(&mut self) {
        println!("\ndecode                floor ms     ms   of floor   tokens/s   asked one by one");
        for (n, context) in [
            (1, 512),
            (8, 512),
            (32, 512),
            (64, 512),
            (128, 512),
            (256, 512),
            (1, 2048),
            (64, 2048),
            (128, 2048),
            (256, 2048),
        ] {
            if n > self.sizes.lanes || context > self.sizes.longest {
                continue;
            }
            const STEPS: usize = 40;
            // A context grows with every step: the mean of those measured is the one named.
            let begin = context - STEPS / 2;
            self.at_context(n, begin);
            let mut times = Vec::new();
            self.executor.submit(Bench::decode_step(n, begin - 1)).expect("submitted");
            let mut last: Option<Instant> = None;
            for step in 1..=STEPS {
                self.executor.submit(Bench::decode_step(n, begin - 1 + step)).expect("submitted");
                self.executor.wait().expect("a step");
                let now = Instant::now();
                times.extend(last.map(|last| now - last));
                last = Some(now);
            }
            self.executor.wait().expect("a step");
            let time = middle(&mut times);
            let mut position = begin + STEPS;
            let alone = median(12, || {
                let began = Instant::now();
                self.run(Bench::decode_step(n, position));
                position += 1;
                began.elapsed()
            });
            let sizes = &self.sizes;
            let operations = 2.0 * sizes.active(sizes.weights) * n as f64;
            let products = (sizes.read(n) / BANDWIDTH).max(operations / 790e12);
            let floor = (products + n as f64 * context as f64 * sizes.kv / BANDWIDTH) * 1e3;
            println!(
                "{:<20} {floor:>9.2} {time:>7.3} {:>9.2}x {:>10.0} {alone:>9.3}",
                format!("{n} x {context}"),
                time / floor,
                n as f64 / time * 1e3
            );
            let row = json!({"what": "decode", "ranks": self.sizes.ranks, "rows": n, "context": context, "ms": time, "floor_ms": floor,
                "one_by_one_ms": alone});
            self.rows.push(row);
        }
    }

    /// What a step costs beyond the device's time when the next is submitted only after its tokens are known.
    fn gaps(&mut self) {
        let rows = self.sizes.lanes.min(64);
        self.at_context(rows, 512);
        let mut times = Vec::new();
        for step in 0..48 {
            let input = Bench::decode_step(rows, 511 + step);
            let began = Instant::now();
            self.executor.submit(input).expect("submitted");
            times.push(began.elapsed());
            self.executor.wait().expect("a step");
        }
        println!("\nsubmitting {rows} rows takes {:.1} µs of the host", middle(&mut times) * 1e3);
    }
}

/// In milliseconds; the first runs do not count.
fn median(n: usize, mut run: impl FnMut() -> Duration) -> f64 {
    let mut times: Vec<Duration> = (0..n + 2).map(|_| run()).skip(2).collect();
    middle(&mut times)
}

fn middle(times: &mut [Duration]) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}
