//! The choice of a token, as TGI's `HeterogeneousNextTokenChooser` orders it.

use rayon::prelude::*;

use super::Tensor;
use super::logprobs::summarise;
use super::step::{Draft, Step};
use super::warp::{Candidate, likelier, log_sum, warp};
use super::watermark::GreenList;
use crate::backend::random::Draws;
use crate::backend::step::{Choice, Sampled, SamplingParams};

/// Chooses from each row; rows are independent of each other.
pub fn sample(logits: &mut Tensor, step: &mut Step) {
    let width = logits.width;
    let drafts = step.drafts();
    let rows = logits.values.par_chunks_exact_mut(width).zip(drafts.par_iter());
    let sampled = match drafts.as_slice() {
        [only] => vec![sample_row(&mut logits.values[..width], only)],
        _ => rows.map(|(logits, draft)| sample_row(logits, draft)).collect(),
    };
    step.sampled = sampled;
}

/// Runs the stages that the request asks for; what it does not ask for is not computed.
pub fn sample_row(logits: &mut [f32], draft: &Draft) -> Sampled {
    let params = &draft.lane.sampling;
    bias(logits, draft);
    let Some(summary) = summarise(logits) else { return Sampled::NoDistribution };
    if params.choice == Choice::Greedy && params.top_n == 0 && !warps(params) {
        return Sampled::Token { id: summary.argmax, logprob: -summary.log_sum as f32, top: Vec::new() };
    }
    // From the largest down, so that no temperature overflows.
    let score = |logit: f32| (logit - summary.max) / params.temperature;
    let candidate = |(id, &logit): (usize, &f32)| Candidate { id: id as u32, score: score(logit) };
    let possible = |candidate: &Candidate| candidate.score > f32::NEG_INFINITY;
    let mut candidates: Vec<Candidate> = logits.iter().enumerate().map(candidate).filter(possible).collect();
    warp(&mut candidates, params);
    let log_sum = if warps(params) { log_sum(&candidates) } else { summary.log_sum };
    let Some(chosen) = choose(&candidates, params.choice, draft.position) else {
        return Sampled::NoDistribution;
    };
    let logprob = |candidate: &Candidate| (f64::from(candidate.score) - log_sum) as f32;
    let top = top(&mut candidates, params.top_n as usize);
    Sampled::Token {
        id: chosen.id,
        logprob: logprob(&chosen),
        top: top.iter().map(|candidate| (candidate.id, logprob(candidate))).collect(),
    }
}

/// Whether a stage after the penalties changes the distribution.
fn warps(params: &SamplingParams) -> bool {
    params.temperature != 1.0 || params.top_k != 0 || params.top_p < 1.0 || params.typical_p < 1.0
}

/// Watermark and penalties.
fn bias(logits: &mut [f32], draft: &Draft) {
    let params = &draft.lane.sampling;
    if let Some(watermark) = params.watermark {
        let green = GreenList::new(watermark, logits.len(), draft.previous);
        for (id, logit) in logits.iter_mut().enumerate() {
            if green.contains(id as u32) {
                *logit += watermark.delta;
            }
        }
    }
    let (repetition, frequency) = (params.repetition_penalty, params.frequency_penalty);
    let context = &draft.lane.context;
    for &(id, count) in &context.counts {
        let logit = &mut logits[id as usize];
        if repetition != 1.0 {
            *logit = if *logit < 0.0 { *logit * repetition } else { *logit / repetition };
        }
        if frequency != 0.0 {
            *logit -= frequency * count as f32 / context.len as f32;
        }
    }
}

/// Arg-max, or an exponential race: the largest `p / e` with `e` from the exponential distribution is a draw from
/// `p`. Ties go to the lowest id.
fn choose(candidates: &[Candidate], choice: Choice, position: u32) -> Option<Candidate> {
    match choice {
        Choice::Greedy => candidates.iter().copied().min_by(likelier),
        Choice::Draw { seed } => {
            let mut draws = Draws::new(seed, position);
            let race = |candidate: &Candidate| Candidate {
                score: candidate.score - draws.exponential(candidate.id).ln(),
                ..*candidate
            };
            let winner = candidates.iter().map(race).min_by(likelier)?.id;
            candidates.iter().copied().find(|candidate| candidate.id == winner)
        }
    }
}

/// The `n` likeliest, likeliest first. Reorders the candidates.
fn top(candidates: &mut [Candidate], n: usize) -> &[Candidate] {
    let n = n.min(candidates.len());
    if n == 0 {
        return &[];
    }
    candidates.select_nth_unstable_by(n - 1, likelier);
    candidates[..n].sort_unstable_by(likelier);
    &candidates[..n]
}

#[cfg(test)]
#[path = "sample_tests.rs"]
mod tests;
