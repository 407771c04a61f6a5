//! Which way of making a product is best: measured on this GPU, at start.

use cudarc::driver::sys as driver;

use super::device::{failed, launched};
use super::graph::Graph;
use super::linear::{Call, Choice, Linear};
use super::weight::Weight;
use super::{dtype_code, ffi, graph};
use crate::backend::Product;
use crate::error::Result;

/// Algorithms of cuBLASLt that are tried, for products that are bound by the weights and for those bound by arithmetic,
/// where its first guesses are further off.
const N_CANDIDATES: usize = 8;
const N_LARGE_CANDIDATES: usize = 12;
/// Rows from which arithmetic is the bound.
const LARGE_ROWS: usize = 512;
/// Ways that are measured a second time: the best alone, and those that come near.
const N_FINALISTS: usize = 5;
const NEAR: f32 = 1.12;
/// Turns that ways take at being measured, after one that does not count: clocks and power drift by more than ways
/// differ, and all must have their share of it.
const N_TURNS: usize = 3;
/// Layers of a chain, whose weights no cache holds together.
const N_CHAINED: usize = 4;
/// Passes over a chain in a turn: of few rows fewer, which draw less power, so that clocks drift less.
const N_CHAIN_PASSES: usize = 4;
const N_SHORT_CHAIN_PASSES: usize = 2;
const SHORT_CHAIN_ROWS: usize = 64;
/// How often every product of a chain may change its way.
const N_ROUNDS: usize = 2;
/// By how much a way must shorten the chain to be taken: less is noise.
const WORTHWHILE: f32 = 0.997;
/// Bytes of weights over which a measurement rotates, so that they come from memory as they do in a step: more than
/// twice the largest cache.
const ROTATED_BYTES: usize = 256 << 20;

impl Linear {
    /// Measures every way of making a layer's products, given in their order, and keeps the best. Each product has the
    /// weights of several layers.
    ///
    /// What is best alone may be in the way of its neighbours: a kernel of ours begins to read its weights while the one
    /// before it still runs. So few rows are measured as a step runs them: in a recorded chain of layers, of which one
    /// product after the other takes the way that shortens the chain most.
    pub fn tune(&self, products: &[(Call<'_>, &[&Weight])]) -> Result<()> {
        let mut finalists = Vec::new();
        for (call, weights) in products {
            finalists.push(self.finalists(call, weights)?);
        }
        let mut best: Vec<Option<Choice>> = finalists.iter().map(|ways| ways.first().copied()).collect();
        let is_chain = products.len() > 1 && products.iter().all(|(call, _)| call.rows < LARGE_ROWS);
        if is_chain && best.iter().all(Option::is_some) {
            let mut chosen: Vec<Choice> = best.iter().flatten().copied().collect();
            for _ in 0..N_ROUNDS {
                let mut has_changed = false;
                for (number, ways) in finalists.iter().enumerate() {
                    has_changed |= self.improve(products, &mut chosen, number, ways)?;
                }
                if !has_changed {
                    break;
                }
            }
            best = chosen.into_iter().map(Some).collect();
        }
        for ((call, _), choice) in products.iter().zip(best) {
            if let Some(choice) = choice {
                self.choose(call, choice);
            }
        }
        Ok(())
    }

    /// The best ways of making a product alone, best first.
    fn finalists(&self, call: &Call<'_>, weights: &[&Weight]) -> Result<Vec<Choice>> {
        let n_bytes: usize = call.weight.outputs * call.weight.stride * 2;
        // What is bound by arithmetic is the same wherever its weights lie.
        let rotated = if call.rows < LARGE_ROWS { ROTATED_BYTES } else { n_bytes };
        let n = rotated.div_ceil(n_bytes.max(1)).clamp(1, weights.len().max(1));
        let weights = weights.get(..n).unwrap_or(&[]);
        let own = (0..self.n_own_variants(call)).map(|variant| Choice::Own { variant });
        let n_candidates = if call.rows < LARGE_ROWS { N_CANDIDATES } else { N_LARGE_CANDIDATES };
        let library = self.candidates(call, n_candidates)?.into_iter().map(Choice::Library);
        let mut timed = Vec::new();
        for choice in own.chain(library) {
            // The first pass loads the kernel.
            if self.pass(call, weights, &choice)? {
                timed.push((self.elapsed(|| self.pass(call, weights, &choice).map(drop))?, choice));
            }
        }
        timed.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        let near = timed.first().map_or(0.0, |(best, _)| best * NEAR);
        timed.retain(|(time, _)| *time <= near);
        timed.truncate(N_FINALISTS);
        let mut ways: Vec<Choice> = timed.into_iter().map(|(_, choice)| choice).collect();
        let n_passes = if call.rows <= 2 * LARGE_ROWS { 4 } else { 1 };
        let times = self.in_turns(ways.len(), |way| {
            (0..n_passes).try_for_each(|_| self.pass(call, weights, &ways[way]).map(drop))
        })?;
        let mut order: Vec<usize> = (0..ways.len()).collect();
        order.sort_by(|&a, &b| times[a].total_cmp(&times[b]));
        ways = order.into_iter().map(|way| ways[way]).collect();
        Ok(ways)
    }

    /// A product with each of the weights; whether it can be made so.
    fn pass(&self, call: &Call<'_>, weights: &[&Weight], choice: &Choice) -> Result<bool> {
        for weight in weights {
            if !self.run_by(&Call { weight, ..*call }, choice)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Gives one product of the chain the best of these ways; whether that is another than it had.
    fn improve(
        &self,
        products: &[(Call<'_>, &[&Weight])],
        chosen: &mut [Choice],
        number: usize,
        ways: &[Choice],
    ) -> Result<bool> {
        let before = chosen[number];
        let others = ways.iter().filter(|&&way| way != before).copied();
        let ways: Vec<Choice> = std::iter::once(before).chain(others).collect();
        if ways.len() == 1 {
            return Ok(false);
        }
        let mut chains = Vec::new();
        for &way in &ways {
            chosen[number] = way;
            chains.push(self.chain(products, chosen)?);
        }
        let is_short = products.iter().all(|(call, _)| call.rows <= SHORT_CHAIN_ROWS);
        let n_passes = if is_short { N_SHORT_CHAIN_PASSES } else { N_CHAIN_PASSES };
        let times =
            self.in_turns(chains.len(), |way| (0..n_passes).try_for_each(|_| chains[way].launch()))?;
        let best = (0..ways.len()).min_by(|&a, &b| times[a].total_cmp(&times[b])).unwrap_or(0);
        let is_better = times[best] < WORTHWHILE * times[0];
        chosen[number] = if is_better { ways[best] } else { before };
        Ok(is_better)
    }

    /// Some layers' products in their order, recorded. Between them a step has small kernels, for which a norm stands in;
    /// only what a gate makes is taken by the next product at once.
    fn chain(&self, products: &[(Call<'_>, &[&Weight])], choices: &[Choice]) -> Result<Graph> {
        let n_layers = products.iter().map(|(_, weights)| weights.len()).min().unwrap_or(0).min(N_CHAINED);
        graph::capture(&self.device, || {
            for layer in 0..n_layers {
                let mut is_gated = false;
                for ((call, weights), choice) in products.iter().zip(choices) {
                    let call = Call { weight: weights[layer], ..*call };
                    if !is_gated {
                        self.predecessor(&call)?;
                    }
                    self.run_by(&call, choice)?;
                    is_gated = matches!(call.product, Product::Gated(_));
                }
            }
            Ok(())
        })
    }

    /// A norm of the product's own inputs, in place: any weights will do.
    fn predecessor(&self, call: &Call<'_>) -> Result<()> {
        let params = ffi::NormRows {
            x: call.x.ptr(),
            x_stride: call.x.stride as i64,
            weight: call.weight.numbers.ptr(),
            bias: std::ptr::null(),
            out: call.x.ptr(),
            out_stride: call.x.stride as i64,
            rows: call.rows as i32,
            width: call.x.width as i32,
            // The numbers keep their scale over any number of passes.
            eps: 1.0,
            kind: ffi::KV_RMS,
            add: 0,
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: a block reads its row whole before it writes it, and a weight has a row of that width.
        launched("norm", unsafe { ffi::kv_norm(&params, self.device.stream()) })
    }

    /// The median time of each of `n` ways, which take turns: microseconds.
    fn in_turns(&self, n: usize, run: impl Fn(usize) -> Result<()>) -> Result<Vec<f32>> {
        let mut times = vec![Vec::new(); n];
        for turn in 0..=N_TURNS {
            for (way, times) in times.iter_mut().enumerate() {
                let time = self.elapsed(|| run(way))?;
                if turn > 0 {
                    times.push(time);
                }
            }
        }
        let median = |mut times: Vec<f32>| {
            times.sort_by(f32::total_cmp);
            times[times.len() / 2]
        };
        Ok(times.into_iter().map(median).collect())
    }

    /// Microseconds that the GPU takes for what `work` queues.
    fn elapsed(&self, work: impl FnOnce() -> Result<()>) -> Result<f32> {
        let stream = self.device.cuda_stream();
        let flags = Some(driver::CUevent_flags::CU_EVENT_DEFAULT);
        let before = stream.record_event(flags).map_err(failed("recording an event"))?;
        work()?;
        let after = stream.record_event(flags).map_err(failed("recording an event"))?;
        after.synchronize().map_err(failed("measuring a product"))?;
        Ok(before.elapsed_ms(&after).map_err(failed("measuring a product"))? * 1e3)
    }
}
