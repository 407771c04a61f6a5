//! A rank's parts of the weights, taken to its device.

use std::cell::Cell;

use super::Parts;
use super::names::{LayerRole, Role};
use super::partition::Shard;
use super::spec::{Bias, DecoderSpec, Head, Mlp, Norm};
use super::weights::TensorPart;
use crate::backend::cpu::stored::size_of_dtype;
use crate::backend::{Backend, LinearPart};
use crate::error::{Error, Result};

/// Takes tensors from the checkpoint to one rank's device.
pub struct Upload<'a, B: Backend> {
    /// The rank's device.
    pub backend: &'a B,
    /// The rank.
    pub shard: Shard,
    parts: &'a Parts,
    report: &'a dyn Fn(u64),
    n_bytes: Cell<u64>,
}

impl<'a, B: Backend> Upload<'a, B> {
    /// `report` hears of the bytes of each tensor.
    pub fn new(backend: &'a B, shard: Shard, parts: &'a Parts, report: &'a dyn Fn(u64)) -> Upload<'a, B> {
        Upload { backend, shard, parts, report, n_bytes: Cell::new(0) }
    }

    /// Bytes taken so far.
    pub fn n_bytes(&self) -> u64 {
        self.n_bytes.get()
    }

    /// This rank's part of a tensor.
    pub fn part(&self, role: Role) -> Result<TensorPart> {
        let part = (self.parts)(role, self.shard)?;
        let bytes = bytes(&part);
        self.n_bytes.set(self.n_bytes.get() + bytes);
        (self.report)(bytes);
        Ok(part)
    }

    /// A norm over `width` numbers.
    pub fn norm(&self, kind: Norm, width: usize, role: Role) -> Result<B::Norm> {
        let part = self.part(role)?;
        if part.rows.len() != width {
            let text = format!("a norm of {} weights over {width} numbers ({role:?})", part.rows.len());
            return Err(Error::Checkpoint(text));
        }
        self.backend.norm_weight(kind, &part)
    }

    /// One block of a linear layer over `inputs` numbers.
    pub fn linear_part(&self, inputs: usize, weight: Role, bias: Option<Role>) -> Result<LinearPart> {
        let part = self.part(weight)?;
        if part.columns.len() != inputs {
            let text = format!("{} columns for {inputs} inputs ({weight:?})", part.columns.len());
            return Err(Error::Checkpoint(text));
        }
        Ok(LinearPart { weight: part, bias: bias.map(|bias| self.part(bias)).transpose()? })
    }

    /// A block of a layer whose outputs are cut: every rank adds its part of the bias.
    pub fn cut_outputs(
        &self,
        layer: usize,
        inputs: usize,
        (weight, bias): (LayerRole, LayerRole),
        has_bias: Bias,
    ) -> Result<LinearPart> {
        let bias = (has_bias == Bias::Present).then_some(Role::Layer(layer, bias));
        self.linear_part(inputs, Role::Layer(layer, weight), bias)
    }

    /// A layer whose inputs are cut: the ranks' outputs are summed, so rank 0 alone adds the bias.
    pub fn cut_inputs(
        &self,
        layer: usize,
        inputs: usize,
        (weight, bias): (LayerRole, LayerRole),
        has_bias: Bias,
    ) -> Result<B::Weight> {
        let bias = (has_bias == Bias::Present && self.shard.rank == 0).then_some(Role::Layer(layer, bias));
        self.backend.weight(&[self.linear_part(inputs, Role::Layer(layer, weight), bias)?])
    }
}

/// Bytes of a part.
fn bytes(part: &TensorPart) -> u64 {
    (part.rows.len() * part.columns.len() * size_of_dtype(part.tensor.dtype)) as u64
}

/// Bytes of a rank's parts of all tensors that [`super::decoder::Decoder::load`] takes.
pub fn total_bytes(parts: &Parts, spec: &DecoderSpec, shard: Shard) -> Result<u64> {
    roles(spec, shard).into_iter().map(|role| Ok(bytes(&parts(role, shard)?))).sum()
}

/// The tensors that a rank takes.
fn roles(spec: &DecoderSpec, shard: Shard) -> Vec<Role> {
    use LayerRole::*;
    let Mlp::Gated { bias: mlp_bias, .. } = spec.mlp;
    let on_rank_0 = |bias| if shard.rank == 0 { bias } else { Bias::Absent };
    let biases: [(Bias, &[LayerRole]); 4] = [
        (spec.attention.qkv_bias, &[QueryBias, KeyBias, ValueBias]),
        (on_rank_0(spec.attention.out_bias), &[OutputBias]),
        (mlp_bias, &[GateBias, UpBias]),
        (on_rank_0(mlp_bias), &[DownBias]),
    ];
    let mut layer_roles = vec![AttentionNorm, Query, Key, Value, Output, MlpNorm, Gate, Up, Down];
    for (_, roles) in biases.iter().filter(|(bias, _)| *bias == Bias::Present) {
        layer_roles.extend_from_slice(roles);
    }
    let mut roles = vec![Role::Embedding, Role::FinalNorm];
    roles.extend((spec.head == Head::Untied).then_some(Role::Head));
    for layer in 0..spec.masks.len() {
        roles.extend(layer_roles.iter().map(|&role| Role::Layer(layer, role)));
    }
    roles
}
