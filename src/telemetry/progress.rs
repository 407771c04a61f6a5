//! How far long work has come: a bar on a terminal, log lines elsewhere.

use std::io::{self, IsTerminal as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The progress of one piece of work, in bytes. Shared by threads.
#[derive(Debug)]
pub struct Progress {
    label: &'static str,
    bar: Option<ProgressBar>,
    began: Instant,
    /// Tenths that were logged.
    logged: AtomicU64,
}

/// Work that is over before this is not worth a line.
const SILENT_FOR: Duration = Duration::from_secs(1);

impl Progress {
    /// Nothing done yet. A bar if standard error is a terminal.
    pub fn new(label: &'static str) -> Progress {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(label);
            bar
        });
        Progress { label, bar, began: Instant::now(), logged: AtomicU64::new(0) }
    }

    /// `done` of `total` bytes are done.
    pub fn report(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            return;
        }
        if self.began.elapsed() < SILENT_FOR {
            return;
        }
        let tenth = if total == 0 { 10 } else { u128::from(done.min(total)) * 10 / u128::from(total) };
        let tenth = u64::try_from(tenth).unwrap_or(10);
        if self.logged.fetch_max(tenth, Ordering::Relaxed) < tenth {
            tracing::info!("{}: {} %", self.label, tenth * 10);
        }
    }

    /// The work is over; the bar disappears.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
