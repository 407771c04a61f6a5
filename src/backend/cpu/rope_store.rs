//! Rotary embedding of queries and keys, and the store of keys and values.

use super::Tensor;
use super::step::Step;
use crate::backend::Heads;

/// Keys and values of one layer, `[slots, width]` each.
pub struct Kv {
    /// Rotated keys.
    pub keys: Vec<f32>,
    /// Values.
    pub values: Vec<f32>,
    /// KV heads times head width.
    pub width: usize,
}

/// Rotates in place; stores where the step says so.
pub fn rope_store(heads: Heads, step: &Step, qkv: &mut Tensor, kv: &mut Kv) {
    let rotated = heads.query_width() + heads.kv_width();
    let width = qkv.width;
    for (token, row) in qkv.rows_mut(step.tokens.len()).chunks_exact_mut(width).enumerate() {
        let (cos, sin) = step.angles(token);
        for head in row[..rotated].chunks_exact_mut(heads.head_dim) {
            rotate(head, cos, sin);
        }
        if let Some(slot) = step.store[token] {
            let (keys, values) = row[heads.query_width()..].split_at(kv.width);
            let at = slot as usize * kv.width;
            kv.keys[at..][..kv.width].copy_from_slice(keys);
            kv.values[at..][..kv.width].copy_from_slice(values);
        }
    }
}

/// Rotates the pairs `(i, i + d/2)`.
fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(head.len() / 2);
    for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
    }
}
