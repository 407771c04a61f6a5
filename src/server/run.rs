//! `serve`, from start to end.

use std::future::Future;
use std::io::IsTerminal as _;

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::bind::check_path;
use super::follower;
use super::health::Fault;
use super::listen::RunningShard;
use super::load::{Loaded, load};
use crate::config::{Role, ServeConfig, ShardConfig};
use crate::error::{Error, Result};

/// How serving ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// By a signal, and every running call was answered.
    Drained,
    /// By a signal, with calls still running.
    CutShort,
    /// By a fault of the engine.
    Fault(Fault),
    /// A rank above 0, whose rank 0 died.
    LeaderDied,
}

/// Serves until a signal or a fault ends it.
///
/// # Errors
/// What was in the way of loading the model or of binding its socket.
pub async fn run(config: &ServeConfig) -> Result<Ending> {
    let mut signals = Signals::new()?;
    if let Role::Follower { rank } = config.shard.role {
        return follower::run(rank, &config.socket, signals.next()).await;
    }
    check_path(&config.socket.path_of(0)).await?;
    let Some(loaded) = unless(signals.next(), load_off_thread(config.shard.clone())).await else {
        tracing::info!("asked to end while loading");
        return Ok(Ending::Drained);
    };
    let mut shard = RunningShard::start(&config.shard, &config.socket, loaded?).await?;
    tracing::info!("Server started at {}", shard.url());
    greet(&shard);
    let Some(fault) = unless(signals.next(), shard.fault()).await else {
        tracing::info!("asked to end: finishing what runs");
        let drained = unless(signals.next(), shard.stop()).await;
        return Ok(if drained == Some(true) { Ending::Drained } else { Ending::CutShort });
    };
    Ok(Ending::Fault(fault))
}

async fn load_off_thread(config: ShardConfig) -> Result<Loaded> {
    tokio::task::spawn_blocking(move || load(&config))
        .await
        .unwrap_or_else(|error| Err(Error::Bug(format!("loading panicked: {error}"))))
}

/// The outcome of `work`, or nothing if `end` comes first.
async fn unless<T>(end: impl Future<Output = ()>, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        () = end => None,
        outcome = work => Some(outcome),
    }
}

/// For whoever started it by hand: a line to paste.
fn greet(shard: &RunningShard) {
    if !std::io::stdout().is_terminal() {
        return;
    }
    // A batch number that no router counts up to.
    let request = r#"{"batch":{"id":"7700000000000000001","size":1,"requests":[{"inputs":"Once upon a time","truncate":100,"add_special_tokens":true,"stopping_parameters":{"max_new_tokens":1}}]}}"#;
    let address = match shard.tcp() {
        Some(address) => address.to_string(),
        None => shard.url().to_owned(),
    };
    tracing::info!(
        "try: grpcurl -plaintext -d '{request}' {address} generate.v3.TextGenerationService/Prefill"
    );
}

/// The signals that ask a process to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Signals> {
        let listen =
            |kind| signal(kind).map_err(|error| Error::Bug(format!("signals cannot be received: {error}")));
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
