//! The load test against real shards: what was asked for is what ran, what it counts is true, and nothing stays.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::Parser as _;
use kvshard::backend::step::{StepInput, StepOutput};
use kvshard::cli::{Cli, Command};
use kvshard::client::{self, BenchEnding, Level, Report};
use kvshard::config;
use kvshard::model::executor::{Executor, ModelInfo};
use serde_json::{Value, json};

use crate::support::fixture;
use crate::support::process::{Serving, kvshard};
use crate::support::shard::TestShard;

/// What `kvshard bench` reports of a shard.
async fn bench(url: &str, flags: &str) -> Report {
    let line = format!("kvshard bench --url {url} {flags}");
    let command = Cli::try_parse_from(line.split_whitespace()).unwrap().command;
    let Command::Bench(args) = command else { unreachable!() };
    let (config, _) = config::bench(*args).unwrap();
    client::bench(&config, &mut |_| {}).await.unwrap()
}

/// The only load of a report, all of whose requests got what they asked for.
fn whole(report: &Report, n_requests: usize, n_input: u64, n_output: u64) -> &Level {
    let [level] = &report.loads[..] else { panic!("not one load") };
    assert_eq!(report.ending, BenchEnding::Complete);
    assert_eq!((level.n_done, level.n_failed, level.wrong_lengths), (n_requests, 0, None), "{report}");
    assert_eq!((level.n_input_tokens, level.n_output_tokens), (n_input, n_output));
    level
}

/// A model of which there is only the shape.
fn dummy(folder: &Path, vocab: usize) {
    let config = fs::read(fixture("llama3").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config["vocab_size"] = json!(vocab);
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_gets_exactly_the_tokens_that_were_asked_for() {
    let shard = TestShard::start("llama", &[]).await;
    let report = bench(shard.shard.url(), "-c 5 -n 23 --input-tokens 31 --output-tokens 9").await;
    let level = whole(&report, 23, 23 * 31, 23 * 9);
    assert!(level.n_lengths_checked > 0);
    assert_eq!(level.inter_token_latency_ms.unwrap().n, 23 * 8);
    assert_eq!(level.time_to_first_token_ms.unwrap().n, 23);
    assert!(level.decode_steps.iter().any(|step| step.batch_size == 5 && step.forward_ms > 0.0));
    shard.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prompts_longer_than_a_step_come_in_chunks_and_lengths_may_vary() {
    let shard = TestShard::start("llama", &["--max-batch-prefill-tokens", "24"]).await;
    let flags = "--at-once -n 12 --input-tokens uniform:1..60 --output-tokens uniform:1..7 \
                 --max-batch-prefill-tokens 24 --max-batch-size 4 --do-sample --top-k 20 --seed 5";
    let report = bench(shard.shard.url(), flags).await;
    let [level] = &report.loads[..] else { panic!("not one load") };
    assert_eq!((level.n_done, level.wrong_lengths), (12, None), "{report}");
    assert!(level.decode_steps.iter().all(|step| step.batch_size <= 4));
    shard.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_without_chunking_decodes_two_batches() {
    let shard = TestShard::start("llama", &["--prefill-chunking", "false"]).await;
    let report = bench(shard.shard.url(), "-c 3 -n 10 --input-tokens 20 --output-tokens uniform:2..6").await;
    let [level] = &report.loads[..] else { panic!("not one load") };
    assert_eq!((level.n_done, level.n_failed), (10, 0), "{report}");
    shard.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn alone_it_fills_the_pool_and_no_more() {
    // 48 slots beyond slot 0 are the router's: one request of 39 at a time.
    let shard = TestShard::start("llama", &["--pool-tokens", "81", "--own-slots", "32"]).await;
    let flags =
        "--exclusive --at-once -n 4 --input-tokens 32 --output-tokens 8 --max-batch-prefill-tokens 48";
    let report = bench(shard.shard.url(), flags).await;
    let level = whole(&report, 4, 4 * 32, 4 * 8);
    assert!(level.decode_steps.iter().all(|step| step.batch_size == 1), "{report}");
    let report = bench(shard.shard.url(), &flags.replace("32", "42")).await;
    assert_eq!((report.loads[0].n_done, report.loads[0].n_failed), (0, 4));
    assert!(report.to_string().contains("it needs 49 KV slots, and 48 may be taken"), "{report}");
    shard.finish().await;
}

/// Counts the tokens that an executor computes.
struct Counting {
    inner: Box<dyn Executor>,
    n_tokens: Arc<AtomicUsize>,
}

impl Executor for Counting {
    fn info(&self) -> &ModelInfo {
        self.inner.info()
    }

    fn submit(&mut self, step: StepInput) -> kvshard::error::Result<()> {
        self.n_tokens.fetch_add(step.n_tokens(), Ordering::Relaxed);
        self.inner.submit(step)
    }

    fn wait(&mut self) -> kvshard::error::Result<StepOutput> {
        self.inner.wait()
    }

    fn free_bytes(&self) -> Option<u64> {
        self.inner.free_bytes()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shared_prefix_is_computed_once() {
    let folder = tempfile::tempdir().unwrap();
    dummy(folder.path(), 5000);
    let n_tokens = Arc::new(AtomicUsize::new(0));
    let counted = n_tokens.clone();
    let around = |inner| -> Box<dyn Executor> { Box::new(Counting { inner, n_tokens: counted }) };
    let shard = TestShard::start_around(folder.path(), &["--load-format", "dummy"], around).await;
    let flags = "--exclusive --max-batch-prefill-tokens 512 -c 4 --input-tokens 100 --output-tokens 20 \
                 --shared-prefix 90";
    let mut n_computed = Vec::new();
    for n_requests in [10, 40] {
        let report = bench(shard.shard.url(), &format!("{flags} -n {n_requests}")).await;
        whole(&report, n_requests, 100 * n_requests as u64, 20 * n_requests as u64);
        n_computed.push(n_tokens.swap(0, Ordering::Relaxed));
    }
    // Of 30 requests more, the rest of each prompt, and each token but the last.
    assert_eq!(n_computed[1] - n_computed[0], 30 * (10 + 19));
    shard.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sweeps_are_measured_load_by_load() {
    let shard = TestShard::start("llama", &[]).await;
    let flags = "--rate-sweep 200,1000 -n 10 --input-tokens 8 --output-tokens 3 --warmup 0";
    let report = bench(shard.shard.url(), flags).await;
    let rates: Vec<_> = report.loads.iter().map(|load| (load.rate, load.n_done)).collect();
    assert_eq!(rates, [(Some(200.0), 10), (Some(1000.0), 10)]);
    let svg = client::svg(&report);
    assert_eq!((svg.matches("<polyline").count(), svg.matches("requests per second").count()), (5, 3));
    shard.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_beyond_the_limits_fails_alone_and_says_why() {
    let shard = TestShard::start("llama", &["--pool-tokens", "200", "--own-slots", "100"]).await;
    let report = bench(
        shard.shard.url(),
        "--at-once -n 9 --input-tokens uniform:20..130 --output-tokens 2 --max-batch-size 1",
    )
    .await;
    let [level] = &report.loads[..] else { panic!("not one load") };
    assert!(level.n_done > 0 && level.n_failed > 0 && level.n_done + level.n_failed == 9, "{report}");
    assert!(level.failures.keys().all(|why| why.contains("the limit is")), "{report}");
    shard.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_weights_need_no_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    dummy(folder.path(), 5000);
    let shard = TestShard::start_folder(folder.path(), &["--load-format", "dummy"]).await;
    let report = bench(shard.shard.url(), "-c 4 -n 8 --input-tokens 100 --output-tokens 20").await;
    whole(&report, 8, 8 * 100, 8 * 20);
    shard.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_prints_what_there_is_and_leaves_nothing_behind() {
    let shard = TestShard::start("llama", &[]).await;
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("figures.json");
    let mut command = kvshard(&["bench", "--url", shard.shard.url(), "-c", "4", "-n", "1000000"]);
    command.args(["--input-tokens", "8", "--output-tokens", "4", "--json", json.to_str().unwrap()]);
    let child = command.stdout(Stdio::piped()).spawn().unwrap();
    let began = Instant::now();
    while shard.stats().await.n_requests < 4 {
        assert!(began.elapsed() < Duration::from_secs(60), "nothing runs");
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let interrupt = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(interrupt.unwrap().success());
    let output = child.wait_with_output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success() && table.contains("interrupted: these are the figures so far"),
        "{table}"
    );
    let figures: Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
    assert_eq!(figures["ending"], "interrupted");
    assert_eq!((shard.stats().await.n_batches, shard.stats().await.n_leased), (0, 0));
    shard.finish().await;
}

#[test]
fn a_lost_shard_ends_it_with_a_sentence() {
    let mut serving = Serving::start(&[fixture("llama").to_str().unwrap()], &[]);
    serving.wait_until_ready(0);
    let url = format!("unix://{}", serving.socket(0).display());
    let mut command = kvshard(&["bench", "--url", &url, "-n", "1000000", "--input-tokens", "8"]);
    let child = command.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    drop(serving);
    let output = child.wait_with_output().unwrap();
    let (table, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(1));
    assert!(table.contains("cut short") && told.contains("the connection was lost"), "{table}\n{told}");
}
