//! Every fixture on the GPU against what `transformers` computed in f32 from the same files.
//!
//! `KVSHARD_FIXTURES` names those to take, separated by commas, where it is set. A device reports at most 100 of a distribution's log-probabilities, and any one that is asked for as a target.

use kvshard::backend::step::{Feed, Row, Sampled, StepInput};
use kvshard::ids::Lane;
use kvshard::model::Device;
use kvshard::model::checkpoint::DType;
use kvshard::model::executor::Executor;

use crate::card;
use crate::noise::{Noise, Seen};
use crate::support::fixture;
use crate::support::golden::{Golden, Prompt, log_softmax, prefill, run};

/// Most alternatives that a GPU reports.
const TOP_N: u32 = 100;

/// A fixture on the GPU, and what was seen of it.
struct Check {
    executor: Box<dyn Executor>,
    noise: Noise,
    seen: Seen,
    /// Greedy tokens that were compared, and those among them that differ where the reference itself was torn.
    n_tokens: usize,
    n_torn: usize,
}

impl Check {
    /// Compares the likeliest of a position's tokens with the log-softmax of stored logits.
    fn distribution(&mut self, found: &Sampled, logits: &[f32], place: &str) {
        let Sampled::Token { id, logprob, top } = found else { panic!("{place}: {found:?}") };
        assert_eq!(top.len(), logits.len().min(TOP_N as usize), "{place}");
        assert_eq!((top[0].0, top[0].1.to_bits()), (*id, logprob.to_bits()), "{place}: the first is chosen");
        let expected = log_softmax(logits);
        top.iter().for_each(|&(id, logprob)| self.compare(logprob, expected[id as usize], place));
    }

    fn compare(&mut self, found: f32, expected: f32, place: &str) {
        let distance = (found - expected).abs();
        assert!(distance <= self.noise.largest, "{place}: {found} instead of {expected}");
        self.seen.add(distance);
    }

    /// Whether greedy token `step` is the reference's. It may differ only where the reference's two best are as close as
    /// noise.
    fn token(&mut self, prompt: &Prompt<'_>, step: usize, found: &Sampled) -> bool {
        let Sampled::Token { id, .. } = found else { panic!("{}: {found:?}", prompt.place("greedy")) };
        let same = *id == prompt.greedy[step];
        let gap = prompt.about["greedy"]["gaps"][step].as_f64().unwrap() as f32;
        assert!(
            same || gap <= self.noise.margin,
            "{}: token {step} is {id} instead of {}, which leads by {gap}",
            prompt.place("greedy"),
            prompt.greedy[step]
        );
        self.n_tokens += 1;
        self.n_torn += usize::from(!same);
        same
    }

    /// The prompt in one step; then `feed` one token a step, as long as it is the reference's.
    fn generation(&mut self, prompt: &Prompt<'_>, forced: bool) {
        let has_logits = prompt.has("greedy_logits");
        let logits = if has_logits { prompt.logits("greedy_logits") } else { prompt.logits("last_logits") };
        let mut input = prefill(&prompt.ids, prompt.greedy.len(), TOP_N);
        for step in 0..prompt.greedy.len() {
            let found = run(&mut *self.executor, input).sampled.remove(0);
            if let Some(logits) = logits.get(step) {
                self.distribution(&found, logits, &prompt.place(&format!("step {step}")));
            }
            if !self.token(prompt, step, &found) && !forced {
                return;
            }
            let (lane, start) = (Lane(0), (prompt.ids.len() + step) as u32);
            let (feed, prompt_tokens) = match forced {
                true => (Feed::Prompt { len: 1 }, vec![prompt.greedy[step]]),
                false => (Feed::Last, vec![]),
            };
            let row = Row { lane, start, feed, store_from: 0, sample: true, n_targets: 0 };
            input = StepInput { rows: vec![row], prompt_tokens, ..StepInput::default() };
        }
    }

    /// Every position of the prompt: each prefix ends in one.
    fn all_positions(&mut self, prompt: &Prompt<'_>) {
        for (position, logits) in prompt.logits("logits").iter().enumerate() {
            let output = run(&mut *self.executor, prefill(&prompt.ids[..=position], 1, TOP_N));
            self.distribution(&output.sampled[0], logits, &prompt.place(&format!("position {position}")));
        }
    }

    /// The prompt's own log-probabilities, as targets.
    fn prompt_logprobs(&mut self, prompt: &Prompt<'_>) {
        let expected = &prompt.golden.tensors[&format!("{}.prompt_logprobs", prompt.name)];
        let mut input = prefill(&prompt.ids, 1, 0);
        input.targets = prompt.ids[1..].to_vec();
        input.rows[0].n_targets = prompt.ids.len() as u32 - 1;
        let found = run(&mut *self.executor, input).target_logprobs;
        assert_eq!(found.len() + 1, expected.len());
        for (&found, &expected) in found.iter().zip(&expected[1..]) {
            self.compare(found, expected, &prompt.place("targets"));
        }
    }
}

/// Compares all that is stored of a fixture, computed by so many GPUs.
pub fn check(name: &str, dtype: DType, n_ranks: usize) {
    let golden = Golden::open(name);
    let executor = golden.executor(Device::Cuda { dtype }, n_ranks);
    check_by(executor, &golden, name, dtype, &format!("{n_ranks} ranks"));
}

/// As [`check`], by an executor that was loaded from the fixture.
pub fn check_by(executor: Box<dyn Executor>, golden: &Golden, name: &str, dtype: DType, by: &str) {
    let mut check =
        Check { executor, noise: Noise::of(dtype), seen: Seen::default(), n_tokens: 0, n_torn: 0 };
    for prompt in golden.prompts() {
        check.generation(&prompt, false);
        check.generation(&prompt, true);
        if prompt.has("all_positions") {
            check.all_positions(&prompt);
        }
        if prompt.has("prompt_logprobs") {
            check.prompt_logprobs(&prompt);
        }
    }
    let Check { seen, noise, n_tokens, n_torn, .. } = check;
    println!(
        "{name:15} {:8} {by} {:6} log-probs, off by {:.5} on average and {:.4} at most; {n_tokens} greedy tokens, {n_torn} torn",
        dtype.name(),
        seen.n(),
        seen.mean(),
        seen.largest()
    );
    assert!(seen.n() > 1000 && seen.mean() <= noise.mean, "{name} in {dtype:?}: {seen:?} against {noise:?}");
}

/// The fixtures with stored results.
pub fn fixtures() -> Vec<String> {
    if let Ok(names) = std::env::var("KVSHARD_FIXTURES") {
        return names.split(',').map(str::to_owned).collect();
    }
    let folders = std::fs::read_dir(fixture("")).unwrap().map(|entry| entry.unwrap().path());
    let with_results = folders.filter(|folder| folder.join("golden.json").is_file());
    let mut names: Vec<String> =
        with_results.map(|folder| folder.file_name().unwrap().to_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

/// All of them, so that one that fails hides no other.
pub fn check_all(fixtures: Vec<String>, dtype: DType, n_ranks: usize) {
    let fails = |name: &String| std::panic::catch_unwind(|| check(name, dtype, n_ranks)).is_err();
    let failed: Vec<String> = fixtures.into_iter().filter(fails).collect();
    assert!(failed.is_empty(), "{dtype:?} on {n_ranks} GPUs of {}", failed.join(", "));
}

#[test]
fn every_fixture_in_bf16() {
    let _gpu = card::alone();
    check_all(fixtures(), DType::BF16, 1);
}

#[test]
fn every_fixture_in_f16() {
    let _gpu = card::alone();
    check_all(fixtures(), DType::F16, 1);
}
