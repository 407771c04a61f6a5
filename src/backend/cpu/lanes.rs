//! A live request's state on the device.

use crate::backend::step::{LaneStart, SamplingParams};

/// What a lane holds.
#[derive(Debug, Clone)]
pub struct LaneState {
    /// The slot of each position.
    pub slots: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_len: u32,
    /// The token sampled last.
    pub last: u32,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Prompt and generated ids.
    pub context: Context,
}

impl LaneState {
    /// Before its first token.
    pub fn new(start: &LaneStart) -> LaneState {
        LaneState {
            slots: start.slots.clone(),
            prompt_len: start.prompt.len() as u32,
            last: 0,
            sampling: start.sampling,
            context: Context::new(&start.prompt, &start.sampling),
        }
    }
}

/// How often each id occurs in prompt and output. Empty where no penalty asks for it.
#[derive(Debug, Clone)]
pub struct Context {
    /// Distinct ids with their counts, by id.
    pub counts: Vec<(u32, u32)>,
    /// Tokens counted.
    pub len: u32,
    wanted: bool,
}

impl Context {
    fn new(prompt: &[u32], sampling: &SamplingParams) -> Context {
        let wanted = sampling.repetition_penalty != 1.0 || sampling.frequency_penalty != 0.0;
        let mut context = Context { counts: Vec::new(), len: 0, wanted };
        if wanted {
            let mut ids = prompt.to_vec();
            ids.sort_unstable();
            context.counts = ids.chunk_by(|a, b| a == b).map(|run| (run[0], run.len() as u32)).collect();
            context.len = prompt.len() as u32;
        }
        context
    }

    /// Counts a generated token.
    pub fn push(&mut self, id: u32) {
        if !self.wanted {
            return;
        }
        match self.counts.binary_search_by_key(&id, |&(id, _)| id) {
            Ok(at) => self.counts[at].1 += 1,
            Err(at) => self.counts.insert(at, (id, 1)),
        }
        self.len += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_counts_prompt_and_output() {
        let sampling = SamplingParams { repetition_penalty: 1.5, ..SamplingParams::GREEDY };
        let mut context = Context::new(&[5, 3, 5], &sampling);
        context.push(3);
        context.push(4);
        assert_eq!((context.counts.as_slice(), context.len), ([(3, 2), (4, 1), (5, 2)].as_slice(), 5));
        let mut unused = Context::new(&[5, 3, 5], &SamplingParams::GREEDY);
        unused.push(3);
        assert_eq!((unused.counts.len(), unused.len), (0, 0));
    }
}
