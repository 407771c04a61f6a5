//! From flags to what the program does: validated, complete, printable.

mod bench;
mod shard;
mod source;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::ValueEnum;

pub use bench::{BatchLimits, BenchConfig, Lengths, Load};
pub use shard::{Compute, Role, ShardConfig, own_slots_of};
pub use source::{ModelSource, WeightFiles};

use crate::cli::{
    BenchArgs, DownloadArgs, GenerateArgs, InspectArgs, LogArgs, SamplingArgs, ServeArgs, SocketArgs,
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
    /// 0 for none.
    pub frequency_penalty: f32,
    /// Whether the output is watermarked.
    pub watermark: bool,
    /// Alternatives to report for each token.
    pub top_n: u32,
    /// Draw although every other parameter is neutral.
    pub do_sample: bool,
    /// Of the draws.
    pub seed: u64,
    /// Texts that end the output.
    pub stop: Vec<String>,
}

impl Parameters {
    fn new(args: SamplingArgs, max_new_tokens: u32, stop: Vec<String>) -> Parameters {
        Parameters {
            max_new_tokens,
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            typical_p: args.typical_p,
            repetition_penalty: args.repetition_penalty,
            frequency_penalty: args.frequency_penalty,
            watermark: args.watermark,
            top_n: args.top_n,
            do_sample: args.do_sample,
            seed: args.seed,
            stop,
        }
    }
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
    let parameters = Parameters::new(args.sampling, args.max_new_tokens, args.stop);
    let telemetry = quiet(args.log);
    Ok((ClientConfig { target, prompt: args.prompt, parameters }, telemetry))
}

/// From `bench`'s flags.
///
/// # Errors
/// As [`serve`].
pub fn bench(args: BenchArgs) -> Result<(BenchConfig, TelemetryConfig), Refusal> {
    let telemetry = quiet(args.log.clone());
    Ok((BenchConfig::new(args)?, telemetry))
}

/// The result is what the caller came for; INFO is what it was not asked to be told.
fn quiet(args: LogArgs) -> TelemetryConfig {
    let mut telemetry = TelemetryConfig::new(args, LogStream::Err);
    if telemetry.level == LogLevel::Info {
        telemetry.level = LogLevel::Warning;
    }
    telemetry
}

/// From `inspect`'s flags.
///
/// # Errors
/// As [`serve`].
pub fn inspect(args: InspectArgs) -> Result<(ShardConfig, TelemetryConfig), Refusal> {
    let config = ShardConfig::new(args.model, args.shard)?;
    Ok((config, TelemetryConfig::new(args.log, LogStream::Err)))
}

/// What `download-weights` does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DownloadConfig {
    /// Which model.
    pub source: ModelSource,
    /// Whether `pytorch_model*.bin` become safetensors.
    pub converts: bool,
}

/// From `download-weights`' flags.
///
/// # Errors
/// As [`serve`].
pub fn download(args: DownloadArgs) -> Result<(DownloadConfig, TelemetryConfig), Refusal> {
    if args.extension != ".safetensors" {
        return refuse(format!(
            "--extension {}: .safetensors is what weights are fetched as, or converted to",
            args.extension
        ));
    }
    let source = ModelSource::new(Some(args.model), args.hub)?;
    let config = DownloadConfig { source, converts: !args.no_auto_convert };
    Ok((config, TelemetryConfig::new(args.log, LogStream::Out)))
}

#[cfg(test)]
mod tests;
