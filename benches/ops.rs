//! One op at a time on the CPU: how far from the memory's and the cores' limits?

#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvshard::backend::cpu::{Cpu, Tensor};
use kvshard::backend::step::{Feed, LaneStart, Row, SamplingParams, StepInput};
use kvshard::backend::{Backend, Heads, KvRows, LinearPart, Scores, StepShape};
use kvshard::ids::Lane;
use kvshard::model::checkpoint::{DType, StoredTensor};
use kvshard::model::rope::Frequencies;
use kvshard::model::spec::{Mask, Rope, RopeScaling};
use kvshard::model::weights::TensorPart;

/// Some numbers, none of them special.
fn numbers(n: usize) -> impl Iterator<Item = f32> {
    (0..n).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0)
}

fn fill(tensor: &mut Tensor) {
    let n = tensor.values.len();
    tensor.values.iter_mut().zip(numbers(n)).for_each(|(value, number)| *value = number);
}

/// One row reads every weight once: bytes a second. Many rows share them: multiply-adds a second.
fn linear(criterion: &mut Criterion) {
    let cpu = Cpu::alone();
    let mut group = criterion.benchmark_group("linear");
    for (inputs, outputs) in [(256, 768), (2048, 2048), (4096, 4096)] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let numbers = numbers(inputs * outputs);
            let bytes: Vec<u8> = match dtype {
                DType::F32 => numbers.flat_map(|n| n.to_le_bytes()).collect(),
                DType::F16 => numbers.flat_map(|n| half::f16::from_f32(n).to_le_bytes()).collect(),
                DType::BF16 => numbers.flat_map(|n| half::bf16::from_f32(n).to_le_bytes()).collect(),
            };
            let n_bytes = bytes.len() as u64;
            let Ok(tensor) = StoredTensor::from_bytes(dtype, vec![outputs, inputs], bytes) else { continue };
            let weight = TensorPart::whole(tensor);
            let weight = cpu.weight(&[LinearPart { weight, bias: None }], 1.0).unwrap();
            for rows in [1, 8, 128] {
                let mut x = cpu.tensor(rows, inputs).unwrap();
                fill(&mut x);
                let mut out = cpu.tensor(rows, outputs).unwrap();
                group.throughput(match rows {
                    1 => Throughput::Bytes(n_bytes),
                    _ => Throughput::Elements((rows * inputs * outputs) as u64),
                });
                let id = BenchmarkId::new(format!("{dtype:?}/{inputs}x{outputs}"), rows);
                group.bench_function(id, |bencher| {
                    bencher.iter(|| cpu.linear(&weight, rows, &x, &mut out).unwrap());
                });
            }
        }
    }
}

/// A decode of `rows` requests with `len` tokens each: bytes of keys and values a second.
fn attend(criterion: &mut Criterion) {
    let cpu = Cpu::alone();
    let heads = Heads { heads: 32, kv_heads: 8, head_dim: 128 };
    let mut group = criterion.benchmark_group("attend");
    for (rows, len) in [(1, 128), (1, 4096), (8, 1024)] {
        let n_slots = rows * len;
        let mut input = StepInput::default();
        for row in 0..rows {
            let lane = Lane(row as u32);
            let slots = (0..len).map(|i| ((row * len + i) * 7 % n_slots) as u32).collect();
            let prompt = vec![0; len];
            input.starts.push(LaneStart { lane, slots, prompt, sampling: SamplingParams::GREEDY });
            let (start, feed) = (len as u32 - 1, Feed::Prompt { len: 1 });
            input.rows.push(Row { lane, start, feed, store_from: 0, sample: true, n_targets: 0 });
            input.prompt_tokens.push(0);
        }
        let rope = Rope { base: 10_000.0, width: heads.head_dim, scaling: RopeScaling::Unscaled };
        let frequencies = vec![Frequencies::new(&rope)];
        let shape = StepShape {
            max_tokens: rows,
            n_lanes: rows,
            max_positions: len,
            vocab: 1,
            frequencies,
            masks: vec![Mask::Causal],
            heads,
        };
        let mut step = cpu.step(shape).unwrap();
        cpu.begin(&input, &mut step).unwrap();
        let mut qkv = cpu.tensor(rows, heads.qkv_width()).unwrap();
        fill(&mut qkv);
        let mut kv = cpu.kv(n_slots, KvRows::KeysValues { width: heads.kv_width() }).unwrap();
        kv.keys
            .iter_mut()
            .chain(&mut kv.values)
            .zip(numbers(2 * n_slots * heads.kv_width()))
            .for_each(|(to, number)| *to = number);
        let mut out = cpu.tensor(rows, heads.query_width()).unwrap();
        group.throughput(Throughput::Bytes((2 * n_slots * heads.kv_width() * size_of::<f32>()) as u64));
        let scale = 1.0 / (heads.head_dim as f32).sqrt();
        let scores = Scores { scale, softcap: None, mask: Mask::Causal, slopes: None, sinks: None };
        group.bench_function(BenchmarkId::new(format!("{rows} rows"), len), |bencher| {
            bencher.iter(|| cpu.attend(heads, &scores, &step, &qkv, &kv, &mut out).unwrap());
        });
    }
}

criterion_group!(ops, linear, attend);
criterion_main!(ops);
