//! From flags to what the program does: validated, complete, printable.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;

use crate::backend::step::Watermark;
use crate::cli::{
    DownloadArgs, GenerateArgs, HubArgs, InspectArgs, LogArgs, ServeArgs, ShardArgs, SocketArgs,
};

/// A combination of flags that nobody can serve: what is wrong with it, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal(pub String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn refuse<T>(message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal(message.into()))
}

/// Where to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    /// The best device there is.
    Auto,
    /// The processor.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// The dtype of weights on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// IEEE half.
    Float16,
    /// The upper half of a single.
    Bfloat16,
    /// IEEE single.
    Float32,
}

impl Dtype {
    /// The name that operators use, `float16` for example.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::Float16 => "float16",
            Dtype::Bfloat16 => "bfloat16",
            Dtype::Float32 => "float32",
        }
    }
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// The model's files.
    Auto,
    /// Random numbers made on the device.
    Dummy,
}

/// How an operator stretches a rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RopeScalingKind {
    /// Frequencies divided by the factor.
    Linear,
    /// The base grows with the sequence.
    Dynamic,
}

/// An operator's scaling in place of the checkpoint's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeOverride {
    /// Which.
    pub kind: RopeScalingKind,
    /// By how much; finite, at least 1.
    pub factor: f32,
}

/// The least severe line that is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    /// Everything.
    Trace,
    /// What helps to find a fault.
    Debug,
    /// What an operator wants to know.
    Info,
    /// What is odd.
    Warning,
    /// What is wrong.
    Error,
}

impl FromStr for LogLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<LogLevel, String> {
        match text.to_ascii_uppercase().as_str() {
            "TRACE" => Ok(LogLevel::Trace),
            "DEBUG" => Ok(LogLevel::Debug),
            "INFO" | "SUCCESS" => Ok(LogLevel::Info),
            "WARNING" | "WARN" => Ok(LogLevel::Warning),
            "ERROR" | "CRITICAL" => Ok(LogLevel::Error),
            _ => Err("expected TRACE, DEBUG, INFO, SUCCESS, WARNING, ERROR or CRITICAL".to_owned()),
        }
    }
}

/// Where a model's files are found.
#[derive(Clone, PartialEq, Eq)]
pub struct ModelSource {
    /// A local directory or a hub id.
    pub name: String,
    /// Branch, tag or commit on the hub.
    pub revision: Option<String>,
    /// The hub's access token.
    pub token: Option<String>,
    /// The folder of downloaded files, where the operator chose one.
    pub cache: Option<PathBuf>,
    /// A mirror of the hub.
    pub endpoint: Option<String>,
    /// A folder of weights that goes before the others.
    pub weights_override: Option<PathBuf>,
    /// Whether the network must not be asked.
    pub offline: bool,
}

impl fmt::Debug for ModelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelSource")
            .field("name", &self.name)
            .field("revision", &self.revision)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("cache", &self.cache)
            .field("endpoint", &self.endpoint)
            .field("weights_override", &self.weights_override)
            .field("offline", &self.offline)
            .finish()
    }
}

impl ModelSource {
    fn new(name: Option<String>, hub: HubArgs) -> Result<ModelSource, Refusal> {
        let given = |text: Option<String>| text.filter(|text| !text.trim().is_empty());
        let name = match given(name) {
            Some(name) => name,
            None => demo_model()?.to_string_lossy().into_owned(),
        };
        let cache = hub.huggingface_hub_cache.or_else(|| hub.hf_home.map(|home| home.join("hub")));
        Ok(ModelSource {
            name,
            revision: given(hub.revision),
            token: given(hub.hf_token).or(given(hub.hf_api_token)),
            cache,
            endpoint: given(hub.hf_endpoint),
            weights_override: hub.weights_cache_override,
            offline: hub.hf_hub_offline,
        })
    }
}

/// The demo model: in the repository that this program was built from, else beside the program.
fn demo_model() -> Result<PathBuf, Refusal> {
    let in_repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("integration/demo");
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("demo")));
    let found = [Some(in_repository), beside].into_iter().flatten().find(|path| path.is_dir());
    found.ok_or_else(|| Refusal("name a model: the demo model is not here".to_owned()))
}

/// Where a shard listens, and how long it waits.
#[derive(Debug, Clone, PartialEq)]
pub struct SocketConfig {
    /// The unix socket, less its ending `-<rank>`; absolute.
    pub uds_path: PathBuf,
    /// TCP beside it.
    pub listen: Option<SocketAddr>,
    /// Largest request message.
    pub max_message_bytes: usize,
    /// How long running calls may take to finish after a signal.
    pub drain_timeout: Duration,
}

impl SocketConfig {
    /// The socket of a rank.
    pub fn path_of(&self, rank: usize) -> PathBuf {
        let mut path = self.uds_path.clone().into_os_string();
        path.push(format!("-{rank}"));
        path.into()
    }

    /// Sockets of a shard that only this process talks to.
    pub fn private(folder: &Path) -> SocketConfig {
        SocketConfig {
            uds_path: folder.join("shard"),
            listen: None,
            max_message_bytes: 256 << 20,
            drain_timeout: Duration::from_secs(5),
        }
    }

    fn new(args: SocketArgs) -> Result<SocketConfig, Refusal> {
        let uds_path =
            std::path::absolute(&args.uds_path).map_err(|error| Refusal(format!("--uds-path: {error}")))?;
        let Some(max_message_bytes) =
            args.max_message_mb.checked_mul(1 << 20).filter(|bytes| (1..=1 << 31).contains(bytes))
        else {
            return refuse(format!("--max-message-mb {} is not between 1 and 2048", args.max_message_mb));
        };
        let drain_timeout = seconds("--drain-timeout", args.drain_timeout)?;
        Ok(SocketConfig { uds_path, listen: args.listen, max_message_bytes, drain_timeout })
    }
}

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
    /// How long a step may run.
    pub step_timeout: Duration,
}

/// Largest pool that is made without being asked for.
const DEFAULT_POOL_TOKENS: u64 = 131_072;
/// Ranks in one process, at most.
const MAX_WORLD_SIZE: usize = 64;

impl ShardConfig {
    fn new(model: Option<String>, args: ShardArgs) -> Result<ShardConfig, Refusal> {
        refuse_what_is_not_there(&args)?;
        let (role, world_size) = role(&args)?;
        if args.max_lanes == 0 || args.max_batch_prefill_tokens == 0 {
            return refuse("--max-lanes and --max-batch-prefill-tokens must be at least 1");
        }
        let max_step_tokens = args
            .max_step_tokens
            .unwrap_or_else(|| args.max_batch_prefill_tokens.saturating_add(args.max_lanes));
        if max_step_tokens < args.max_lanes {
            return refuse(format!(
                "--max-step-tokens {max_step_tokens} is less than one token for each of {} lanes",
                args.max_lanes
            ));
        }
        if let Some(pool) = args.pool_tokens.filter(|pool| *pool < 2) {
            return refuse(format!("--pool-tokens {pool} leaves no slot beside slot 0"));
        }
        if let (Some(own), Some(pool)) = (args.own_slots, args.pool_tokens)
            && own >= pool
        {
            return refuse(format!("--own-slots {own} leaves nothing of --pool-tokens {pool}"));
        }
        Ok(ShardConfig {
            rope: rope(&args)?,
            watermark: watermark(&args)?,
            step_timeout: seconds("--step-timeout", args.step_timeout)?,
            source: ModelSource::new(model, args.hub)?,
            role,
            world_size,
            dtype: args.dtype,
            load_format: args.load_format,
            pool_tokens: args.pool_tokens,
            own_slots: args.own_slots,
            max_lanes: args.max_lanes,
            max_prefill_tokens: args.max_batch_prefill_tokens,
            max_step_tokens,
            prompt_logprobs: args.enable_prefill_logprobs,
            prefix_caching: args.prefix_caching && args.prefill_chunking,
            chunking: args.prefill_chunking,
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

    /// Slots kept for requests without slots, in a pool of `n_slots`: what was asked for, else a 64th and at least
    /// 1024, but never more than half.
    pub fn own_slots_of(&self, n_slots: u32) -> u32 {
        let default = (n_slots / 64).max(1024).min(n_slots / 2);
        self.own_slots.unwrap_or(default).min(n_slots.saturating_sub(1))
    }
}

fn refuse_what_is_not_there(args: &ShardArgs) -> Result<(), Refusal> {
    if args.device == Device::Cuda {
        return refuse("--device cuda: this build computes on the CPU only");
    }
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
        && !["auto", "float32"].contains(&dtype)
    {
        return refuse(format!("--kv-cache-dtype {dtype}: on the CPU, keys and values are float32"));
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

fn seconds(flag: &str, value: f64) -> Result<Duration, Refusal> {
    match Duration::try_from_secs_f64(value) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => refuse(format!("{flag} {value} is not a number of seconds above 0")),
    }
}

/// What is told, and to whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TelemetryConfig {
    /// The least severe line that is logged.
    pub level: LogLevel,
    /// One JSON object a line.
    pub json: bool,
    /// Where logs go.
    pub stream: LogStream,
    /// The collector of traces and metrics.
    pub otlp_endpoint: Option<String>,
    /// The name under which they are sent.
    pub service_name: String,
}

/// Where logs go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogStream {
    /// Standard output, where TGI's launcher reads them.
    Out,
    /// Standard error, where standard output is for the result.
    Err,
}

impl TelemetryConfig {
    fn new(args: LogArgs, stream: LogStream) -> TelemetryConfig {
        let endpoint = args.otlp_endpoint.filter(|text| !text.trim().is_empty());
        TelemetryConfig {
            level: args.logger_level,
            json: args.json_output,
            stream,
            otlp_endpoint: endpoint
                .map(|text| if text.contains("://") { text } else { format!("http://{text}") }),
            service_name: args.otlp_service_name,
        }
    }
}

/// What `serve` does.
#[derive(Debug, Clone, PartialEq)]
pub struct ServeConfig {
    /// Which model, with how much of the machine.
    pub shard: ShardConfig,
    /// Where it listens.
    pub socket: SocketConfig,
}

/// What `generate` does.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientConfig {
    /// The shard to ask.
    pub target: Target,
    /// The prompt.
    pub prompt: String,
    /// How tokens are chosen, and how many.
    pub parameters: Parameters,
}

/// A shard to ask.
#[derive(Debug, Clone, PartialEq)]
pub enum Target {
    /// One that runs.
    Url(String),
    /// One to start for this, with its private socket under a folder.
    Private(Box<ShardConfig>, PathBuf),
}

/// How `generate` chooses tokens; the shard checks them.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters {
    /// Most tokens to generate.
    pub max_new_tokens: u32,
    /// Divides the logits.
    pub temperature: f32,
    /// 0 for all.
    pub top_k: u32,
    /// 1 for all.
    pub top_p: f32,
    /// 1 for all.
    pub typical_p: f32,
    /// 1 for none.
    pub repetition_penalty: f32,
    /// Draw although every other parameter is neutral.
    pub do_sample: bool,
    /// Of the draws.
    pub seed: u64,
    /// Texts that end the output.
    pub stop: Vec<String>,
}

/// From `serve`'s flags.
///
/// # Errors
/// A sentence, for combinations that cannot be served.
pub fn serve(args: ServeArgs) -> Result<(ServeConfig, TelemetryConfig), Refusal> {
    let shard = ShardConfig::new(args.model, args.shard)?;
    let socket = SocketConfig::new(args.socket)?;
    Ok((ServeConfig { shard, socket }, TelemetryConfig::new(args.log, LogStream::Out)))
}

/// From `generate`'s flags.
///
/// # Errors
/// As [`serve`].
pub fn generate(args: GenerateArgs) -> Result<(ClientConfig, TelemetryConfig), Refusal> {
    let target = match args.url {
        Some(url) => Target::Url(url),
        None => Target::Private(Box::new(ShardConfig::new(args.model, args.shard)?), args.tmpdir),
    };
    let parameters = Parameters {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        typical_p: args.typical_p,
        repetition_penalty: args.repetition_penalty,
        do_sample: args.do_sample,
        seed: args.seed,
        stop: args.stop,
    };
    let mut telemetry = TelemetryConfig::new(args.log, LogStream::Err);
    // The text is what the caller came for; INFO is what it was not asked to be told.
    if telemetry.level == LogLevel::Info {
        telemetry.level = LogLevel::Warning;
    }
    Ok((ClientConfig { target, prompt: args.prompt, parameters }, telemetry))
}

/// From `inspect`'s flags.
///
/// # Errors
/// As [`serve`].
pub fn inspect(args: InspectArgs) -> Result<(ShardConfig, TelemetryConfig), Refusal> {
    let config = ShardConfig::new(args.model, args.shard)?;
    Ok((config, TelemetryConfig::new(args.log, LogStream::Err)))
}

/// From `download-weights`' flags.
///
/// # Errors
/// As [`serve`].
pub fn download(args: DownloadArgs) -> Result<(ModelSource, TelemetryConfig), Refusal> {
    if args.merge_lora {
        return refuse("--merge-lora: adapters are not supported");
    }
    if args.extension != ".safetensors" {
        return refuse(format!(
            "--extension {}: weights are read from .safetensors files only",
            args.extension
        ));
    }
    let source = ModelSource::new(Some(args.model), args.hub)?;
    Ok((source, TelemetryConfig::new(args.log, LogStream::Out)))
}

#[cfg(test)]
mod tests;
