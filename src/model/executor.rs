//! The seam under the engine: somebody who runs steps.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::step::{StepInput, StepOutput};
use crate::error::Result;
use crate::model::rope::prompt_alpha;
use crate::model::spec::{Positions, RopeScaling};

/// What an engine must know of a loaded model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelInfo {
    /// The family's name, as `inspect` prints it.
    pub family: &'static str,
    /// Width of a row of logits; ids at or above it are no tokens.
    pub vocab: u32,
    /// Largest number of positions, prompt and output together.
    pub max_positions: u32,
    /// Slots of the KV pool, slot 0 included.
    pub n_slots: u32,
    /// Lanes on the device.
    pub n_lanes: u32,
    /// Most tokens of one step.
    pub max_step_tokens: u32,
    /// How a position's keys depend on more than the tokens up to it.
    pub regime: PositionRegime,
    /// What the device computes in, as `Info` reports it: `float32`, `float16`, `bfloat16`.
    pub dtype: &'static str,
    /// `cpu` or `cuda`.
    pub device: &'static str,
    /// Bytes of keys and values a slot, over all layers and ranks.
    pub kv_bytes_per_slot: u64,
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// Bytes of the pool's keys and values, over all ranks.
    pub kv_bytes: u64,
    /// Bytes of recorded graphs, over all ranks.
    pub graph_bytes: u64,
    /// How the ranks' devices reach each other, where there are several.
    pub links: Option<String>,
    /// How far the ranks have come.
    pub progress: Progress,
}

/// The step that each rank has begun last, counted from 1 since the loading: readable while they work. Of two that are
/// equal, one is the other.
#[derive(Debug, Clone)]
pub struct Progress {
    begun: Arc<[AtomicU64]>,
}

impl Progress {
    /// Of so many ranks.
    pub fn new(n_ranks: usize) -> Progress {
        Progress { begun: (0..n_ranks).map(|_| AtomicU64::new(0)).collect() }
    }

    /// A rank begins a step.
    pub fn begin(&self, rank: usize, step: u64) {
        if let Some(begun) = self.begun.get(rank) {
            begun.store(step, Ordering::Relaxed);
        }
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let begun: Vec<u64> = self.begun.iter().map(|step| step.load(Ordering::Relaxed)).collect();
        let step = begun.iter().copied().max().unwrap_or(0);
        match begun.iter().position(|&begun| begun < step) {
            Some(rank) => write!(f, "rank {rank} has not begun step {step}"),
            None if begun.len() == 1 => write!(f, "rank 0 has begun step {step}"),
            None => write!(f, "all {} ranks have begun step {step}", begun.len()),
        }
    }
}

impl PartialEq for Progress {
    fn eq(&self, other: &Progress) -> bool {
        Arc::ptr_eq(&self.begun, &other.begun)
    }
}

impl Eq for Progress {}

/// Rope scalings whose frequencies depend on the length of the sequence: the length that counts for position `p`
/// of a prompt of `prompt_len` tokens is `max(prompt_len, p + 1)`, as in `transformers`' generation. Keys computed
/// under different lengths differ, so a cached prefix may be shared within one regime only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PositionRegime {
    /// Keys depend on the position alone.
    Fixed,
    /// One set of frequencies up to `threshold` tokens, another beyond (longrope).
    TwoLengths {
        /// Longest sequence of the first set.
        threshold: u32,
    },
    /// Unscaled up to `threshold` tokens, beyond it a set for each length (dynamic NTK).
    EachLength {
        /// Longest unscaled sequence.
        threshold: u32,
    },
    /// The prompt's length alone decides, for the whole request (Qwen v1).
    Prompt {
        /// Longest prompt that is not scaled.
        trained: u32,
    },
}

impl PositionRegime {
    /// The regime of a decoder's positions; all its rotary embeddings that depend on lengths do so alike, which
    /// [`super::spec::DecoderSpec::check`] sees to.
    pub fn of(positions: &Positions) -> PositionRegime {
        let Positions::Rope(ropes) = positions else { return PositionRegime::Fixed };
        let regimes = ropes.iter().map(|rope| PositionRegime::of_scaling(&rope.scaling));
        regimes.reduce(|a, b| if a == PositionRegime::Fixed { b } else { a }).unwrap_or(PositionRegime::Fixed)
    }

    /// The regime of one rotary embedding.
    pub fn of_scaling(scaling: &RopeScaling) -> PositionRegime {
        match *scaling {
            RopeScaling::Dynamic { original, .. } => PositionRegime::EachLength { threshold: original },
            RopeScaling::LongRope { original, .. } => PositionRegime::TwoLengths { threshold: original },
            RopeScaling::PromptNtk { trained } => PositionRegime::Prompt { trained },
            RopeScaling::Unscaled
            | RopeScaling::Linear { .. }
            | RopeScaling::Llama3 { .. }
            | RopeScaling::Yarn { .. } => PositionRegime::Fixed,
        }
    }

    /// The salt of position `p`'s slot tag: equal exactly where the frequencies are.
    pub fn salt(self, prompt_len: u32, position: u32) -> u64 {
        let len = prompt_len.max(position.saturating_add(1));
        match self {
            PositionRegime::TwoLengths { threshold } if len > threshold => 1,
            PositionRegime::EachLength { threshold } if len > threshold => u64::from(len),
            PositionRegime::Prompt { trained } if prompt_len > trained => prompt_alpha(prompt_len, trained),
            _ => 0,
        }
    }
}

/// Runs steps, in the order in which they are submitted: what a step reads or writes of slots and lanes, and the lanes
/// that it starts, come after all of the steps before it. Built and used on the engine's thread.
pub trait Executor {
    /// What was loaded.
    fn info(&self) -> &ModelInfo;

    /// Starts a step. At most two are under way at once.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] when the step could not be started; nothing was written then.
    /// [`crate::error::Error::DeviceLost`] when no step ever can be again.
    fn submit(&mut self, step: StepInput) -> Result<()>;

    /// Waits for the oldest step under way.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] when the step failed: what it was to store is undefined.
    /// [`crate::error::Error::DeviceLost`] when every later one will fail too.
    fn wait(&mut self) -> Result<StepOutput>;

    /// Bytes of device memory still free, where the device can tell.
    fn free_bytes(&self) -> Option<u64>;
}

#[cfg(test)]
mod tests {
    use super::Progress;

    #[test]
    fn who_lags_is_named() {
        let (one, three) = (Progress::new(1), Progress::new(3));
        one.begin(0, 7);
        assert_eq!(one.to_string(), "rank 0 has begun step 7");
        (0..3).for_each(|rank| three.begin(rank, 4));
        assert_eq!(three.to_string(), "all 3 ranks have begun step 4");
        three.begin(0, 5);
        three.begin(2, 5);
        assert_eq!(three.to_string(), "rank 1 has not begun step 5");
    }
}
