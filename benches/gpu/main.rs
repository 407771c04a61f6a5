//! Steps on GPUs, start to next start, of a Llama-3.1 shape with random weights: how far from the floor?
//!
//! Sampling, log-probabilities and the advance of lanes are inside; slots are scattered; keys and values are those of real
//! prompts. Arguments: `[decode] [prefill] [gap] [collectives]`, all but the last where none is given; `70b` instead of the
//! 8B shape; `tp2`, `tp4`: over so many GPUs. `$OUT` names a folder for the results as JSON.

#![allow(missing_docs)]

mod collectives;

use std::time::{Duration, Instant};

use kvshard::backend::step::{Feed, LaneStart, Row, Sampled, SamplingParams, StepInput};
use kvshard::ids::Lane;
use kvshard::model::checkpoint::{Checkpoint, DType};
use kvshard::model::executor::Executor;
use kvshard::model::families::{self, Resolved};
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
const LONGEST: usize = 2048;

/// A model, the GPUs that it is cut for, and what is run on it.
struct Shape {
    model: Resolved,
    n_ranks: usize,
    n_lanes: usize,
    /// Rows and context of decode steps.
    decodes: &'static [(usize, usize)],
    /// Prompts and their length.
    prefills: &'static [(usize, usize)],
}

impl Shape {
    fn llama31_8b(n_ranks: usize) -> Shape {
        Shape {
            model: llama31(4096, 32, 32, 14336),
            n_ranks,
            n_lanes: 256,
            decodes: &[
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
            ],
            prefills: &[(1, 512), (1, 2048), (1, 8192), (8, 1024)],
        }
    }

    fn llama31_70b(n_ranks: usize) -> Shape {
        Shape {
            model: llama31(8192, 80, 64, 28672),
            n_ranks,
            n_lanes: 128,
            decodes: &[(1, 512), (32, 512), (64, 512), (128, 512), (32, 2048), (128, 2048)],
            prefills: &[(1, 2048), (1, 8192)],
        }
    }

    fn n_slots(&self) -> usize {
        self.n_lanes * (LONGEST + 64) + 1
    }

    /// Weights that every token passes, without the embedding.
    fn n_weights(&self) -> f64 {
        let spec = &self.model.spec;
        spec.n_parameters() as f64 - (spec.vocab * spec.hidden) as f64
    }

    /// Seconds in which a step's weights are read.
    fn read_s(&self) -> f64 {
        2.0 * self.n_weights() / self.n_ranks as f64 / BANDWIDTH
    }

    /// Seconds in which keys and values of so many tokens are read.
    fn read_kv_s(&self, n_tokens: usize) -> f64 {
        let spec = &self.model.spec;
        let bytes = 4 * spec.layers() * spec.attention.kv_heads * spec.attention.head_dim;
        (n_tokens * bytes) as f64 / self.n_ranks as f64 / BANDWIDTH
    }

    /// Seconds of the products of so many tokens; `per_s` operations a second.
    fn products_s(&self, n_tokens: usize, n_logits: usize, per_s: f64) -> f64 {
        let head = (self.model.spec.vocab * self.model.spec.hidden) as f64;
        let layers = self.n_weights() - head;
        2.0 * (layers * n_tokens as f64 + head * n_logits as f64) / self.n_ranks as f64 / per_s
    }

    /// Seconds of the attention of `n` prompts.
    fn attention_s(&self, n: usize, len: usize) -> f64 {
        let spec = &self.model.spec;
        let width = spec.attention.heads * spec.attention.head_dim * spec.layers();
        2.0 * width as f64 * (n * len * len) as f64 / self.n_ranks as f64 / ATTENTION
    }

    /// The slot of a lane's position: neighbours lie far apart, and no slot comes twice.
    fn slot(&self, lane: usize, position: usize) -> u32 {
        const STRIDE: usize = 7919;
        let n = self.n_slots() - 1;
        ((lane * (LONGEST + 64) + position) * STRIDE % n + 1) as u32
    }

    fn start(&self, lane: usize, len: usize, n_slots: usize) -> LaneStart {
        LaneStart {
            lane: Lane(lane as u32),
            slots: (0..n_slots).map(|position| self.slot(lane, position)).collect(),
            prompt: prompt(lane, len),
            sampling: SamplingParams::GREEDY,
        }
    }
}

fn llama31(hidden: usize, layers: usize, heads: usize, neurons: usize) -> Resolved {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "intermediate_size": neurons, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192
        }
    });
    let mut model = families::resolve(&config).expect("a config of ours");
    // Slot tables of no more than is run here.
    model.spec.max_positions = 1 << 14;
    model
}

struct Bench {
    shape: Shape,
    executor: Box<dyn Executor>,
    rows: Vec<serde_json::Value>,
}

fn main() {
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let has = |name: &str| wanted.iter().any(|argument| argument == name);
    let n_ranks = wanted.iter().find_map(|argument| argument.strip_prefix("tp")?.parse().ok()).unwrap_or(1);
    let parts = ["decode", "prefill", "gap", "collectives"];
    let wants = |name: &str| has(name) || (name != "collectives" && !parts.iter().any(|part| has(part)));
    if wants("collectives") {
        collectives::run(n_ranks);
    }
    if !parts[..3].iter().any(|part| wants(part)) {
        return;
    }
    let began = Instant::now();
    let shape = if has("70b") { Shape::llama31_70b(n_ranks) } else { Shape::llama31_8b(n_ranks) };
    let Resolved { spec, names, .. } = &shape.model;
    let checkpoint = Checkpoint::dummy_unmade(spec, names, DType::BF16, 1);
    let weights = Weights::open(&checkpoint, spec, names).expect("weights of this spec");
    let options = Options {
        device: Device::Cuda { dtype: DType::BF16 },
        n_ranks,
        pool: PoolSize::Slots(shape.n_slots()),
        n_lanes: shape.n_lanes,
        max_step_tokens: STEP_TOKENS,
        graphs: true,
        fault: None,
    };
    let parts = move |role, shard| weights.part(role, shard);
    let executor = match model::load(spec.clone(), parts, options, &|_, _| ()) {
        Ok(executor) => executor,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    };
    executor.info().links.iter().for_each(|links| println!("{links}"));
    println!("loaded, measured and recorded in {:.2} s", began.elapsed().as_secs_f64());
    let mut bench = Bench { shape, executor, rows: Vec::new() };
    if wants("prefill") {
        bench.prefills();
    }
    if wants("decode") || wants("gap") {
        let filling = Instant::now();
        bench.fill();
        println!(
            "{} prompts of {LONGEST} tokens in {:.2} s",
            bench.shape.n_lanes,
            filling.elapsed().as_secs_f64()
        );
    }
    if wants("decode") {
        bench.decodes();
    }
    if wants("gap") {
        bench.gaps();
    }
    if let Some(folder) = std::env::var_os("OUT") {
        let text = serde_json::to_string_pretty(&bench.rows).expect("JSON");
        std::fs::write(std::path::Path::new(&folder).join("gpu.json"), text).expect("a file in $OUT");
    }
}

fn prompt(lane: usize, len: usize) -> Vec<u32> {
    (0..len).map(|i| ((lane * 7 + i * 31 + i * i) % 128_000) as u32).collect()
}

impl Bench {
    fn run(&mut self, step: StepInput) -> Vec<Sampled> {
        self.executor.submit(step).expect("submitted");
        self.executor.wait().expect("a step").sampled
    }

    /// Prompts to their first token.
    fn prefill_step(&self, lanes: &[usize], len: usize) -> StepInput {
        let mut input = StepInput::default();
        for &lane in lanes {
            let tokens = prompt(lane, len);
            let feed = Feed::Prompt { len: len as u32 };
            let lane_id = Lane(lane as u32);
            input.rows.push(Row { lane: lane_id, start: 0, feed, store_from: 0, sample: true, n_targets: 0 });
            input.prompt_tokens.extend(tokens);
            // Longer prompts than a lane's share of the pool take the slots of lanes that are not used then.
            input.starts.push(self.shape.start(lane, len, len));
        }
        input
    }

    fn prefills(&mut self) {
        println!("\nprefill               floor ms     ms   of floor   tokens/s");
        for &(n, len) in self.shape.prefills {
            let lanes: Vec<usize> = (0..n).collect();
            let time = median(12, || {
                let step = self.prefill_step(&lanes, len);
                let began = Instant::now();
                self.run(step);
                began.elapsed()
            });
            let tokens = (n * len) as f64;
            let shape = &self.shape;
            let operations = shape.products_s(n * len, n, PRODUCTS) + shape.attention_s(n, len);
            let floor = operations.max(shape.read_s()) * 1e3;
            println!(
                "{:<20} {floor:>9.2} {time:>7.2} {:>9.2}x {:>10.0}",
                format!("{n} x {len}"),
                time / floor,
                tokens / time * 1e3
            );
            self.rows.push(json!({"what": "prefill", "ranks": self.shape.n_ranks, "rows": n, "len": len, "ms": time, "floor_ms": floor}));
        }
    }

    fn fill(&mut self) {
        let n_lanes = self.shape.n_lanes;
        for first in (0..n_lanes).step_by(STEP_TOKENS / LONGEST) {
            let lanes: Vec<usize> = (first..(first + STEP_TOKENS / LONGEST).min(n_lanes)).collect();
            self.run(self.prefill_step(&lanes, LONGEST));
        }
    }

    /// Lanes whose next token is at position `context − 1`, their keys and values in place.
    fn at_context(&mut self, n: usize, context: usize) {
        let mut input = StepInput::default();
        for lane in 0..n {
            let begin = self.shape.start(lane, context - 1, context + 60);
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
        for &(n, context) in self.shape.decodes {
            self.at_context(n, context);
            const STEPS: usize = 24;
            let mut times = Vec::new();
            self.executor.submit(Bench::decode_step(n, context - 1)).expect("submitted");
            let mut last: Option<Instant> = None;
            for step in 1..=STEPS {
                self.executor.submit(Bench::decode_step(n, context - 1 + step)).expect("submitted");
                self.executor.wait().expect("a step");
                let now = Instant::now();
                times.extend(last.map(|last| now - last));
                last = Some(now);
            }
            self.executor.wait().expect("a step");
            let time = middle(&mut times);
            let mut position = context + STEPS;
            let alone = median(12, || {
                let began = Instant::now();
                self.run(Bench::decode_step(n, position));
                position += 1;
                began.elapsed()
            });
            let shape = &self.shape;
            let products = shape.products_s(n, n, 790e12);
            let floor = (shape.read_s().max(products) + shape.read_kv_s(n * context)) * 1e3;
            println!(
                "{:<20} {floor:>9.2} {time:>7.3} {:>9.2}x {:>10.0} {alone:>9.3}",
                format!("{n} x {context}"),
                time / floor,
                n as f64 / time * 1e3
            );
            let row = json!({"what": "decode", "ranks": self.shape.n_ranks, "rows": n, "context": context, "ms": time, "floor_ms": floor,
                "one_by_one_ms": alone});
            self.rows.push(row);
        }
    }

    /// What a step costs beyond the device's time when the next is submitted only after its tokens are known.
    fn gaps(&mut self) {
        self.at_context(64, 512);
        let mut times = Vec::new();
        for step in 0..48 {
            let input = Bench::decode_step(64, 511 + step);
            let began = Instant::now();
            self.executor.submit(input).expect("submitted");
            times.push(began.elapsed());
            self.executor.wait().expect("a step");
        }
        println!("\nsubmitting 64 rows takes {:.1} µs of the host", middle(&mut times) * 1e3);
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
