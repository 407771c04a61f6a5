//! Attention over the slots of a lane.

use super::matmul::{Kernel, widest};
use super::rope_store::Kv;
use super::step::Step;
use super::sum::dot;
use super::{Tensor, for_each_chunk};
use crate::backend::Heads;
use crate::model::spec::Mask;

/// Keys scored at once. Blocks begin at the first visible position, so they do not depend on how a prompt is cut.
const BLOCK: usize = 64;

/// Outputs that are summed at once: few enough to stay in registers.
const GROUP: usize = 32;

/// The first position that a query at `position` sees.
fn first_visible(mask: Mask, position: u32) -> usize {
    match mask {
        Mask::Causal => 0,
        Mask::Window { window } => (position as usize + 1).saturating_sub(window as usize),
    }
}

/// Every query head of every token attends to the visible slots of its lane.
pub fn attend(heads: Heads, mask: Mask, step: &Step, qkv: &Tensor, kv: &Kv, out: &mut Tensor) {
    let Heads { heads: n_heads, kv_heads, head_dim } = heads;
    let n_tokens = step.tokens.len();
    let keys: usize = step.positions.iter().map(|&p| p as usize + 1 - first_visible(mask, p)).sum();
    for_each_chunk(out.rows_mut(n_tokens), head_dim, keys * n_heads * head_dim * 2, |unit, out| {
        let (token, head) = (unit / n_heads, unit % n_heads);
        let query = &qkv.row(token)[head * head_dim..][..head_dim];
        let position = step.positions[token];
        let slots = &step.slots(token)[first_visible(mask, position)..=position as usize];
        let kv_head = head / (n_heads / kv_heads);
        widest(Attend { query, slots, kv, offset: kv_head * head_dim, out });
    });
}

/// One query and the slots that it sees.
struct Attend<'a> {
    query: &'a [f32],
    slots: &'a [u32],
    kv: &'a Kv,
    /// Where the KV head lies in a row of the cache.
    offset: usize,
    out: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    /// Softmax by blocks: the running maximum rescales what was summed before (Milakov and Gimelshein, arXiv
    /// 1805.02867).
    #[inline(always)]
    fn run<const FUSED: bool>(self) {
        let Attend { query, slots, kv, offset, out } = self;
        let head_dim = query.len();
        let scale = 1.0 / (head_dim as f32).sqrt();
        let (mut max, mut sum) = (f32::NEG_INFINITY, 0f32);
        let mut scores = [0f32; BLOCK];
        out.fill(0.0);
        for slots in slots.chunks(BLOCK) {
            let scores = &mut scores[..slots.len()];
            let mut new_max = max;
            for (score, &slot) in scores.iter_mut().zip(slots) {
                *score = scale * dot(query, &kv.keys[slot as usize * kv.width + offset..][..head_dim]);
                new_max = new_max.max(*score);
            }
            let rescale = (max - new_max).exp();
            if rescale != 1.0 {
                sum *= rescale;
                for out in out.iter_mut() {
                    *out *= rescale;
                }
            }
            max = new_max;
            for score in scores.iter_mut() {
                *score = (*score - max).exp();
                sum += *score;
            }
            let (groups, rest) = out.as_chunks_mut::<GROUP>();
            let n_grouped = groups.len() * GROUP;
            for (group, out) in groups.iter_mut().enumerate() {
                add_weighted(out, scores, slots, kv, offset + group * GROUP);
            }
            for (&weight, &slot) in scores.iter().zip(slots) {
                let values = &kv.values[slot as usize * kv.width + offset + n_grouped..];
                for (out, value) in rest.iter_mut().zip(values) {
                    *out += weight * value;
                }
            }
        }
        for out in out.iter_mut() {
            *out /= sum;
        }
    }
}

/// Adds the weighted values of all slots to some of the outputs.
#[inline(always)]
fn add_weighted(out: &mut [f32; GROUP], weights: &[f32], slots: &[u32], kv: &Kv, offset: usize) {
    let mut sums = *out;
    for (&weight, &slot) in weights.iter().zip(slots) {
        let values = &kv.values[slot as usize * kv.width + offset..][..GROUP];
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += weight * value;
        }
    }
    *out = sums;
}
