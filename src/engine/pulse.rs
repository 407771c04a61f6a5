//! How the engine is, readable without asking it: a long step must not make `Health` wait.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::error::Error;

/// Written by the engine's thread, read by anyone.
#[derive(Debug)]
pub struct Pulse {
    origin: Instant,
    /// Nanoseconds since `origin` at which the engine began to wait for a step, plus one; 0 while it waits for none.
    step_began: AtomicU64,
    /// Slots under a lease.
    n_leased: AtomicU32,
    fault: OnceLock<Error>,
}

/// What a look at a [`Pulse`] tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Waiting for a call.
    Idle,
    /// A step has been waited for this long.
    Stepping(Duration),
    /// The engine is dead: [`Error::DeviceLost`] if the device died under it, [`Error::Bug`] if it panicked.
    Dead(Error),
}

impl Default for Pulse {
    fn default() -> Pulse {
        Pulse {
            origin: Instant::now(),
            step_began: AtomicU64::new(0),
            n_leased: AtomicU32::new(0),
            fault: OnceLock::new(),
        }
    }
}

impl Pulse {
    /// The engine begins to wait for the device: it submits a step, or wants its outcome.
    pub fn begin_step(&self) {
        let now = u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX - 1);
        self.step_began.store(now + 1, Ordering::Relaxed);
    }

    /// The wait is over, well or not.
    pub fn end_step(&self) {
        self.step_began.store(0, Ordering::Relaxed);
    }

    /// A call has left this many slots under a lease.
    pub fn lease(&self, n_leased: u32) {
        self.n_leased.store(n_leased, Ordering::Relaxed);
    }

    /// Slots under a lease since the last call.
    pub fn n_leased(&self) -> u32 {
        self.n_leased.load(Ordering::Relaxed)
    }

    /// The engine is dead; the first reason stays.
    pub fn die(&self, reason: Error) {
        let _ = self.fault.set(reason);
    }

    /// How the engine is now.
    pub fn condition(&self) -> Condition {
        if let Some(reason) = self.fault.get() {
            return Condition::Dead(reason.clone());
        }
        match self.step_began.load(Ordering::Relaxed) {
            0 => Condition::Idle,
            began => {
                Condition::Stepping(self.origin.elapsed().saturating_sub(Duration::from_nanos(began - 1)))
            }
        }
    }
}
