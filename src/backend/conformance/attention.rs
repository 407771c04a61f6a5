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

/// Runs attention over random keys and values, with poison in every slot that no row may see.
fn check_attend<B: Probe>(backend: &B, heads: Heads, mask: Mask, rows: &[(u32, u32)]) {
    let ragged = Ragged::new(rows);
    let step = ragged.begin(backend, heads);
    let tokens = ragged.tokens();
    let kv_width = heads.kv_width();
    let visible = |position: u32| match mask {
        Mask::Causal => 0..position + 1,
        Mask::Window { window } => (position + 1).saturating_sub(window)..position + 1,
    };
    let mut seen = vec![false; ragged.n_slots];
    for &(row, position) in &tokens {
        visible(position).for_each(|p| seen[ragged.slots[row][p as usize] as usize] = true);
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
    let scale = 1.0 / (heads.head_dim as f32).sqrt();
    let scores = Scores { scale, softcap: None, mask, slopes: None, sinks: None };
    backend.attend(heads, &scores, &step, &qkv, &kv, &mut out).unwrap();

    let mut expected = Vec::new();
    for (token, &(row, position)) in tokens.iter().enumerate() {
        let slots: Vec<u32> = visible(position).map(|p| ragged.slots[row][p as usize]).collect();
        let query = &queries[token * heads.qkv_width()..][..heads.query_width()];
        expected.extend(reference(query, heads, &slots, &keys, &values));
    }
    assert_close(
        &backend.read(&out),
        &expected,
        4.0 * B::TOLERANCE,
        &format!("{heads:?}, {mask:?}, {rows:?}"),
    );
}

/// Attention of one token's heads over the slots that it sees.
fn reference(query: &[f32], heads: Heads, slots: &[u32], keys: &[f32], values: &[f32]) -> Vec<f64> {
    let Heads { heads: n_heads, kv_heads, head_dim } = heads;
    let mut out = vec![0f64; query.len()];
    for head in 0..n_heads {
        let at = |slot: u32| (slot as usize * kv_heads + head / (n_heads / kv_heads)) * head_dim;
        let score = |&slot: &u32| {
            let products =
                (0..head_dim).map(|i| f64::from(query[head * head_dim + i]) * f64::from(keys[at(slot) + i]));
            (products.sum::<f64>() / (head_dim as f64).sqrt()).exp()
        };
        let weights: Vec<f64> = slots.iter().map(score).collect();
        let sum: f64 = weights.iter().sum();
        for (weight, &slot) in weights.iter().zip(slots) {
            for i in 0..head_dim {
                out[head * head_dim + i] += weight / sum * f64::from(values[at(slot) + i]);
            }
        }
    }
    out
}

pub fn attend_over_every_length<B: Probe>(backend: &B) {
    let heads = Heads { heads: 2, kv_heads: 1, head_dim: 16 };
    for len in 1..=70 {
        for mask in MASKS {
            check_attend(backend, heads, mask, &[(len - 1, 1)]);
            check_attend(backend, heads, mask, &[(0, len)]);
        }
    }
}

pub fn attend_over_every_shape<B: Probe>(backend: &B) {
    for head_dim in [8, 10, 16, 32, 64, 80, 96, 112, 128] {
        for (kv_heads, ratio) in [(1, 1), (3, 1), (2, 2), (1, 4), (2, 4), (1, 7)] {
            let heads = Heads { heads: kv_heads * ratio, kv_heads, head_dim };
            for mask in MASKS {
                check_attend(backend, heads, mask, &[(20, 1), (0, 9), (66, 3)]);
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
            check_attend(backend, heads, mask, mix);
        }
    }
}
