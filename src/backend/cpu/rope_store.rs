//! What queries and keys go through before attention, and the store of keys and values.

use super::norm::NormWeight;
use super::step::Step;
use super::{Cpu, Tensor};
use crate::backend::{Heads, KvRows, Turn};
use crate::model::spec::LatentAttention;

/// The cache of one layer.
pub struct Kv {
    /// `[slots, width]` turned keys; of latent attention latents and turned keys.
    pub keys: Vec<f32>,
    /// `[slots, width]`; of latent attention none.
    pub values: Vec<f32>,
    /// Numbers of a row.
    pub width: usize,
}

impl Kv {
    /// Numbers of a row of keys, and of a row of values.
    pub fn widths(rows: KvRows) -> (usize, usize) {
        match rows {
            KvRows::KeysValues { width } => (width, width),
            KvRows::Latent { width } => (width, 0),
        }
    }
}

/// Norms and turns in place; stores where the step says so.
pub fn rope_store(heads: Heads, turn: &Turn<'_, Cpu>, step: &Step, qkv: &mut Tensor, kv: &mut Kv) {
    let (width, head_dim) = (qkv.width, heads.head_dim);
    for (token, row) in qkv.rows_mut(step.tokens.len()).chunks_exact_mut(width).enumerate() {
        let (queries, rest) = row.split_at_mut(heads.query_width());
        let (keys, values) = rest.split_at_mut(heads.kv_width());
        if let Some((of_queries, of_keys)) = turn.norms {
            norm_heads(of_queries, head_dim, queries);
            norm_heads(of_keys, head_dim, keys);
        }
        if let Some(rope) = turn.rope {
            let (cos, sin) = step.angles(rope, token);
            for head in queries.chunks_exact_mut(head_dim).chain(keys.chunks_exact_mut(head_dim)) {
                rotate(head, cos, sin);
            }
        }
        if let Some(length) = turn.log_n {
            let at = step.positions[token] + 1;
            if at > length {
                let factor = (f64::from(at).ln() / f64::from(length).ln()) as f32;
                queries.iter_mut().for_each(|number| *number *= factor);
            }
        }
        if let Some(slot) = step.store[token] {
            let at = slot as usize * kv.width;
            kv.keys[at..][..kv.width].copy_from_slice(keys);
            kv.values[at..][..kv.width].copy_from_slice(values);
        }
    }
}

fn norm_heads(norm: &NormWeight, head_dim: usize, heads: &mut [f32]) {
    for (number, head) in heads.chunks_exact_mut(head_dim).enumerate() {
        norm.head(number, head);
    }
}

/// Turns the pairs `(i, i + width/2)` of the first `width` numbers, of which there are half as many angles.
fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
    }
}

/// Completes the absorbed queries by their turned parts, and stores normed latents and turned keys.
pub fn store_latent(
    attention: &LatentAttention,
    norm: &NormWeight,
    step: &Step,
    queries: &Tensor,
    absorbed: &mut Tensor,
    latents: &Tensor,
    kv: &mut Kv,
) {
    let LatentAttention { kv_rank, nope_dim, .. } = *attention;
    let (query_dim, row_width) = (attention.query_dim(), attention.row_width());
    for token in 0..step.tokens.len() {
        let (cos, sin) = step.angles(0, token);
        let absorbed = &mut absorbed.values[token * absorbed.width..][..absorbed.width];
        let heads = queries.row(token).chunks_exact(query_dim);
        for (query, absorbed) in heads.zip(absorbed.chunks_exact_mut(row_width)) {
            let turned = &mut absorbed[kv_rank..];
            turned.copy_from_slice(&query[nope_dim..]);
            rotate(turned, cos, sin);
        }
        if let Some(slot) = step.store[token] {
            let (latent, key) = latents.row(token).split_at(kv_rank);
            let row = &mut kv.keys[slot as usize * kv.width..][..kv.width];
            norm.row(latent, &mut row[..kv_rank]);
            row[kv_rank..].copy_from_slice(key);
            rotate(&mut row[kv_rank..], cos, sin);
        }
    }
}
