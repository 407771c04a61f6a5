//! From a checkpoint to steps.

pub mod checkpoint;
pub mod families;
pub mod layout;
pub mod names;
pub mod part;
pub mod partition;
pub mod plan;
pub mod rope;
pub mod runs;
pub mod spec;
pub mod weights;

pub mod attention;
pub mod branch;
pub mod decoder;
pub mod experts;
pub mod kv;
pub mod latent;
pub mod layer;
pub mod mlp;
pub mod upload;
pub mod workspace;

pub mod executor;
pub mod graphed;
pub mod guard;
pub mod inject;
pub mod leader;
pub mod rank;
pub mod ranks;
mod warm;

#[cfg(test)]
mod invariance;

use crate::backend::cpu::Cpu;
use crate::error::{Error, Result};
use checkpoint::DType;
use executor::Executor;
use inject::InjectedFault;
use names::Role;
use partition::Shard;
use ranks::Ranks;
use spec::DecoderSpec;
use weights::TensorPart;

/// Where a model computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The processor, in f32.
    Cpu,
    /// NVIDIA GPUs, one a rank.
    Cuda {
        /// What is computed in: f16 or bf16.
        dtype: DType,
    },
}

/// How many slots the KV pool gets, slot 0 included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolSize {
    /// So many.
    Slots(usize),
    /// As many as fit, but for so many bytes of each device.
    Rest {
        /// Left to others.
        unused_bytes: u64,
    },
}

/// What a model is loaded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Where it computes.
    pub device: Device,
    /// Ranks: threads with a part of the weights each.
    pub n_ranks: usize,
    /// The KV pool.
    pub pool: PoolSize,
    /// Lanes.
    pub n_lanes: usize,
    /// Most tokens of one step.
    pub max_step_tokens: usize,
    /// Whether decode steps are recorded and replayed, where the device can.
    pub graphs: bool,
    /// What the last rank is to suffer.
    pub fault: Option<InjectedFault>,
}

/// Where a rank's part of a tensor comes from; asked for by every rank's thread.
pub type Parts = dyn Fn(Role, Shard) -> Result<TensorPart> + Send + Sync;

/// Loads a model onto its device. `progress` hears of the bytes taken so far, and of all bytes, over all ranks.
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
    match options.device {
        Device::Cpu => {
            let backends = Cpu::world(options.n_ranks);
            Ok(Box::new(Ranks::start(backends, spec, Box::new(parts), options, progress)?))
        }
        #[cfg(feature = "cuda")]
        Device::Cuda { dtype } => {
            use crate::backend::cuda::{Cuda, World};
            let world = World::new(options.n_ranks)?;
            let open = |rank| -> leader::Open<Cuda> {
                let world = world.clone();
                Box::new(move || Cuda::of_world(&world, rank, dtype))
            };
            let opens = (0..options.n_ranks).map(open).collect();
            Ok(Box::new(leader::Leader::load(opens, spec, Box::new(parts), options, progress)?))
        }
        #[cfg(not(feature = "cuda"))]
        Device::Cuda { .. } => Err(Error::Unsupported("this build computes on the CPU only".into())),
    }
}
