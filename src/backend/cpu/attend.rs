//! Attention over the slots of a lane.

use super::matmul::{Kernel, widest};
use super::rope_store::Kv;
use super::step::Step;
use super::sum::dot;
use super::{Cpu, Tensor, for_each_chunk};
use crate::backend::{Heads, Scores};
use crate::model::spec::{LatentAttention, Mask};

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
pub fn attend(heads: Heads, scores: &Scores<'_, Cpu>, step: &Step, qkv: &Tensor, kv: &Kv, out: &mut Tensor) {
    let values = Rows { numbers: &kv.values, stride: kv.width };
    attend_to(heads, scores, heads.head_dim, step, qkv, kv, values, out);
}

/// As [`attend`], with one KV head whose values are the first numbers of its keys.
pub fn attend_latent(
    attention: &LatentAttention,
    mask: Mask,
    step: &Step,
    absorbed: &Tensor,
    kv: &Kv,
    out: &mut Tensor,
) {
    let heads = Heads { heads: attention.heads, kv_heads: 1, head_dim: attention.row_width() };
    let scores = Scores { scale: attention.scale, softcap: None, mask, slopes: None, sinks: None };
    let values = Rows { numbers: &kv.keys, stride: kv.width };
    attend_to(heads, &scores, attention.kv_rank, step, absorbed, kv, values, out);
}

/// `value_dim` is the width of a value, `queries` begin the rows of `x`.
#[allow(clippy::too_many_arguments)]
fn attend_to(
    heads: Heads,
    scores: &Scores<'_, Cpu>,
    value_dim: usize,
    step: &Step,
    x: &Tensor,
    kv: &Kv,
    values: Rows<'_>,
    out: &mut Tensor,
) {
    let Heads { heads: n_heads, kv_heads, head_dim } = heads;
    let n_tokens = step.tokens.len();
    let mask = scores.mask;
    let n_keys: usize = step.positions.iter().map(|&p| p as usize + 1 - first_visible(mask, p)).sum();
    let keys = Rows { numbers: &kv.keys, stride: kv.width };
    for_each_chunk(out.rows_mut(n_tokens), value_dim, n_keys * n_heads * head_dim * 2, |unit, out| {
        let (token, head) = (unit / n_heads, unit % n_heads);
        let query = &x.row(token)[head * head_dim..][..head_dim];
        let position = step.positions[token];
        let slots = &step.slots(token)[first_visible(mask, position)..=position as usize];
        let kv_head = head / (n_heads / kv_heads);
        let (keys, values) = (keys.from(kv_head * head_dim), values.from(kv_head * value_dim));
        let slope = scores.slopes.map(|slopes| slopes[head]);
        let sink = scores.sinks.map(|sinks| sinks[head]);
        let (scale, softcap) = (scores.scale, scores.softcap);
        widest(Attend { query, slots, keys, values, scale, softcap, slope, sink, out });
    });
}

/// Rows of a cache, of which a part is read.
#[derive(Clone, Copy)]
struct Rows<'a> {
    numbers: &'a [f32],
    stride: usize,
}

impl<'a> Rows<'a> {
    /// From a column on.
    fn from(self, column: usize) -> Rows<'a> {
        Rows { numbers: &self.numbers[column..], ..self }
    }

    #[inline(always)]
    fn at(self, slot: u32) -> &'a [f32] {
        &self.numbers[slot as usize * self.stride..]
    }
}

/// One query and the slots that it sees, the last of which is its own.
struct Attend<'a> {
    query: &'a [f32],
    slots: &'a [u32],
    /// Of the KV head.
    keys: Rows<'a>,
    /// Of the KV head.
    values: Rows<'a>,
    scale: f32,
    softcap: Option<f32>,
    slope: Option<f32>,
    sink: Option<f32>,
    out: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    /// Softmax by blocks: the running maximum rescales what was summed before (Milakov and Gimelshein, arXiv
    /// 1805.02867).
    #[inline(always)]
    fn run<const FUSED: bool>(self) {
        let Attend { query, slots, keys, values, scale, softcap, slope, sink, out } = self;
        // A sink is a first key without a value.
        let (mut max, mut sum) = match sink {
            Some(sink) => (sink, 1f32),
            None => (f32::NEG_INFINITY, 0f32),
        };
        let mut scores = [0f32; BLOCK];
        out.fill(0.0);
        for (block, seen) in slots.chunks(BLOCK).enumerate() {
            let scores = &mut scores[..seen.len()];
            for (score, &slot) in scores.iter_mut().zip(seen) {
                *score = scale * dot(query, &keys.at(slot)[..query.len()]);
            }
            if let Some(cap) = softcap {
                for score in scores.iter_mut() {
                    *score = cap * (*score / cap).tanh();
                }
            }
            if let Some(slope) = slope {
                for (i, score) in scores.iter_mut().enumerate() {
                    let before = slots.len() - 1 - (block * BLOCK + i);
                    *score -= slope * before as f32;
                }
            }
            let mut new_max = max;
            for score in scores.iter() {
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
                add_weighted(out, scores, seen, values, group * GROUP);
            }
            for (&weight, &slot) in scores.iter().zip(seen) {
                for (out, value) in rest.iter_mut().zip(&values.at(slot)[n_grouped..]) {
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
fn add_weighted(out: &mut [f32; GROUP], weights: &[f32], slots: &[u32], values: Rows<'_>, offset: usize) {
    let mut sums = *out;
    for (&weight, &slot) in weights.iter().zip(slots) {
        for (sum, value) in sums.iter_mut().zip(&values.at(slot)[offset..][..GROUP]) {
            *sum += weight * value;
        }
    }
    *out = sums;
}
