//! Decode steps recorded once for each of some numbers of rows, and run again as one.

use crate::backend::Backend;
use crate::error::Result;

/// Graphs by number of rows; a step takes the smallest that holds it, whose surplus rows do nothing.
pub struct Graphs<B: Backend> {
    /// Rows ascending.
    buckets: Vec<(usize, B::Graph)>,
}

impl<B: Backend> Graphs<B> {
    /// No graph: every step runs op by op.
    pub fn none() -> Graphs<B> {
        Graphs { buckets: Vec::new() }
    }

    /// Records a graph for every bucket up to `max_rows`, by `ops` of so many rows.
    pub fn record(
        backend: &B,
        max_rows: usize,
        step: &mut B::Step,
        mut ops: impl FnMut(usize, &mut B::Step) -> Result<()>,
    ) -> Result<Graphs<B>> {
        let mut buckets = Vec::new();
        for rows in bucket_rows(max_rows) {
            match backend.capture(rows, step, |step| ops(rows, step))? {
                Some(graph) => buckets.push((rows, graph)),
                None => break,
            }
        }
        Ok(Graphs { buckets })
    }

    /// The graph for so many rows.
    pub fn for_rows(&self, rows: usize) -> Option<&B::Graph> {
        let at = self.buckets.partition_point(|&(bucket, _)| bucket < rows);
        (rows > 0).then_some(())?;
        self.buckets.get(at).map(|(_, graph)| graph)
    }
}

/// Buckets up to `max_rows`: within one, the surplus costs little beside the weights, which are read anyway.
pub fn bucket_rows(max_rows: usize) -> Vec<usize> {
    let small = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256];
    let large = (320..).step_by(64);
    let mut rows: Vec<usize> = small.into_iter().chain(large).take_while(|&rows| rows < max_rows).collect();
    rows.push(max_rows);
    rows
}

/// Numbers of rows at which products of up to `max_rows` are measured: some of the buckets, whose neighbours are alike.
pub fn measured_rows(max_rows: usize) -> Vec<usize> {
    let some = [1, 8, 16, 32, 48, 64, 96, 128, 192, 256];
    let mut rows: Vec<usize> =
        some.into_iter().chain((384..).step_by(128)).take_while(|&n| n < max_rows).collect();
    rows.push(max_rows);
    rows
}

/// Numbers of rows at which a step's products are measured: those of decode steps, and coarser ones up to `max_tokens`.
pub fn step_rows(max_rows: usize, max_tokens: usize) -> Vec<usize> {
    let mut rows = measured_rows(max_rows);
    let mut next = max_rows.next_power_of_two().max(64);
    while next < max_tokens {
        let between = if next < 1024 { next + next / 2 } else { next };
        rows.extend([next, between].into_iter().filter(|&n| n > max_rows && n < max_tokens));
        rows.dedup();
        next *= 2;
    }
    rows.extend((max_tokens > max_rows).then_some(max_tokens));
    rows
}

#[cfg(test)]
mod tests {
    use super::{bucket_rows, step_rows};

    #[test]
    fn buckets_end_at_the_most_rows() {
        assert_eq!(bucket_rows(1), [1]);
        assert_eq!(bucket_rows(9), [1, 2, 4, 8, 9]);
        assert_eq!(bucket_rows(400).split_off(19), [256, 320, 384, 400]);
        let many = bucket_rows(1025);
        assert!(many.is_sorted() && many.last() == Some(&1025));
    }

    #[test]
    fn longer_steps_are_measured_coarsely() {
        assert_eq!(step_rows(2, 400), [1, 2, 64, 96, 128, 192, 256, 384, 400]);
        assert_eq!(step_rows(4, 4), [1, 4]);
        let many = step_rows(1025, 8192);
        assert!(many.is_sorted() && many.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
