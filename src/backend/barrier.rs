//! Where the threads of a world's ranks wait for each other: a barrier that can be aborted.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Opens when every rank has come to it, again and again.
pub struct Barrier {
    n_ranks: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    arrived: usize,
    /// Times that the barrier opened; who waits does so for the next.
    opened: u64,
    aborted: Option<String>,
}

impl Barrier {
    /// For so many ranks.
    pub fn new(n_ranks: usize) -> Barrier {
        Barrier { n_ranks, state: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for all other ranks.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason once the world is aborted.
    pub fn wait(&self) -> Result<()> {
        let mut state = self.lock();
        state.arrived += 1;
        let opening = state.opened + 1;
        if state.arrived == self.n_ranks && state.aborted.is_none() {
            state.arrived = 0;
            state.opened = opening;
            self.changed.notify_all();
        }
        while state.opened < opening {
            if let Some(reason) = &state.aborted {
                return Err(Error::Device(reason.clone()));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// Who waits, or comes later, gets an error with this reason. The first reason stays.
    pub fn abort(&self, reason: &str) {
        self.lock().aborted.get_or_insert_with(|| reason.to_owned());
        self.changed.notify_all();
    }

    /// Why the world was aborted, if it was: for ranks that wait elsewhere than here.
    #[cfg(feature = "cuda")]
    pub fn aborted(&self) -> Option<String> {
        self.lock().aborted.clone()
    }
}
