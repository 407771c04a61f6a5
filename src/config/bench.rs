//! What `bench` does.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::{Parameters, Refusal, refuse};
use crate::cli::BenchArgs;

/// Longest prompt or output that is asked for, in tokens.
const MAX_LENGTH: u32 = 1 << 20;
/// Fewest requests of a load that are sent without being asked for.
const MIN_REQUESTS: usize = 16;
/// Requests of a closed loop for each one in flight, and seconds of an open one, where their number is not given.
const ROUNDS: usize = 4;
const SECONDS: f64 = 30.0;

/// What `bench` does.
#[derive(Debug, Clone, PartialEq)]
pub struct BenchConfig {
    /// The shard to ask.
    pub url: String,
    /// One after the other; at least one.
    pub loads: Vec<Load>,
    /// Requests that run before the first load.
    pub n_warmup: usize,
    /// Lengths of prompts.
    pub input_tokens: Lengths,
    /// Lengths of outputs.
    pub output_tokens: Lengths,
    /// Whether nobody else uses the shard.
    pub exclusive: bool,
    /// Tokens that prompts begin with alike.
    pub shared_prefix: u32,
    /// What runs together.
    pub limits: BatchLimits,
    /// How tokens are chosen; the number of new ones is each request's own.
    pub parameters: Parameters,
    /// Of prompts, lengths and arrivals.
    pub seed: u64,
    /// Where all figures go.
    pub json: Option<PathBuf>,
    /// Where the plot goes.
    pub plot: Option<PathBuf>,
}

/// When requests come, and how many.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Load {
    /// A number of requests in flight: a new one comes when one ends.
    Closed {
        /// That number.
        in_flight: usize,
        /// In all.
        n_requests: usize,
    },
    /// Requests come whether others have ended or not, with exponentially distributed gaps.
    Open {
        /// Their mean number in a second.
        rate: f64,
        /// In all.
        n_requests: usize,
    },
}

impl Load {
    /// Requests in all.
    pub fn n_requests(&self) -> usize {
        match *self {
            Load::Closed { n_requests, .. } | Load::Open { n_requests, .. } => n_requests,
        }
    }
}

/// What runs together, as a router's flags say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchLimits {
    /// Prompt tokens in one step.
    pub max_prefill_tokens: u32,
    /// Requests.
    pub max_requests: usize,
    /// KV slots; `None`: what the shard says.
    pub max_total_tokens: Option<u64>,
}

/// A distribution of lengths, in tokens from 1 to 2²⁰.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lengths {
    /// Always the same.
    Fixed(u32),
    /// Each length from the first to the last as likely.
    Uniform(u32, u32),
    /// Mean and standard deviation.
    Normal(f64, f64),
    /// Median, and standard deviation of the logarithm.
    LogNormal(f64, f64),
}

impl Lengths {
    /// The nearest length to a number.
    pub fn clamp(length: f64) -> u32 {
        length.round().clamp(1.0, f64::from(MAX_LENGTH)) as u32
    }
}

/// As it is parsed.
impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lengths::Fixed(length) => write!(f, "{length}"),
            Lengths::Uniform(from, to) => write!(f, "uniform:{from}..{to}"),
            Lengths::Normal(mean, deviation) => write!(f, "normal:{mean},{deviation}"),
            Lengths::LogNormal(median, sigma) => write!(f, "lognormal:{median},{sigma}"),
        }
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Lengths, String> {
        let length = |text: &str| text.parse().ok().filter(|length| (1..=MAX_LENGTH).contains(length));
        let numbers = |text: &str, least: f64| {
            let (first, second) = text.split_once(',')?;
            let (first, second): (f64, f64) = (first.trim().parse().ok()?, second.trim().parse().ok()?);
            (first >= least && first.is_finite() && second >= 0.0 && second.is_finite())
                .then_some((first, second))
        };
        let parsed = match text.split_once(':') {
            None => length(text).map(Lengths::Fixed),
            Some(("uniform", rest)) => rest
                .split_once("..")
                .and_then(|(from, to)| Some((length(from)?, length(to)?)))
                .filter(|(from, to)| from <= to)
                .map(|(from, to)| Lengths::Uniform(from, to)),
            Some(("normal", rest)) => {
                numbers(rest, 1.0).map(|(mean, deviation)| Lengths::Normal(mean, deviation))
            }
            Some(("lognormal", rest)) => {
                numbers(rest, 1.0).map(|(median, sigma)| Lengths::LogNormal(median, sigma))
            }
            Some(_) => None,
        };
        parsed.ok_or_else(|| {
            format!(
                "expected a length from 1 to {MAX_LENGTH}, uniform:FROM..TO, normal:MEAN,DEVIATION or \
                 lognormal:MEDIAN,SIGMA"
            )
        })
    }
}

impl BenchConfig {
    pub(super) fn new(args: BenchArgs) -> Result<BenchConfig, Refusal> {
        if args.requests == Some(0) || args.max_batch_size == Some(0) || args.max_batch_prefill_tokens == 0 {
            return refuse("--requests, --max-batch-size and --max-batch-prefill-tokens must be at least 1");
        }
        Ok(BenchConfig {
            loads: loads(&args)?,
            url: args.url,
            n_warmup: args.warmup,
            input_tokens: args.input_tokens,
            output_tokens: args.output_tokens,
            exclusive: args.exclusive,
            shared_prefix: args.shared_prefix,
            limits: BatchLimits {
                max_prefill_tokens: args.max_batch_prefill_tokens,
                max_requests: args.max_batch_size.unwrap_or(usize::MAX),
                max_total_tokens: args.max_batch_total_tokens,
            },
            seed: args.sampling.seed,
            parameters: Parameters::new(args.sampling, 1, Vec::new()),
            json: args.json,
            plot: args.plot,
        })
    }
}

fn loads(args: &BenchArgs) -> Result<Vec<Load>, Refusal> {
    let closed = |in_flight: usize| {
        let n_requests = args.requests.unwrap_or(in_flight.saturating_mul(ROUNDS).max(MIN_REQUESTS));
        Load::Closed { in_flight, n_requests }
    };
    let open = |rate: f64| {
        let n_requests = args.requests.unwrap_or(((rate * SECONDS).ceil() as usize).max(MIN_REQUESTS));
        Load::Open { rate, n_requests }
    };
    if args.sweep.contains(&0) || args.concurrency == Some(0) {
        return refuse("--concurrency and --sweep need at least one request in flight");
    }
    let rates = args.rate.iter().chain(&args.rate_sweep).copied();
    if let Some(rate) = rates.clone().find(|rate| !(*rate > 0.0 && *rate <= 1e6)) {
        return refuse(format!("--rate {rate} is not a number of requests a second above 0"));
    }
    let in_flight = args.sweep.iter().chain(&args.concurrency).copied();
    let at_once = args.at_once.then_some(args.requests).flatten();
    let loads: Vec<Load> = in_flight.chain(at_once).map(closed).chain(rates.map(open)).collect();
    Ok(if loads.is_empty() { vec![closed(1)] } else { loads })
}
