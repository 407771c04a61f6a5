//! From logits to tokens, and from a step to the next.

use super::*;
use crate::backend::step::{Choice, Sampled};

/// Logits of `rows` rows with one clear maximum each.
fn peaked(peaks: &[usize]) -> Vec<f32> {
    let mut logits = numbers(peaks.len() * VOCAB, 1);
    peaks.iter().enumerate().for_each(|(row, peak)| logits[row * VOCAB + peak] = 9.0);
    logits
}

fn sample<B: Probe>(backend: &B, step: &mut B::Step, logits: &[f32]) -> Vec<Sampled> {
    let mut tensor = backend.logits(logits.len() / VOCAB + 1, VOCAB).unwrap();
    backend.fill(&mut tensor, logits);
    backend.sample(&mut tensor, step).unwrap();
    backend.advance(step).unwrap();
    backend.output(step).unwrap().sampled
}

fn id(sampled: &Sampled) -> Option<u32> {
    match sampled {
        Sampled::Token { id, .. } => Some(*id),
        Sampled::NoDistribution => None,
    }
}

pub fn greedy_rows_are_independent<B: Probe>(backend: &B) {
    let mut ragged = Ragged::new(&[(0, 3), (5, 1), (0, 2), (0, 1)]);
    ragged.input.rows[1].sample = false;
    ragged.input.starts[3].sampling.choice = Choice::Draw { seed: 4 };
    ragged.input.starts[3].sampling.top_k = 1;
    ragged.input.starts[3].sampling.top_n = 4;
    let mut logits = peaked(&[7, 20, 49]);
    let mut step = ragged.begin(backend, ONE_HEAD);
    let sampled = sample(backend, &mut step, &logits);
    assert_eq!(sampled.iter().map(id).collect::<Vec<_>>(), [Some(7), Some(20), Some(49)]);
    assert_eq!(sampled[2], Sampled::Token { id: 49, logprob: 0.0, top: vec![(49, 0.0)] });
    let sum: f64 = logits[..VOCAB].iter().map(|&x| f64::from(x - 9.0).exp()).sum();
    let Sampled::Token { logprob, .. } = sampled[0] else { panic!() };
    assert!((f64::from(logprob) + sum.ln()).abs() < B::TOLERANCE);

    logits[VOCAB + 3] = f32::NAN;
    let mut step = ragged.begin(backend, ONE_HEAD);
    let spoilt = sample(backend, &mut step, &logits);
    assert_eq!(spoilt, [sampled[0].clone(), Sampled::NoDistribution, sampled[2].clone()]);
}

/// The tokens of the step, as an embedding of one column shows them.
fn tokens<B: Probe>(backend: &B, step: &B::Step, n: usize) -> Vec<f32> {
    let ids: Vec<f32> = (0..VOCAB).map(|id| id as f32).collect();
    let table = backend.weight(&[linear_part(stored(DType::F32, &[VOCAB, 1], &ids), None)], 1.0).unwrap();
    let mut out = backend.tensor(n, 1).unwrap();
    backend.embed(&table, 1.0, step, &mut out).unwrap();
    backend.read(&out)
}

pub fn a_lane_feeds_what_it_sampled<B: Probe>(backend: &B) {
    let ragged = Ragged::new(&[(0, 3), (5, 1), (0, 2)]);
    let mut step = ragged.begin(backend, ONE_HEAD);
    sample(backend, &mut step, &peaked(&[11, 22, 33]));
    // The lanes go on in another order, beside a new request.
    let last = |i: usize| {
        let Row { lane, start, .. } = ragged.input.rows[i];
        let start = start + ragged.input.rows[i].len();
        Row { lane, start, feed: Feed::Last, store_from: 0, sample: true, n_targets: 0 }
    };
    let mut next = Ragged::new(&[(0, 2)]).input;
    next.starts[0].lane = Lane(7);
    next.rows[0].lane = Lane(7);
    next.rows = vec![last(2), next.rows[0], last(0), last(1)];
    let prompt: Vec<f32> = next.prompt_tokens.iter().map(|&id| id as f32).collect();
    begin(backend, &next, &mut step);
    assert_eq!(tokens(backend, &step, 5), [33.0, prompt[0], prompt[1], 11.0, 22.0]);
    sample(backend, &mut step, &peaked(&[1, 2, 3, 4]));
    let again = StepInput { rows: vec![last(0), last(1), last(2)], ..StepInput::default() };
    begin(backend, &again, &mut step);
    assert_eq!(tokens(backend, &step, 3), [3.0, 4.0, 1.0]);
}

pub fn targets_follow_raw_logits<B: Probe>(backend: &B) {
    let mut ragged = Ragged::new(&[(0, 4), (0, 3)]);
    (ragged.input.rows[0].n_targets, ragged.input.rows[1].n_targets) = (3, 2);
    ragged.input.starts[0].sampling.temperature = 0.1; // Of no concern to targets.
    ragged.input.targets = vec![5, 0, 49, 7, 7];
    let mut step = ragged.begin(backend, ONE_HEAD);
    let logits = numbers(5 * VOCAB, 8);
    let mut tensor = backend.logits(3, VOCAB).unwrap();
    // In two chunks.
    backend.fill(&mut tensor, &logits[..3 * VOCAB]);
    backend.target_logprobs(0..3, &tensor, &mut step).unwrap();
    backend.fill(&mut tensor, &logits[3 * VOCAB..]);
    backend.target_logprobs(3..5, &tensor, &mut step).unwrap();
    backend.advance(&mut step).unwrap();
    let got = backend.output(&mut step).unwrap().target_logprobs;
    let logprob = |(row, &target): (&[f32], &u32)| {
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        f64::from(row[target as usize]) - sum.ln()
    };
    let expected: Vec<f64> = logits.chunks(VOCAB).zip(&ragged.input.targets).map(logprob).collect();
    assert_eq!(got.len(), 5);
    assert_close(&got, &expected, B::TOLERANCE, "targets");
}

pub fn a_lane_forgets_what_it_held_before<B: Probe>(backend: &B) {
    let penalised = SamplingParams { repetition_penalty: 100.0, ..SamplingParams::GREEDY };
    let run = |step: &mut B::Step, token: u32| {
        let mut input = Ragged::new(&[(0, 1)]).input;
        input.starts[0].sampling = penalised;
        input.starts[0].prompt = vec![token];
        input.prompt_tokens = vec![token];
        begin(backend, &input, step);
        let mut logits = vec![0.0; VOCAB];
        (logits[10], logits[20]) = (5.0, 4.0);
        id(&sample(backend, step, &logits)[0])
    };
    let mut step = new_step(backend, ONE_HEAD);
    assert_eq!(run(&mut step, 10), Some(20));
    assert_eq!(run(&mut step, 20), Some(10));
    assert_eq!(run(&mut step, 3), Some(10));
    // Generated tokens count as well.
    let row = Row { lane: Lane(0), start: 1, feed: Feed::Last, store_from: 0, sample: true, n_targets: 0 };
    begin(backend, &StepInput { rows: vec![row], ..StepInput::default() }, &mut step);
    let mut logits = vec![0.0; VOCAB];
    (logits[10], logits[20]) = (5.0, 4.0);
    assert_eq!(id(&sample(backend, &mut step, &logits)[0]), Some(20));
}
