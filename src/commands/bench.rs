//! `bench`: a load on a running shard, measured.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::runtime::Builder;

use crate::cli::Exit;
use crate::client::{self, BenchEnding, Phase, Progress, Report};
use crate::config::{BenchConfig, Load};

pub(super) async fn run(config: BenchConfig) -> Result<Exit> {
    // Before the work whose result they are to hold.
    let json = config.json.as_deref().map(create).transpose()?;
    let plot = config.plot.as_deref().map(create).transpose()?;
    // One thread for the socket and the loop, so that no step waits for another thread to wake.
    let measured = tokio::task::spawn_blocking(move || {
        let bar = Bar::new();
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let report = runtime.block_on(client::bench(&config, &mut |progress| bar.show(progress)));
        bar.0.finish_and_clear();
        report
    });
    let report = measured.await??;
    write!(io::stdout(), "{report}")?;
    if let Some(mut file) = json {
        serde_json::to_writer_pretty(&mut file, &report)?;
        writeln!(file)?;
    }
    if let Some(mut file) = plot {
        file.write_all(client::svg(&report).as_bytes())?;
    }
    ending(&report)
}

fn create(path: &Path) -> Result<File> {
    File::create(path).with_context(|| format!("{} cannot be written", path.display()))
}

fn ending(report: &Report) -> Result<Exit> {
    match &report.ending {
        BenchEnding::Failed(why) => bail!("{why}"),
        BenchEnding::Complete if !report.has_measured() => bail!("no request got an answer"),
        BenchEnding::Complete | BenchEnding::Interrupted => Ok(Exit::Done),
    }
}

/// Requests that have ended, on a terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Bar {
        let target = match io::stderr().is_terminal() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(None, target);
        let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} requests");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Bar(bar)
    }

    fn show(&self, progress: Progress) {
        let Progress { phase, n_ended, n_requests } = progress;
        let Bar(bar) = self;
        if bar.is_hidden() || (bar.position() == n_ended as u64 && n_ended > 0) {
            return;
        }
        bar.set_message(match phase {
            Phase::WarmUp => "warming up".to_owned(),
            Phase::Measuring(Load::Closed { in_flight, .. }) => format!("{in_flight} in flight"),
            Phase::Measuring(Load::Open { rate, .. }) => format!("{rate} requests/s"),
        });
        bar.set_length(n_requests as u64);
        bar.set_position(n_ended as u64);
    }
}
