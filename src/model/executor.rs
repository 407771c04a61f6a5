//! The seam under the engine: somebody who runs steps.

use crate::backend::step::{StepInput, StepOutput};
use crate::error::Result;
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
}

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
}

impl PositionRegime {
    /// The regime of a decoder's positions.
    pub fn of(positions: &Positions) -> PositionRegime {
        let Positions::Rope(rope) = positions;
        match rope.scaling {
            RopeScaling::Dynamic { original, .. } => PositionRegime::EachLength { threshold: original },
            RopeScaling::LongRope { original, .. } => PositionRegime::TwoLengths { threshold: original },
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
