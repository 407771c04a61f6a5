//! The reference backend: the shortest correct code, f32 accumulation, one file an op.
//!
//! A row's numbers do not depend on what else is in the step: every sum has an order that follows from the row's
//! own position and width. So a request alone, batched, chunked or with a cached prefix gives the same bits.

mod activation;
mod attend;
mod collective;
mod embed;
mod experts;
mod lanes;
mod linear_heads;
mod logprobs;
mod matmul;
mod norm;
mod rope_store;
mod route;
mod sample;
mod step;
pub mod stored;
mod sum;
mod warp;
mod watermark;

use std::convert::Infallible;
use std::ops::Range;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::step::{Sampled, StepInput, StepOutput};
use super::{Backend, ExpertParts, Heads, KvRows, LinearPart, LogitRows, Scores, StepShape, Tuned, Turn};
use crate::error::{Error, Result};
use crate::model::checkpoint::DType;
use crate::model::spec::{Activation, DecoderSpec, Experts, LatentAttention, Logits, Mask, Norm};
use crate::model::weights::TensorPart;

pub use collective::Member;
pub use experts::ExpertsWeight;
pub use linear_heads::HeadWeight;
pub use norm::NormWeight;
pub use rope_store::Kv;
pub use step::Step;
pub use stored::Weight;

/// Below this many multiplications an op runs on its caller's thread: handing it out would take longer.
const PARALLEL_FROM: usize = 1 << 19;

/// One rank on the CPU.
pub struct Cpu {
    peers: Member,
    /// The rank's thread and others that help it; until it is attached, the process's threads do.
    cores: Option<ThreadPool>,
}

impl Cpu {
    /// The ranks of one world; each is moved to a thread of its own.
    pub fn world(n_ranks: usize) -> Vec<Cpu> {
        Member::world(n_ranks).into_iter().map(|peers| Cpu { peers, cores: None }).collect()
    }

    /// The only rank of a world of one.
    pub fn alone() -> Cpu {
        Cpu { peers: Member::alone(), cores: None }
    }
}

/// `[rows, width]` of f32, row-major.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Row after row.
    pub values: Vec<f32>,
    /// Numbers in a row.
    pub width: usize,
}

impl Tensor {
    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..][..self.width]
    }

    fn rows(&self, rows: usize) -> &[f32] {
        &self.values[..rows * self.width]
    }

    fn rows_mut(&mut self, rows: usize) -> &mut [f32] {
        let width = self.width;
        &mut self.values[..rows * width]
    }
}

/// Calls `each` with the index and the numbers of every `width` numbers of `values`; on all cores if the `work`, in
/// multiplications, is worth it.
fn for_each_chunk(values: &mut [f32], width: usize, work: usize, each: impl Fn(usize, &mut [f32]) + Sync) {
    if work < PARALLEL_FROM {
        values.chunks_exact_mut(width).enumerate().for_each(|(index, chunk)| each(index, chunk));
    } else {
        values.par_chunks_exact_mut(width).enumerate().for_each(|(index, chunk)| each(index, chunk));
    }
}

impl Backend for Cpu {
    const DEVICE: &'static str = "cpu";

    type Tensor = Tensor;
    type Norm = NormWeight;
    type Weight = Weight;
    type HeadWeight = HeadWeight;
    type Experts = ExpertsWeight;
    type ExpertsRoom = ();
    type Vector = Vec<f32>;
    type Kv = Kv;
    type Step = Step;
    type Graph = Infallible;

    fn dtype(&self) -> DType {
        DType::F32
    }

    /// The rank's share of the cores becomes a pool of which its own thread is one: an op then begins at once, where
    /// a thread outside would sleep until others have woken, worked and woken it.
    fn attach(&mut self) -> Result<()> {
        let share = (rayon::current_num_threads() / self.peers.n_ranks()).max(1);
        let pool = ThreadPoolBuilder::new()
            .num_threads(share)
            .thread_name(|index| format!("cpu-{index}"))
            .use_current_thread()
            .build();
        let pool = pool.map_err(|error| Error::Exhausted(format!("no threads for a rank: {error}")))?;
        self.cores = Some(pool);
        Ok(())
    }

    /// Every variant of a spec has its arm in every op that it concerns.
    fn supports(&self, _spec: &DecoderSpec) -> Result<()> {
        Ok(())
    }

    fn tensor(&self, rows: usize, width: usize) -> Result<Tensor> {
        Ok(Tensor { values: zeros(rows, width)?, width })
    }

    fn logits(&self, rows: usize, width: usize) -> Result<Tensor> {
        self.tensor(rows, width)
    }

    fn share(&self, _tensor: &mut Tensor) -> Result<()> {
        Ok(())
    }

    fn norm_weight(&self, kind: Norm, weight: &TensorPart, bias: Option<&TensorPart>) -> Result<NormWeight> {
        NormWeight::new(kind, weight, bias)
    }

    fn weight(&self, parts: &[LinearPart], scale: f32) -> Result<Weight> {
        Weight::new(parts, scale)
    }

    fn normalised_weight(&self, part: &LinearPart, scale: f32) -> Result<Weight> {
        Weight::normalised(part, scale)
    }

    fn head_weight(&self, heads: &[TensorPart]) -> Result<HeadWeight> {
        HeadWeight::new(heads)
    }

    fn experts_weight(&self, spec: &Experts, _hidden: usize, parts: &ExpertParts) -> Result<ExpertsWeight> {
        ExpertsWeight::new(spec, parts)
    }

    /// Taken as it is needed: how much an expert needs depends on who chooses it.
    fn experts_room(&self, _spec: &Experts, _hidden: usize, _width: usize, _rows: usize) -> Result<()> {
        Ok(())
    }

    fn vector(&self, numbers: &[f32]) -> Result<Vec<f32>> {
        Ok(numbers.to_vec())
    }

    fn stored_vector(&self, part: &TensorPart) -> Result<Vec<f32>> {
        stored::vector(part)
    }

    fn kv(&self, n_slots: usize, rows: KvRows) -> Result<Kv> {
        let (width, of_values) = Kv::widths(rows);
        Ok(Kv { keys: zeros(n_slots, width)?, values: zeros(n_slots, of_values)?, width })
    }

    fn step(&self, shape: StepShape) -> Result<Step> {
        Ok(Step::new(shape))
    }

    fn free_bytes(&self) -> Option<u64> {
        None
    }

    fn prepare(&self, _layers: &[Tuned<'_, Cpu>]) -> Result<()> {
        Ok(())
    }

    fn meet(&self, number: u64) -> Result<u64> {
        self.peers.least(number)
    }

    fn begin(&self, input: &StepInput, step: &mut Step) -> Result<()> {
        step.begin(input)
    }

    fn capture(
        &self,
        _rows: usize,
        _step: &mut Step,
        _record: impl FnOnce(&mut Step) -> Result<()>,
    ) -> Result<Option<Infallible>> {
        Ok(None)
    }

    fn replay(&self, graph: &Infallible, _step: &mut Step) -> Result<()> {
        match *graph {}
    }

    /// Done as the step began.
    fn lay_out(&self, _step: &mut Step) -> Result<()> {
        Ok(())
    }

    fn embed(&self, table: &Weight, multiplier: f32, step: &Step, out: &mut Tensor) -> Result<()> {
        embed::embed(table, multiplier, step, out);
        Ok(())
    }

    fn add_positions(&self, table: &Weight, step: &Step, out: &mut Tensor) -> Result<()> {
        embed::add_positions(table, step, out);
        Ok(())
    }

    fn norm(&self, norm: &NormWeight, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        norm.norm(rows, x, out);
        Ok(())
    }

    fn norm_add(&self, norm: &NormWeight, rows: usize, x: &Tensor, residual: &mut Tensor) -> Result<()> {
        norm.norm_add(rows, x, residual);
        Ok(())
    }

    fn reduce_add(&self, multiplier: f32, rows: usize, x: &mut Tensor, residual: &mut Tensor) -> Result<()> {
        self.all_reduce(rows, x)?;
        let sums = residual.rows_mut(rows).iter_mut().zip(x.rows(rows));
        sums.for_each(|(residual, x)| *residual += multiplier * x);
        Ok(())
    }

    fn linear(&self, weight: &Weight, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        matmul::matmul(weight, x.rows(rows), out.rows_mut(rows))
    }

    fn linear_add(
        &self,
        weight: &Weight,
        rows: usize,
        x: &Tensor,
        branch: &mut Tensor,
        residual: &mut Tensor,
    ) -> Result<()> {
        self.linear(weight, rows, x, branch)?;
        self.reduce_add(1.0, rows, branch, residual)
    }

    fn linear_gate(
        &self,
        weight: &Weight,
        activation: Activation,
        rows: usize,
        x: &Tensor,
        gate_up: &mut Tensor,
        out: &mut Tensor,
    ) -> Result<()> {
        self.linear(weight, rows, x, gate_up)?;
        activation::gate(activation, rows, gate_up, out);
        Ok(())
    }

    fn linear_activate(
        &self,
        weight: &Weight,
        activation: Activation,
        rows: usize,
        x: &Tensor,
        out: &mut Tensor,
    ) -> Result<()> {
        self.linear(weight, rows, x, out)?;
        activation::activate(activation, rows, out);
        Ok(())
    }

    fn linear_heads(&self, weight: &HeadWeight, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        weight.apply(rows, x, out)
    }

    fn experts(
        &self,
        experts: &ExpertsWeight,
        rows: usize,
        x: &Tensor,
        _room: &mut (),
        out: &mut Tensor,
    ) -> Result<()> {
        experts.apply(rows, x, out)
    }

    fn rope_store(
        &self,
        heads: Heads,
        turn: &Turn<'_, Cpu>,
        step: &Step,
        qkv: &mut Tensor,
        kv: &mut Kv,
    ) -> Result<()> {
        rope_store::rope_store(heads, turn, step, qkv, kv);
        Ok(())
    }

    fn attend(
        &self,
        heads: Heads,
        scores: &Scores<'_, Cpu>,
        step: &Step,
        qkv: &Tensor,
        kv: &Kv,
        out: &mut Tensor,
    ) -> Result<()> {
        attend::attend(heads, scores, step, qkv, kv, out);
        Ok(())
    }

    fn store_latent(
        &self,
        attention: &LatentAttention,
        norm: &NormWeight,
        step: &Step,
        queries: &Tensor,
        absorbed: &mut Tensor,
        latents: &Tensor,
        kv: &mut Kv,
    ) -> Result<()> {
        rope_store::store_latent(attention, norm, step, queries, absorbed, latents, kv);
        Ok(())
    }

    fn attend_latent(
        &self,
        attention: &LatentAttention,
        mask: Mask,
        step: &Step,
        absorbed: &Tensor,
        kv: &Kv,
        out: &mut Tensor,
    ) -> Result<()> {
        attend::attend_latent(attention, mask, step, absorbed, kv, out);
        Ok(())
    }

    fn select(&self, wanted: &LogitRows, step: &Step, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let tokens = step.logit_tokens(wanted);
        for (chosen, &token) in out.values.chunks_exact_mut(x.width).zip(tokens) {
            chosen.copy_from_slice(x.row(token as usize));
        }
        Ok(())
    }

    fn all_reduce(&self, rows: usize, x: &mut Tensor) -> Result<()> {
        self.peers.all_reduce(x.rows_mut(rows))
    }

    fn warp_logits(&self, warp: Logits, rows: usize, logits: &mut Tensor) -> Result<()> {
        for logit in logits.rows_mut(rows) {
            *logit *= warp.multiplier;
            if let Some(cap) = warp.softcap {
                *logit = cap * (*logit / cap).tanh();
            }
        }
        Ok(())
    }

    fn gather(&self, rows: usize, part: &Tensor, out: &mut Tensor) -> Result<()> {
        let width = out.width;
        self.peers.gather(rows, part.rows(rows), out.rows_mut(rows), width)
    }

    fn target_logprobs(&self, targets: Range<usize>, logits: &Tensor, step: &mut Step) -> Result<()> {
        logprobs::target_logprobs(targets, logits, step);
        Ok(())
    }

    fn sample(&self, logits: &mut Tensor, step: &mut Step) -> Result<()> {
        sample::sample(logits, step);
        Ok(())
    }

    fn advance(&self, step: &mut Step) -> Result<()> {
        let ids = self.peers.broadcast(step.sampled.iter().map(chosen).collect())?;
        step.advance(&ids);
        Ok(())
    }

    fn output(&self, step: &mut Step) -> Result<StepOutput> {
        Ok(StepOutput {
            sampled: std::mem::take(&mut step.sampled),
            target_logprobs: std::mem::take(&mut step.target_logprobs),
        })
    }

    fn abort(&self, reason: &str) {
        self.peers.abort(reason);
    }

    fn links(&self) -> Option<String> {
        None
    }
}

/// The token that a lane takes as its last. Where there was nothing to choose from it takes 0, so that a step
/// submitted ahead of that news has something to feed.
fn chosen(sampled: &Sampled) -> u32 {
    match sampled {
        Sampled::Token { id, .. } => *id,
        Sampled::NoDistribution => 0,
    }
}

/// Zeros that take no memory until they are written: the allocator hands out untouched pages.
fn zeros(rows: usize, width: usize) -> Result<Vec<f32>> {
    let elements = rows.checked_mul(width).filter(|&n| n <= isize::MAX as usize / size_of::<f32>());
    match elements {
        Some(elements) => Ok(vec![0.0; elements]),
        None => Err(Error::Exhausted(format!("{rows} rows of {width} numbers exceed the address space"))),
    }
}
