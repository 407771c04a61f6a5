//! Shapes of real models, which the fixtures are too small for: heads of 128 and of 64, products of many rows, prompts of
//! several tiles, graphs of many rows. Random weights, the same on both devices; the CPU in f32 is the reference.

use kvshard::backend::step::{Feed, LaneStart, Row, Sampled, SamplingParams, StepInput};
use kvshard::ids::Lane;
use kvshard::model::checkpoint::{Checkpoint, DType};
use kvshard::model::executor::Executor;
use kvshard::model::families::{self, Resolved};
use kvshard::model::weights::Weights;
use kvshard::model::{self, Device, Options, PoolSize};
use serde_json::{Value, json};

use crate::card::{self, DTYPES};
use crate::noise::{Noise, Seen};
use crate::rescore::{deficits, run};

const N_LANES: u32 = 100;
const N_NEW: u32 = 16;
const MAX_STEP_TOKENS: u32 = 1024;
const LONGEST: u32 = 800;
/// One request in so many is compared: the CPU takes its time.
const COMPARED: usize = 9;

fn config(architecture: &str, heads: u32, kv_heads: u32, head_dim: u32) -> Value {
    json!({
        "architectures": [architecture], "hidden_size": 1024, "num_hidden_layers": 2,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim,
        "intermediate_size": 2816, "vocab_size": 4096, "max_position_embeddings": 1024,
        "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "sliding_window": 200
    })
}

fn load(model: &Resolved, dtype: DType, device: Device) -> Box<dyn Executor> {
    let Resolved { spec, names, .. } = model;
    let checkpoint = match device {
        Device::Cpu => Checkpoint::dummy(spec, names, dtype, 1).unwrap(),
        Device::Cuda { .. } => Checkpoint::dummy_unmade(spec, names, dtype, 1),
    };
    let weights = Weights::open(&checkpoint, spec, names).unwrap();
    let options = Options {
        device,
        n_ranks: 1,
        pool: PoolSize::Slots((N_LANES * 200 + LONGEST) as usize),
        n_lanes: N_LANES as usize,
        max_step_tokens: MAX_STEP_TOKENS as usize,
        graphs: device != Device::Cpu,
        fault: None,
    };
    let parts = move |role, shard| weights.part(role, shard);
    let loaded = model::load(spec.clone(), parts, options, &|_, _| ());
    loaded.unwrap_or_else(|error| panic!("{error}"))
}

/// A request, the log-probabilities of its prompt's tokens but the first, and what it got.
#[derive(Default)]
struct Request {
    prompt: Vec<u32>,
    slots: Vec<u32>,
    logprobs: Vec<f32>,
    output: Vec<u32>,
}

/// Of every length up to 160, and one of [`LONGEST`]; slots lie apart.
fn requests(n: u32) -> Vec<Request> {
    let mut free = (1..n * 200 + LONGEST).map(|i| i * 389 % (n * 200 + LONGEST));
    let request = |i: u32| {
        let len = if i == 0 { LONGEST } else { 1 + i * 37 % 160 };
        let prompt =
            (0..len).map(|position| (position * 131 + i * 977 + position * position) % 4096).collect();
        let slots = free.by_ref().take((len + N_NEW - 1) as usize).collect();
        Request { prompt, slots, logprobs: vec![], output: vec![] }
    };
    (0..n).map(request).collect()
}

fn tokens(sampled: Vec<Sampled>) -> impl Iterator<Item = u32> {
    sampled.into_iter().map(|sampled| match sampled {
        Sampled::Token { id, .. } => id,
        Sampled::NoDistribution => panic!("no distribution"),
    })
}

/// Prompts, as many in one step as it may hold.
fn prefill(executor: &mut dyn Executor, requests: &mut [Request]) {
    let mut first = 0;
    while first < requests.len() {
        let mut input = StepInput::default();
        let mut end = first;
        while let Some(request) = requests.get(end) {
            let len = request.prompt.len() as u32;
            if input.n_tokens() as u32 + len > MAX_STEP_TOKENS {
                break;
            }
            let lane = Lane(end as u32);
            let feed = Feed::Prompt { len };
            input.rows.push(Row { lane, start: 0, feed, store_from: 0, sample: true, n_targets: len - 1 });
            input.prompt_tokens.extend(&request.prompt);
            input.targets.extend(&request.prompt[1..]);
            let (slots, prompt) = (request.slots.clone(), request.prompt.clone());
            input.starts.push(LaneStart { lane, slots, prompt, sampling: SamplingParams::GREEDY });
            end += 1;
        }
        let output = run(executor, input);
        let mut logprobs = output.target_logprobs.into_iter();
        for (request, id) in requests[first..end].iter_mut().zip(tokens(output.sampled)) {
            request.logprobs = logprobs.by_ref().take(request.prompt.len() - 1).collect();
            request.output = vec![id];
        }
        first = end;
    }
}

/// The next token of each request.
fn decode(executor: &mut dyn Executor, requests: &mut [Request]) {
    let row = |(lane, request): (usize, &Request)| Row {
        lane: Lane(lane as u32),
        start: (request.prompt.len() + request.output.len() - 1) as u32,
        feed: Feed::Last,
        store_from: 0,
        sample: true,
        n_targets: 0,
    };
    let rows = requests.iter().enumerate().map(row).collect();
    let output = run(executor, StepInput { rows, ..StepInput::default() });
    requests.iter_mut().zip(tokens(output.sampled)).for_each(|(request, id)| request.output.push(id));
}

fn check(what: &str, config: &Value, dtype: DType) {
    let model = families::resolve(config).unwrap();
    let mut cpu = load(&model, dtype, Device::Cpu);
    let mut gpu = load(&model, dtype, Device::Cuda { dtype });
    let noise = Noise::of(dtype);
    let (mut logprobs, mut below) = (Seen::default(), Seen::default());
    for n in [1, 8, 33, N_LANES] {
        let mut requests = requests(n);
        prefill(&mut *gpu, &mut requests);
        (1..N_NEW).for_each(|_| decode(&mut *gpu, &mut requests));
        for (index, request) in requests.iter().enumerate().step_by(COMPARED) {
            let place = format!("{what} in {dtype}, request {index} of {n}");
            let mut alone = [Request {
                prompt: request.prompt.clone(),
                slots: request.slots.clone(),
                ..Request::default()
            }];
            prefill(&mut *cpu, &mut alone);
            for (found, expected) in request.logprobs.iter().zip(&alone[0].logprobs) {
                let distance = (found - expected).abs();
                assert!(distance <= noise.largest, "{place}: {found} instead of {expected}");
                logprobs.add(distance);
            }
            for (token, deficit) in
                deficits(&mut *cpu, &request.prompt, &request.output).into_iter().enumerate()
            {
                assert!(deficit <= noise.margin, "{place}: token {token} is {deficit} below the likeliest");
                below.add(deficit.max(0.0));
            }
        }
    }
    println!(
        "{what:15} {:8} {} log-probs, off by {:.5} on average and {:.4} at most; {} tokens, {:.4} below the likeliest at most",
        dtype.name(),
        logprobs.n(),
        logprobs.mean(),
        logprobs.largest(),
        below.n(),
        below.largest()
    );
    assert!(logprobs.n() > 1000 && logprobs.mean() <= noise.mean, "{what} in {dtype}: {logprobs:?}");
}

#[test]
fn shapes_of_real_models() {
    let _gpu = card::alone();
    for (what, config) in [
        ("heads of 128", config("LlamaForCausalLM", 8, 2, 128)),
        ("heads of 64", config("LlamaForCausalLM", 16, 16, 64)),
        ("a window", config("MistralForCausalLM", 8, 1, 128)),
    ] {
        DTYPES.into_iter().for_each(|dtype| check(what, &config, dtype));
    }
}
