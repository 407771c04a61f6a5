//! The real CPU backend, of which one op can be made to fail in the middle of a step.

use std::convert::Infallible;
use std::ops::Range;

use kvshard::backend::cpu::stored::Weight;
use kvshard::backend::cpu::{Cpu, ExpertsWeight, HeadWeight, Kv, NormWeight, Step, Tensor};
use kvshard::backend::step::{StepInput, StepOutput};
use kvshard::backend::{
    Backend, ExpertParts, Heads, KvRows, LinearPart, LogitRows, Scores, StepShape, Tuned, Turn,
};
use kvshard::error::Result;
use kvshard::model::checkpoint::DType;
use kvshard::model::spec::{Activation, DecoderSpec, Experts, LatentAttention, Logits, Mask, Norm};
use kvshard::model::weights::TensorPart;

/// A rank whose `attend` may fail: once in every layer, between two meetings with the other ranks.
pub struct Faulty {
    pub inner: Cpu,
    pub before_attend: Box<dyn Fn() -> Result<()> + Send>,
}

impl Backend for Faulty {
    const DEVICE: &'static str = Cpu::DEVICE;

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
        self.inner.dtype()
    }

    fn attach(&mut self) -> Result<()> {
        self.inner.attach()
    }

    fn supports(&self, spec: &DecoderSpec) -> Result<()> {
        self.inner.supports(spec)
    }

    fn tensor(&self, rows: usize, width: usize) -> Result<Tensor> {
        self.inner.tensor(rows, width)
    }

    fn logits(&self, rows: usize, width: usize) -> Result<Tensor> {
        self.inner.logits(rows, width)
    }

    fn share(&self, tensor: &mut Tensor) -> Result<()> {
        self.inner.share(tensor)
    }

    fn norm_weight(&self, kind: Norm, weight: &TensorPart, bias: Option<&TensorPart>) -> Result<NormWeight> {
        self.inner.norm_weight(kind, weight, bias)
    }

    fn weight(&self, parts: &[LinearPart], scale: f32) -> Result<Weight> {
        self.inner.weight(parts, scale)
    }

    fn normalised_weight(&self, part: &LinearPart, scale: f32) -> Result<Weight> {
        self.inner.normalised_weight(part, scale)
    }

    fn head_weight(&self, heads: &[TensorPart]) -> Result<HeadWeight> {
        self.inner.head_weight(heads)
    }

    fn experts_weight(&self, spec: &Experts, hidden: usize, parts: &ExpertParts) -> Result<ExpertsWeight> {
        self.inner.experts_weight(spec, hidden, parts)
    }

    fn experts_room(&self, spec: &Experts, hidden: usize, width: usize, rows: usize) -> Result<()> {
        self.inner.experts_room(spec, hidden, width, rows)
    }

    fn vector(&self, numbers: &[f32]) -> Result<Vec<f32>> {
        self.inner.vector(numbers)
    }

    fn stored_vector(&self, part: &TensorPart) -> Result<Vec<f32>> {
        self.inner.stored_vector(part)
    }

    fn kv(&self, n_slots: usize, rows: KvRows) -> Result<Kv> {
        self.inner.kv(n_slots, rows)
    }

    fn step(&self, shape: StepShape) -> Result<Step> {
        self.inner.step(shape)
    }

    fn meet(&self, number: u64) -> Result<u64> {
        self.inner.meet(number)
    }

    fn begin(&self, input: &StepInput, step: &mut Step) -> Result<()> {
        self.inner.begin(input, step)
    }

    fn free_bytes(&self) -> Option<u64> {
        self.inner.free_bytes()
    }

    fn prepare(&self, _layers: &[Tuned<'_, Faulty>]) -> Result<()> {
        Ok(())
    }

    fn capture(
        &self,
        rows: usize,
        step: &mut Step,
        record: impl FnOnce(&mut Step) -> Result<()>,
    ) -> Result<Option<Infallible>> {
        self.inner.capture(rows, step, record)
    }

    fn replay(&self, graph: &Infallible, step: &mut Step) -> Result<()> {
        self.inner.replay(graph, step)
    }

    fn lay_out(&self, step: &mut Step) -> Result<()> {
        self.inner.lay_out(step)
    }

    fn embed(&self, table: &Weight, multiplier: f32, step: &Step, out: &mut Tensor) -> Result<()> {
        self.inner.embed(table, multiplier, step, out)
    }

    fn add_positions(&self, table: &Weight, step: &Step, out: &mut Tensor) -> Result<()> {
        self.inner.add_positions(table, step, out)
    }

    fn norm(&self, norm: &NormWeight, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        self.inner.norm(norm, rows, x, out)
    }

    fn norm_add(&self, norm: &NormWeight, rows: usize, x: &Tensor, residual: &mut Tensor) -> Result<()> {
        self.inner.norm_add(norm, rows, x, residual)
    }

    fn reduce_add(&self, multiplier: f32, rows: usize, x: &mut Tensor, residual: &mut Tensor) -> Result<()> {
        self.inner.reduce_add(multiplier, rows, x, residual)
    }

    fn linear(&self, weight: &Weight, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        self.inner.linear(weight, rows, x, out)
    }

    fn linear_add(
        &self,
        weight: &Weight,
        rows: usize,
        x: &Tensor,
        branch: &mut Tensor,
        residual: &mut Tensor,
    ) -> Result<()> {
        self.inner.linear_add(weight, rows, x, branch, residual)
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
        self.inner.linear_gate(weight, activation, rows, x, gate_up, out)
    }

    fn linear_activate(
        &self,
        weight: &Weight,
        activation: Activation,
        rows: usize,
        x: &Tensor,
        out: &mut Tensor,
    ) -> Result<()> {
        self.inner.linear_activate(weight, activation, rows, x, out)
    }

    fn linear_heads(&self, weight: &HeadWeight, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        self.inner.linear_heads(weight, rows, x, out)
    }

    fn experts(
        &self,
        experts: &ExpertsWeight,
        rows: usize,
        x: &Tensor,
        room: &mut (),
        out: &mut Tensor,
    ) -> Result<()> {
        self.inner.experts(experts, rows, x, room, out)
    }

    fn rope_store(
        &self,
        heads: Heads,
        turn: &Turn<'_, Faulty>,
        step: &Step,
        qkv: &mut Tensor,
        kv: &mut Kv,
    ) -> Result<()> {
        let Turn { norms, rope, log_n } = *turn;
        self.inner.rope_store(heads, &Turn { norms, rope, log_n }, step, qkv, kv)
    }

    fn attend(
        &self,
        heads: Heads,
        scores: &Scores<'_, Faulty>,
        step: &Step,
        qkv: &Tensor,
        kv: &Kv,
        out: &mut Tensor,
    ) -> Result<()> {
        (self.before_attend)()?;
        let Scores { scale, softcap, mask, slopes, sinks } = *scores;
        self.inner.attend(heads, &Scores { scale, softcap, mask, slopes, sinks }, step, qkv, kv, out)
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
        self.inner.store_latent(attention, norm, step, queries, absorbed, latents, kv)
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
        (self.before_attend)()?;
        self.inner.attend_latent(attention, mask, step, absorbed, kv, out)
    }

    fn select(&self, wanted: &LogitRows, step: &Step, x: &Tensor, out: &mut Tensor) -> Result<()> {
        self.inner.select(wanted, step, x, out)
    }

    fn all_reduce(&self, rows: usize, x: &mut Tensor) -> Result<()> {
        self.inner.all_reduce(rows, x)
    }

    fn warp_logits(&self, warp: Logits, rows: usize, logits: &mut Tensor) -> Result<()> {
        self.inner.warp_logits(warp, rows, logits)
    }

    fn gather(&self, rows: usize, part: &Tensor, out: &mut Tensor) -> Result<()> {
        self.inner.gather(rows, part, out)
    }

    fn target_logprobs(&self, targets: Range<usize>, logits: &Tensor, step: &mut Step) -> Result<()> {
        self.inner.target_logprobs(targets, logits, step)
    }

    fn sample(&self, logits: &mut Tensor, step: &mut Step) -> Result<()> {
        self.inner.sample(logits, step)
    }

    fn advance(&self, step: &mut Step) -> Result<()> {
        self.inner.advance(step)
    }

    fn output(&self, step: &mut Step) -> Result<StepOutput> {
        self.inner.output(step)
    }

    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }

    fn links(&self) -> Option<String> {
        self.inner.links()
    }
}
