//! Places along one axis of a stored matrix.

use std::ops::Range;

/// `count` numbers: `first`, `first + step`, ….
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub first: usize,
    /// From one to the next.
    pub step: usize,
    /// How many.
    pub count: usize,
}

/// Rows or columns of a stored matrix, in the order in which the decoder has them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Runs {
    runs: Vec<Run>,
    /// `[runs]` places up to the end of each.
    ends: Vec<usize>,
}

impl Runs {
    /// Neighbours.
    pub fn range(range: Range<usize>) -> Runs {
        Runs::equal(range.start, 1, 1, range.len())
    }

    /// `groups` times `count` neighbours, of which the first ones lie `stride` apart.
    pub fn equal(first: usize, groups: usize, stride: usize, count: usize) -> Runs {
        let mut runs = Runs::default();
        match count {
            1 => runs.push(Run { first, step: stride, count: groups }),
            _ => {
                (0..groups).for_each(|group| runs.push(Run { first: first + group * stride, step: 1, count }))
            }
        }
        runs
    }

    /// How many places.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The places in order.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        self.runs.iter().flat_map(|run| (0..run.count).map(|i| run.first + i * run.step))
    }

    /// The runs in order, none of them empty.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The places from number `i` on, up to the end of their run.
    #[inline]
    pub fn rest_from(&self, i: usize) -> Option<Run> {
        let at = self.ends.partition_point(|&end| end <= i);
        let run = self.runs.get(at)?;
        let before = i + run.count - self.ends[at];
        Some(Run { first: run.first + before * run.step, step: run.step, count: run.count - before })
    }

    /// Some of the places, by their numbers in the order.
    pub fn slice(&self, range: Range<usize>) -> Runs {
        let mut slice = Runs::default();
        let mut i = range.start;
        while i < range.end
            && let Some(rest) = self.rest_from(i)
        {
            let count = rest.count.min(range.end - i);
            slice.push(Run { count, ..rest });
            i += count;
        }
        slice
    }

    /// The places as a range, where they are neighbours.
    pub fn as_range(&self) -> Option<Range<usize>> {
        match *self.runs.as_slice() {
            [] => Some(0..0),
            [Run { first, step, count }] if step == 1 || count == 1 => Some(first..first + count),
            _ => None,
        }
    }

    /// The largest place, if there is one.
    pub fn last(&self) -> Option<usize> {
        self.runs.iter().map(|run| run.first + (run.count - 1) * run.step).max()
    }

    /// Appends a run, to the last one where it continues that.
    fn push(&mut self, run: Run) {
        if run.count == 0 {
            return;
        }
        let len = self.len() + run.count;
        if let (Some(last), Some(end)) = (self.runs.last_mut(), self.ends.last_mut()) {
            let step = if last.count > 1 {
                last.step
            } else if run.count > 1 {
                run.step
            } else {
                run.first.saturating_sub(last.first)
            };
            let continues = step > 0 && run.first == last.first + last.count * step;
            if continues && (run.count == 1 || run.step == step) {
                *last = Run { first: last.first, step, count: last.count + run.count };
                *end = len;
                return;
            }
        }
        self.runs.push(run);
        self.ends.push(len);
    }
}

impl FromIterator<usize> for Runs {
    fn from_iter<I: IntoIterator<Item = usize>>(places: I) -> Runs {
        let mut runs = Runs::default();
        places.into_iter().for_each(|first| runs.push(Run { first, step: 1, count: 1 }));
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(runs: &Runs) -> Vec<usize> {
        runs.iter().collect()
    }

    #[test]
    fn groups_of_neighbours() {
        assert_eq!(list(&Runs::range(3..6)), [3, 4, 5]);
        assert_eq!(list(&Runs::equal(2, 3, 10, 2)), [2, 3, 12, 13, 22, 23]);
        assert_eq!(Runs::equal(1, 4, 2, 1).runs(), [Run { first: 1, step: 2, count: 4 }]);
        // Groups without gaps are one run.
        assert_eq!(Runs::equal(5, 3, 2, 2).as_range(), Some(5..11));
        assert_eq!((Runs::range(4..4).len(), Runs::range(4..4).as_range()), (0, Some(0..0)));
        assert_eq!(Runs::equal(2, 3, 10, 2).last(), Some(23));
    }

    #[test]
    fn a_list_becomes_runs_and_stays_the_list() {
        let lists: [&[usize]; 6] =
            [&[], &[7], &[0, 2, 4, 1, 3, 5, 6, 7], &[5, 4, 3], &[0, 5, 6, 7, 8], &[3, 3, 4]];
        for places in lists {
            let runs: Runs = places.iter().copied().collect();
            assert_eq!((list(&runs), runs.len()), (places.to_vec(), places.len()));
        }
    }

    #[test]
    fn every_slice_is_the_lists_slice() {
        let runs: Runs = [0, 2, 4, 1, 3, 5, 20, 21, 22, 9].into_iter().collect();
        let places = list(&runs);
        for start in 0..=places.len() {
            for end in start..=places.len() {
                assert_eq!(list(&runs.slice(start..end)), places[start..end]);
            }
            let rest = runs.rest_from(start).map(|run| run.first);
            assert_eq!(rest, places.get(start).copied());
        }
    }
}
