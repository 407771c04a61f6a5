//! Which model a shard runs, and with how much of the machine.

use std::time::Duration;

use super::{
    Device, Dtype, LoadFormat, ModelSource, Refusal, RopeOverride, RopeScalingKind, WeightFiles, refuse,
    seconds,
};
use crate::backend::step::Watermark;
use crate::cli::{HubArgs, ShardArgs};
use crate::model::inject::InjectedFault;

/// Which process this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one that serves.
    Leader,
    /// One of TGI's launcher's processes of a rank above 0: rank 0 does its work.
    Follower {
        /// Which.
        rank: usize,
    },
}

/// Which model a shard runs, and with how much of the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardConfig {
    /// Its files.
    pub source: ModelSource,
    /// Serving, or standing beside the one that does.
    pub role: Role,
    /// Ranks among which the weights are cut; at least 1.
    pub world_size: usize,
    /// The weights' dtype; `None`: as stored.
    pub dtype: Option<Dtype>,
    /// Where it computes.
    pub compute: Compute,
    /// Whether decode steps are recorded into graphs, where there are such.
    pub graphs: bool,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// The operator's rotary scaling.
    pub rope: Option<RopeOverride>,
    /// Slots of the pool; `None`: as memory allows.
    pub pool_tokens: Option<u32>,
    /// Slots kept for requests without slots; `None`: see [`ShardConfig::own_slots_of`].
    pub own_slots: Option<u32>,
    /// Live requests that the device holds.
    pub max_lanes: u32,
    /// Prompt tokens in one step before a Warmup says otherwise.
    pub max_prefill_tokens: u32,
    /// Most tokens of one step.
    pub max_step_tokens: u32,
    /// Whether log-probabilities of prompt tokens are answered.
    pub prompt_logprobs: bool,
    /// Whether the router may reuse the KV of earlier prompts; never without chunking.
    pub prefix_caching: bool,
    /// Whether the router may cut prompts into chunks.
    pub chunking: bool,
    /// Strength of the watermark where a request asks for one.
    pub watermark: Watermark,
    /// Whether a batch's next decode is submitted before it is asked for.
    pub run_ahead: bool,
    /// How long a step may run.
    pub step_timeout: Duration,
    /// A fault to order.
    pub fault: Option<InjectedFault>,
}

/// Where a shard computes.
#[derive(Debug, Clone, PartialEq)]
pub enum Compute {
    /// On the processor.
    Cpu {
        /// Why not on a GPU, where one would have been taken.
        why: Option<String>,
    },
    /// On NVIDIA GPUs.
    Cuda {
        /// Share of a GPU's memory that may be used, in (0, 1].
        memory_fraction: f32,
    },
}

/// Lanes of a GPU, unless the operator says otherwise.
const GPU_LANES: u32 = 1024;
/// Lanes of the CPU, unless the operator says otherwise.
const CPU_LANES: u32 = 64;
/// Seconds that a step may take on a GPU, whose longest ones take a few.
const GPU_STEP_TIMEOUT: f64 = 60.0;
/// Seconds that a step may take on the CPU, where long prompts of large models take minutes.
const CPU_STEP_TIMEOUT: f64 = 600.0;
/// Largest pool that is made without being asked for.
const DEFAULT_POOL_TOKENS: u64 = 131_072;
/// Ranks in one process, at most.
const MAX_WORLD_SIZE: usize = 64;

impl ShardConfig {
    pub(super) fn new(model: Option<String>, args: ShardArgs) -> Result<ShardConfig, Refusal> {
        refuse_what_is_not_there(&args)?;
        let (role, world_size) = role(&args)?;
        let compute = compute(&args)?;
        let max_lanes = args.max_lanes.unwrap_or(match compute {
            Compute::Cpu { .. } => CPU_LANES,
            Compute::Cuda { .. } => GPU_LANES,
        });
        let default_step_timeout = match compute {
            Compute::Cpu { .. } => CPU_STEP_TIMEOUT,
            Compute::Cuda { .. } => GPU_STEP_TIMEOUT,
        };
        if max_lanes == 0 || args.max_batch_prefill_tokens == 0 {
            return refuse("--max-lanes and --max-batch-prefill-tokens must be at least 1");
        }
        let max_step_tokens = args
            .max_step_tokens
            .unwrap_or_else(|| args.max_batch_prefill_tokens.saturating_add(max_lanes).saturating_add(1));
        Ok(ShardConfig {
            rope: rope(&args)?,
            watermark: watermark(&args)?,
            step_timeout: seconds("--step-timeout", args.step_timeout.unwrap_or(default_step_timeout))?,
            source: source(model, args.hub, args.load_format)?,
            role,
            world_size,
            dtype: args.dtype,
            load_format: args.load_format,
            pool_tokens: args.pool_tokens,
            own_slots: args.own_slots,
            max_lanes,
            compute,
            // As `text-generation-launcher` turns them off.
            graphs: args.cuda_graphs != [0],
            max_prefill_tokens: args.max_batch_prefill_tokens,
            max_step_tokens,
            prompt_logprobs: args.enable_prefill_logprobs,
            prefix_caching: args.prefix_caching && args.prefill_chunking,
            chunking: args.prefill_chunking,
            run_ahead: args.run_ahead,
            fault: fault(args.inject_fault.as_deref())?,
        })
    }

    /// Slots of the pool, for a model whose slot takes `bytes_per_slot` on a machine with `available_bytes`: what
    /// was asked for, else what fits in a quarter of the memory, at most 131072.
    ///
    /// # Errors
    /// A sentence with the numbers, when what was asked for does not fit.
    pub fn pool_slots(&self, bytes_per_slot: u64, available_bytes: Option<u64>) -> Result<u32, String> {
        let bytes_per_slot = bytes_per_slot.max(1);
        let fits = |share: u64| available_bytes.map_or(u64::MAX, |bytes| bytes / share / bytes_per_slot);
        if let Some(asked) = self.pool_tokens {
            if u64::from(asked) > fits(1) {
                let needed = u64::from(asked).saturating_mul(bytes_per_slot);
                return Err(format!(
                    "a pool of {asked} tokens takes {} MiB, and {} MiB are free: lower --pool-tokens",
                    needed >> 20,
                    available_bytes.unwrap_or(0) >> 20
                ));
            }
            return Ok(asked);
        }
        let slots = fits(4).min(DEFAULT_POOL_TOKENS);
        if slots < 2 {
            return Err(format!("no memory for a KV pool: one token takes {} KiB", bytes_per_slot >> 10));
        }
        Ok(u32::try_from(slots).unwrap_or(u32::MAX))
    }

    /// Slots kept for requests without slots, in a pool of `n_slots`.
    pub fn own_slots_of(&self, n_slots: u32) -> u32 {
        own_slots_of(self.own_slots, n_slots)
    }
}

/// Slots kept for requests without slots, in a pool of `n_slots`: what was asked for, else a 64th and at least 1024, but
/// never more than half.
pub fn own_slots_of(asked: Option<u32>, n_slots: u32) -> u32 {
    let default = (n_slots / 64).max(1024).min(n_slots / 2);
    asked.unwrap_or(default).min(n_slots.saturating_sub(1))
}

/// The GPU if there is one and nobody wants the CPU.
fn compute(args: &ShardArgs) -> Result<Compute, Refusal> {
    let cuda = Compute::Cuda { memory_fraction: args.cuda_memory_fraction };
    match (args.device, gpu()) {
        (Device::Cpu, _) => Ok(Compute::Cpu { why: None }),
        (_, Ok(())) => Ok(cuda),
        (Device::Auto, Err(why)) => Ok(Compute::Cpu { why: Some(why) }),
        (Device::Cuda, Err(why)) => refuse(format!("--device cuda: {why}")),
    }
}

#[cfg(feature = "cuda")]
fn gpu() -> Result<(), String> {
    crate::backend::cuda::probe()
}

#[cfg(not(feature = "cuda"))]
fn gpu() -> Result<(), String> {
    Err("this build computes on the CPU only".to_owned())
}

fn refuse_what_is_not_there(args: &ShardArgs) -> Result<(), Refusal> {
    if let Some(method) = given(&args.quantize) {
        return refuse(format!("--quantize {method}: quantised weights are not supported"));
    }
    if let Some(n) = args.speculate.filter(|n| *n > 0) {
        return refuse(format!("--speculate {n}: speculation is not supported"));
    }
    if let Some(adapters) = given(&args.lora_adapters) {
        return refuse(format!("--lora-adapters {adapters}: adapters are not supported"));
    }
    if let Some(dtype) = given(&args.kv_cache_dtype)
        && dtype != "auto"
        && args.dtype.map(Dtype::name) != Some(dtype)
        && (dtype, args.device) != ("float32", Device::Cpu)
    {
        return refuse(format!(
            "--kv-cache-dtype {dtype}: keys and values are kept in the dtype of computation"
        ));
    }
    if !(args.cuda_memory_fraction > 0.0 && args.cuda_memory_fraction <= 1.0) {
        return refuse(format!("--cuda-memory-fraction {} is not in (0, 1]", args.cuda_memory_fraction));
    }
    Ok(())
}

fn given(text: &Option<String>) -> Option<&str> {
    text.as_deref().map(str::trim).filter(|text| !text.is_empty())
}

/// `RANK` and `WORLD_SIZE` count with `--sharded` only, as in `text-generation-server`.
fn role(args: &ShardArgs) -> Result<(Role, usize), Refusal> {
    let threads = args.num_shard.unwrap_or(1);
    if !(1..=MAX_WORLD_SIZE).contains(&threads) {
        return refuse(format!("--num-shard {threads} is not between 1 and {MAX_WORLD_SIZE}"));
    }
    if !args.sharded {
        return Ok((Role::Leader, threads));
    }
    let world_size = match (args.world_size, args.num_shard) {
        (Some(world), Some(shards)) if world != shards => {
            return refuse(format!("--num-shard {shards} contradicts WORLD_SIZE={world}"));
        }
        (world, shards) => world.or(shards),
    };
    let (Some(world_size), rank) = (world_size, args.rank.unwrap_or(0)) else {
        return refuse("--sharded needs WORLD_SIZE (and RANK), or --num-shard");
    };
    if !(1..=MAX_WORLD_SIZE).contains(&world_size) || rank >= world_size {
        return refuse(format!(
            "rank {rank} of a world of {world_size} (at most {MAX_WORLD_SIZE}) cannot be"
        ));
    }
    Ok((if rank == 0 { Role::Leader } else { Role::Follower { rank } }, world_size))
}

fn source(model: Option<String>, hub: HubArgs, format: LoadFormat) -> Result<ModelSource, Refusal> {
    let mut source = ModelSource::new(model, hub)?;
    if format == LoadFormat::Dummy {
        source.weights = WeightFiles::NotNeeded;
    }
    Ok(source)
}

fn fault(text: Option<&str>) -> Result<Option<InjectedFault>, Refusal> {
    let parsed = text.map(|text| text.parse().map_err(|why| Refusal(format!("--inject-fault: {why}"))));
    parsed.transpose()
}

fn rope(args: &ShardArgs) -> Result<Option<RopeOverride>, Refusal> {
    let (kind, factor) = match (args.rope_scaling, args.rope_factor) {
        (None, None) => return Ok(None),
        (Some(kind), factor) => (kind, factor.unwrap_or(1.0)),
        (None, Some(factor)) => (RopeScalingKind::Linear, factor),
    };
    if !(factor.is_finite() && factor >= 1.0) {
        return refuse(format!("--rope-factor {factor} is not at least 1"));
    }
    Ok(Some(RopeOverride { kind, factor }))
}

fn watermark(args: &ShardArgs) -> Result<Watermark, Refusal> {
    let (gamma, delta) = (args.watermark_gamma, args.watermark_delta);
    if !(gamma > 0.0 && gamma < 1.0 && delta.is_finite()) {
        return refuse(format!(
            "--watermark-gamma {gamma} is not in (0, 1), or --watermark-delta {delta} is not finite"
        ));
    }
    Ok(Watermark { gamma, delta })
}
