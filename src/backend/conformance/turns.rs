//! What is done to queries and keys before they are stored: norms, rotary embeddings of a part of the head, LogN.

use super::norms::{KINDS, has_bias, normed, wide};
use super::*;
use crate::backend::{KvRows, Turn};
use crate::model::spec::Norm;

/// Longest prompt of the usual frequencies of [`RopeScaling::PromptNtk`].
const TRAINED: u32 = 16;

/// Rotary embeddings of one width.
fn ropes(width: usize) -> [Rope; 3] {
    [
        Rope { base: 1e4, width, scaling: RopeScaling::Unscaled },
        Rope { base: 1e6, width, scaling: RopeScaling::Linear { factor: 8.0 } },
        Rope { base: 1e4, width, scaling: RopeScaling::PromptNtk { trained: TRAINED } },
    ]
}

/// The frequency of pair `i` under one of [`ropes`], in a request with such a prompt.
fn frequency(rope: usize, width: usize, i: usize, prompt_len: u32) -> f64 {
    let (d, power) = (width as f64, 2.0 * i as f64 / width as f64);
    match rope {
        0 => 1e4f64.powf(-power),
        1 => 1e6f64.powf(-power) / 8.0,
        _ => {
            let doublings = (f64::from(prompt_len) / f64::from(TRAINED)).log2() + 1.0;
            let alpha = (doublings.ceil().exp2() - 1.0).max(1.0);
            (1e4 * alpha.powf(d / (d - 2.0))).powf(-power)
        }
    }
}

/// A case: which heads, how many of their numbers turn, by which of [`ropes`], and after which norm.
#[derive(Debug, Clone, Copy)]
struct Case {
    heads: Heads,
    width: usize,
    rope: usize,
    norm: Option<Norm>,
    per_head: bool,
    log_n: Option<u32>,
}

/// Weights of a norm of so many heads, or of one for all.
struct HeadWeights(Vec<f32>);

impl HeadWeights {
    fn new(case: &Case, heads: usize, seed: u32) -> HeadWeights {
        let d = case.heads.head_dim;
        HeadWeights(numbers(if case.per_head { heads * d } else { d }, seed))
    }

    fn upload<B: Probe>(&self, backend: &B, case: &Case) -> Option<B::Norm> {
        let (kind, d) = (case.norm?, case.heads.head_dim);
        let shape = if case.per_head { vec![self.0.len() / d, d] } else { vec![d] };
        Some(backend.norm_weight(kind, &stored(DType::F32, &shape, &self.0), None).unwrap())
    }

    fn normed(&self, case: &Case, head: usize, x: &[f64]) -> Vec<f64> {
        let Some(kind) = case.norm else { return x.to_vec() };
        let d = x.len();
        let at = if case.per_head { head * d } else { 0 };
        normed(kind, x, &wide(&self.0[at..at + d]), &vec![0.0; d])
    }
}

/// Runs a case over tokens of several requests.
fn check<B: Probe>(backend: &B, case: Case) {
    let Case { heads, width, rope, log_n, .. } = case;
    let d = heads.head_dim;
    let ragged = Ragged::new(&[(3, 9), (0, 1), (60, 2), (10, 10), (10, 1)]);
    let frequencies = if width == 0 { vec![] } else { ropes(width).iter().map(Frequencies::new).collect() };
    let mut step = step_with(backend, heads, frequencies);
    begin(backend, &ragged.input, &mut step);
    let (query_norm, key_norm) =
        (HeadWeights::new(&case, heads.heads, 10), HeadWeights::new(&case, heads.kv_heads, 20));
    let norms = (query_norm.upload(backend, &case), key_norm.upload(backend, &case));
    let turn: Turn<'_, B> =
        Turn { norms: norms.0.as_ref().zip(norms.1.as_ref()), rope: (width > 0).then_some(rope), log_n };
    let tokens = ragged.tokens();
    let before = numbers(tokens.len() * heads.qkv_width(), 1);
    let mut qkv = backend.tensor(tokens.len() + 2, heads.qkv_width()).unwrap();
    backend.fill(&mut qkv, &before);
    let kv_width = heads.kv_width();
    let mut kv = backend.kv(ragged.n_slots, KvRows::KeysValues { width: kv_width }).unwrap();
    let poison = vec![f32::NAN; ragged.n_slots * kv_width];
    backend.fill_kv(&mut kv, &poison, &poison);
    backend.rope_store(heads, &turn, &step, &mut qkv, &mut kv).unwrap();

    let turned = |head: Vec<f64>, row: usize, position: u32| {
        let mut out = head.clone();
        let prompt_len = ragged.input.starts[row].prompt.len() as u32;
        for i in 0..width / 2 {
            let frequency = frequency(rope, width, i, prompt_len) as f32;
            let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
            let (a, b) = (head[i], head[i + width / 2]);
            (out[i], out[i + width / 2]) = (a * cos - b * sin, b * cos + a * sin);
        }
        out
    };
    let (keys, values) = backend.read_kv(&kv);
    let (got, tolerance) = (backend.read(&qkv), 8.0 * B::TOLERANCE);
    for (token, &(row, position)) in tokens.iter().enumerate() {
        let numbers = wide(&before[token * heads.qkv_width()..][..heads.qkv_width()]);
        let what = format!("{case:?}, token {token} at {position}");
        let log_n = log_n.filter(|&n| position + 1 > n);
        let factor = log_n.map_or(1.0, |n| f64::from(position + 1).ln() / f64::from(n).ln());
        for head in 0..heads.heads {
            let normed = query_norm.normed(&case, head, &numbers[head * d..][..d]);
            let expected: Vec<f64> = turned(normed, row, position).iter().map(|x| factor * x).collect();
            let got = &got[token * heads.qkv_width() + head * d..][..d];
            assert_close(got, &expected, tolerance, &format!("{what}, query {head}"));
        }
        let slot = ragged.slots[row][position as usize] as usize;
        for head in 0..heads.kv_heads {
            let at = slot * kv_width + head * d;
            let key = &numbers[heads.query_width() + head * d..][..d];
            let expected = turned(key_norm.normed(&case, head, key), row, position);
            assert_close(&keys[at..at + d], &expected, tolerance, &format!("{what}, key {head}"));
            let value = &numbers[heads.query_width() + kv_width + head * d..][..d];
            assert_close(&values[at..at + d], value, 0.0, &format!("{what}, value {head}"));
        }
    }
}

/// Widths of heads, and how much of them turns: StableLM, ChatGLM, Phi, and what no family has.
const WIDTHS: [(usize, usize); 12] = [
    (8, 0),
    (10, 4),
    (16, 4),
    (64, 16),
    (64, 0),
    (80, 80),
    (96, 96),
    (104, 52),
    (128, 64),
    (160, 40),
    (256, 256),
    (256, 64),
];

pub fn every_rotary_width<B: Probe>(backend: &B) {
    for (head_dim, width) in WIDTHS {
        for (heads, kv_heads) in [(2, 2), (6, 2), (5, 1)] {
            for rope in 0..if width == 0 { 1 } else { 2 } {
                let heads = Heads { heads, kv_heads, head_dim };
                check(backend, Case { heads, width, rope, norm: None, per_head: false, log_n: None });
            }
        }
    }
}

pub fn every_norm_of_heads<B: Probe>(backend: &B) {
    for (head_dim, width) in WIDTHS {
        // Heads have no biases.
        for norm in KINDS.into_iter().filter(|&kind| !has_bias(kind)).map(Some) {
            for per_head in [false, true] {
                let heads = Heads { heads: 6, kv_heads: 2, head_dim };
                check(backend, Case { heads, width, rope: 0, norm, per_head, log_n: None });
            }
        }
    }
}

pub fn log_n_and_frequencies_by_the_prompt<B: Probe>(backend: &B) {
    for (head_dim, width) in [(16, 16), (64, 64), (128, 128), (32, 8)] {
        let heads = Heads { heads: 4, kv_heads: 2, head_dim };
        for (rope, log_n) in [(2, None), (2, Some(TRAINED)), (0, Some(5))] {
            check(backend, Case { heads, width, rope, norm: None, per_head: false, log_n });
        }
    }
}
