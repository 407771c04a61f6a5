//! Random weights, for programs that measure and tests that compare.

use std::collections::BTreeMap;
use std::sync::Arc;

use rayon::prelude::*;

use super::{Backing, Checkpoint, DType, Entry};
use crate::error::{Error, Result};
use crate::model::layout::Stack;
use crate::model::names::{self, LayerRole, Names, Role};
use crate::model::spec::{Attention, DecoderSpec, HeadNorm};

/// Numbers that are not stored but made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Random {
    /// All the same.
    Constant(f32),
    /// Uniform in ±`reach`: number `i` of the tensor, row-major, is `reach` times [`signed_unit`] of `stream + i`.
    Uniform {
        /// The tensor's.
        stream: u64,
        /// Largest magnitude.
        reach: f32,
    },
}

impl Random {
    /// Those from number `first` of the tensor on.
    pub fn from(self, first: usize) -> Random {
        match self {
            Random::Constant(value) => Random::Constant(value),
            Random::Uniform { stream, reach } => {
                Random::Uniform { stream: stream.wrapping_add(first as u64), reach }
            }
        }
    }
}

impl Checkpoint {
    /// Random weights under the names and shapes of a spec, the same for the same seed: norms are 1, biases 0, and a
    /// linear weight is uniform with the variance `1 / in`, so that activations keep their scale.
    ///
    /// # Errors
    /// [`Error::Exhausted`] when they do not fit in memory.
    pub fn dummy(spec: &DecoderSpec, names: &Names, dtype: DType, seed: u64) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint::dummy_unmade(spec, names, dtype, seed);
        for entry in checkpoint.tensors.values_mut() {
            if let Some(random) = entry.random.take() {
                let bytes = random_bytes(random, entry.shape.iter().product(), dtype)?;
                (entry.range, entry.file) = (0..bytes.len(), Arc::new(bytes));
            }
        }
        Ok(checkpoint)
    }

    /// The weights of [`Checkpoint::dummy`], for a device that makes them itself.
    pub fn dummy_unmade(spec: &DecoderSpec, names: &Names, dtype: DType, seed: u64) -> Checkpoint {
        let mut tensors = BTreeMap::new();
        for (number, role) in names::roles(spec).into_iter().enumerate() {
            let place = (names.place)(spec, role);
            let shape = role.shape(spec);
            let random = match (neutral(spec, role), shape.get(1)) {
                (None, Some(&columns)) => Random::Uniform {
                    stream: mix(seed ^ mix(number as u64)),
                    // Uniform in ±a has the variance a²/3.
                    reach: (3.0 / columns as f32).sqrt(),
                },
                (neutral, _) => Random::Constant(neutral.unwrap_or(0.0)),
            };
            let n_tensors = if place.stack() == Stack::ByHead { shape[0] } else { 1 };
            for head in 0..n_tensors {
                let Some(name) = names.of(spec, role, head).into_iter().next() else { continue };
                // Roles of one fused tensor have one scale: that of the first.
                tensors.entry(name).or_insert_with(|| {
                    let shape = place.stored_shape(&shape);
                    let file: Backing = Arc::new(Vec::new());
                    Entry {
                        dtype: dtype.into(),
                        shape,
                        strides: None,
                        file,
                        range: 0..0,
                        random: Some(random),
                    }
                });
            }
        }
        Checkpoint { tensors }
    }
}

/// The weight that does nothing, of a role that is a norm.
fn neutral(spec: &DecoderSpec, role: Role) -> Option<f32> {
    let norm = match (role, spec.attention) {
        (Role::Layer(_, LayerRole::QueryNorm | LayerRole::KeyNorm), Attention::Heads(heads)) => {
            heads.qk_norm.map(HeadNorm::norm)
        }
        (Role::Layer(_, LayerRole::QueryDownNorm | LayerRole::KvDownNorm), Attention::Latent(latent)) => {
            Some(latent.norm)
        }
        (Role::EmbeddingNorm, _) => spec.embedding.norm,
        _ => Some(spec.norm),
    };
    norm.filter(|_| role.is_norm()).map(|norm| norm.neutral())
}

/// One dummy tensor, little-endian.
fn random_bytes(random: Random, n: usize, dtype: DType) -> Result<Vec<u8>> {
    const CHUNK: usize = 1 << 16;
    let n_bytes = n * dtype.size_bytes();
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(n_bytes)
        .map_err(|_| Error::Exhausted(format!("no memory for a dummy tensor of {n_bytes} bytes")))?;
    bytes.resize(n_bytes, 0);
    let size = dtype.size_bytes();
    bytes.par_chunks_mut(CHUNK * size).enumerate().for_each(|(chunk, bytes)| {
        for (i, number) in bytes.chunks_exact_mut(size).enumerate() {
            let value = match random {
                Random::Uniform { stream, reach } => {
                    reach * signed_unit(stream.wrapping_add((chunk * CHUNK + i) as u64))
                }
                Random::Constant(value) => value,
            };
            match dtype {
                DType::F32 => number.copy_from_slice(&value.to_le_bytes()),
                DType::F16 => number.copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
                DType::BF16 => number.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
            }
        }
    });
    Ok(bytes)
}

/// A number in [−1, 1), a function of the counter.
pub fn signed_unit(counter: u64) -> f32 {
    (mix(counter) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// One output of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), counter in, number out.
fn mix(counter: u64) -> u64 {
    let mut z = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
