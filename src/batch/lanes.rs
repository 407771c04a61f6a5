//! Lanes: places on the device, handed out and returned.

use std::cell::RefCell;
use std::rc::Rc;

use crate::error::{Error, Result};
use crate::ids::Lane;

/// The lanes of a device; a cheap handle. The last one is kept for a router's probe, which must run also when
/// requests have taken all others.
#[derive(Clone)]
pub struct Lanes {
    free: Rc<RefCell<Vec<u32>>>,
    n_lanes: u32,
}

/// A request's hold on a lane; dropping it gives the lane back.
pub struct LaneLease {
    lane: Lane,
    free: Rc<RefCell<Vec<u32>>>,
}

impl Lanes {
    /// `n_lanes` free lanes; at least two.
    ///
    /// # Errors
    /// [`Error::Precondition`] for fewer.
    pub fn new(n_lanes: u32) -> Result<Lanes> {
        if n_lanes < 2 {
            return Err(Error::Precondition(format!(
                "{n_lanes} lanes are too few: one is kept for health probes"
            )));
        }
        Ok(Lanes { free: Rc::new(RefCell::new((0..n_lanes).collect())), n_lanes })
    }

    /// Lanes that ordinary requests may still take.
    pub fn n_free(&self) -> usize {
        self.free.borrow().len().saturating_sub(1)
    }

    /// Lanes taken.
    pub fn n_taken(&self) -> u32 {
        self.n_lanes - self.free.borrow().len() as u32
    }

    /// A lane for an ordinary request.
    pub fn take(&self) -> Option<LaneLease> {
        (self.n_free() > 0).then(|| self.take_last()).flatten()
    }

    /// A lane for a probe.
    pub fn take_last(&self) -> Option<LaneLease> {
        let lane = Lane(self.free.borrow_mut().pop()?);
        Some(LaneLease { lane, free: self.free.clone() })
    }

    /// Checks that `n_held` lanes are taken.
    ///
    /// # Errors
    /// [`Error::Bug`] with the numbers.
    pub fn check_integrity(&self, n_held: usize) -> Result<()> {
        if self.n_taken() as usize == n_held {
            return Ok(());
        }
        Err(Error::Bug(format!("{} lanes are taken, requests hold {n_held}", self.n_taken())))
    }
}

impl LaneLease {
    /// The lane.
    pub fn lane(&self) -> Lane {
        self.lane
    }
}

impl Drop for LaneLease {
    fn drop(&mut self) {
        self.free.borrow_mut().push(self.lane.0);
    }
}
