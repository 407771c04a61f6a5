//! The set of free slots.

use std::ops::Range;

/// Free slot numbers, a bit each. Slot 0 is never among them.
pub(super) struct FreeSlots {
    words: Vec<u64>,
    len: u32,
}

impl FreeSlots {
    /// Slots `1..n_slots`, all free.
    pub(super) fn new(n_slots: u32) -> FreeSlots {
        let mut free = FreeSlots { words: vec![0; n_slots.div_ceil(64) as usize], len: 0 };
        (1..n_slots).for_each(|slot| free.insert(slot));
        free
    }

    /// Number of free slots.
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    pub(super) fn contains(&self, slot: u32) -> bool {
        self.words[slot as usize / 64] & bit(slot) != 0
    }

    pub(super) fn insert(&mut self, slot: u32) {
        self.len += u32::from(!self.contains(slot));
        self.words[slot as usize / 64] |= bit(slot);
    }

    pub(super) fn remove(&mut self, slot: u32) {
        self.len -= u32::from(self.contains(slot));
        self.words[slot as usize / 64] &= !bit(slot);
    }

    /// Number of free slots in a range.
    pub(super) fn count(&self, range: Range<u32>) -> usize {
        if range.is_empty() {
            return 0;
        }
        let (first, last) = (range.start as usize / 64, range.end as usize / 64);
        let below = |slot: u32| bit(slot) - 1;
        let whole: usize =
            self.words[first..last.min(self.words.len())].iter().map(|word| word.count_ones() as usize).sum();
        let before = (self.words[first] & below(range.start)).count_ones() as usize;
        let rest = self.words.get(last).map_or(0, |word| (word & below(range.end)).count_ones() as usize);
        whole + rest - before
    }

    /// Removes the `n` lowest free slots of a range; fewer, if there are fewer.
    pub(super) fn take_lowest(&mut self, n: usize, range: Range<u32>) -> Vec<u32> {
        let mut taken = Vec::with_capacity(n);
        for index in range.start as usize / 64..range.end.div_ceil(64) as usize {
            let mut word = self.words[index];
            while taken.len() < n && word != 0 {
                let slot = index as u32 * 64 + word.trailing_zeros();
                word &= word - 1;
                if range.contains(&slot) {
                    self.remove(slot);
                    taken.push(slot);
                }
            }
        }
        taken
    }
}

fn bit(slot: u32) -> u64 {
    1 << (slot % 64)
}
