//! The program: parse, telemetry, run the command, exit code.

mod bench;
mod download;
mod generate;
mod inspect;

use std::fmt;
use std::process::ExitCode;

use clap::Parser as _;
use tokio::runtime::Runtime;

use crate::cli::{Cli, Command, Exit};
use crate::config::{self, LogStream, Refusal, TelemetryConfig};
use crate::server::{self, Ending, Fault};
use crate::telemetry::Telemetry;

/// What `main` does.
pub fn main() -> ExitCode {
    let exit = match Cli::parse().command {
        Command::Serve(args) => {
            with(config::serve(*args), async |config| server::run(&config).await.map(exit_of))
        }
        Command::Generate(args) => with(config::generate(*args), generate::run),
        Command::Bench(args) => with(config::bench(*args), bench::run),
        Command::Inspect(args) => with(config::inspect(*args), inspect::run),
        Command::DownloadWeights(args) => with(config::download(*args), download::run),
    };
    match exit {
        Exit::Done | Exit::Usage => ExitCode::from(exit.code()),
        _ => server::leave(exit.code()),
    }
}

/// Runs a command between setting up and ending what it runs on.
fn with<C, E: fmt::Display>(
    configured: Result<(C, TelemetryConfig), Refusal>,
    command: impl AsyncFnOnce(C) -> Result<Exit, E>,
) -> Exit {
    let (config, telemetry) = match configured {
        Ok(configured) => configured,
        Err(refusal) => return refuse(&refusal),
    };
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("no threads can be started: {error}");
            return Exit::Failed;
        }
    };
    let exit = {
        let _entered = runtime.enter();
        let started = Telemetry::start(&telemetry);
        let (exporters, exit) = match started {
            Ok(exporters) => (exporters, runtime.block_on(command(config))),
            Err(message) => return refuse(&message),
        };
        let exit = exit.unwrap_or_else(|error| {
            fail(&telemetry, &error);
            Exit::Failed
        });
        exporters.stop();
        exit
    };
    // What still runs now was abandoned on purpose: a step that hangs must not keep the process.
    runtime.shutdown_background();
    exit
}

/// For flags that are well-formed alone and wrong together.
fn refuse(why: &dyn fmt::Display) -> Exit {
    eprintln!("error: {why}\n\nFor more information, try '--help'.");
    Exit::Usage
}

/// The sentence that says why a command failed: as a log line, where TGI's launcher looks for it, and on the
/// terminal where logs go elsewhere.
fn fail(telemetry: &TelemetryConfig, error: &dyn fmt::Display) {
    tracing::error!("{error:#}");
    if telemetry.json && telemetry.stream == LogStream::Out {
        // The launcher shows standard error when a shard has ended.
        eprintln!("{error:#}");
    }
}

fn exit_of(ending: Ending) -> Exit {
    match ending {
        Ending::Drained => Exit::Done,
        Ending::CutShort => {
            tracing::error!("ended with calls still running");
            Exit::CutShort
        }
        Ending::Fault(Fault::StepTimeout(cause)) => {
            tracing::error!("giving up: {cause}");
            Exit::StepTimeout
        }
        Ending::Fault(Fault::EngineDied(cause)) => {
            tracing::error!("giving up: the engine died: {cause}");
            Exit::EngineDied
        }
        Ending::Fault(Fault::DeviceLost(cause)) => {
            tracing::error!("giving up: {cause}");
            Exit::DeviceLost
        }
        Ending::LeaderDied => {
            tracing::error!("rank 0 died");
            Exit::LeaderDied
        }
    }
}
