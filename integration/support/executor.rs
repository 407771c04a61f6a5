//! The real executor, with something happening around its steps.

use kvshard::backend::step::{StepInput, StepOutput};
use kvshard::error::Result;
use kvshard::model::executor::{Executor, ModelInfo};

/// Runs every step as the executor inside does; then `after` hears its number, counted from 1, and may wait, panic, or
/// fail it.
struct Around<F> {
    inner: Box<dyn Executor>,
    after: F,
    n_steps: u64,
}

/// Puts `after` around an executor.
pub fn around(inner: Box<dyn Executor>, after: impl FnMut(u64) -> Result<()> + 'static) -> Box<dyn Executor> {
    Box::new(Around { inner, after, n_steps: 0 })
}

impl<F: FnMut(u64) -> Result<()>> Executor for Around<F> {
    fn info(&self) -> &ModelInfo {
        self.inner.info()
    }

    fn submit(&mut self, step: StepInput) -> Result<()> {
        self.inner.submit(step)
    }

    fn wait(&mut self) -> Result<StepOutput> {
        let output = self.inner.wait()?;
        self.n_steps += 1;
        (self.after)(self.n_steps)?;
        Ok(output)
    }

    fn free_bytes(&self) -> Option<u64> {
        self.inner.free_bytes()
    }
}
