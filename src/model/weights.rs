//! Tensor name → role → a rank's part of it.

use std::collections::BTreeMap;
use std::ops::Range;

use super::checkpoint::{Checkpoint, DType, StoredTensor};
use super::names::{LayerRole, Names, Role, roles};
use super::partition::{Cut, Partition, Shard};
use super::spec::{DecoderSpec, Head};
use crate::error::{Error, Result};

/// A rank's part of a stored tensor: a rectangle of it, seen in place. A vector is a matrix of one column.
#[derive(Debug, Clone)]
pub struct TensorPart {
    /// The whole tensor.
    pub tensor: StoredTensor,
    /// Rows (dimension 0) that the rank holds.
    pub rows: Range<usize>,
    /// Columns (dimension 1) that the rank holds.
    pub columns: Range<usize>,
}

/// A checkpoint that fits a spec: every tensor is there, in the right shape, and no other. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Weights {
    spec: DecoderSpec,
    tensors: BTreeMap<Role, StoredTensor>,
}

impl Weights {
    /// Finds and checks every tensor of a spec. Reads no weights.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for the first tensor that is missing, misshapen, of an unknown dtype, or unexpected.
    pub fn open(checkpoint: &Checkpoint, spec: &DecoderSpec, names: &Names) -> Result<Weights> {
        let mut tensors = BTreeMap::new();
        let mut found = std::collections::BTreeSet::new();
        for role in roles(spec) {
            let (name, tensor) = find(checkpoint, names, role)?;
            let expected = role.shape(spec);
            if tensor.shape != expected {
                let shape = tensor.shape;
                return Err(Error::Checkpoint(format!(
                    "tensor {name} has the shape {shape:?}, expected {expected:?}"
                )));
            }
            found.insert(name);
            tensors.insert(role, tensor);
        }
        // Files of tied models may hold a copy of the embedding under the head's name.
        let copied_head = (spec.head == Head::Tied).then_some(names.head);
        let unknown = checkpoint
            .names()
            .find(|&name| !found.contains(name) && !names.ignores(name) && Some(name) != copied_head);
        match unknown {
            None => Ok(Weights { spec: spec.clone(), tensors }),
            Some(name) => Err(Error::Checkpoint(format!(
                "tensor {name} has no place in a {} decoder of {} layers with this config",
                spec.family,
                spec.layers()
            ))),
        }
    }

    /// The rectangle of a role's tensor that a rank holds; [`Role::Head`] is the embedding where they are tied.
    /// Biases of row-cut weights ([`LayerRole::OutputBias`], [`LayerRole::DownBias`]) are whole on every rank and
    /// added by rank 0 alone.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the spec does not divide among the ranks, [`Error::Bug`] for a role that the spec does
    /// not have.
    pub fn part(&self, role: Role, shard: Shard) -> Result<TensorPart> {
        let stored = if role == Role::Head && self.spec.head == Head::Tied { Role::Embedding } else { role };
        let tensor = self
            .tensors
            .get(&stored)
            .ok_or_else(|| Error::Bug(format!("a {} decoder has no {role:?}", self.spec.family)))?;
        let part = Partition::new(&self.spec, shard)?;
        let head_dim = self.spec.attention.head_dim;
        let by_head = |heads: Range<usize>| heads.start * head_dim..heads.end * head_dim;
        let mut rows = 0..tensor.shape.first().copied().unwrap_or(1);
        let mut columns = 0..tensor.shape.get(1).copied().unwrap_or(1);
        match role.cut() {
            Cut::Whole => {}
            Cut::VocabRows => rows = part.vocab,
            Cut::HeadRows => rows = by_head(part.heads),
            Cut::KvHeadRows => rows = by_head(part.kv_heads),
            Cut::HeadColumns => columns = by_head(part.heads),
            Cut::NeuronRows => rows = part.neurons,
            Cut::NeuronColumns => columns = part.neurons,
        }
        Ok(TensorPart { tensor: tensor.clone(), rows, columns })
    }

    /// Bytes of all tensors as stored.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(|tensor| (tensor.n_elements() * tensor.dtype.size_bytes()) as u64).sum()
    }

    /// The dtype of the linear weights, by the first layer's query; norms may be stored in another.
    pub fn dtype(&self) -> DType {
        let query =
            self.tensors.get(&Role::Layer(0, LayerRole::Query)).or(self.tensors.get(&Role::Embedding));
        query.map_or(DType::F32, |tensor| tensor.dtype)
    }

    /// The spec that they were checked against.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }
}

/// A role's tensor under the first of its names that the checkpoint has.
fn find(checkpoint: &Checkpoint, names: &Names, role: Role) -> Result<(String, StoredTensor)> {
    for name in names.of(role) {
        if let Some(tensor) = checkpoint.tensor(&name)? {
            return Ok((name, tensor));
        }
    }
    Err(Error::Checkpoint(format!("tensor {} is missing", names.first(role))))
}

#[cfg(test)]
mod tests;
