//! The demo model from start to answer: how long until ready, how many tokens a second through the socket?
//!
//! `cargo bench --bench load`.

#![allow(missing_docs)]

#[allow(dead_code, unused_imports)]
#[path = "../integration/support/mod.rs"]
mod support;

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use support::shard::{Client, connect, decode, prefill, request};
use tokio::runtime::{Builder, Runtime};

const STARTS: usize = 7;
const RUNS: usize = 9;
const PROMPT: &str = "Once upon a time";
const NEW_TOKENS: u32 = 200;
const PREFILL_TOKENS: u32 = 512;

/// A `kvshard serve` of the demo model, ended when dropped.
struct Serving {
    child: Child,
    socket: PathBuf,
    ready_after: Duration,
}

impl Serving {
    fn start(folder: &Path) -> Serving {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvshard"));
        command.args(["serve", "--uds-path"]).arg(folder.join("s"));
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null());
        let began = Instant::now();
        let child = command.spawn().unwrap();
        let socket = folder.join("s-0");
        while UnixStream::connect(&socket).is_err() {
            sleep(Duration::from_millis(1));
        }
        Serving { child, socket, ready_after: began.elapsed() }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        // A killed process leaves its socket.
        std::fs::remove_file(&self.socket).unwrap();
    }
}

/// The middle and the least of some times, in seconds.
fn summary(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort_unstable();
    (times[times.len() / 2].as_secs_f64(), times[0].as_secs_f64())
}

/// The time of Decodes in a row, each with as many tokens as there are rows.
fn decodes(client: &Runtime, shard: &mut Client, rows: u64) -> Duration {
    client.block_on(async {
        let requests = (0..rows).map(|id| request(id, PROMPT, NEW_TOKENS + 1)).collect();
        let mut batch = shard.prefill(prefill(1, requests, None)).await.unwrap().into_inner().batch;
        let began = Instant::now();
        let mut n_steps = 0;
        while batch.is_some() {
            batch = shard.decode(decode(&[1])).await.unwrap().into_inner().batch;
            n_steps += 1;
        }
        assert_eq!(n_steps, NEW_TOKENS);
        began.elapsed()
    })
}

/// The time of a Prefill of [`PREFILL_TOKENS`].
fn long_prefill(client: &Runtime, shard: &mut Client) -> Duration {
    client.block_on(async {
        let mut long = request(1, &PROMPT.repeat(PREFILL_TOKENS as usize), 1);
        long.truncate = PREFILL_TOKENS;
        let began = Instant::now();
        shard.prefill(prefill(1, vec![long], None)).await.unwrap();
        began.elapsed()
    })
}

fn main() {
    let folder = tempfile::tempdir().unwrap();
    let starts = (0..STARTS).map(|_| Serving::start(folder.path()).ready_after).collect();
    let (median, least) = summary(starts);
    println!("start to ready: median {:.0} ms, least {:.0} ms", median * 1e3, least * 1e3);
    let serving = Serving::start(folder.path());
    let client = Builder::new_current_thread().enable_all().build().unwrap();
    let mut shard = client.block_on(connect(&format!("unix://{}", serving.socket.display())));
    for rows in [1, 4, 16] {
        let n_tokens = f64::from(NEW_TOKENS) * rows as f64;
        let (median, least) = summary((0..RUNS).map(|_| decodes(&client, &mut shard, rows)).collect());
        println!(
            "decode of {rows:>2} rows: median {:.0} tokens/s, best {:.0} tokens/s ({:.0} µs a step)",
            n_tokens / median,
            n_tokens / least,
            least / f64::from(NEW_TOKENS) * 1e6
        );
    }
    let (median, least) = summary((0..RUNS).map(|_| long_prefill(&client, &mut shard)).collect());
    println!(
        "prefill of {PREFILL_TOKENS} tokens: median {:.1} ms, least {:.1} ms",
        median * 1e3,
        least * 1e3
    );
}
