//! A model of random numbers.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::OPTIONS;
use crate::backend::cpu::Cpu;
use crate::backend::random::philox;
use crate::error::Result;
use crate::model::checkpoint::{DType, StoredTensor};
use crate::model::executor::Executor;
use crate::model::leader::{Leader, Open};
use crate::model::names::{Role, roles};
use crate::model::partition::Shard;
use crate::model::spec::{DecoderSpec, Norm};
use crate::model::weights::{TensorPart, part_of_rank};
use crate::model::{Options, load};

/// A tensor for every role of a spec.
pub struct Random {
    spec: DecoderSpec,
    tensors: BTreeMap<Role, StoredTensor>,
}

impl Random {
    pub fn new(spec: DecoderSpec, seed: u32, dtype: DType) -> Random {
        spec.check().unwrap();
        let tensor = |(index, role): (usize, Role)| {
            let shape = role.shape(&spec);
            let scale =
                if shape.len() == 2 && !role.is_norm() { 2.0 / (shape[1] as f32).sqrt() } else { 0.5 };
            let neutral = if let Norm::RmsOnePlus { .. } = spec.norm { 0.0 } else { 1.0 };
            let offset = if role.is_norm() { neutral } else { 0.0 };
            let number = |i: usize| {
                let word = philox([i as u32, index as u32, 0, 0], [seed, 0])[0];
                offset + (word as f32 / u32::MAX as f32 - 0.5) * 2.0 * scale
            };
            let numbers = (0..shape.iter().product()).map(number);
            let bytes = match dtype {
                DType::F32 => numbers.flat_map(|n| n.to_le_bytes()).collect(),
                DType::F16 => numbers.flat_map(|n| half::f16::from_f32(n).to_le_bytes()).collect(),
                DType::BF16 => numbers.flat_map(|n| half::bf16::from_f32(n).to_le_bytes()).collect(),
            };
            (role, StoredTensor::from_bytes(dtype, shape, bytes).unwrap())
        };
        let tensors = roles(&spec).into_iter().enumerate().map(tensor).collect();
        Random { spec, tensors }
    }

    pub fn part(&self, role: Role, shard: Shard) -> Result<TensorPart> {
        part_of_rank(&TensorPart::whole(self.tensors[&role].clone()), role, &self.spec, shard)
    }

    pub fn load(self: &Arc<Self>, n_ranks: usize) -> Box<dyn Executor> {
        let model = Arc::clone(self);
        let options = Options { n_ranks, ..OPTIONS };
        load(self.spec.clone(), move |role, shard| model.part(role, shard), options, &|_, _| {}).unwrap()
    }

    /// With rank 0 on this thread.
    pub fn load_led(self: &Arc<Self>, options: Options) -> Result<Leader<Cpu>> {
        let model = Arc::clone(self);
        let parts = Box::new(move |role, shard| model.part(role, shard));
        Leader::load(led(options.n_ranks), self.spec.clone(), parts, options, &|_, _| {})
    }
}

/// Ranks of a world, to be opened on threads of their own.
pub fn led(n_ranks: usize) -> Vec<Open<Cpu>> {
    Cpu::world(n_ranks).into_iter().map(|cpu| Box::new(move || Ok(cpu)) as Open<Cpu>).collect()
}
