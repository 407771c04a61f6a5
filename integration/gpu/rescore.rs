//! What was produced in company, scored alone by teacher forcing.

use kvshard::backend::step::{Feed, LaneStart, Row, Sampled, SamplingParams, StepInput, StepOutput};
use kvshard::ids::Lane;
use kvshard::model::executor::Executor;

/// Runs one step.
pub fn run(executor: &mut dyn Executor, input: StepInput) -> StepOutput {
    executor.submit(input).unwrap();
    executor.wait().unwrap()
}

/// For each token of an output, how far its log-probability lies below the largest one of its position, in nats.
///
/// The tokens are fed as one prompt, which gives their log-probabilities; then each position again by itself, which
/// gives the largest. The prompt's length stays that of the prompt, on which frequencies may depend. Lane 0 and the slots
/// from 1 on must be free.
pub fn deficits(executor: &mut dyn Executor, prompt: &[u32], output: &[u32]) -> Vec<f32> {
    let tokens = [prompt, output].concat();
    let n_fed = tokens.len() as u32 - 1;
    let lane = Lane(0);
    let slots = (1..=n_fed).collect();
    let mut starts =
        vec![LaneStart { lane, slots, prompt: prompt.to_vec(), sampling: SamplingParams::GREEDY }];
    let mut logprobs = Vec::new();
    for start in (0..n_fed).step_by(executor.info().max_step_tokens as usize) {
        let len = executor.info().max_step_tokens.min(n_fed - start);
        let (from, to) = (start as usize, (start + len) as usize);
        let feed = Feed::Prompt { len };
        let input = StepInput {
            starts: std::mem::take(&mut starts),
            rows: vec![Row { lane, start, feed, store_from: 0, sample: false, n_targets: len }],
            prompt_tokens: tokens[from..to].to_vec(),
            targets: tokens[from + 1..to + 1].to_vec(),
        };
        logprobs.extend(run(executor, input).target_logprobs);
    }
    let predicting = prompt.len() - 1..tokens.len() - 1;
    let deficit = |position: usize| {
        let (start, feed) = (position as u32, Feed::Prompt { len: 1 });
        let row = Row { lane, start, feed, store_from: start + 1, sample: true, n_targets: 0 };
        let prompt_tokens = vec![tokens[position]];
        let input = StepInput { rows: vec![row], prompt_tokens, ..StepInput::default() };
        match run(executor, input).sampled.as_slice() {
            [Sampled::Token { logprob, .. }] => logprob - logprobs[position],
            other => panic!("{other:?} at position {position}"),
        }
    };
    predicting.map(deficit).collect()
}
