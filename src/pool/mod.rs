//! The token-granular pool: one slot a token, numbers only. Who holds a slot, and what its KV was computed from.
//!
//! Two parties place requests: the router, which believes that every slot below [`Pool::n_router_slots`] is its
//! own, and the shard, for callers who name no slots. The slots above are the shard's reserve; until a router
//! shows up, the shard may lend any of them.
//!
//! Leases return their slots when dropped. Contents outlive leases: a slot's *tag* says of which token prefix its
//! KV is, so that a router's claim of a cached prefix can be checked instead of believed.

mod free;
mod lease;
mod tags;

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::rc::Rc;

use crate::error::{Error, Result};
use free::FreeSlots;
pub use lease::{Lease, RouterClaim, RouterLease};
pub use tags::{Chain, Tag};

/// Slots of the reserve that are kept for health probes: the longest one known has ten tokens.
pub const PROBE_SLOTS: u32 = 16;

/// The pool; a cheap handle. Lives on one thread.
#[derive(Clone)]
pub struct Pool {
    slots: Rc<RefCell<Slots>>,
}

/// The state behind every handle and lease.
struct Slots {
    chain: Chain,
    n_router: u32,
    /// Topmost slots that only probes may take.
    n_probe: u32,
    router_attached: bool,
    free: FreeSlots,
    /// `[n_slots]` leases that hold the slot; more than one where requests share a prefix.
    holders: Vec<u32>,
    /// `[n_slots]` what the holders' tokens make of the slot, so that only equals share; [`Tag::NONE`] where its
    /// token is yet to be sampled, which nobody may share.
    expected: Vec<Tag>,
    /// `[n_slots]` what the slot's KV was computed from.
    contents: Vec<Tag>,
    /// `[n_slots]` the last count that saw the slot; see [`Pool::n_distinct`].
    seen: Vec<u32>,
    count: u32,
}

impl Pool {
    /// A pool of `n_slots`, of which the last `n_own` are the shard's reserve. Slot 0 is never leased.
    ///
    /// # Errors
    /// As [`Pool::check_sizes`].
    pub fn new(n_slots: u32, n_own: u32) -> Result<Pool> {
        Pool::check_sizes(n_slots, n_own)?;
        let n = n_slots as usize;
        Ok(Pool {
            slots: Rc::new(RefCell::new(Slots {
                chain: Chain::default(),
                n_router: n_slots - n_own,
                n_probe: PROBE_SLOTS.min(n_own / 2),
                router_attached: false,
                free: FreeSlots::new(n_slots),
                holders: vec![0; n],
                expected: vec![Tag::NONE; n],
                contents: vec![Tag::NONE; n],
                seen: vec![0; n],
                count: 0,
            })),
        })
    }

    /// Whether router and shard both get slots.
    ///
    /// # Errors
    /// [`Error::Precondition`] with the numbers.
    pub fn check_sizes(n_slots: u32, n_own: u32) -> Result<()> {
        if n_own < 2 || n_slots.saturating_sub(n_own) < 2 {
            return Err(Error::Precondition(format!(
                "a pool of {n_slots} slots with {n_own} reserved for requests without slots: both sides need at least 2"
            )));
        }
        Ok(())
    }

    /// Whether a router has named slots since the last reset.
    pub fn has_router(&self) -> bool {
        self.slots.borrow().router_attached
    }

    /// Slots in all, slot 0 included.
    pub fn n_slots(&self) -> u32 {
        self.slots.borrow().holders.len() as u32
    }

    /// The router may name slots below this number.
    pub fn n_router_slots(&self) -> u32 {
        self.slots.borrow().n_router
    }

    /// Slots under at least one lease.
    pub fn n_leased(&self) -> u32 {
        self.n_slots() - 1 - self.slots.borrow().free.len()
    }

    /// The hash that tags are made with.
    pub fn chain(&self) -> Chain {
        self.slots.borrow().chain.clone()
    }

    /// Forgets all contents, and the router: the next one starts afresh. Leases stay.
    pub fn reset(&self) {
        let mut slots = self.slots.borrow_mut();
        slots.contents.fill(Tag::NONE);
        slots.router_attached = false;
    }

    /// `n` free slots of the shard's choice: of the reserve first, of the rest only while no router is attached. The
    /// topmost few are left to probes.
    ///
    /// # Errors
    /// [`Error::Exhausted`] with the numbers.
    pub fn lease_own(&self, n: usize) -> Result<Lease> {
        let n_slots = self.n_slots();
        let n_probe = self.slots.borrow().n_probe;
        self.lease_below(n_slots - n_probe, n)
    }

    /// `n` free slots for a router's health probe, which must run however full the pool is.
    ///
    /// # Errors
    /// [`Error::Exhausted`] with the numbers.
    pub fn lease_probe(&self, n: usize) -> Result<Lease> {
        self.lease_below(self.n_slots(), n)
    }

    fn lease_below(&self, end: u32, n: usize) -> Result<Lease> {
        let mut slots = self.slots.borrow_mut();
        let taken = slots.take_own(n, end)?;
        for &slot in &taken {
            slots.hold(slot, Tag::NONE);
        }
        Ok(Lease::new(self.clone(), taken))
    }

    /// Whether the slot holds the KV of `tag`'s prefix.
    pub fn holds(&self, slot: u32, tag: Tag) -> bool {
        tag != Tag::NONE && self.slots.borrow().contents[slot as usize] == tag
    }

    /// Contents are about to be written: until [`Pool::written`] says so, nobody can rely on them.
    pub fn writing(&self, slot: u32) {
        self.slots.borrow_mut().contents[slot as usize] = Tag::NONE;
    }

    /// The slot now holds the KV of `tag`'s prefix.
    pub fn written(&self, slot: u32, tag: Tag) {
        self.slots.borrow_mut().contents[slot as usize] = tag;
    }

    /// Number of different slots under these leases.
    pub fn n_distinct<'a>(&self, leases: impl Iterator<Item = &'a Lease>) -> u32 {
        let mut slots = self.slots.borrow_mut();
        slots.count = slots.count.wrapping_add(1);
        if slots.count == 0 {
            slots.seen.fill(0);
            slots.count = 1;
        }
        let count = slots.count;
        let mut distinct = 0;
        for &slot in leases.flat_map(Lease::slots) {
            distinct += u32::from(std::mem::replace(&mut slots.seen[slot as usize], count) != count);
        }
        distinct
    }

    /// Checks the books: free + held = total, slot 0 untouched, and as many holdings as the live leases have
    /// slots (`n_holdings`).
    ///
    /// # Errors
    /// [`Error::Bug`] with the numbers.
    pub fn check_integrity(&self, n_holdings: usize) -> Result<()> {
        let slots = self.slots.borrow();
        let n_free = (1..slots.holders.len()).filter(|&slot| slots.free.contains(slot as u32)).count();
        let n_held = slots.holders.iter().filter(|&&holders| holders > 0).count();
        let held: usize = slots.holders.iter().map(|&holders| holders as usize).sum();
        let disagree = (1..slots.holders.len())
            .find(|&slot| slots.free.contains(slot as u32) != (slots.holders[slot] == 0));
        let fault = if slots.holders[0] != 0 || slots.free.contains(0) {
            "slot 0 is leased or free".to_string()
        } else if n_free != slots.free.len() as usize || n_free + n_held + 1 != slots.holders.len() {
            format!("{n_free} free and {n_held} held slots of {}", slots.holders.len() - 1)
        } else if let Some(slot) = disagree {
            format!("slot {slot} is both free and held, or neither")
        } else if held != n_holdings {
            format!("slots count {held} holdings, live leases {n_holdings}")
        } else {
            return Ok(());
        };
        Err(Error::Bug(format!("the pool's books do not balance: {fault}")))
    }
}

impl Slots {
    /// Takes `n` free slots of the shard's own, below `end`: of the reserve first, then from the bottom of the pool,
    /// since routers hand out its top first.
    fn take_own(&mut self, n: usize, end: u32) -> Result<Vec<u32>> {
        let beyond = if self.router_attached { 1..1 } else { 1..self.n_router };
        let n_free = self.free.count(self.n_router..end) + self.free.count(beyond.clone());
        if n > n_free {
            return Err(Error::Exhausted(format!(
                "the request needs {n} slots of the shard's own, {n_free} of {} are free",
                end - self.n_router + beyond.end - beyond.start
            )));
        }
        let mut taken = self.free.take_lowest(n, self.n_router..end);
        taken.extend(self.free.take_lowest(n - taken.len(), beyond));
        Ok(taken)
    }

    /// Adds a holder. The first one removes the slot from the free ones, and says what will be in it.
    fn hold(&mut self, slot: u32, expected: Tag) {
        let index = slot as usize;
        if self.holders[index] == 0 {
            self.free.remove(slot);
            self.expected[index] = expected;
        }
        self.holders[index] += 1;
    }

    fn release(&mut self, slot: u32) {
        let index = slot as usize;
        self.holders[index] -= 1;
        if self.holders[index] == 0 {
            self.free.insert(slot);
            self.expected[index] = Tag::NONE;
        }
    }
}
