//! Which way of making a product is best: measured on this GPU, at start.

use cudarc::driver::sys as driver;

use super::device::{failed, launched};
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
/// Ways that are measured a second time.
const N_FINALISTS: usize = 6;
/// Layers of a chain, whose weights no cache holds together.
const N_CHAINED: usize = 4;
/// Passes over a chain that are measured together: a few milliseconds, after as many unmeasured ones, so that clocks and
/// power are those of sustained work.
const N_CHAIN_PASSES: usize = 6;
/// How often every product of a chain may change its way.
const N_ROUNDS: usize = 2;
/// By how much a way must shorten the chain to be taken: less is noise.
const WORTHWHILE: f32 = 0.998;
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
            let mut least = self.time_chain(products, &chosen)?;
            for (number, ways) in (0..N_ROUNDS).flat_map(|_| finalists.iter().enumerate()) {
                for way in ways {
                    let before = std::mem::replace(&mut chosen[number], *way);
                    let time = self.time_chain(products, &chosen)?;
                    if time < WORTHWHILE * least { least = time } else { chosen[number] = before }
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
            timed.extend(self.time(call, weights, &choice, 1)?.map(|time| (time, choice)));
        }
        timed.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        timed.truncate(N_FINALISTS);
        let n_passes = if call.rows <= 2 * LARGE_ROWS { 8 } else { 3 };
        for (time, choice) in &mut timed {
            *time = self.time(call, weights, choice, n_passes)?.unwrap_or(f32::INFINITY);
        }
        timed.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        Ok(timed.into_iter().map(|(_, choice)| choice).collect())
    }

    /// Passes over the weights, one after the other: microseconds a product, or `None` if it cannot be made so.
    fn time(
        &self,
        call: &Call<'_>,
        weights: &[&Weight],
        choice: &Choice,
        n_passes: usize,
    ) -> Result<Option<f32>> {
        let pass = || -> Result<bool> {
            for weight in weights {
                if !self.run_by(&Call { weight, ..*call }, choice)? {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        if !pass()? {
            return Ok(None);
        }
        let time = self.elapsed(|| (0..n_passes).try_for_each(|_| pass().map(drop)))?;
        Ok(Some(time / (n_passes * weights.len()) as f32))
    }

    /// Some layers' products in their order, recorded. Between them a step has small kernels, for which a norm stands in;
    /// only what a gate makes is taken by the next product at once. In microseconds.
    fn time_chain(&self, products: &[(Call<'_>, &[&Weight])], choices: &[Choice]) -> Result<f32> {
        let n_layers = products.iter().map(|(_, weights)| weights.len()).min().unwrap_or(0).min(N_CHAINED);
        let chain = graph::capture(&self.device, || {
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
        })?;
        let passes = || (0..N_CHAIN_PASSES).try_for_each(|_| chain.launch());
        passes()?;
        Ok(self.elapsed(passes)? / N_CHAIN_PASSES as f32)
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
