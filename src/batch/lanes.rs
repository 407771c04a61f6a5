//! Lanes: places on the device, handed out and returned.

use std::cell::RefCell;
use std::rc::Rc;

use crate::error::{Error, Result};
use crate::ids::Lane;

/// Whose request takes a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claimant {
    /// A router that places its requests itself.
    Router,
    /// A caller whose requests the shard places. Beside a router they may have a quarter of the lanes.
    Own {
        /// Whether there is one.
        beside_router: bool,
    },
    /// A router's health probe.
    Probe,
}

/// The lanes of a device; a cheap handle. The last one is kept for a router's probe, which must run also when
/// requests have taken all others.
#[derive(Clone)]
pub struct Lanes {
    books: Rc<RefCell<Books>>,
    n_lanes: u32,
}

struct Books {
    free: Vec<u32>,
    /// Lanes of requests that the shard placed.
    n_own: usize,
}

/// A request's hold on a lane; dropping it gives the lane back.
pub struct LaneLease {
    lane: Lane,
    is_own: bool,
    books: Rc<RefCell<Books>>,
}

impl Lanes {
    /// `n_lanes` free lanes.
    pub fn new(n_lanes: u32) -> Lanes {
        let books = Books { free: (0..n_lanes).collect(), n_own: 0 };
        Lanes { books: Rc::new(RefCell::new(books)), n_lanes }
    }

    /// Lanes that ordinary requests may still take.
    pub fn n_free(&self) -> usize {
        self.books.borrow().free.len().saturating_sub(1)
    }

    /// Lanes taken.
    pub fn n_taken(&self) -> u32 {
        self.n_lanes - self.books.borrow().free.len() as u32
    }

    /// A lane, if the claimant may have one.
    pub fn take(&self, claimant: Claimant) -> Option<LaneLease> {
        let n_free = self.n_free();
        let mut books = self.books.borrow_mut();
        let may = match claimant {
            Claimant::Probe => true,
            Claimant::Router | Claimant::Own { beside_router: false } => n_free > 0,
            Claimant::Own { beside_router: true } => {
                n_free > 0 && books.n_own < (self.n_lanes as usize / 4).max(1)
            }
        };
        let lane = Lane(books.free.pop_if(|_| may)?);
        let is_own = matches!(claimant, Claimant::Own { .. });
        books.n_own += usize::from(is_own);
        Some(LaneLease { lane, is_own, books: self.books.clone() })
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
        let mut books = self.books.borrow_mut();
        books.free.push(self.lane.0);
        books.n_own -= usize::from(self.is_own);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_always_finds_a_lane_and_own_requests_leave_a_router_most() {
        let lanes = Lanes::new(9);
        let beside = Claimant::Own { beside_router: true };
        let own: Vec<LaneLease> = std::iter::from_fn(|| lanes.take(beside)).collect();
        assert_eq!(own.len(), 2);
        let routers: Vec<LaneLease> = std::iter::from_fn(|| lanes.take(Claimant::Router)).collect();
        assert_eq!((routers.len(), lanes.n_free()), (6, 0));
        assert!(lanes.take(Claimant::Own { beside_router: false }).is_none());
        let probe = lanes.take(Claimant::Probe).unwrap();
        assert!(lanes.take(Claimant::Probe).is_none());
        lanes.check_integrity(9).unwrap();
        drop((own, probe));
        let alone: Vec<LaneLease> =
            std::iter::from_fn(|| lanes.take(Claimant::Own { beside_router: false })).collect();
        assert_eq!(alone.len(), 2);
        drop((alone, routers));
        lanes.check_integrity(0).unwrap();
    }
}
