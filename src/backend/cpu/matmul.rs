//! `x · Wᵀ + b` over weights as they are stored.
//!
//! Every output is one dot product, summed in the same order whatever the number of rows of `x` and the number of
//! cores: that is what makes a request's tokens independent of its batch. A general matrix product promises no
//! such order (it cuts `in` by the shape of the whole problem), so the blocking here is our own: few rows read
//! the stored weights as they go, many rows share a panel of weights that was widened once.

#![allow(unsafe_code)]

use rayon::prelude::*;

use super::PARALLEL_FROM;
use super::stored::{BF16, F16, F32, Stored, Weight, pad};
use super::sum::{LANES, tree};
use crate::error::{Error, Result};
use crate::model::checkpoint::DType;

/// Output columns of a task; a multiple of both tiles' widths. Its widened weights should fit the L2 cache.
const PANEL: usize = 24;
/// Rows of `x` of a task.
const BLOCK: usize = 64;
/// From this many rows on, widening a panel first pays: below, its stores cost more than widening anew for every few
/// rows, while the next weights are on their way.
const WIDEN_FROM: usize = 32;

/// `T` rows of `x` times `O` rows of weights, all widened and padded to whole chunks.
#[inline(always)]
fn tile<const FUSED: bool, const T: usize, const O: usize>(
    x: [&[[f32; LANES]]; T],
    weights: [&[[f32; LANES]]; O],
) -> [[f32; O]; T] {
    let n = x[0].len();
    let (x, weights) = (x.map(|row| &row[..n]), weights.map(|row| &row[..n]));
    let mut sums = [[[0f32; LANES]; O]; T];
    for chunk in 0..n {
        for t in 0..T {
            for o in 0..O {
                multiply_add::<FUSED>(&mut sums[t][o], &x[t][chunk], &weights[o][chunk]);
            }
        }
    }
    sums.map(|sums| sums.map(tree))
}

/// `T` rows of `x` times `O` stored rows, widened as they are read.
#[inline(always)]
fn stored_tile<S: Stored<BYTES>, const BYTES: usize, const FUSED: bool, const T: usize, const O: usize>(
    x: [&[[f32; LANES]]; T],
    rows: [&[u8]; O],
) -> [[f32; O]; T] {
    let rows = rows.map(|row| row.as_chunks::<BYTES>());
    let n = rows[0].0.len();
    let chunks = rows.map(|(chunks, _)| &chunks[..n]);
    let whole = x.map(|x| &x[..n]);
    let mut sums = [[[0f32; LANES]; O]; T];
    for chunk in 0..n {
        for o in 0..O {
            let weights = S::widen(&chunks[o][chunk]);
            for t in 0..T {
                multiply_add::<FUSED>(&mut sums[t][o], &whole[t][chunk], &weights);
            }
        }
    }
    if x[0].len() > n {
        for o in 0..O {
            let weights = S::widen(&pad(rows[o].1));
            for t in 0..T {
                multiply_add::<FUSED>(&mut sums[t][o], &x[t][n], &weights);
            }
        }
    }
    sums.map(|sums| sums.map(tree))
}

#[inline(always)]
fn multiply_add<const FUSED: bool>(sums: &mut [f32; LANES], x: &[f32; LANES], weights: &[f32; LANES]) {
    for lane in 0..LANES {
        sums[lane] = if FUSED {
            x[lane].mul_add(weights[lane], sums[lane])
        } else {
            sums[lane] + x[lane] * weights[lane]
        };
    }
}

/// What all tasks share.
struct Product<'a> {
    weight: &'a Weight,
    /// `[tokens][chunks]`, padded with zeros.
    x: &'a [[f32; LANES]],
    /// Chunks of a row of `x`.
    chunks: usize,
    tokens: usize,
    out: Out,
}

/// `[tokens, width]`, of which each task writes columns of its own.
struct Out {
    first: *mut f32,
    width: usize,
}

// SAFETY: Tasks write disjoint elements and read none, see `Product::task`.
unsafe impl Sync for Out {}

impl Product<'_> {
    fn x(&self, token: usize) -> &[[f32; LANES]] {
        &self.x[token * self.chunks..][..self.chunks]
    }

    /// Writes one output.
    #[inline(always)]
    fn put(&self, token: usize, column: usize, sum: f32) {
        let sum = self.weight.output(column, sum);
        debug_assert!(token < self.tokens && column < self.weight.rows());
        // SAFETY: `matmul` checked that `out` holds `tokens` rows of `rows` numbers and keeps it borrowed; this
        // element belongs to one task, which is one thread.
        unsafe { *self.out.first.add(token * self.out.width + column) = sum }
    }

    /// The task's outputs: columns of one panel, for the tokens of one block.
    #[inline(always)]
    fn task<const FUSED: bool>(&self, task: usize) {
        let panels = self.weight.rows().div_ceil(PANEL);
        let columns = task % panels * PANEL..(task % panels * PANEL + PANEL).min(self.weight.rows());
        let tokens = task / panels * BLOCK..(task / panels * BLOCK + BLOCK).min(self.tokens);
        if tokens.len() < WIDEN_FROM {
            let mut token = tokens.start;
            while token < tokens.end {
                if tokens.end - token >= 4 {
                    self.stored::<FUSED, 4, 2>(token, columns.clone());
                    token += 4;
                } else {
                    self.stored::<FUSED, 1, 8>(token, columns.clone());
                    token += 1;
                }
            }
        } else {
            self.widened::<FUSED>(tokens, columns);
        }
    }

    #[inline(always)]
    fn widened<const FUSED: bool>(&self, tokens: std::ops::Range<usize>, columns: std::ops::Range<usize>) {
        const T: usize = 4;
        const O: usize = 3;
        let mut panel = vec![[0f32; LANES]; columns.len() * self.chunks];
        for (column, row) in columns.clone().zip(panel.chunks_exact_mut(self.chunks)) {
            self.weight.widen_row(column, &mut row.as_flattened_mut()[..self.weight.columns()]);
        }
        let row = |column: usize| &panel[(column - columns.start) * self.chunks..][..self.chunks];
        let mut column = columns.start;
        while column < columns.end {
            let o_count = if columns.end - column >= O { O } else { 1 };
            let mut token = tokens.start;
            while token < tokens.end {
                let t_count = if tokens.end - token >= T { T } else { 1 };
                match (t_count, o_count) {
                    (T, O) => {
                        self.put_tile(token, column, tile::<FUSED, T, O>(self.xs(token), rows(&row, column)))
                    }
                    (T, _) => {
                        self.put_tile(token, column, tile::<FUSED, T, 1>(self.xs(token), rows(&row, column)))
                    }
                    (_, O) => {
                        self.put_tile(token, column, tile::<FUSED, 1, O>(self.xs(token), rows(&row, column)))
                    }
                    _ => {
                        self.put_tile(token, column, tile::<FUSED, 1, 1>(self.xs(token), rows(&row, column)))
                    }
                }
                token += t_count;
            }
            column += o_count;
        }
    }

    #[inline(always)]
    fn xs<const T: usize>(&self, token: usize) -> [&[[f32; LANES]]; T] {
        std::array::from_fn(|t| self.x(token + t))
    }

    #[inline(always)]
    fn put_tile<const T: usize, const O: usize>(&self, token: usize, column: usize, sums: [[f32; O]; T]) {
        for (t, sums) in sums.iter().enumerate() {
            for (o, &sum) in sums.iter().enumerate() {
                self.put(token + t, column + o, sum);
            }
        }
    }

    /// `T` tokens from `token` on, `O` columns at a time.
    #[inline(always)]
    fn stored<const FUSED: bool, const T: usize, const O: usize>(
        &self,
        token: usize,
        columns: std::ops::Range<usize>,
    ) {
        let x: [_; T] = self.xs(token);
        let mut column = columns.start;
        while column < columns.end {
            // Parts of one layer may be stored in different dtypes, so a block ends with its part.
            let stored = self.weight.rows_from(column);
            let count = O.min(columns.end - column).min(stored.count);
            let rows: [&[u8]; O] = std::array::from_fn(|o| stored.get(if o < count { o } else { 0 }));
            let sums = match stored.dtype {
                DType::F32 => stored_tile::<F32, _, FUSED, T, O>(x, rows),
                DType::F16 => stored_tile::<F16, _, FUSED, T, O>(x, rows),
                DType::BF16 => stored_tile::<BF16, _, FUSED, T, O>(x, rows),
            };
            for (t, sums) in sums.iter().enumerate() {
                for (o, &sum) in sums.iter().take(count).enumerate() {
                    self.put(token + t, column + o, sum);
                }
            }
            column += count;
        }
    }
}

#[inline(always)]
fn rows<'a, const O: usize>(
    row: &impl Fn(usize) -> &'a [[f32; LANES]],
    column: usize,
) -> [&'a [[f32; LANES]]; O] {
    std::array::from_fn(|o| row(column + o))
}

/// Work whose every function is inlined into [`widest`], so that it is compiled for more than the oldest machines.
/// Closures are compiled without the caller's instructions: loops stand in their place.
pub trait Kernel {
    /// Does it. `FUSED` says that a multiplication and an addition in one (which rounds once) cost one instruction.
    fn run<const FUSED: bool>(self);
}

/// Runs a kernel with the widest instructions that the machine is known to have. Within one process that is always
/// the same choice, so a kernel that fuses gives the same bits each time.
#[inline]
pub fn widest(kernel: impl Kernel) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn fused(kernel: impl Kernel) {
            kernel.run::<true>();
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: Both features were detected.
            unsafe { fused(kernel) }
        } else {
            kernel.run::<false>();
        }
    }
    #[cfg(target_arch = "aarch64")]
    kernel.run::<true>();
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    kernel.run::<false>();
}

/// One task of a product.
struct Task<'a> {
    product: &'a Product<'a>,
    number: usize,
}

impl Kernel for Task<'_> {
    #[inline(always)]
    fn run<const FUSED: bool>(self) {
        self.product.task::<FUSED>(self.number);
    }
}

/// `out = scale · (x · weightᵀ + bias)`, for `x` of `[tokens, in]` and `out` of `[tokens, out]`.
pub fn matmul(weight: &Weight, x: &[f32], out: &mut [f32]) -> Result<()> {
    if weight.columns() == 0 || weight.rows() == 0 || x.is_empty() {
        return Ok(());
    }
    let tokens = x.len() / weight.columns();
    if x.len() != tokens * weight.columns() || out.len() != tokens * weight.rows() {
        let text = format!(
            "{} inputs and {} outputs for {} → {}",
            x.len(),
            out.len(),
            weight.columns(),
            weight.rows()
        );
        return Err(Error::Bug(text));
    }
    let padded = padded(x, weight.columns());
    let (whole, _) = x.as_chunks();
    let chunks = weight.columns().div_ceil(LANES);
    let x = padded.as_deref().unwrap_or(whole);
    let out = Out { first: out.as_mut_ptr(), width: weight.rows() };
    let product = Product { weight, x, chunks, tokens, out };
    let tasks = weight.rows().div_ceil(PANEL) * tokens.div_ceil(BLOCK);
    let work = tokens * weight.rows() * weight.columns();
    let run = |number| widest(Task { product: &product, number });
    if work < PARALLEL_FROM {
        (0..tasks).for_each(run);
    } else {
        let tasks_of_one_thread = (PARALLEL_FROM / 4 / (work / tasks).max(1)).max(1);
        (0..tasks).into_par_iter().with_min_len(tasks_of_one_thread).for_each(run);
    }
    Ok(())
}

/// Rows of whole chunks, if they are not so already.
fn padded(x: &[f32], columns: usize) -> Option<Vec<[f32; LANES]>> {
    if columns.is_multiple_of(LANES) {
        return None;
    }
    let chunks = columns.div_ceil(LANES);
    let mut padded = vec![[0f32; LANES]; x.len() / columns * chunks];
    for (padded, row) in padded.chunks_exact_mut(chunks).zip(x.chunks_exact(columns)) {
        padded.as_flattened_mut()[..columns].copy_from_slice(row);
    }
    Some(padded)
}

#[cfg(test)]
#[path = "matmul_tests.rs"]
mod tests;
