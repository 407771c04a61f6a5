//! A rank's parts of the weights, taken to its device.

use std::cell::Cell;

use super::Parts;
use super::names::{self, LayerRole, MlpRole, Role};
use super::partition::Shard;
use super::spec::{Bias, DecoderSpec, Norm};
use super::weights::TensorPart;
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

    /// A norm over `width` numbers; `bias` is its role, where the kind has one.
    pub fn norm(&self, kind: Norm, width: usize, weight: Role, bias: Role) -> Result<B::Norm> {
        let part = self.part(weight)?;
        if part.n_elements() != width {
            let text = format!("a norm of {} weights over {width} numbers ({weight:?})", part.n_elements());
            return Err(Error::Checkpoint(text));
        }
        let bias = (kind.bias() == Bias::Present).then(|| self.part(bias)).transpose()?;
        self.backend.norm_weight(kind, &part, bias.as_ref())
    }

    /// A norm without a bias in a layer, over the last dimension of its weight.
    pub fn layer_norm(&self, kind: Norm, layer: usize, weight: LayerRole) -> Result<B::Norm> {
        self.backend.norm_weight(kind, &self.part(Role::Layer(layer, weight))?, None)
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

    /// The only block of a layer whose inputs are cut: the ranks' outputs are summed, so rank 0 alone adds the bias.
    pub fn cut_inputs(
        &self,
        layer: usize,
        inputs: usize,
        (weight, bias): (LayerRole, LayerRole),
        has_bias: Bias,
    ) -> Result<LinearPart> {
        let bias = (has_bias == Bias::Present && self.shard.rank == 0).then_some(Role::Layer(layer, bias));
        self.linear_part(inputs, Role::Layer(layer, weight), bias)
    }
}

/// Bytes of a part.
fn bytes(part: &TensorPart) -> u64 {
    (part.n_elements() * part.tensor.dtype.size_bytes()) as u64
}

/// Bytes of a rank's parts of all tensors that [`super::decoder::Decoder::load`] takes.
pub fn total_bytes(parts: &Parts, spec: &DecoderSpec, shard: Shard) -> Result<u64> {
    let taken = names::roles(spec).into_iter().filter(|role| shard.rank == 0 || !is_of_rank_0(*role));
    taken.map(|role| Ok(bytes(&parts(role, shard)?))).sum()
}

/// Whether rank 0 alone takes it: what is added to a sum over the ranks is added once.
fn is_of_rank_0(role: Role) -> bool {
    use LayerRole::{Expert, Mlp, OutputBias, SharedExpert};
    let Role::Layer(_, role) = role else { return false };
    let (Mlp(in_mlp) | Expert(_, in_mlp) | SharedExpert(in_mlp)) = role else { return role == OutputBias };
    in_mlp == MlpRole::DownBias
}
