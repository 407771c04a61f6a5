//! The largest steps, run once before any request: what a device takes at an op's first run is taken then.

use super::Options;
use super::graphed::bucket_rows;
use super::rank::Rank;
use super::spec::DecoderSpec;
use crate::backend::Backend;
use crate::backend::step::{Choice, Feed, LaneStart, Row, SamplingParams, StepInput};
use crate::error::Result;
use crate::ids::Lane;

/// Runs a prefill of as many tokens as a step may have, and decode steps of every number of rows that is recorded later.
/// All of it in slot 0, which no request ever reads.
pub fn run<B: Backend>(rank: &mut Rank<B>, spec: &DecoderSpec, options: &Options) -> Result<()> {
    let longest = spec.max_positions.saturating_sub(1).max(1);
    let mut lens = vec![1; options.n_lanes];
    let mut spare = options.max_step_tokens.saturating_sub(options.n_lanes);
    for len in &mut lens {
        let more = spare.min(longest - 1);
        *len += more;
        spare -= more;
    }
    rank.submit_eager(&prefill(&lens, spec.vocab))?;
    rank.output()?;
    for rows in bucket_rows(options.n_lanes) {
        rank.submit_eager(&decode(&lens[..rows], spec.max_positions))?;
        rank.output()?;
    }
    Ok(())
}

/// Prompts of these lengths, each on its lane, sampled with every stage.
fn prefill(lens: &[usize], vocab: usize) -> StepInput {
    let sampling = SamplingParams {
        choice: Choice::Draw { seed: 1 },
        temperature: 0.7,
        top_k: 50,
        top_p: 0.9,
        typical_p: 0.9,
        repetition_penalty: 1.1,
        top_n: 5,
        ..SamplingParams::GREEDY
    };
    let mut input = StepInput::default();
    for (lane, &len) in lens.iter().enumerate() {
        let prompt: Vec<u32> = (0..len).map(|i| (i % vocab) as u32).collect();
        let (lane, feed) = (Lane(lane as u32), Feed::Prompt { len: len as u32 });
        input.rows.push(Row { lane, start: 0, feed, store_from: 0, sample: true, n_targets: 0 });
        input.prompt_tokens.extend(&prompt);
        input.starts.push(LaneStart { lane, slots: vec![0; len + 1], prompt, sampling });
    }
    input.rows[0].n_targets = 1;
    input.targets.push(0);
    input
}

/// The tokens after those prompts.
fn decode(lens: &[usize], max_positions: usize) -> StepInput {
    let row = |(lane, &len): (usize, &usize)| Row {
        lane: Lane(lane as u32),
        start: len.min(max_positions - 1) as u32,
        feed: Feed::Last,
        store_from: 0,
        sample: true,
        n_targets: 0,
    };
    StepInput { rows: lens.iter().enumerate().map(row).collect(), ..StepInput::default() }
}
