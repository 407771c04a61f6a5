//! Each stage against a direct transcription of its formula, and the draw against its distribution.

use super::super::lanes::LaneState;
use super::*;
use crate::backend::random::philox;
use crate::backend::step::{LaneStart, Watermark};
use crate::ids::Lane;

const NEG: f32 = f32::NEG_INFINITY;

fn run_at(logits: &[f32], sampling: SamplingParams, prompt: &[u32], position: u32) -> Sampled {
    let start = LaneStart { lane: Lane(0), slots: vec![], prompt: prompt.to_vec(), sampling };
    let lane = LaneState::new(&start);
    let previous = prompt.last().copied().unwrap_or(0);
    sample_row(&mut logits.to_vec(), &Draft { lane: &lane, position, previous })
}

fn run(logits: &[f32], sampling: SamplingParams) -> Sampled {
    run_at(logits, sampling, &[], 1)
}

/// Everything that stays, with log-probabilities: the top list of the whole vocabulary.
fn survivors(logits: &[f32], sampling: SamplingParams, prompt: &[u32]) -> Vec<(u32, f32)> {
    let sampling = SamplingParams { top_n: logits.len() as u32, ..sampling };
    match run_at(logits, sampling, prompt, 1) {
        Sampled::Token { top, .. } => top,
        Sampled::NoDistribution => panic!("no distribution"),
    }
}

fn ids(survivors: &[(u32, f32)]) -> Vec<u32> {
    let mut ids: Vec<u32> = survivors.iter().map(|&(id, _)| id).collect();
    ids.sort_unstable();
    ids
}

fn random_logits(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32)
        .map(|id| (philox([id, 0, 0, 0], [seed, 9])[0] as f32 / u32::MAX as f32 - 0.5) * 8.0)
        .collect()
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().fold(NEG, |a, &b| a.max(b));
    let exps: Vec<f64> = logits.iter().map(|&x| f64::from(x - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|e| e / sum).collect()
}

const DRAW: SamplingParams = SamplingParams { choice: Choice::Draw { seed: 42 }, ..SamplingParams::GREEDY };

#[test]
fn greedy_takes_the_lowest_of_the_largest() {
    let Sampled::Token { id, logprob, top } = run(&[0.0, 2.0, 1.0, 2.0], SamplingParams::GREEDY) else {
        panic!()
    };
    assert_eq!((id, top.len()), (1, 0));
    assert!((f64::from(logprob) - softmax(&[0.0, 2.0, 1.0, 2.0])[1].ln()).abs() < 1e-6);
}

#[test]
fn asking_for_alternatives_changes_neither_token_nor_logprob() {
    for seed in 0..20 {
        let logits = random_logits(300, seed);
        for params in [SamplingParams::GREEDY, DRAW, SamplingParams { temperature: 0.7, top_k: 9, ..DRAW }] {
            let Sampled::Token { id, logprob, .. } = run(&logits, params) else { panic!() };
            let with_top = run(&logits, SamplingParams { top_n: 5, ..params });
            let Sampled::Token { id: same, logprob: same_logprob, top } = with_top else { panic!() };
            assert_eq!((id, logprob, top.len()), (same, same_logprob, 5));
        }
    }
}

#[test]
fn without_a_distribution_there_is_no_token() {
    for params in [SamplingParams::GREEDY, DRAW, SamplingParams { top_p: 0.5, top_n: 3, ..DRAW }] {
        assert_eq!(run(&[1.0, f32::NAN, 2.0], params), Sampled::NoDistribution);
        assert_eq!(run(&[NEG, NEG], params), Sampled::NoDistribution);
        assert_eq!(run(&[0.0, f32::INFINITY], params), Sampled::NoDistribution);
    }
}

#[test]
fn what_is_ruled_out_is_never_drawn_nor_listed() {
    let logits = [NEG, 1.0, NEG, 0.5, NEG];
    for seed in 0..50 {
        let params = SamplingParams { choice: Choice::Draw { seed }, top_n: 5, ..SamplingParams::GREEDY };
        let Sampled::Token { id, top, .. } = run(&logits, params) else { panic!() };
        assert!([1, 3].contains(&id));
        assert_eq!(ids(&top), [1, 3]);
    }
}

#[test]
fn top_k_keeps_ties() {
    let logits = [3.0, 1.0, 2.0, 2.0, 0.0];
    let keeps = |top_k| ids(&survivors(&logits, SamplingParams { top_k, ..DRAW }, &[]));
    assert_eq!(keeps(1), [0]);
    assert_eq!(keeps(2), [0, 2, 3]);
    assert_eq!(keeps(3), [0, 2, 3]);
    assert_eq!(keeps(4), [0, 1, 2, 3]);
    assert_eq!(keeps(99).len(), 5);
    let Sampled::Token { logprob, .. } = run(&logits, SamplingParams { top_k: 1, ..DRAW }) else { panic!() };
    assert_eq!(logprob, 0.0);
}

#[test]
fn top_p_drops_from_below_while_the_rest_is_at_most_one_minus_p() {
    for seed in 0..50 {
        let logits = random_logits(40, seed);
        let probabilities = softmax(&logits);
        for p in [0.01f32, 0.3, 0.5, 0.9, 0.99] {
            let mut ascending: Vec<usize> = (0..logits.len()).collect();
            ascending.sort_by(|&a, &b| probabilities[a].total_cmp(&probabilities[b]));
            let mut cumulative = 0.0;
            let mut expected = Vec::new();
            for (n, &id) in ascending.iter().enumerate() {
                cumulative += probabilities[id];
                if cumulative > 1.0 - f64::from(p) || n + 1 == logits.len() {
                    expected.push(id as u32);
                }
            }
            expected.sort_unstable();
            assert_eq!(ids(&survivors(&logits, SamplingParams { top_p: p, ..DRAW }, &[])), expected);
        }
    }
}

#[test]
fn the_likeliest_survives_any_top_p() {
    assert_eq!(ids(&survivors(&[1.0, 1.0, 1.0], SamplingParams { top_p: 1e-9, ..DRAW }, &[])), [0]);
}

#[test]
fn typical_p_keeps_what_is_close_to_the_entropy() {
    for seed in 0..50 {
        let logits = random_logits(40, seed);
        let probabilities = softmax(&logits);
        let entropy: f64 = probabilities.iter().map(|p| -p * p.ln()).sum();
        let distances: Vec<f64> = probabilities.iter().map(|p| (-p.ln() - entropy).abs()).collect();
        for mass in [0.01f32, 0.2, 0.5, 0.95] {
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| distances[a].total_cmp(&distances[b]));
            let mut cumulative = 0.0;
            let below = order.iter().take_while(|&&id| {
                cumulative += probabilities[id];
                cumulative < f64::from(mass)
            });
            let last = below.count().min(logits.len() - 1);
            let mut expected: Vec<u32> = order[..=last].iter().map(|&id| id as u32).collect();
            expected.sort_unstable();
            assert_eq!(ids(&survivors(&logits, SamplingParams { typical_p: mass, ..DRAW }, &[])), expected);
        }
    }
}

#[test]
fn penalties_count_the_requests_own_tokens() {
    let logits = [2.0, -2.0, 1.0, 0.0];
    let params = SamplingParams { repetition_penalty: 2.0, frequency_penalty: 0.5, ..DRAW };
    let got = survivors(&logits, params, &[0, 1, 0, 0]);
    let biased = [2.0 / 2.0 - 0.5 * 0.75, -4.0 - 0.5 * 0.25, 1.0, 0.0];
    let expected = softmax(&biased);
    for (id, logprob) in got {
        assert!((f64::from(logprob) - expected[id as usize].ln()).abs() < 1e-6);
    }
}

#[test]
fn a_watermark_raises_the_green_ids() {
    let logits = [0.0; 100];
    let params =
        SamplingParams { watermark: Some(Watermark { gamma: 0.25, delta: 3.0 }), ..SamplingParams::GREEDY };
    let got = survivors(&logits, params, &[17]);
    let best = got[0].1;
    assert_eq!(got.iter().filter(|&&(_, logprob)| (logprob - best).abs() < 1e-6).count(), 25);
    assert!((got[0].1 - got[99].1 - 3.0).abs() < 1e-5);
    assert_ne!(ids(&got[..25]), ids(&survivors(&logits, params, &[18])[..25]));
}

#[test]
fn no_temperature_overflows() {
    for temperature in [f32::MIN_POSITIVE, 1e-40, 1e-3] {
        let got = survivors(&[1.0, 3.0, 3.0, -1e30], SamplingParams { temperature, ..DRAW }, &[]);
        assert_eq!(ids(&got[..2]), [1, 2]);
        assert!((f64::from(got[0].1) - 0.5f64.ln()).abs() < 1e-6);
    }
    let got = survivors(&[1.0, 3.0], SamplingParams { temperature: f32::MAX, ..DRAW }, &[]);
    assert!((f64::from(got[1].1) - 0.5f64.ln()).abs() < 1e-6);
}

#[test]
fn top_lists_end_at_n_with_the_lowest_ids() {
    let params = SamplingParams { top_n: 2, ..SamplingParams::GREEDY };
    let Sampled::Token { top, .. } = run(&[1.0, 2.0, 2.0, 2.0], params) else { panic!() };
    assert_eq!(top.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn draws_follow_the_distribution() {
    let logits = [0.0, 1.0, 2.0, -1.0, 0.5];
    let params = SamplingParams { temperature: 1.3, top_k: 4, ..DRAW };
    let scaled: Vec<f32> = logits.iter().map(|&x| if x < 0.0 { NEG } else { x / 1.3 }).collect();
    let expected = softmax(&scaled);
    let n = 20_000;
    let mut counts = [0u32; 5];
    for position in 0..n {
        let Sampled::Token { id, .. } = run_at(&logits, params, &[], position) else { panic!() };
        counts[id as usize] += 1;
    }
    // Five standard deviations of a binomial count.
    for (count, p) in counts.iter().zip(expected) {
        let deviation = (f64::from(n) * p * (1.0 - p)).sqrt();
        assert!((f64::from(*count) - f64::from(n) * p).abs() <= 5.0 * deviation, "{counts:?}");
    }
}

#[test]
fn a_draw_depends_on_seed_and_position_alone() {
    let logits = random_logits(1000, 3);
    let flat = SamplingParams { temperature: 5.0, ..DRAW };
    assert_eq!(run_at(&logits, flat, &[1, 2], 9), run_at(&logits, flat, &[7], 9));
    assert_ne!(run_at(&logits, flat, &[], 9), run_at(&logits, flat, &[], 10));
    let other = SamplingParams { choice: Choice::Draw { seed: 43 }, ..flat };
    assert_ne!(run_at(&logits, flat, &[], 9), run_at(&logits, other, &[], 9));
}
