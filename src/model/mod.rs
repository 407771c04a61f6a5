//! From a checkpoint to steps.

pub mod checkpoint;
pub mod families;
pub mod names;
pub mod partition;
pub mod plan;
pub mod rope;
pub mod spec;
pub mod weights;

pub mod attention;
pub mod decoder;
pub mod kv;
pub mod mlp;
pub mod upload;
pub mod workspace;

pub mod executor;
pub mod guard;
pub mod inject;
pub mod rank;
pub mod ranks;

#[cfg(test)]
mod invariance;

use crate::backend::cpu::Cpu;
use crate::error::{Error, Result};
use executor::Executor;
use names::Role;
use partition::Shard;
use ranks::Ranks;
use spec::DecoderSpec;
use weights::TensorPart;

/// What a model is loaded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Ranks: threads with a part of the weights each.
    pub n_ranks: usize,
    /// Slots of the KV pool, slot 0 included.
    pub n_slots: usize,
    /// Lanes.
    pub n_lanes: usize,
    /// Most tokens of one step.
    pub max_step_tokens: usize,
}

/// Where a rank's part of a tensor comes from; asked for by every rank's thread.
pub type Parts = dyn Fn(Role, Shard) -> Result<TensorPart> + Send + Sync;

/// Loads a model onto the CPU. `progress` hears of the bytes taken so far, and of all bytes, over all ranks.
///
/// # Errors
/// [`Error::Unsupported`] for a decoder or a number of ranks that does not fit, [`Error::Checkpoint`] for
/// tensors that do not, [`Error::Exhausted`] for a lack of memory.
pub fn load(
    spec: DecoderSpec,
    parts: impl Fn(Role, Shard) -> Result<TensorPart> + Send + Sync + 'static,
    options: Options,
    progress: &dyn Fn(u64, u64),
) -> Result<Box<dyn Executor>> {
    if options.n_ranks == 0 {
        return Err(Error::Invalid("a model needs at least one rank".into()));
    }
    let backends = Cpu::world(options.n_ranks);
    Ok(Box::new(Ranks::start(backends, spec, Box::new(parts), options, progress)?))
}
