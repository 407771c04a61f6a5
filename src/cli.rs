//! Flags and environment as written: the only reader of the environment.
//!
//! Names are those of `text-generation-server` and `text-generation-launcher` wherever one exists, so that either
//! can be replaced without touching what starts it. What the flags mean together is decided in [`crate::config`].

mod bench;
mod environment;
mod exit;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::{BoolishValueParser, FalseyValueParser};
use clap::{Args, Parser, Subcommand};

pub use bench::BenchArgs;
pub use environment::{ENVIRONMENT, Variable};
pub use exit::Exit;
use exit::exit_codes;

use crate::config::{Device, Dtype, LoadFormat, LogLevel, RopeScalingKind};

/// A shard server for LLM routers.
#[derive(Debug, Parser)]
#[command(name = "kvshard", version, about, after_long_help = exit_codes(), arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model to a router, on a unix socket
    #[command(after_long_help = serve_notes())]
    Serve(Box<ServeArgs>),
    /// Generate text from one prompt, streamed to the terminal
    #[command(after_long_help = exit_codes())]
    Generate(Box<GenerateArgs>),
    /// Load a running shard as a router does, and measure latency and throughput
    #[command(after_long_help = exit_codes())]
    Bench(Box<BenchArgs>),
    /// Show a model's family, sizes and memory plan without reading its weights
    Inspect(Box<InspectArgs>),
    /// Fetch a model's files, and convert pytorch_model*.bin to safetensors
    DownloadWeights(Box<DownloadArgs>),
}

/// Flags of `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// A local directory or a hub id; the demo model of the repository when left out
    #[arg(env = "MODEL_ID")]
    pub model: Option<String>,
    /// How and where the model is loaded.
    #[command(flatten)]
    pub shard: ShardArgs,
    /// Where it listens.
    #[command(flatten)]
    pub socket: SocketArgs,
    /// What it tells.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Flags that say which model runs, and with how much of the machine.
#[derive(Debug, Args)]
pub struct ShardArgs {
    /// The hub's files: revision, token, folders.
    #[command(flatten)]
    pub hub: HubArgs,
    /// Where to compute
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    pub device: Device,
    /// Dtype of weights and activations [default: as stored]; the CPU computes in float32 whatever is stored
    #[arg(long, env = "DTYPE", value_enum)]
    pub dtype: Option<Dtype>,
    /// Dtype of keys and values
    #[arg(long, env = "KV_CACHE_DTYPE")]
    pub kv_cache_dtype: Option<String>,
    /// Quantisation method
    #[arg(long, env = "QUANTIZE")]
    pub quantize: Option<String>,
    /// Draft tokens a step
    #[arg(long, env = "SPECULATE")]
    pub speculate: Option<u32>,
    /// `dummy`: random weights, for load tests
    #[arg(long, value_enum, default_value_t = LoadFormat::Auto)]
    pub load_format: LoadFormat,
    /// Ranks among which the weights are cut, all of them threads of this process
    #[arg(long, env = "NUM_SHARD")]
    pub num_shard: Option<usize>,
    /// Started once a rank, as TGI's launcher does: RANK and WORLD_SIZE count
    #[arg(long, env = "SHARDED", value_parser = FalseyValueParser::new(), overrides_with = "no_sharded")]
    pub sharded: bool,
    #[arg(long = "no-sharded", id = "no_sharded", hide = true)]
    _no_sharded: bool,
    /// Which of the processes this is; with --sharded
    #[arg(long, env = "RANK", hide = true)]
    pub rank: Option<usize>,
    /// How many processes there are; with --sharded
    #[arg(long, env = "WORLD_SIZE", hide = true)]
    pub world_size: Option<usize>,
    /// LoRA adapters
    #[arg(long, env = "LORA_ADAPTERS")]
    pub lora_adapters: Option<String>,
    /// Accepted; no code is ever taken from a model's folder
    #[arg(long, env = "TRUST_REMOTE_CODE", value_parser = FalseyValueParser::new())]
    #[arg(overrides_with = "no_trust_remote_code")]
    pub trust_remote_code: bool,
    #[arg(long = "no-trust-remote-code", id = "no_trust_remote_code", hide = true)]
    _no_trust_remote_code: bool,
    /// Stretch the rotary embedding
    #[arg(long, env = "ROPE_SCALING", value_enum)]
    pub rope_scaling: Option<RopeScalingKind>,
    /// By how much; alone it means linear scaling
    #[arg(long, env = "ROPE_FACTOR")]
    pub rope_factor: Option<f32>,
    /// Slots of the KV pool, one a token [default: all the memory that a GPU has left; on the CPU a quarter of what is free, at most 131072]
    #[arg(long)]
    pub pool_tokens: Option<u32>,
    /// Slots of the pool kept for requests that come without slots [default: 1/64 of the pool, at least 1024]
    #[arg(long)]
    pub own_slots: Option<u32>,
    /// Live requests that the device holds [default: 1024 on a GPU, 64 on the CPU]
    #[arg(long)]
    pub max_lanes: Option<u32>,
    /// Prompt tokens in one step until a router's Warmup says otherwise
    #[arg(long, env = "MAX_BATCH_PREFILL_TOKENS", default_value_t = 4096)]
    pub max_batch_prefill_tokens: u32,
    /// Most tokens of one forward pass [default: --max-batch-prefill-tokens and --max-lanes together]
    #[arg(long)]
    pub max_step_tokens: Option<u32>,
    /// Accepted; the router's Warmup carries the limit that counts
    #[arg(long, env = "MAX_INPUT_TOKENS")]
    pub max_input_tokens: Option<u32>,
    /// Share of the GPU's memory to use
    #[arg(long, env = "CUDA_MEMORY_FRACTION", default_value_t = 1.0)]
    pub cuda_memory_fraction: f32,
    /// Batch sizes of captured graphs, separated by commas; 0 for none
    #[arg(long, env = "CUDA_GRAPHS", value_delimiter = ',')]
    pub cuda_graphs: Vec<u32>,
    /// Answer requests for the log-probabilities of prompt tokens
    #[arg(long, env = "REQUEST_LOGPROBS", value_parser = FalseyValueParser::new())]
    pub enable_prefill_logprobs: bool,
    /// Let the router reuse the KV of earlier prompts
    #[arg(long, env = "PREFIX_CACHING", action = clap::ArgAction::Set)]
    #[arg(value_parser = FalseyValueParser::new(), default_value = "true")]
    pub prefix_caching: bool,
    /// Let the router cut prompts into chunks; off means no prefix caching either
    #[arg(long, env = "PREFILL_CHUNKING", action = clap::ArgAction::Set)]
    #[arg(value_parser = FalseyValueParser::new(), default_value = "true")]
    pub prefill_chunking: bool,
    /// Share of the vocabulary that a watermark prefers
    #[arg(long, env = "WATERMARK_GAMMA", default_value_t = 0.5)]
    pub watermark_gamma: f32,
    /// How strongly a watermark prefers it
    #[arg(long, env = "WATERMARK_DELTA", default_value_t = 2.0)]
    pub watermark_delta: f32,
    /// Submit a batch's next decode before the router asks for it; tokens are the same either way
    #[arg(long, value_name = "on|off", action = clap::ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), default_value = "on")]
    pub run_ahead: bool,
    /// Seconds after which a step counts as hung, and the process ends; 60 on a GPU, 600 on the CPU where it is not given
    #[arg(long)]
    pub step_timeout: Option<f64>,
    /// For drills and tests: fail at a step, counted from 1. `hang@3`, `panic@3` (of the engine), `error@3` (of this
    /// step alone), `lost@3` (of the device, for good), `rank-error@3` or `rank-hang@3` (of the last rank)
    #[arg(long, value_name = "KIND@STEP", hide = true)]
    pub inject_fault: Option<String>,
}

/// Flags that say where a shard listens.
#[derive(Debug, Args)]
pub struct SocketArgs {
    /// The unix socket, less its ending `-<rank>`
    #[arg(long, env = "SHARD_UDS_PATH", default_value = "/tmp/text-generation-server")]
    pub uds_path: PathBuf,
    /// Listen on TCP as well: a port (on loopback) or an address; nothing is encrypted or authenticated
    #[arg(long, value_name = "ADDR", value_parser = parse_listen)]
    pub listen: Option<SocketAddr>,
    /// Largest request message, in MiB
    #[arg(long, default_value_t = 256)]
    pub max_message_mb: usize,
    /// Seconds that running calls may take to finish after SIGTERM
    #[arg(long, default_value_t = 30.0)]
    pub drain_timeout: f64,
}

/// Flags that say what is told, and to whom.
#[derive(Debug, Clone, Args)]
pub struct LogArgs {
    /// TRACE, DEBUG, INFO, SUCCESS, WARNING, ERROR or CRITICAL
    #[arg(long, default_value = "INFO")]
    pub logger_level: LogLevel,
    /// Log one JSON object a line
    #[arg(long, env = "JSON_OUTPUT", value_parser = FalseyValueParser::new())]
    #[arg(overrides_with = "no_json_output")]
    pub json_output: bool,
    #[arg(long = "no-json-output", id = "no_json_output", hide = true)]
    _no_json_output: bool,
    /// Send traces and metrics to this OTLP/gRPC collector
    #[arg(long, env = "OTLP_ENDPOINT")]
    pub otlp_endpoint: Option<String>,
    /// The name under which they are sent
    #[arg(long, env = "OTLP_SERVICE_NAME", default_value = "text-generation-inference.server")]
    pub otlp_service_name: String,
}

/// Flags of the hub.
#[derive(Debug, Args)]
pub struct HubArgs {
    /// Branch, tag or commit on the hub
    #[arg(long, env = "REVISION")]
    pub revision: Option<String>,
    /// The hub's access token
    #[arg(long, env = "HF_TOKEN", hide = true, hide_env_values = true)]
    pub hf_token: Option<String>,
    /// The same, by its older name
    #[arg(long, env = "HF_API_TOKEN", hide = true, hide_env_values = true)]
    pub hf_api_token: Option<String>,
    /// The folder of all that belongs to the hub
    #[arg(long, env = "HF_HOME", hide = true)]
    pub hf_home: Option<PathBuf>,
    /// The folder of downloaded files
    #[arg(long, env = "HUGGINGFACE_HUB_CACHE")]
    pub huggingface_hub_cache: Option<PathBuf>,
    /// A mirror of the hub
    #[arg(long, env = "HF_ENDPOINT", hide = true)]
    pub hf_endpoint: Option<String>,
    /// A folder of weights that goes before the others
    #[arg(long, env = "WEIGHTS_CACHE_OVERRIDE")]
    pub weights_cache_override: Option<PathBuf>,
    /// Never ask the network
    #[arg(long, env = "HF_HUB_OFFLINE", value_parser = FalseyValueParser::new())]
    pub hf_hub_offline: bool,
}

/// Flags of `generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// The prompt
    pub prompt: String,
    /// A running shard, as `unix:///path` or `http://host:port`; without one, a shard is started for this prompt
    #[arg(long)]
    pub url: Option<String>,
    /// A local directory or a hub id; the demo model of the repository when left out
    #[arg(long, env = "MODEL_ID")]
    pub model: Option<String>,
    /// Most tokens to generate
    #[arg(long, short = 'n', default_value_t = 300)]
    pub max_new_tokens: u32,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// A text that ends the output; may be given several times
    #[arg(long)]
    pub stop: Vec<String>,
    /// How and where the model is loaded, without --url.
    #[command(flatten)]
    pub shard: ShardArgs,
    /// What is told.
    #[command(flatten)]
    pub log: LogArgs,
    /// The folder for the private socket of the shard started here
    #[arg(long, env = "TMPDIR", hide = true, default_value = "/tmp")]
    pub tmpdir: PathBuf,
}

/// Flags that say how tokens are chosen.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Divides the logits
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f32,
    /// Draw from the likeliest tokens only; 0 for all
    #[arg(long, default_value_t = 0)]
    pub top_k: u32,
    /// Draw from the smallest set with this mass
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
    /// Draw from the most typical set with this mass
    #[arg(long, default_value_t = 1.0)]
    pub typical_p: f32,
    /// Punish tokens that were there before
    #[arg(long, default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Punish tokens by how often they were there before
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// Watermark the output
    #[arg(long)]
    pub watermark: bool,
    /// Show this many of the likeliest tokens for each token
    #[arg(long, default_value_t = 0)]
    pub top_n: u32,
    /// Draw instead of taking the likeliest token
    #[arg(long)]
    pub do_sample: bool,
    /// Seed of the draws; for `bench`, of prompts and arrivals too
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// Flags of `inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A local directory or a hub id; the demo model of the repository when left out
    #[arg(env = "MODEL_ID")]
    pub model: Option<String>,
    /// How and where it would be loaded.
    #[command(flatten)]
    pub shard: ShardArgs,
    /// What is told.
    #[command(flatten)]
    pub log: LogArgs,
}

/// Flags of `download-weights`.
#[derive(Debug, Args)]
pub struct DownloadArgs {
    /// A local directory or a hub id
    #[arg(env = "MODEL_ID")]
    pub model: String,
    /// The hub's files.
    #[command(flatten)]
    pub hub: HubArgs,
    /// Ending of the weight files that are wanted; there is one
    #[arg(long, default_value = ".safetensors")]
    pub extension: String,
    /// Accepted; where there are no safetensors, pytorch_model*.bin are converted
    #[arg(long, overrides_with = "no_auto_convert")]
    pub auto_convert: bool,
    /// Leave pytorch_model*.bin as they are; they can be served too
    #[arg(long)]
    pub no_auto_convert: bool,
    /// Accepted, since TGI's launcher always asks; a folder that holds an adapter only is refused
    #[arg(long)]
    pub merge_lora: bool,
    /// Accepted; no code is ever taken from a model's folder
    #[arg(long, env = "TRUST_REMOTE_CODE", value_parser = FalseyValueParser::new())]
    #[arg(overrides_with = "no_trust_remote_code")]
    pub trust_remote_code: bool,
    #[arg(long = "no-trust-remote-code", id = "no_trust_remote_code", hide = true)]
    _no_trust_remote_code: bool,
    /// What is told.
    #[command(flatten)]
    pub log: LogArgs,
}

fn serve_notes() -> String {
    let ignored = ENVIRONMENT.iter().filter_map(|(name, variable)| match variable {
        Variable::Ignored(reason) => Some(format!("  {name}: {reason}")),
        Variable::Flag(_) => None,
    });
    let ignored = ignored.collect::<Vec<_>>().join("\n");
    format!("Variables of TGI's launcher that change nothing here:\n{ignored}\n\n{}", exit_codes())
}

/// A port alone means loopback.
fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.trim_start_matches(':').parse::<u16>() {
        return Ok(SocketAddr::from(([127, 0, 0, 1], port)));
    }
    let text = text.strip_prefix("localhost:").map_or(text.to_owned(), |port| format!("127.0.0.1:{port}"));
    text.parse().map_err(|_| "expected a port or an address like 127.0.0.1:50051".to_owned())
}

#[cfg(test)]
mod tests;
