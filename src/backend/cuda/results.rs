//! What steps produced, where the host reads it: pinned memory that kernels write, a part for each step under way.

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use super::device::{Buffer, Device, Pinned};
use super::ffi;
use crate::backend::step::{Sampled, StepOutput};
use crate::error::{Error, Result};

/// Steps that may be under way, each with its own staging and results.
pub const N_TURNS: usize = 2;

/// Results by turn, and the steps that they are of.
pub struct Results {
    /// Steps finished, as the device counts.
    finished: Buffer,
    /// The same for the host.
    host_finished: Pinned<u32>,
    /// `[turns, lanes]`.
    choices: Pinned<ffi::Chosen>,
    /// `[turns, lanes, KV_MAX_TOP_N]`.
    tops: Pinned<ffi::Alternative>,
    /// `[turns, max_tokens]`.
    target_logprobs: Pinned<f32>,
    n_lanes: usize,
    max_tokens: usize,
    /// Steps begun, as the device counts: wrapping.
    n_begun: u32,
    under_way: VecDeque<UnderWay>,
}

struct UnderWay {
    number: u32,
    n_sampled: usize,
    n_targets: usize,
}

impl Results {
    /// Room for steps of so many lanes and tokens.
    pub fn new(device: &Device, n_lanes: usize, max_tokens: usize) -> Result<Results> {
        Ok(Results {
            finished: device.alloc(size_of::<u32>())?,
            host_finished: device.pinned(1)?,
            choices: device.pinned(N_TURNS * n_lanes)?,
            tops: device.pinned(N_TURNS * n_lanes * ffi::KV_MAX_TOP_N)?,
            target_logprobs: device.pinned(N_TURNS * max_tokens)?,
            n_lanes,
            max_tokens,
            n_begun: 0,
            under_way: VecDeque::with_capacity(N_TURNS),
        })
    }

    /// Whether another step may begin.
    ///
    /// # Errors
    /// [`Error::Bug`] where as many are under way as there are turns.
    pub fn check_room(&self) -> Result<()> {
        if self.under_way.len() == N_TURNS {
            return Err(Error::Bug(format!("{N_TURNS} steps are under way already")));
        }
        Ok(())
    }

    /// The turn of the step that is beginning.
    pub fn turn(&self) -> usize {
        self.n_begun as usize % N_TURNS
    }

    /// Where the choices of the step that is beginning go.
    pub fn first_choice(&self) -> usize {
        self.turn() * self.n_lanes
    }

    /// A step has begun that produces so much.
    pub fn expect(&mut self, n_sampled: usize, n_targets: usize) {
        self.under_way.push_back(UnderWay { number: self.n_begun, n_sampled, n_targets });
        self.n_begun = self.n_begun.wrapping_add(1);
    }

    /// Where the log-probability of a target goes, of the step that began last.
    pub fn target_logprobs(&self, target: usize) -> *mut f32 {
        let turn = (self.n_begun as usize + N_TURNS - 1) % N_TURNS;
        // Inside the array: a step has no more targets than tokens.
        self.target_logprobs.at(turn * self.max_tokens + target)
    }

    /// For kernels: the count of finished steps on the device.
    pub fn finished(&self) -> *mut u32 {
        self.finished.ptr()
    }

    /// For kernels: the count that the host reads.
    pub fn host_finished(&self) -> *mut u32 {
        self.host_finished.ptr()
    }

    /// For kernels: choices of both turns.
    pub fn choices(&self) -> *mut ffi::Chosen {
        self.choices.ptr()
    }

    /// For kernels: alternatives of both turns.
    pub fn tops(&self) -> *mut ffi::Alternative {
        self.tops.ptr()
    }

    /// Waits for the oldest step under way.
    ///
    /// # Errors
    /// What `check` finds, which is asked now and then.
    pub fn output(&mut self, check: &dyn Fn() -> Result<()>) -> Result<StepOutput> {
        let step = self.under_way.pop_front().ok_or_else(|| Error::Bug("no step is under way".into()))?;
        self.await_finished(step.number.wrapping_add(1), check)?;
        let turn = step.number as usize % N_TURNS;
        let first = turn * self.n_lanes;
        let sampled = (first..first + step.n_sampled).map(|at| self.chosen(at)).collect();
        let first = turn * self.max_tokens;
        let targets = first..first + step.n_targets;
        let target_logprobs = targets.map(|at| self.target_logprobs.read(at)).collect();
        Ok(StepOutput { sampled, target_logprobs })
    }

    fn chosen(&self, at: usize) -> Sampled {
        let chosen = self.choices.read(at);
        if chosen.failed != 0 {
            return Sampled::NoDistribution;
        }
        let tops = (0..(chosen.n_top as usize).min(ffi::KV_MAX_TOP_N)).map(|i| {
            let top = self.tops.read(at * ffi::KV_MAX_TOP_N + i);
            (top.id, top.logprob)
        });
        Sampled::Token { id: chosen.id, logprob: chosen.logprob, top: tops.collect() }
    }

    /// Watches the number of finished steps: an event would cost the device and a system call the host.
    fn await_finished(&self, number: u32, check: &dyn Fn() -> Result<()>) -> Result<()> {
        const SPINS_BETWEEN_CHECKS: u32 = 1 << 14;
        let mut spins = 0u32;
        loop {
            // Wrapping, as the device counts.
            if (self.host_finished.read(0).wrapping_sub(number) as i32) >= 0 {
                fence(Ordering::Acquire);
                return Ok(());
            }
            std::hint::spin_loop();
            spins += 1;
            if spins.is_multiple_of(SPINS_BETWEEN_CHECKS) {
                check()?;
            }
        }
    }
}
