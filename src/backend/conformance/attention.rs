//! Rope, store and attention.

use super::*;
use crate::backend::{KvRows, Scores, Turn};

pub fn rope_store_rotates_and_stores<B: Probe>(backend: &B) {
    for (kv_heads, ratio, head_dim) in [(1, 1, 8), (2, 3, 10), (2, 2, 64), (1, 8, 128)] {
        let heads = Heads { heads: kv_heads * ratio, kv_heads, head_dim };
        for store_from in [0, 5, 11, 1000] {
            let mut ragged = Ragged::new(&[(3, 9), (0, 1), (60, 2), (10, 1)]);
            ragged.input.rows.iter_mut().for_each(|row| row.store_from = store_from);
            let step = ragged.begin(backend, heads);
            let tokens = ragged.tokens();
            let (width, kv_width) = (heads.qkv_width(), heads.kv_width());
            let before = numbers(tokens.len() * width, 1);
            let mut qkv = backend.tensor(tokens.len() + 2, width).unwrap();
            backend.fill(&mut qkv, &before);
            let mut kv = backend.kv(ragged.n_slots, KvRows::KeysValues { width: kv_width }).unwrap();
            let poison = vec![f32::NAN; ragged.n_slots * kv_width];
            backend.fill_kv(&mut kv, &poison, &poison);
            let turn = Turn { norms: None, rope: Some(0), log_n: None };
            backend.rope_store(heads, &turn, &step, &mut qkv, &mut kv).unwrap();

            let after = rotated(&before, &tokens, heads);
            let what = format!("{heads:?}, stored from {store_from}");
            let keys_at = heads.query_width();
            let got = backend.read(&qkv);
            for (token, (got, after)) in got.chunks(width).zip(after.chunks(width)).enumerate() {
                assert_close(
                    &got[..keys_at],
                    &after[..keys_at],
                    4.0 * B::TOLERANCE,
                    &format!("{what}, {token}"),
                );
            }
            let (keys, values) = backend.read_kv(&kv);
            let mut stored = vec![None; ragged.n_slots];
            for (token, &(row, position)) in
                tokens.iter().enumerate().filter(|(_, token)| token.1 >= store_from)
            {
                stored[ragged.slots[row][position as usize] as usize] = Some(token);
            }
            for (slot, token) in stored.into_iter().enumerate() {
                let at = |token: usize, part: usize| {
                    let first = token * width + heads.query_width() + part * kv_width;
                    &after[first..first + kv_width]
                };
                let range = slot * kv_width..(slot + 1) * kv_width;
                let expected = |part| token.map_or(&[][..], |token| at(token, part));
                assert_close(
                    &keys[range.clone()],
                    expected(0),
                    4.0 * B::TOLERANCE,
                    &format!("{what}, slot {slot}"),
                );
                assert_close(&values[range], expected(1), 0.0, &format!("{what}, slot {slot}"));
            }
        }
    }
}

/// Queries and keys rotated, values as they were.
fn rotated(qkv: &[f32], tokens: &[(usize, u32)], heads: Heads) -> Vec<f64> {
    let d = heads.head_dim;
    let n_rotated = heads.heads + heads.kv_heads;
    let mut out: Vec<f64> = qkv.iter().map(|&x| f64::from(x)).collect();
    for (row, &(_, position)) in out.chunks_mut(heads.qkv_width()).zip(tokens) {
        for head in row.chunks_mut(d).take(n_rotated) {
            for i in 0..d / 2 {
                // The product is single in the published code, where it decides about far positions.
                let frequency = ROPE_BASE.powf(-2.0 * i as f64 / d as f64) as f32;
                let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
                let (a, b) = (head[i], head[i + d / 2]);
                (head[i], head[i + d / 2]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }
    out
}

/// What is computed: which heads, and how their scores are made.
#[derive(Debug, Clone, Copy)]
struct Case {
    heads: Heads,
    mask: Mask,
    scale: f32,
    softcap: Option<f32>,
    /// ALiBi's.
    slopes: bool,
    sinks: bool,
}

impl Case {
    fn plain(heads: Heads, mask: Mask) -> Case {
        let scale = 1.0 / (heads.head_dim as f32).sqrt();
        Case { heads, mask, scale, softcap: None, slopes: false, sinks: false }
    }

    fn slope(&self, head: usize) -> f32 {
        if self.slopes { (-8.0 * (head + 1) as f32 / self.heads.heads as f32).exp2() } else { 0.0 }
    }

    /// Some far below a head's scores, some far above.
    fn sink(&self, head: usize) -> f32 {
        if self.sinks { [-3.0, 0.5, 2.0, 9.0][head % 4] } else { f32::NEG_INFINITY }
    }

    fn visible(&self, position: u32) -> std::ops::Range<u32> {
        match self.mask {
            Mask::Causal => 0..position + 1,
            Mask::Window { window } => (position + 1).saturating_sub(window)..position + 1,
        }
    }

    /// Attention of one token's heads over the slots that it sees, its own last.
    fn reference(&self, query: &[f32], slots: &[u32], keys: &[f32], values: &[f32]) -> Vec<f64> {
        let Heads { heads, kv_heads, head_dim } = self.heads;
        let mut out = vec![0f64; query.len()];
        for head in 0..heads {
            let at = |slot: u32| (slot as usize * kv_heads + head / (heads / kv_heads)) * head_dim;
            let score = |(&slot, ahead): (&u32, usize)| {
                let products = (0..head_dim)
                    .map(|i| f64::from(query[head * head_dim + i]) * f64::from(keys[at(slot) + i]));
                let scaled = products.sum::<f64>() * f64::from(self.scale);
                let capped =
                    self.softcap.map_or(scaled, |cap| f64::from(cap) * (scaled / f64::from(cap)).tanh());
                (capped - f64::from(self.slope(head)) * ahead as f64).exp()
            };
            let weights: Vec<f64> = slots.iter().zip((0..slots.len()).rev()).map(score).collect();
            let sum: f64 = weights.iter().sum::<f64>() + f64::from(self.sink(head)).exp();
            for (weight, &slot) in weights.iter().zip(slots) {
                for i in 0..head_dim {
                    out[head * head_dim + i] += weight / sum * f64::from(values[at(slot) + i]);
                }
            }
        }
        out
    }
}

/// Runs attention over random keys and values, with poison in every slot that no row may see.
fn check_attend<B: Probe>(backend: &B, case: Case, rows: &[(u32, u32)]) {
    let heads = case.heads;
    let ragged = Ragged::new(rows);
    let step = ragged.begin(backend, heads);
    let tokens = ragged.tokens();
    let kv_width = heads.kv_width();
    let mut seen = vec![false; ragged.n_slots];
    for &(row, position) in &tokens {
        case.visible(position).for_each(|p| seen[ragged.slots[row][p as usize] as usize] = true);
    }
    let poisoned = |seed| {
        let mut numbers = numbers(ragged.n_slots * kv_width, seed);
        let unseen = numbers.chunks_mut(kv_width).zip(&seen).filter(|(_, seen)| !**seen);
        unseen.for_each(|(slot, _)| slot.fill(f32::NAN));
        numbers
    };
    let (keys, values) = (poisoned(1), poisoned(2));
    let mut queries = numbers(tokens.len() * heads.qkv_width(), 3);
    queries.iter_mut().for_each(|number| *number *= 4.0);
    let mut kv = backend.kv(ragged.n_slots, KvRows::KeysValues { width: kv_width }).unwrap();
    backend.fill_kv(&mut kv, &keys, &values);
    let mut qkv = backend.tensor(tokens.len() + 2, heads.qkv_width()).unwrap();
    backend.fill(&mut qkv, &queries);
    let mut out = backend.tensor(tokens.len() + 2, heads.query_width()).unwrap();
    backend.fill(&mut out, &[]);
    let vector =
        |of: &dyn Fn(usize) -> f32| backend.vector(&(0..heads.heads).map(of).collect::<Vec<f32>>()).unwrap();
    let slopes = case.slopes.then(|| vector(&|head| case.slope(head)));
    let sinks = case.sinks.then(|| vector(&|head| case.sink(head)));
    let Case { scale, softcap, mask, .. } = case;
    let scores = Scores { scale, softcap, mask, slopes: slopes.as_ref(), sinks: sinks.as_ref() };
    backend.attend(heads, &scores, &step, &qkv, &kv, &mut out).unwrap();

    let mut expected = Vec::new();
    for (token, &(row, position)) in tokens.iter().enumerate() {
        let slots: Vec<u32> = case.visible(position).map(|p| ragged.slots[row][p as usize]).collect();
        let query = &queries[token * heads.qkv_width()..][..heads.query_width()];
        expected.extend(case.reference(query, &slots, &keys, &values));
    }
    assert_close(&backend.read(&out), &expected, 4.0 * B::TOLERANCE, &format!("{case:?}, {rows:?}"));
}

pub fn attend_over_every_length<B: Probe>(backend: &B) {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 16 };
    for len in 1..=70 {
        for mask in MASKS {
            check_attend(backend, Case::plain(heads, mask), &[(len - 1, 1)]);
            check_attend(backend, Case::plain(heads, mask), &[(0, len)]);
        }
    }
}

pub fn attend_over_every_shape<B: Probe>(backend: &B) {
    for head_dim in [8, 10, 16, 32, 64, 80, 96, 112, 128] {
        for (kv_heads, ratio) in [(1, 1), (3, 1), (2, 2), (1, 4), (2, 4), (1, 7)] {
            let heads = Heads { heads: kv_heads * ratio, kv_heads, head_dim };
            for mask in MASKS {
                check_attend(backend, Case::plain(heads, mask), &[(20, 1), (0, 9), (66, 3)]);
            }
        }
    }
}

pub fn attend_over_ragged_rows<B: Probe>(backend: &B) {
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 32 };
    let mixes: [&[(u32, u32)]; 5] = [
        &[(0, 1), (0, 1), (0, 1)],
        &[(63, 1), (64, 1), (65, 1), (0, 64)],
        &[(0, 70), (69, 1)],
        &[(12, 1), (0, 5), (30, 17), (0, 1), (7, 33), (1, 1), (100, 1)],
        &[(5, 2), (90, 10), (64, 64)],
    ];
    for mix in mixes {
        for mask in MASKS {
            check_attend(backend, Case::plain(heads, mask), mix);
        }
    }
}

/// Softcaps, slopes, sinks and another scale, alone and together, over widths with kernels of their own and without.
pub fn attend_by_every_score<B: Probe>(backend: &B) {
    let rows = [(20, 1), (0, 9), (66, 30), (100, 1), (0, 1)];
    for head_dim in [10, 16, 64, 80, 128, 160, 256] {
        for (kv_heads, ratio) in [(2, 1), (1, 6), (2, 3)] {
            let heads = Heads { heads: kv_heads * ratio, kv_heads, head_dim };
            for mask in [Mask::Causal, Mask::Window { window: 7 }] {
                for (softcap, slopes, sinks) in [
                    (Some(2.0), false, false),
                    (None, true, false),
                    (None, false, true),
                    (Some(50.0), true, true),
                ] {
                    let case = Case { softcap, slopes, sinks, scale: 0.15, ..Case::plain(heads, mask) };
                    check_attend(backend, case, &rows);
                }
            }
        }
    }
}

/// More query heads than a kernel takes at once on one KV head: StarCoder, Falcon 7B.
pub fn attend_with_one_kv_head<B: Probe>(backend: &B) {
    for (heads, head_dim) in [(48, 128), (71, 64), (129, 16), (22, 256)] {
        let heads = Heads { heads, kv_heads: 1, head_dim };
        for sinks in [false, true] {
            let case = Case { sinks, ..Case::plain(heads, Mask::Causal) };
            check_attend(backend, case, &[(20, 1), (0, 9), (66, 3), (150, 1)]);
        }
    }
}
