//! Faults to order, for operators' drills and for tests: an executor around the real one that fails at one step.

use std::fmt;
use std::str::FromStr;

use super::executor::{Executor, ModelInfo};
use crate::backend::step::{StepInput, StepOutput};
use crate::error::{Error, Result};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// The step never ends.
    Hang,
    /// The engine's thread panics.
    Panic,
    /// The step runs, and is reported as failed.
    Error,
    /// The step is reported as failed, and so is every later one.
    Lost,
    /// The last rank fails as the step begins.
    RankError,
    /// The last rank never begins the step, for which the others wait.
    RankHang,
}

/// A fault to order, written `error@3`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InjectedFault {
    /// What goes wrong.
    pub kind: FaultKind,
    /// At which step, counted from 1. A step is a forward pass, asked for or ahead; a Warmup runs at least one.
    pub step: u64,
}

impl FromStr for InjectedFault {
    type Err = String;

    fn from_str(text: &str) -> Result<InjectedFault, String> {
        let expected = || {
            let kinds = "hang, panic, error, lost, rank-error or rank-hang";
            format!("expected {kinds}, and a step: error@3, not {text:?}")
        };
        let (kind, step) = text.split_once('@').ok_or_else(expected)?;
        let kind = match kind {
            "hang" => FaultKind::Hang,
            "panic" => FaultKind::Panic,
            "error" => FaultKind::Error,
            "lost" => FaultKind::Lost,
            "rank-error" => FaultKind::RankError,
            "rank-hang" => FaultKind::RankHang,
            _ => return Err(expected()),
        };
        match step.parse() {
            Ok(step) if step > 0 => Ok(InjectedFault { kind, step }),
            _ => Err(expected()),
        }
    }
}

impl fmt::Display for InjectedFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            FaultKind::Hang => "hang",
            FaultKind::Panic => "panic",
            FaultKind::Error => "error",
            FaultKind::Lost => "lost",
            FaultKind::RankError => "rank-error",
            FaultKind::RankHang => "rank-hang",
        };
        write!(f, "{kind}@{}", self.step)
    }
}

impl InjectedFault {
    /// What becomes of a step of the last rank.
    ///
    /// # Errors
    /// [`Error::Bug`] where the fault is an error.
    pub fn strike_rank(self, step: u64) -> Result<()> {
        match self.kind {
            FaultKind::RankError if step == self.step => Err(Error::Bug("a fault was injected".into())),
            FaultKind::RankHang if step == self.step => loop {
                std::thread::park();
            },
            _ => Ok(()),
        }
    }
}

/// Runs steps as the executor inside does, until the fault.
pub struct Injector {
    inner: Box<dyn Executor>,
    fault: InjectedFault,
    n_waited: u64,
}

impl Injector {
    /// Puts a fault around an executor.
    pub fn new(inner: Box<dyn Executor>, fault: InjectedFault) -> Injector {
        Injector { inner, fault, n_waited: 0 }
    }
}

impl Executor for Injector {
    fn info(&self) -> &ModelInfo {
        self.inner.info()
    }

    fn submit(&mut self, step: StepInput) -> Result<()> {
        self.inner.submit(step)
    }

    fn wait(&mut self) -> Result<StepOutput> {
        // The step has run: its keys and values are stored, and its lanes have moved on.
        let output = self.inner.wait()?;
        self.n_waited += 1;
        let InjectedFault { kind, step } = self.fault;
        let why = || format!("fault injected at step {step}");
        match kind {
            FaultKind::Lost if self.n_waited >= step => Err(Error::DeviceLost(why())),
            _ if self.n_waited != step => Ok(output),
            FaultKind::Hang => loop {
                std::thread::park();
            },
            FaultKind::Panic => panic!("{}", why()),
            FaultKind::Error | FaultKind::Lost => Err(Error::Device(why())),
            // The rank's own.
            FaultKind::RankError | FaultKind::RankHang => Ok(output),
        }
    }

    fn free_bytes(&self) -> Option<u64> {
        self.inner.free_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_written_as_it_is_read() {
        for text in
            ["hang@1", "panic@2", "error@3", "lost@18446744073709551615", "rank-error@4", "rank-hang@5"]
        {
            assert_eq!(text.parse::<InjectedFault>().map(|fault| fault.to_string()), Ok(text.to_owned()));
        }
        for text in ["", "hang", "hang@", "hang@0", "hang@-1", "fire@1", "hang@1@2", "@3"] {
            let error = text.parse::<InjectedFault>().expect_err(text);
            assert!(error.contains("error@3"), "{error}");
        }
    }
}
