//! Tensor name → role → a rank's part of it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::checkpoint::{Checkpoint, DType, StoredTensor};
use super::layout::Stack;
use super::names::{LayerRole, Names, Role, roles};
pub use super::part::TensorPart;
use super::partition::{Cut, Partition, Shard};
use super::spec::{DecoderSpec, Head};
use crate::error::{Error, Result};

/// A checkpoint that fits a spec: every tensor is there, in the right shape, and no other.
#[derive(Debug, Clone)]
pub struct Weights {
    spec: DecoderSpec,
    /// Each role as a whole.
    roles: BTreeMap<Role, TensorPart>,
}

impl Weights {
    /// Finds and checks every tensor of a spec. Reads no weights.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for the first tensor that is missing, misshapen, of an unknown dtype, or unexpected.
    pub fn open(checkpoint: &Checkpoint, spec: &DecoderSpec, names: &Names) -> Result<Weights> {
        let mut search = Search { checkpoint, spec, names, found: BTreeSet::new() };
        let wanted = roles(spec).into_iter();
        let roles = wanted.map(|role| Ok((role, search.role(role)?))).collect::<Result<_>>()?;
        let found = search.found;
        // Files of tied models may hold a copy of the embedding under the head's name.
        let copied_heads = if spec.head == Head::Tied { names.of(spec, Role::Head, 0) } else { Vec::new() };
        let known = |name: &str| {
            found.contains(name)
                || (names.ignores)(spec, name)
                || copied_heads.iter().any(|head| head == name)
        };
        match checkpoint.names().find(|name| !known(name)) {
            None => Ok(Weights { spec: spec.clone(), roles }),
            Some(name) => Err(Error::Checkpoint(format!(
                "tensor {name} has no place in a {} decoder of {} layers with this config",
                spec.family,
                spec.layers()
            ))),
        }
    }

    /// What of a role a rank holds; [`Role::Head`] is the embedding where they are tied. Biases of row-cut weights
    /// ([`LayerRole::OutputBias`], [`super::names::MlpRole::DownBias`]) are whole on every rank and added by rank 0 alone.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the spec does not divide among the ranks, [`Error::Bug`] for a role that the spec does
    /// not have.
    pub fn part(&self, role: Role, shard: Shard) -> Result<TensorPart> {
        let stored = if role == Role::Head && self.spec.head == Head::Tied { Role::Embedding } else { role };
        let whole = self
            .roles
            .get(&stored)
            .ok_or_else(|| Error::Bug(format!("a {} decoder has no {role:?}", self.spec.family)))?;
        part_of_rank(whole, stored, &self.spec, shard)
    }

    /// Bytes of all tensors as stored, but for what has no role.
    pub fn bytes(&self) -> u64 {
        let bytes = |part: &TensorPart| (part.n_elements() * part.tensor.dtype.size_bytes()) as u64;
        self.roles.values().map(bytes).sum()
    }

    /// The dtype of the linear weights, by the first layer's query; norms may be stored in another.
    pub fn dtype(&self) -> DType {
        let query = self.roles.get(&Role::Layer(0, LayerRole::Query)).or(self.roles.get(&Role::Embedding));
        query.map_or(DType::F32, |part| part.tensor.dtype)
    }

    /// The spec that they were checked against.
    pub fn spec(&self) -> &DecoderSpec {
        &self.spec
    }
}

/// What a rank holds of a role.
///
/// # Errors
/// [`Error::Invalid`] when the spec does not divide among the ranks.
pub(super) fn part_of_rank(
    whole: &TensorPart,
    role: Role,
    spec: &DecoderSpec,
    shard: Shard,
) -> Result<TensorPart> {
    let part = Partition::new(spec, shard)?;
    let (n_rows, n_columns) = (whole.rows.len(), whole.columns.len());
    let (n_heads, n_kv_heads) = (spec.attention.heads(), spec.attention.kv_heads());
    // `n` numbers belong to `all` heads in order.
    let of_heads = |n: usize, heads: Range<usize>, all: usize| {
        let each = n / all.max(1);
        heads.start * each..heads.end * each
    };
    let (mut rows, mut columns) = (0..n_rows, 0..n_columns);
    match role.cut(spec) {
        Cut::Whole => {}
        Cut::VocabRows => rows = part.vocab,
        Cut::HeadRows => rows = of_heads(n_rows, part.heads, n_heads),
        Cut::KvHeadRows => rows = of_heads(n_rows, part.kv_heads, n_kv_heads),
        Cut::HeadColumns => columns = of_heads(n_columns, part.heads, n_heads),
        Cut::NeuronRows => rows = part.neurons(n_rows)?,
        Cut::NeuronColumns => columns = part.neurons(n_columns)?,
    }
    Ok(whole.cut(rows, columns))
}

/// Roles to be found in a checkpoint.
struct Search<'a> {
    checkpoint: &'a Checkpoint,
    spec: &'a DecoderSpec,
    names: &'a Names,
    /// Names of the tensors that have a role.
    found: BTreeSet<String>,
}

impl Search<'_> {
    /// Where a role lies, checked against its shape.
    fn role(&mut self, role: Role) -> Result<TensorPart> {
        let place = (self.names.place)(self.spec, role);
        let shape = role.shape(self.spec);
        let stored = place.stored_shape(&shape);
        let tensor = match place.stack() {
            Stack::One | Stack::OfExperts(_) => self.tensor(role, 0, &stored)?,
            Stack::ByHead => {
                let n = shape.first().copied().unwrap_or(0);
                let rows: Vec<StoredTensor> =
                    (0..n).map(|head| self.tensor(role, head, &stored)).collect::<Result<_>>()?;
                StoredTensor::stacked(&rows, shape.clone())?
            }
        };
        let view = place.view(&shape, role.is_norm_per_head(self.spec), role.expert())?;
        Ok(TensorPart::view(tensor, view))
    }

    /// The tensor under the first of a role's names that the checkpoint has.
    fn tensor(&mut self, role: Role, head: usize, expected: &[usize]) -> Result<StoredTensor> {
        let names = self.names.of(self.spec, role, head);
        for name in &names {
            let Some(tensor) = self.checkpoint.tensor(name)? else { continue };
            if tensor.shape != expected {
                let shape = tensor.shape;
                return Err(Error::Checkpoint(format!(
                    "tensor {name} has the shape {shape:?}, expected {expected:?}"
                )));
            }
            self.found.insert(name.clone());
            return Ok(tensor);
        }
        match names.first() {
            Some(usual) => Err(Error::Checkpoint(format!("tensor {usual} is missing"))),
            None => Err(Error::Bug(format!("a {} checkpoint has no place for {role:?}", self.spec.family))),
        }
    }
}

#[cfg(test)]
mod tests;
