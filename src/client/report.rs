//! What a load test measured: records summed up, as a table and as JSON.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::record::{Record, RequestRecord, State, StepKind, StepRecord, milliseconds};
use crate::config::{BenchConfig, Load};
use crate::pb::v3;

/// Lines of the table of steps: the most frequent batch sizes.
const MAX_STEP_LINES: usize = 10;

/// What a load test measured. Displayed, it is a table for people; serialised, all figures for programs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Where the shard listens.
    pub url: String,
    /// The dtype that it computes with.
    pub dtype: String,
    /// Where it computes.
    pub device: String,
    /// Lengths of prompts.
    pub input_tokens: String,
    /// Lengths of outputs.
    pub output_tokens: String,
    /// Prompt tokens in one step.
    pub max_batch_prefill_tokens: u32,
    /// Whether nobody else used the shard.
    pub exclusive: bool,
    /// Tokens that prompts begin with alike.
    pub shared_prefix: u32,
    /// Of prompts, lengths and arrivals.
    pub seed: u64,
    /// What came of each load.
    pub loads: Vec<Level>,
    /// How it ended.
    pub ending: BenchEnding,
}

/// How a load test ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BenchEnding {
    /// Every load ran to its end.
    Complete,
    /// Ctrl-C.
    Interrupted,
    /// The shard was lost, or broke the protocol.
    Failed(String),
}

/// What came of a load.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Level {
    /// Requests in flight, of a closed loop.
    pub in_flight: Option<usize>,
    /// Requests a second, of an open loop.
    pub rate: Option<f64>,
    /// Requests that got all of their tokens.
    pub n_done: usize,
    /// Requests that ended otherwise.
    pub n_failed: usize,
    /// Why, and how many of each.
    pub failures: BTreeMap<String, usize>,
    /// From the beginning to the last answer.
    pub duration_s: f64,
    /// Prompt tokens of requests that got a token.
    pub n_input_tokens: u64,
    /// Tokens that came.
    pub n_output_tokens: u64,
    /// Requests that got all of their tokens.
    pub requests_per_s: f64,
    /// Prompt tokens of requests that got a token.
    pub input_tokens_per_s: f64,
    /// Tokens that came.
    pub output_tokens_per_s: f64,
    /// From arrival to the first token.
    pub time_to_first_token_ms: Option<Distribution>,
    /// The time after the first token, divided among the others of a request.
    pub time_per_output_token_ms: Option<Distribution>,
    /// Between the tokens of a request, each one.
    pub inter_token_latency_ms: Option<Distribution>,
    /// From arrival to the last token.
    pub end_to_end_ms: Option<Distribution>,
    /// All Prefills.
    pub prefill_steps: Option<StepSummary>,
    /// Decodes by batch size.
    pub decode_steps: Vec<StepSummary>,
    /// Share of the time in which the client neither waited for an answer nor for an arrival.
    pub client_share: f64,
    /// Batches whose slots were compared with the lengths asked for.
    pub n_lengths_checked: usize,
    /// The first one that differs: slots taken, slots expected.
    pub wrong_lengths: Option<(u64, u64)>,
}

/// Steps of one size: medians.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepSummary {
    /// Requests that got a token in each.
    pub batch_size: usize,
    /// Steps.
    pub n: usize,
    /// From one call to the next, where nothing came between.
    pub call_to_call_ms: Option<f64>,
    /// From a call to its answer.
    pub round_trip_ms: f64,
    /// The call as the shard saw it.
    pub total_ms: f64,
    /// Until the tokens were on the host, by the shard's clock.
    pub forward_ms: f64,
    /// Detokenising and building the answer, by the shard's clock.
    pub decode_ms: f64,
}

/// Mean and percentiles.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Distribution {
    /// Values.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// The median.
    pub p50: f64,
    /// Of ten values, nine are not above.
    pub p90: f64,
    /// Of a hundred values, 99 are not above.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Distribution {
    /// Of some values; `None` of none.
    pub fn of(mut values: Vec<f64>) -> Option<Distribution> {
        values.sort_unstable_by(f64::total_cmp);
        Some(Distribution {
            n: values.len(),
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: percentile(&values, 50.0)?,
            p90: percentile(&values, 90.0)?,
            p99: percentile(&values, 99.0)?,
            max: *values.last()?,
        })
    }
}

/// A percentile of sorted values, interpolated between the two nearest (NumPy's `linear`).
fn percentile(sorted: &[f64], percent: f64) -> Option<f64> {
    let at = (sorted.len().checked_sub(1)? as f64) * percent / 100.0;
    let (below, above) = (*sorted.get(at.floor() as usize)?, *sorted.get(at.ceil() as usize)?);
    Some(below + (above - below) * at.fract())
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    percentile(&values, 50.0)
}

impl StepSummary {
    fn of(batch_size: usize, steps: &[&StepRecord]) -> Option<StepSummary> {
        let median_of =
            |value: fn(&StepRecord) -> f64| median(steps.iter().map(|step| value(step)).collect());
        Some(StepSummary {
            batch_size,
            n: steps.len(),
            call_to_call_ms: median(steps.iter().filter_map(|step| step.to_next).map(milliseconds).collect()),
            round_trip_ms: median_of(|step| milliseconds(step.answered - step.began))?,
            total_ms: median_of(|step| step.total_ns as f64 / 1e6)?,
            forward_ms: median_of(|step| step.forward_ns as f64 / 1e6)?,
            decode_ms: median_of(|step| step.decode_ns as f64 / 1e6)?,
        })
    }
}

impl Level {
    pub(super) fn new(load: Load, record: Record) -> Level {
        let done = || record.requests.iter().filter(|request| request.state == State::Done);
        let begun = record.requests.iter().filter(|request| request.first.is_some());
        let n_input_tokens = begun.map(|request| u64::from(request.input_tokens)).sum();
        let n_output_tokens = record.requests.iter().map(|request| u64::from(request.n_tokens)).sum();
        let duration_s = (record.ended - record.began).as_secs_f64();
        let per_s = |n: f64| if duration_s > 0.0 { n / duration_s } else { 0.0 };
        let first = |request: &RequestRecord| Some(milliseconds(request.first? - request.arrived));
        let per_token = |request: &RequestRecord| {
            let n_after = request.n_tokens.checked_sub(1).filter(|n| *n > 0)?;
            Some(milliseconds(request.last - request.first?) / f64::from(n_after))
        };
        let (in_flight, rate) = match load {
            Load::Closed { in_flight, .. } => (Some(in_flight), None),
            Load::Open { rate, .. } => (None, Some(rate)),
        };
        let mut by_size: BTreeMap<usize, Vec<&StepRecord>> = BTreeMap::new();
        let (decodes, prefills): (Vec<_>, Vec<_>) =
            record.steps.iter().partition(|step| step.kind == StepKind::Decode);
        decodes.into_iter().for_each(|step| by_size.entry(step.n_rows).or_default().push(step));
        let rows = prefills.iter().map(|step| step.n_rows as f64).collect();
        Level {
            in_flight,
            rate,
            n_done: done().count(),
            n_failed: record.n_failed,
            duration_s,
            n_input_tokens,
            n_output_tokens,
            requests_per_s: per_s(done().count() as f64),
            input_tokens_per_s: per_s(n_input_tokens as f64),
            output_tokens_per_s: per_s(n_output_tokens as f64),
            time_to_first_token_ms: Distribution::of(done().filter_map(first).collect()),
            time_per_output_token_ms: Distribution::of(done().filter_map(per_token).collect()),
            inter_token_latency_ms: Distribution::of(record.gaps_ms),
            end_to_end_ms: Distribution::of(
                done().map(|request| milliseconds(request.last - request.arrived)).collect(),
            ),
            prefill_steps: median(rows).and_then(|n_rows| StepSummary::of(n_rows as usize, &prefills)),
            decode_steps: by_size.iter().filter_map(|(size, steps)| StepSummary::of(*size, steps)).collect(),
            client_share: 1.0 - per_s(record.waited.as_secs_f64()),
            n_lengths_checked: record.n_checked,
            wrong_lengths: record.wrong_slots,
            failures: record.reasons,
        }
    }

    /// The load, for people.
    fn name(&self) -> String {
        match (self.in_flight, self.rate) {
            (Some(in_flight), _) => format!("{in_flight} in flight"),
            (_, Some(rate)) => format!("{rate} requests/s"),
            _ => String::new(),
        }
    }

    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "requests    {} done, {} failed, in {:.2} s",
            self.n_done, self.n_failed, self.duration_s
        )?;
        writeln!(
            f,
            "throughput  {:.1} input tokens/s, {:.1} output tokens/s, {:.2} requests/s",
            self.input_tokens_per_s, self.output_tokens_per_s, self.requests_per_s
        )?;
        if self.n_output_tokens == 0 {
            return Ok(());
        }
        writeln!(f, "\n{:<24}{:>10}{:>10}{:>10}{:>10}{:>10}", "ms", "mean", "p50", "p90", "p99", "max")?;
        for (name, distribution) in [
            ("time to first token", self.time_to_first_token_ms),
            ("time per output token", self.time_per_output_token_ms),
            ("inter-token latency", self.inter_token_latency_ms),
            ("end to end", self.end_to_end_ms),
        ] {
            let Some(Distribution { mean, p50, p90, p99, max, .. }) = distribution else { continue };
            writeln!(f, "{name:<24}{mean:>10.2}{p50:>10.2}{p90:>10.2}{p99:>10.2}{max:>10.2}")?;
        }
        Ok(())
    }

    fn write_failures(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (reason, n) in &self.failures {
            writeln!(f, "failed      {n} at {}: {reason}", self.name())?;
        }
        Ok(())
    }

    /// One line of several loads.
    fn write_line(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let load = self.rate.map_or(self.in_flight.unwrap_or(0).to_string(), |rate| rate.to_string());
        let of = |distribution: Option<Distribution>| distribution.map_or([f64::NAN; 2], |d| [d.p50, d.p99]);
        write!(f, "{load:>10}{:>8}{:>8}", self.n_done, self.n_failed)?;
        write!(f, "{:>12.1}{:>12.1}", self.input_tokens_per_s, self.output_tokens_per_s)?;
        let latencies = [self.time_to_first_token_ms, self.time_per_output_token_ms, self.end_to_end_ms];
        for value in latencies.into_iter().flat_map(of) {
            write!(f, "{value:>11.2}")?;
        }
        writeln!(f)
    }
}

impl Report {
    pub(super) fn new(config: &BenchConfig, info: &v3::InfoResponse) -> Report {
        Report {
            url: config.url.clone(),
            dtype: info.dtype.clone(),
            device: info.device_type.clone(),
            input_tokens: config.input_tokens.to_string(),
            output_tokens: config.output_tokens.to_string(),
            max_batch_prefill_tokens: config.limits.max_prefill_tokens,
            exclusive: config.exclusive,
            shared_prefix: config.shared_prefix,
            seed: config.seed,
            loads: Vec::new(),
            ending: BenchEnding::Complete,
        }
    }

    pub(super) fn add(&mut self, load: Load, record: Record) {
        self.loads.push(Level::new(load, record));
    }

    /// Whether any request got all of its tokens.
    pub fn has_measured(&self) -> bool {
        self.loads.iter().any(|load| load.n_done > 0)
    }

    fn write_steps(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\n{:<24}{:>8}{:>14}{:>12}{:>12}{:>12}{:>12}",
            "steps, medians in ms", "steps", "call to call", "round trip", "shard", "forward", "detokenise"
        )?;
        let line = |f: &mut fmt::Formatter<'_>, name: &str, step: &StepSummary| {
            let StepSummary { n, round_trip_ms, total_ms, forward_ms, decode_ms, .. } = step;
            let to_next = step.call_to_call_ms.map_or("–".to_owned(), |ms| format!("{ms:.3}"));
            writeln!(
                f,
                "{name:<24}{n:>8}{to_next:>14}{round_trip_ms:>12.3}{total_ms:>12.3}{forward_ms:>12.3}{decode_ms:>12.3}"
            )
        };
        for load in &self.loads {
            let at = if self.loads.len() > 1 { format!("{}: ", load.name()) } else { String::new() };
            if let Some(step) = &load.prefill_steps {
                line(f, &format!("{at}prefill"), step)?;
            }
            let mut decodes: Vec<&StepSummary> = load.decode_steps.iter().collect();
            decodes.sort_by_key(|step| std::cmp::Reverse(step.n));
            decodes.truncate(if self.loads.len() > 1 { 1 } else { MAX_STEP_LINES });
            decodes.sort_by_key(|step| step.batch_size);
            for step in decodes {
                line(f, &format!("{at}decode of {}", step.batch_size), step)?;
            }
        }
        Ok(())
    }

    fn write_lengths(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n_checked: usize = self.loads.iter().map(|load| load.n_lengths_checked).sum();
        match self.loads.iter().find_map(|load| load.wrong_lengths) {
            Some((taken, expected)) => writeln!(
                f,
                "lengths     WRONG: a batch took {taken} KV slots, prompts and outputs as asked for need {expected}"
            ),
            None if n_checked == 0 => Ok(()),
            None => writeln!(f, "lengths     as asked for, by the KV slots of {n_checked} batches"),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { url, dtype, device, input_tokens, output_tokens, .. } = self;
        writeln!(f, "shard       {url}, {device}, {dtype}")?;
        write!(f, "load        {input_tokens} tokens in, {output_tokens} out")?;
        if self.shared_prefix > 0 {
            write!(f, ", {} of them shared", self.shared_prefix)?;
        }
        match &self.loads[..] {
            [load] => {
                writeln!(f, ", {}", load.name())?;
                load.write(f)?;
            }
            loads => {
                let unit =
                    if loads.iter().any(|load| load.rate.is_some()) { "requests/s" } else { "in flight" };
                writeln!(
                    f,
                    "\n\n{:>26}{:>24}{:>22}{:>22}{:>22}",
                    "", "tokens/s", "first token, ms", "per token, ms", "end to end, ms"
                )?;
                write!(f, "{unit:>10}{:>8}{:>8}{:>12}{:>12}", "done", "failed", "in", "out")?;
                writeln!(
                    f,
                    "{:>11}{:>11}{:>11}{:>11}{:>11}{:>11}",
                    "p50", "p99", "p50", "p99", "p50", "p99"
                )?;
                loads.iter().try_for_each(|load| load.write_line(f))?;
            }
        }
        if self.loads.iter().any(|load| load.n_output_tokens > 0) {
            self.write_steps(f)?;
            writeln!(f)?;
            self.write_lengths(f)?;
            let busiest = self.loads.iter().map(|load| load.client_share).fold(0.0, f64::max);
            writeln!(f, "client      busy itself {:.1} % of the time", 100.0 * busiest)?;
        }
        self.loads.iter().try_for_each(|load| load.write_failures(f))?;
        match &self.ending {
            BenchEnding::Complete => Ok(()),
            BenchEnding::Interrupted => writeln!(f, "interrupted: these are the figures so far"),
            BenchEnding::Failed(_) => writeln!(f, "cut short: these are the figures so far"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn percentiles_are_interpolated() {
        let Distribution { n, mean, p50, p90, p99, max } =
            Distribution::of((1..=101).rev().map(f64::from).collect()).expect("values");
        assert_eq!((n, mean, p50, p90, p99, max), (101, 51.0, 51.0, 91.0, 100.0, 101.0));
        let two = Distribution::of(vec![3.0, 1.0]).expect("values");
        assert_eq!((two.p50, two.max), (2.0, 3.0));
        assert!((two.p90 - 2.8).abs() < 1e-12);
        let one = Distribution::of(vec![5.0]).expect("a value");
        assert_eq!((one.mean, one.p50, one.p99), (5.0, 5.0, 5.0));
        assert_eq!(Distribution::of(Vec::new()), None);
    }

    /// Two requests of three and one tokens, 10 ms a step, and one that failed.
    fn level() -> Level {
        let began = Instant::now();
        let at = |ms: u64| began + Duration::from_millis(ms);
        let mut record = Record::new(began);
        record.requests = [(0, 3), (5, 1), (5, 9)].map(|(ms, n)| RequestRecord::new(at(ms), 100, n)).into();
        let step = |kind, n_rows, began, answered| StepRecord {
            kind,
            n_rows,
            began: at(began),
            answered: at(answered),
            to_next: None,
            forward_ns: 8_000_000,
            decode_ns: 500_000,
            total_ns: 9_000_000,
        };
        record.push_step(step(StepKind::Prefill, 2, 5, 15));
        record.take_tokens(0, 1, at(15));
        record.take_tokens(1, 1, at(15));
        record.finish(1);
        record.waited(Duration::from_millis(1));
        record.push_step(step(StepKind::Decode, 1, 16, 25));
        record.take_tokens(0, 1, at(25));
        record.push_step(step(StepKind::Decode, 1, 26, 35));
        record.take_tokens(0, 1, at(35));
        record.finish(0);
        record.fail(2, "no room");
        record.check_slots(102, 102);
        Level::new(Load::Closed { in_flight: 2, n_requests: 3 }, record)
    }

    #[test]
    fn a_load_is_summed_up() {
        let level = level();
        assert_eq!((level.n_done, level.n_failed, level.failures["no room"]), (2, 1, 1));
        assert_eq!((level.n_input_tokens, level.n_output_tokens), (200, 4));
        assert_eq!(level.duration_s, 0.035);
        let first = level.time_to_first_token_ms.expect("first tokens");
        assert_eq!((first.n, first.mean, first.max), (2, 12.5, 15.0));
        let per_token = level.time_per_output_token_ms.expect("a request with more than one token");
        assert_eq!((per_token.n, per_token.p50), (1, 10.0));
        assert_eq!(level.inter_token_latency_ms.expect("gaps").n, 2);
        let [decode] = &level.decode_steps[..] else { panic!("one size") };
        assert_eq!((decode.batch_size, decode.n, decode.call_to_call_ms), (1, 2, Some(10.0)));
        assert_eq!((decode.round_trip_ms, decode.forward_ms), (9.0, 8.0));
        // Before the first call, and one millisecond between two others.
        assert!((level.client_share - 6.0 / 35.0).abs() < 1e-9, "{}", level.client_share);
    }

    #[test]
    fn a_report_is_a_table_and_json() {
        let mut report = Report {
            url: "unix:///s".to_owned(),
            dtype: "float32".to_owned(),
            device: "cpu".to_owned(),
            input_tokens: "100".to_owned(),
            output_tokens: "uniform:1..9".to_owned(),
            max_batch_prefill_tokens: 4096,
            exclusive: false,
            shared_prefix: 0,
            seed: 0,
            loads: vec![level()],
            ending: BenchEnding::Interrupted,
        };
        let table = report.to_string();
        for text in ["2 done, 1 failed", "decode of 1", "no room", "time per output token", "figures so far"]
        {
            assert!(table.contains(text), "{text} is missing in\n{table}");
        }
        report.loads.push(level());
        assert_eq!(report.to_string().lines().filter(|line| line.contains("2 in flight: decode")).count(), 2);
        let json = serde_json::to_value(&report).expect("serialises");
        assert_eq!(json["loads"][0]["time_to_first_token_ms"]["p50"], 12.5);
        assert_eq!(json["ending"], "interrupted");
    }
}
