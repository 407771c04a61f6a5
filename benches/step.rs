//! One Decode when the forward pass costs nothing: what do engine, wire and detokenisation take?
//!
//! The executor answers at once with the tokens of a text. For each tokenizer and number of rows: the whole call, from
//! a client on a thread of its own through the unix socket and back; the engine alone, asked through its handle; and a
//! call of Health, which asks nobody, for what the wire takes at least. Last, how long the device would stand idle:
//! from one step's tokens to the next step, which runs ahead. `cargo bench --bench step`.

#![allow(missing_docs)]

#[allow(dead_code, unused_imports)]
#[path = "../integration/support/mod.rs"]
mod support;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::Parser as _;
use kvshard::backend::step::{Feed, Sampled, StepInput, StepOutput};
use kvshard::cli::{Cli, Command};
use kvshard::config::{self, ServeConfig};
use kvshard::engine::{EngineConfig, EngineHandle};
use kvshard::error::{Error, Result};
use kvshard::ids::{BatchId, Protocol};
use kvshard::model::executor::{Executor, ModelInfo, PositionRegime, Progress};
use kvshard::pb::v3;
use kvshard::sampling::Limits;
use kvshard::server::{Intake, Loaded, RunningShard};
use kvshard::text::{Detokenizer, Tokenizer};
use support::shard::{connect, decode, handle, prefill, request};
use tokio::runtime::{Builder, Runtime};

const TEXT: &str = "Once upon a time, there was a little girl (Lily, 10 years old) who lived in a house near the \
                    sea. “Où est le café ?” she said; 日本語 and 🦀 were fine with her, too.\n\n";
const WARM_UP: usize = 200;
const ROUNDS: usize = 2000;
const MAX_NEW_TOKENS: u32 = 5000;
const MAX_ROWS: usize = 256;

/// What a Decode of so many rows may take.
fn target(rows: usize) -> Duration {
    Duration::from_nanos(60_000 + 1_500 * rows as u64)
}

/// A forward pass that costs nothing: the token at each position is that of a text.
struct Null {
    info: ModelInfo,
    text: Vec<u32>,
    outcomes: VecDeque<StepOutput>,
    /// When the last outcome was handed out.
    waited: Instant,
    /// From each outcome to the next step.
    gaps: Gaps,
}

type Gaps = Arc<Mutex<Vec<Duration>>>;

impl Null {
    fn new(tokenizer: &Tokenizer, gaps: Gaps) -> Null {
        let n_positions = MAX_NEW_TOKENS + 1000;
        let info = ModelInfo {
            family: "null",
            vocab: tokenizer.n_ids(),
            max_positions: n_positions,
            n_slots: n_positions * MAX_ROWS as u32,
            n_lanes: MAX_ROWS as u32 + 1,
            max_step_tokens: 1 << 16,
            regime: PositionRegime::Fixed,
            dtype: "float32",
            device: "cpu",
            kv_bytes_per_slot: 0,
            weight_bytes: 0,
            kv_bytes: 0,
            graph_bytes: 0,
            links: None,
            progress: Progress::new(1),
        };
        Null {
            info,
            text: tokenizer.encode(TEXT, false, usize::MAX).unwrap(),
            outcomes: VecDeque::new(),
            waited: Instant::now(),
            gaps,
        }
    }
}

impl Executor for Null {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn submit(&mut self, step: StepInput) -> Result<()> {
        self.gaps.lock().unwrap().push(self.waited.elapsed());
        let sampled = step.rows.iter().filter(|row| row.sample).map(|row| {
            let fed = match row.feed {
                Feed::Prompt { len } => len,
                Feed::Last => 1,
            };
            let id = self.text[(row.start + fed) as usize % self.text.len()];
            Sampled::Token { id, logprob: -1.0, top: Vec::new() }
        });
        self.outcomes.push_back(StepOutput { sampled: sampled.collect(), target_logprobs: Vec::new() });
        Ok(())
    }

    fn wait(&mut self) -> Result<StepOutput> {
        let outcome = self.outcomes.pop_front();
        self.waited = Instant::now();
        outcome.ok_or_else(|| Error::Bug("no step is under way".into()))
    }

    fn free_bytes(&self) -> Option<u64> {
        None
    }
}

fn start_engine(tokenizer: &Arc<Tokenizer>, gaps: Gaps) -> EngineHandle {
    let config = EngineConfig {
        own_slots: Some(1024),
        max_prefill_tokens: 1 << 16,
        eos: Arc::new([]),
        abandoned_after: Duration::from_secs(600),
        reclaimable_after: Duration::from_secs(600),
        run_ahead: true,
    };
    let null = Null::new(tokenizer, gaps);
    EngineHandle::start(config, tokenizer.clone(), move || Ok(Box::new(null) as Box<dyn Executor>)).unwrap()
}

fn serve_config(socket: &std::path::Path) -> ServeConfig {
    let arguments = ["kvshard", "serve", "--uds-path", socket.to_str().unwrap()];
    let Command::Serve(arguments) = Cli::try_parse_from(arguments).unwrap().command else { unreachable!() };
    config::serve(*arguments).unwrap_or_else(|refusal| panic!("{refusal}")).0
}

async fn serve(socket: &std::path::Path, tokenizer: &Arc<Tokenizer>, gaps: Gaps) -> RunningShard {
    let engine = start_engine(tokenizer, gaps);
    let config = serve_config(socket);
    let intake = Intake {
        tokenizer: tokenizer.clone(),
        eos: Arc::new([]),
        limits: Limits { vocab: engine.model().vocab, watermark: config.shard.watermark },
        prompt_logprobs: false,
        model_names: Vec::new(),
        adapter_warning: Mutex::new(None),
    };
    RunningShard::start(&config.shard, &config.socket, Loaded { engine, intake }).await.unwrap()
}

/// A batch as a router sends it.
fn batch(id: u64, rows: usize) -> v3::PrefillRequest {
    prefill(id, (0..rows as u64).map(|id| request(id, TEXT, MAX_NEW_TOKENS)).collect(), None)
}

/// Times of a call, shortest first.
struct Times(Vec<Duration>);

impl Times {
    fn of(mut call: impl FnMut()) -> Times {
        let mut once = || {
            let began = Instant::now();
            call();
            began.elapsed()
        };
        (0..WARM_UP).for_each(|_| _ = once());
        Times::sorted((0..ROUNDS).map(|_| once()).collect())
    }

    fn sorted(mut times: Vec<Duration>) -> Times {
        times.sort_unstable();
        Times(times)
    }

    fn at(&self, share: f64) -> f64 {
        self.0[(share * (self.0.len() - 1) as f64) as usize].as_secs_f64() * 1e6
    }
}

/// Decodes through the socket, decodes through the engine's handle, calls of Health, and the gaps between steps.
fn measure(server: &Runtime, client: &Runtime, tokenizer: &Arc<Tokenizer>, rows: usize) -> [Times; 4] {
    let gaps = Gaps::default();
    let folder = tempfile::tempdir().unwrap();
    let shard = server.block_on(serve(&folder.path().join("s"), tokenizer, gaps.clone()));
    let engine = shard.engine().clone();
    let mut connection = client.block_on(connect(shard.url()));
    client.block_on(connection.prefill(batch(1, rows))).unwrap();
    let call = || {
        let answer = client.block_on(connection.decode(decode(&[1]))).unwrap().into_inner();
        assert_eq!((answer.generations.len(), answer.batch.map(|batch| batch.id)), (rows, Some(1)));
    };
    let whole = Times::of(call);
    let gaps = Times::sorted(gaps.lock().unwrap().split_off(WARM_UP));
    let id = BatchId { protocol: Protocol::V3, number: handle(1).id };
    let alone = Times::of(|| drop(client.block_on(engine.decode(vec![id])).unwrap()));
    let empty = Times::of(|| drop(client.block_on(connection.health(v3::HealthRequest {})).unwrap()));
    drop(connection);
    server.block_on(shard.stop());
    [whole, alone, empty, gaps]
}

/// Nanoseconds of a token: the median over texts.
fn detokenise(tokenizer: &Tokenizer) -> f64 {
    let text = tokenizer.encode(TEXT, true, usize::MAX).unwrap();
    let prompt_len = 5;
    let times = Times::of(|| {
        let mut detokenizer = Detokenizer::new(&text[..prompt_len]);
        for end in prompt_len + 1..=text.len() {
            std::hint::black_box(detokenizer.push(tokenizer, &text[..end]));
        }
    });
    times.at(0.5) * 1e3 / (text.len() - prompt_len) as f64
}

fn main() {
    // As in the program: threads of the server's own; and a router, which is somewhere else.
    let server = Runtime::new().unwrap();
    let client = Builder::new_current_thread().enable_all().build().unwrap();
    println!(
        "Decode, µs: the whole call (median, 90th percentile, shortest), the engine alone and Health (median), and the \
         gap between two steps (median, 90th percentile)"
    );
    println!(
        "{:<12}{:>6}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
        "tokenizer", "rows", "median", "p90", "min", "target", "engine", "health", "gap", "gap p90"
    );
    for name in ["byte-level", "spm"] {
        let folder = support::fixture("tokenizers").join(name);
        let tokenizer = Arc::new(Tokenizer::load(&folder).unwrap());
        for rows in [1, 64, MAX_ROWS] {
            let [whole, alone, empty, gaps] = measure(&server, &client, &tokenizer, rows);
            println!(
                "{name:<12}{rows:>6}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}",
                whole.at(0.5),
                whole.at(0.9),
                whole.at(0.0),
                target(rows).as_secs_f64() * 1e6,
                alone.at(0.5),
                empty.at(0.5),
                gaps.at(0.5),
                gaps.at(0.9),
            );
        }
        println!("{name:<12}detokenisation: {:.0} ns a token", detokenise(&tokenizer));
    }
    server.shutdown_background();
}
