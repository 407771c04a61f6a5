//! Top-k, top-p and typical-p: which candidates stay.

use std::cmp::Ordering;

use crate::backend::step::SamplingParams;

/// An id that may be chosen; those ruled out are no candidates any more.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// The id.
    pub id: u32,
    /// Its logit after the penalties and the temperature, less the largest.
    pub score: f32,
}

/// Likelier first, ties by the lowest id: a total order.
pub fn likelier(a: &Candidate, b: &Candidate) -> Ordering {
    b.score.total_cmp(&a.score).then(a.id.cmp(&b.id))
}

/// `ln Σ exp(score)`.
pub fn log_sum(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| f64::from(candidate.score).exp()).sum::<f64>().ln()
}

/// Drops what top-k, top-p and typical-p rule out, in this order. At least one candidate stays of any.
pub fn warp(candidates: &mut Vec<Candidate>, params: &SamplingParams) {
    if params.top_k != 0 {
        top_k(candidates, params.top_k as usize);
    }
    if params.top_p < 1.0 {
        top_p(candidates, f64::from(params.top_p));
    }
    if params.typical_p < 1.0 {
        typical_p(candidates, f64::from(params.typical_p));
    }
    // A request that draws reads the ids in order: neighbours share a block of the generator.
    if params.top_p < 1.0 || params.typical_p < 1.0 {
        candidates.sort_unstable_by_key(|candidate| candidate.id);
    }
}

/// The `k` largest stay, and those equal to the least of them.
fn top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k >= candidates.len() {
        return;
    }
    let mut scores: Vec<f32> = candidates.iter().map(|candidate| candidate.score).collect();
    let (_, &mut kth, _) = scores.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    candidates.retain(|candidate| candidate.score >= kth);
}

/// In ascending order, drops while the cumulative probability is at most `1 − p`; the likeliest always stays.
/// Leaves the candidates likeliest first.
fn top_p(candidates: &mut Vec<Candidate>, p: f64) {
    let log_sum = log_sum(candidates);
    candidates.sort_unstable_by(likelier);
    let mut cumulative = 0.0;
    while let Some(least) = candidates.last() {
        cumulative += (f64::from(least.score) - log_sum).exp();
        if candidates.len() == 1 || cumulative > 1.0 - p {
            return;
        }
        candidates.pop();
    }
}

/// Locally typical sampling (Meister et al., arXiv 2202.00666): by ascending distance of the surprise from the
/// entropy, those stay that are no farther than the first at which the cumulative probability reaches `mass`.
fn typical_p(candidates: &mut Vec<Candidate>, mass: f64) {
    let log_sum = log_sum(candidates);
    let log_probability = |candidate: &Candidate| f64::from(candidate.score) - log_sum;
    let entropy: f64 = candidates.iter().map(|c| -log_probability(c).exp() * log_probability(c)).sum();
    let distance = |candidate: &Candidate| (-log_probability(candidate) - entropy).abs();
    let closer = |a: &Candidate, b: &Candidate| distance(a).total_cmp(&distance(b)).then(likelier(a, b));
    candidates.sort_unstable_by(closer);
    let mut cumulative = 0.0;
    let reaches = |candidate: &Candidate| {
        cumulative += log_probability(candidate).exp();
        cumulative >= mass
    };
    let Some(at) = candidates.iter().position(reaches) else { return };
    let farthest = distance(&candidates[at]);
    candidates.retain(|candidate| distance(candidate) <= farthest);
}
