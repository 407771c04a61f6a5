//! Flags of `bench`.

use std::path::PathBuf;

use clap::Args;

use super::{LogArgs, SamplingArgs};
use crate::config::Lengths;

/// Flags of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// The shard, as `unix:///path` or `http://host:port`
    #[arg(long)]
    pub url: String,
    /// Requests of each load [default: four for each one in flight, or 30 seconds' worth; at least 16]
    #[arg(long, short = 'n')]
    pub requests: Option<usize>,
    /// Closed loop: this many requests in flight, a new one for each that ends [default: 1]
    #[arg(long, short = 'c', group = "load")]
    pub concurrency: Option<usize>,
    /// Open loop: this many requests a second arrive, at random (Poisson)
    #[arg(long, group = "load")]
    pub rate: Option<f64>,
    /// Closed loops one after the other, as `1,2,4,8`
    #[arg(long, group = "load", value_delimiter = ',')]
    pub sweep: Vec<usize>,
    /// Open loops one after the other, as `0.5,1,2`
    #[arg(long, group = "load", value_delimiter = ',')]
    pub rate_sweep: Vec<f64>,
    /// All requests at once
    #[arg(long, group = "load", requires = "requests")]
    pub at_once: bool,
    /// Prompt lengths: `512`, `uniform:128..1024`, `normal:MEAN,DEVIATION` or `lognormal:MEDIAN,SIGMA`
    #[arg(long, default_value = "512")]
    pub input_tokens: Lengths,
    /// Output lengths, likewise; an end of text does not end a request
    #[arg(long, default_value = "128")]
    pub output_tokens: Lengths,
    /// Requests that run before the measurement begins
    #[arg(long, default_value_t = 2)]
    pub warmup: usize,
    /// Nobody else uses the shard: send it a router's Warmup first, which drops what it holds, and place requests in
    /// all of its pool, as a router does; otherwise it is asked as if beside a live router, whose slots are not for us
    #[arg(long)]
    pub exclusive: bool,
    /// Prompts begin with the same tokens, so many, which are computed once
    #[arg(long, requires = "exclusive", default_value_t = 0)]
    pub shared_prefix: u32,
    /// Prompt tokens in one step
    #[arg(long, default_value_t = 4096)]
    pub max_batch_prefill_tokens: u32,
    /// Requests that run together at most
    #[arg(long)]
    pub max_batch_size: Option<usize>,
    /// KV slots that running requests may take together [default: with --exclusive what the Warmup answers]
    #[arg(long)]
    pub max_batch_total_tokens: Option<u64>,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Write all figures to this file
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Draw latency over load into this file, as SVG
    #[arg(long)]
    pub plot: Option<PathBuf>,
    /// What is told.
    #[command(flatten)]
    pub log: LogArgs,
}
