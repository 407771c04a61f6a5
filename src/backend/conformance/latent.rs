//! Attention over a latent.

use super::norms::{normed, wide};
use super::*;
use crate::backend::KvRows;
use crate::model::spec::{LatentAttention, Norm};

const NORM: Norm = Norm::Rms { eps: 1e-6 };

fn attention(heads: usize, kv_rank: usize, nope_dim: usize, rope_dim: usize) -> LatentAttention {
    let (query_rank, value_dim, scale) = (None, nope_dim, 0.3);
    LatentAttention { heads, query_rank, kv_rank, nope_dim, rope_dim, value_dim, scale, norm: NORM }
}

/// Small ones, and DeepSeek's.
fn attentions() -> [LatentAttention; 4] {
    [attention(1, 8, 4, 2), attention(3, 24, 10, 6), attention(4, 64, 16, 16), attention(2, 512, 128, 64)]
}

/// A step whose rotary embedding turns the last numbers of a head.
fn begun<B: Probe>(backend: &B, attention: &LatentAttention, ragged: &Ragged) -> B::Step {
    let rope = Rope { base: ROPE_BASE, width: attention.rope_dim, scaling: RopeScaling::Unscaled };
    let shape = StepShape {
        max_tokens: 128,
        n_lanes: 8,
        max_positions: MAX_POSITIONS,
        vocab: VOCAB,
        frequencies: vec![Frequencies::new(&rope)],
        masks: MASKS.to_vec(),
        heads: Heads { heads: attention.heads, kv_heads: 1, head_dim: attention.row_width() },
    };
    let mut step = backend.step(shape).unwrap();
    begin(backend, &ragged.input, &mut step);
    step
}

pub fn linear_of_each_head<B: Probe>(backend: &B) {
    // Of inputs and outputs, how many in a head, and how many of these are used.
    let shapes =
        [(1, (4, 4), (3, 3)), (3, (12, 8), (20, 20)), (4, (24, 16), (40, 32)), (2, (192, 128), (576, 512))];
    for (seed, (heads, (in_stride, inputs), (out_stride, outputs))) in (0..).zip(shapes) {
        for rows in [1, 5, 66] {
            for dtype in [DType::F32, DType::BF16] {
                let w = numbers(heads * outputs * inputs, seed);
                let whole = stored(dtype, &[heads * outputs, inputs], &w);
                let of_head = |head: usize| whole.cut_rows(head * outputs..(head + 1) * outputs);
                let weight = backend.head_weight(&(0..heads).map(of_head).collect::<Vec<_>>()).unwrap();
                // As it lies in a tensor of which it is the other way round.
                let mirrored: Vec<f32> =
                    (0..heads * inputs * outputs).map(|i| mirror(&w, heads, inputs, outputs, i)).collect();
                let mirrored = stored(dtype, &[heads * inputs, outputs], &mirrored);
                let of_head =
                    |head: usize| mirrored.cut_rows(head * inputs..(head + 1) * inputs).transposed();
                let turned = backend.head_weight(&(0..heads).map(of_head).collect::<Vec<_>>()).unwrap();

                let values = numbers(rows * heads * in_stride, seed + 10);
                let before = numbers(rows * heads * out_stride, seed + 20);
                let expected: Vec<f64> = (0..rows * heads * out_stride)
                    .map(|i| {
                        let (row, head, output) =
                            (i / (heads * out_stride), i / out_stride % heads, i % out_stride);
                        if output >= outputs {
                            return f64::from(before[i]);
                        }
                        let x = &values[(row * heads + head) * in_stride..][..inputs];
                        let w = &w[(head * outputs + output) * inputs..][..inputs];
                        x.iter().zip(w).map(|(&x, &w)| f64::from(x) * rounded(dtype, w)).sum()
                    })
                    .collect();
                for weight in [weight, turned] {
                    let mut x = backend.tensor(rows + 2, heads * in_stride).unwrap();
                    let mut out = backend.tensor(rows + 2, heads * out_stride).unwrap();
                    backend.fill(&mut x, &values);
                    backend.fill(&mut out, &before);
                    backend.linear_heads(&weight, rows, &x, &mut out).unwrap();
                    let what = format!("{rows} rows, {heads} heads of {inputs} → {outputs}, {dtype:?}");
                    assert_close(&backend.read(&out), &expected, 4.0 * B::TOLERANCE, &what);
                }
            }
        }
    }
}

/// Number `i` of `[heads, inputs, outputs]`, out of `[heads, outputs, inputs]`.
fn mirror(w: &[f32], heads: usize, inputs: usize, outputs: usize, i: usize) -> f32 {
    let (head, input, output) = (i / (inputs * outputs), i / outputs % inputs, i % outputs);
    assert!(head < heads);
    w[(head * outputs + output) * inputs + input]
}

/// Turns the pairs of halves of some numbers.
fn turned(x: &[f64], position: u32) -> Vec<f64> {
    let half = x.len() / 2;
    let angle = |i: usize| {
        let frequency = ROPE_BASE.powf(-(i as f64) / half as f64) as f32;
        f64::from(position as f32 * frequency)
    };
    let low = (0..half).map(|i| x[i] * angle(i).cos() - x[i + half] * angle(i).sin());
    let high = (0..half).map(|i| x[i + half] * angle(i).cos() + x[i] * angle(i).sin());
    low.chain(high).collect()
}

pub fn latents_are_normed_turned_and_stored<B: Probe>(backend: &B) {
    for attention in attentions() {
        for store_from in [0, 5] {
            let mut ragged = Ragged::new(&[(3, 9), (0, 1), (60, 2), (10, 1)]);
            ragged.input.rows.iter_mut().for_each(|row| row.store_from = store_from);
            let step = begun(backend, &attention, &ragged);
            let tokens = ragged.tokens();
            let LatentAttention { heads, kv_rank, nope_dim, .. } = attention;
            let (query_dim, row_width) = (attention.query_dim(), attention.row_width());
            let n = tokens.len();
            let (queries, latents) = (numbers(n * heads * query_dim, 1), numbers(n * row_width, 2));
            let (before, weight) = (numbers(n * heads * row_width, 3), numbers(kv_rank, 4));
            let filled = |width, numbers: &[f32]| {
                let mut tensor = backend.tensor(n + 2, width).unwrap();
                backend.fill(&mut tensor, numbers);
                tensor
            };
            let mut absorbed = filled(heads * row_width, &before);
            let norm = backend.norm_weight(NORM, &stored(DType::F32, &[kv_rank], &weight), None).unwrap();
            let mut kv = backend.kv(ragged.n_slots, KvRows::Latent { width: row_width }).unwrap();
            backend.fill_kv(&mut kv, &vec![f32::NAN; ragged.n_slots * row_width], &[]);
            let (of_queries, of_latents) = (filled(heads * query_dim, &queries), filled(row_width, &latents));
            backend
                .store_latent(&attention, &norm, &step, &of_queries, &mut absorbed, &of_latents, &mut kv)
                .unwrap();

            let what = format!("{attention:?}, stored from {store_from}");
            let mut expected = wide(&before);
            for (unit, absorbed) in expected.chunks_mut(row_width).enumerate() {
                let query = wide(&queries[unit * query_dim..][..query_dim]);
                absorbed[kv_rank..].copy_from_slice(&turned(&query[nope_dim..], tokens[unit / heads].1));
            }
            assert_close(&backend.read(&absorbed), &expected, 4.0 * B::TOLERANCE, &what);
            let mut rows = vec![None; ragged.n_slots];
            for (token, &(row, position)) in tokens.iter().enumerate() {
                if position >= store_from {
                    let own = wide(&latents[token * row_width..][..row_width]);
                    let mut stored = normed(NORM, &own[..kv_rank], &wide(&weight), &vec![0.0; kv_rank]);
                    stored.extend(turned(&own[kv_rank..], position));
                    rows[ragged.slots[row][position as usize] as usize] = Some(stored);
                }
            }
            let (keys, _) = backend.read_kv(&kv);
            for (slot, (got, expected)) in keys.chunks(row_width).zip(rows).enumerate() {
                let expected = expected.unwrap_or_default();
                assert_close(got, &expected, 4.0 * B::TOLERANCE, &format!("{what}, slot {slot}"));
            }
        }
    }
}

pub fn heads_attend_to_latents<B: Probe>(backend: &B) {
    let mixes: [&[(u32, u32)]; 5] = [
        &[(0, 1)],
        &[(150, 1), (0, 3)],
        &[(63, 1), (64, 1), (65, 1), (0, 64)],
        &[(12, 1), (0, 5), (30, 17), (0, 1), (7, 33), (1, 1), (100, 1)],
        &[(5, 2), (90, 10), (64, 64)],
    ];
    for attention in attentions() {
        for mix in mixes {
            check_attend(backend, &attention, mix);
        }
    }
}

/// More query heads than a kernel takes at once, of DeepSeek's widths.
pub fn many_heads_attend_to_latents<B: Probe>(backend: &B) {
    for mix in [&[(63, 1), (70, 2), (0, 1)][..], &[(64, 1)]] {
        check_attend(backend, &attention(20, 512, 128, 64), mix);
    }
}

fn check_attend<B: Probe>(backend: &B, attention: &LatentAttention, mix: &[(u32, u32)]) {
    let ragged = Ragged::new(mix);
    let step = begun(backend, attention, &ragged);
    let tokens = ragged.tokens();
    let LatentAttention { heads, kv_rank, .. } = *attention;
    let width = attention.row_width();
    let mut seen = vec![false; ragged.n_slots];
    for &(row, position) in &tokens {
        ragged.slots[row][..=position as usize].iter().for_each(|&slot| seen[slot as usize] = true);
    }
    let mut rows = numbers(ragged.n_slots * width, 1);
    let unseen = rows.chunks_mut(width).zip(&seen).filter(|(_, seen)| !**seen);
    unseen.for_each(|(row, _)| row.fill(f32::NAN));
    let absorbed = numbers(tokens.len() * heads * width, 2);
    let mut kv = backend.kv(ragged.n_slots, KvRows::Latent { width }).unwrap();
    backend.fill_kv(&mut kv, &rows, &[]);
    let mut x = backend.tensor(tokens.len() + 2, heads * width).unwrap();
    let mut out = backend.tensor(tokens.len() + 2, heads * kv_rank).unwrap();
    backend.fill(&mut x, &absorbed);
    backend.fill(&mut out, &[]);
    backend.attend_latent(attention, Mask::Causal, &step, &x, &kv, &mut out).unwrap();

    let mut expected = Vec::new();
    for (unit, query) in absorbed.chunks(width).enumerate() {
        let (row, position) = tokens[unit / heads];
        let slots = &ragged.slots[row][..=position as usize];
        let row = |slot: u32| &rows[slot as usize * width..][..width];
        let score = |&slot: &u32| {
            let products = query.iter().zip(row(slot)).map(|(&q, &k)| f64::from(q) * f64::from(k));
            f64::from(attention.scale) * products.sum::<f64>()
        };
        let scores: Vec<f64> = slots.iter().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
        let number = |i: usize| {
            let terms = slots.iter().zip(&scores);
            terms.map(|(&slot, score)| (score - max).exp() / sum * f64::from(row(slot)[i])).sum::<f64>()
        };
        expected.extend((0..kv_rank).map(number));
    }
    // Scores of wide rows are sums of many terms, and their exponentials double their error.
    let tolerance = 8.0 * B::TOLERANCE;
    assert_close(&backend.read(&out), &expected, tolerance, &format!("{attention:?}, {mix:?}"));
}
