//! The real CPU backend, of which one op can be made to fail in the middle of a step.

use std::ops::Range;

use kvshard::backend::cpu::stored::Weight;
use kvshard::backend::cpu::{Cpu, Kv, NormWeight, Step, Tensor};
use kvshard::backend::step::{StepInput, StepOutput};
use kvshard::backend::{Backend, Heads, LinearPart, LogitRows, StepShape};
use kvshard::error::Result;
use kvshard::model::spec::{Activation, DecoderSpec, Mask, Norm};
use kvshard::model::weights::TensorPart;

/// A rank whose `attend` may fail: once in every layer, between two meetings with the other ranks.
pub struct Faulty {
    pub inner: Cpu,
    pub before_attend: Box<dyn Fn() -> Result<()> + Send>,
}

impl Backend for Faulty {
    const DEVICE: &'static str = Cpu::DEVICE;
    const DTYPE: &'static str = Cpu::DTYPE;

    type Tensor = Tensor;
    type Norm = NormWeight;
    type Weight = Weight;
    type Kv = Kv;
    type Step = Step;

    fn attach(&mut self) -> Result<()> {
        self.inner.attach()
    }

    fn supports(&self, spec: &DecoderSpec) -> Result<()> {
        self.inner.supports(spec)
    }

    fn tensor(&self, rows: usize, width: usize) -> Result<Tensor> {
        self.inner.tensor(rows, width)
    }

    fn norm(&self, kind: Norm, weight: &TensorPart) -> Result<NormWeight> {
        self.inner.norm(kind, weight)
    }

    fn weight(&self, parts: &[LinearPart]) -> Result<Weight> {
        self.inner.weight(parts)
    }

    fn kv(&self, n_slots: usize, width: usize) -> Result<Kv> {
        self.inner.kv(n_slots, width)
    }

    fn step(&self, shape: StepShape) -> Result<Step> {
        self.inner.step(shape)
    }

    fn begin(&self, input: &StepInput, step: &mut Step) -> Result<()> {
        self.inner.begin(input, step)
    }

    fn embed(&self, table: &Weight, step: &Step, out: &mut Tensor) -> Result<()> {
        self.inner.embed(table, step, out)
    }

    fn add_norm(
        &self,
        norm: &NormWeight,
        rows: usize,
        branch: Option<&Tensor>,
        residual: &mut Tensor,
        out: &mut Tensor,
    ) -> Result<()> {
        self.inner.add_norm(norm, rows, branch, residual, out)
    }

    fn linear(&self, weight: &Weight, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        self.inner.linear(weight, rows, x, out)
    }

    fn rope_store(&self, heads: Heads, step: &Step, qkv: &mut Tensor, kv: &mut Kv) -> Result<()> {
        self.inner.rope_store(heads, step, qkv, kv)
    }

    fn attend(
        &self,
        heads: Heads,
        mask: Mask,
        step: &Step,
        qkv: &Tensor,
        kv: &Kv,
        out: &mut Tensor,
    ) -> Result<()> {
        (self.before_attend)()?;
        self.inner.attend(heads, mask, step, qkv, kv, out)
    }

    fn gate(&self, activation: Activation, rows: usize, gate_up: &Tensor, out: &mut Tensor) -> Result<()> {
        self.inner.gate(activation, rows, gate_up, out)
    }

    fn select(&self, wanted: &LogitRows, step: &Step, x: &Tensor, out: &mut Tensor) -> Result<()> {
        self.inner.select(wanted, step, x, out)
    }

    fn all_reduce(&self, rows: usize, x: &mut Tensor) -> Result<()> {
        self.inner.all_reduce(rows, x)
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
}
