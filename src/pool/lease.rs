//! Leases: a request's hold on its slots.

use super::tags::Tag;
use super::{Pool, Slots};
use crate::error::{Error, Result};

/// The slots of a request, by position. Dropping it gives them back; their contents stay for whoever asks for the
/// same prefix.
pub struct Lease {
    pool: Pool,
    slots: Vec<u32>,
}

/// What a router says of a request.
pub struct RouterClaim<'a> {
    /// The slot of each position, prompt and output. Every one is leased.
    pub slots: &'a [u32],
    /// `[prompt_len]` the tags of the prompt's positions; not longer than `slots`.
    pub tags: &'a [Tag],
    /// Leading positions whose KV is claimed to be there, as the router says; it may exceed the prompt where the
    /// router counts other tokens.
    pub cache_len: u32,
}

/// A lease of slots that a router named, and what of its claim is true.
pub struct RouterLease {
    /// The slots. Where a claimed one is in a live request's way, a slot of the shard's own takes its place.
    pub lease: Lease,
    /// Leading prompt positions whose slots hold exactly their KV; claimed or not.
    pub n_valid: u32,
    /// Slots replaced by the shard's own.
    pub n_replaced: u32,
}

impl Lease {
    pub(super) fn new(pool: Pool, slots: Vec<u32>) -> Lease {
        Lease { pool, slots }
    }

    /// The slot of each position.
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut slots = self.pool.slots.borrow_mut();
        for &slot in &self.slots {
            slots.release(slot);
        }
    }
}

impl Pool {
    /// Leases the slots that a router named. Live requests may share a slot only where both expect the same
    /// prefix in it; a claimed slot that a live request needs for something else is replaced.
    ///
    /// # Errors
    /// [`Error::Invalid`] for slot 0, a slot that the router was never given, or one named twice;
    /// [`Error::Exhausted`] where an unclaimed slot is under a lease, or no slot is left to replace a claimed one.
    /// Nothing is leased then.
    pub fn lease_router(&self, claim: &RouterClaim<'_>) -> Result<RouterLease> {
        let mut slots = self.slots.borrow_mut();
        slots.check_numbers(claim.slots)?;
        // From the first router's request on, the shard keeps to its reserve, also if this request has to wait for
        // what the shard has lent beyond it.
        slots.router_attached = true;
        let replaced = slots.in_the_way(claim)?;
        let end = slots.holders.len() as u32 - slots.n_probe;
        let spare = slots.take_own(replaced.len(), end)?;
        let mut leased = claim.slots.to_vec();
        for (&position, &slot) in replaced.iter().zip(&spare) {
            leased[position] = slot;
        }
        let n_valid = (claim.tags.iter().zip(&leased))
            .take_while(|&(&tag, &slot)| slots.contents[slot as usize] == tag)
            .count();
        for (position, &slot) in leased.iter().enumerate() {
            slots.hold(slot, claim.tags.get(position).copied().unwrap_or(Tag::NONE));
        }
        drop(slots);
        Ok(RouterLease {
            lease: Lease::new(self.clone(), leased),
            n_valid: n_valid as u32,
            n_replaced: replaced.len() as u32,
        })
    }
}

impl Slots {
    fn check_numbers(&mut self, named: &[u32]) -> Result<()> {
        self.count = self.count.wrapping_add(1);
        if self.count == 0 {
            self.seen.fill(0);
            self.count = 1;
        }
        for (position, &slot) in named.iter().enumerate() {
            if slot == 0 || slot >= self.n_router {
                return Err(Error::Invalid(format!(
                    "slot {slot} at position {position} is not one of the slots 1 to {}",
                    self.n_router - 1
                )));
            }
            if std::mem::replace(&mut self.seen[slot as usize], self.count) == self.count {
                return Err(Error::Invalid(format!(
                    "slot {slot} is named twice, again at position {position}"
                )));
            }
        }
        Ok(())
    }

    /// Claimed positions whose slots live requests hold for something else.
    fn in_the_way(&self, claim: &RouterClaim<'_>) -> Result<Vec<usize>> {
        let mut positions = Vec::new();
        // Of a fully cached prompt the position after the claimed ones lies in the shared prefix too.
        let replaceable = if claim.cache_len == 0 { 0 } else { claim.cache_len as usize + 1 };
        for (position, &slot) in claim.slots.iter().enumerate() {
            let shared = claim.tags.get(position).is_some_and(|&tag| self.expected[slot as usize] == tag);
            if self.holders[slot as usize] == 0 || shared {
                continue;
            }
            if position >= replaceable {
                return Err(Error::Exhausted(format!(
                    "slot {slot} at position {position} is held by a live request"
                )));
            }
            positions.push(position);
        }
        Ok(positions)
    }
}
