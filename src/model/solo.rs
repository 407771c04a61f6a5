//! One rank on the thread of whoever uses it, as an executor.
//!
//! For a device that runs steps by itself: no thread has to be woken for a step to start.

use super::executor::{Executor, ModelInfo};
use super::guard::Guard;
use super::partition::Shard;
use super::rank::{Rank, Taken};
use super::ranks::{MAX_UNDER_WAY, check_options, info};
use super::spec::DecoderSpec;
use super::upload::total_bytes;
use super::{Options, Parts};
use crate::backend::Backend;
use crate::backend::step::{StepInput, StepOutput};
use crate::error::{Error, Result};

/// A world of one.
pub struct Solo<B: Backend> {
    info: ModelInfo,
    guard: Guard,
    rank: Rank<B>,
    n_under_way: usize,
    /// Once a step has failed, what it left half done is never read.
    lost: Option<Error>,
}

impl<B: Backend> Solo<B> {
    /// Loads on the calling thread, which must make all later calls.
    ///
    /// # Errors
    /// As [`super::load`].
    pub fn load(
        mut backend: B,
        spec: &DecoderSpec,
        parts: &Parts,
        options: &Options,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Solo<B>> {
        check_options(options, 1)?;
        let shard = Shard { rank: 0, world: 1 };
        let total = total_bytes(parts, spec, shard)?;
        backend.attach()?;
        backend.supports(spec)?;
        let done = std::cell::Cell::new(0);
        let report = |bytes| {
            done.set(done.get() + bytes);
            progress(done.get(), total);
        };
        let (rank, taken): (Rank<B>, Taken) = Rank::load(backend, shard, spec, parts, options, &report)?;
        let info = info::<B>(spec, options, rank.backend().dtype(), &[taken])?;
        Ok(Solo { guard: Guard::new(&info), info, rank, n_under_way: 0, lost: None })
    }

    fn lose<T>(&mut self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let lost = match error {
                lost @ Error::DeviceLost(_) => lost,
                other => Error::DeviceLost(format!("rank 0 failed: {other}")),
            };
            self.lost.get_or_insert(lost).clone()
        })
    }
}

impl<B: Backend> Executor for Solo<B> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn submit(&mut self, step: StepInput) -> Result<()> {
        if let Some(lost) = &self.lost {
            return Err(lost.clone());
        }
        if self.n_under_way == MAX_UNDER_WAY {
            return Err(Error::Bug(format!("{MAX_UNDER_WAY} steps are under way already")));
        }
        self.guard.admit(&step)?;
        let submitted = self.rank.submit(&step);
        self.lose(submitted)?;
        self.n_under_way += 1;
        Ok(())
    }

    fn wait(&mut self) -> Result<StepOutput> {
        if self.n_under_way == 0 {
            return Err(Error::Bug("no step is under way".into()));
        }
        self.n_under_way -= 1;
        if let Some(lost) = &self.lost {
            return Err(lost.clone());
        }
        let output = self.rank.output();
        self.lose(output)
    }

    fn free_bytes(&self) -> Option<u64> {
        self.rank.backend().free_bytes()
    }
}
