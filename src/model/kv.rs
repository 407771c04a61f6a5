//! Where keys and values lie.

use crate::backend::{Backend, KvRows};
use crate::error::Result;

/// Keys and values of a rank, or latents, `[layers][slots][…]`: a slot is one token's place in every layer.
pub struct KvPool<B: Backend> {
    /// `[layers]`.
    pub layers: Vec<B::Kv>,
}

impl<B: Backend> KvPool<B> {
    /// Room for `n_slots` tokens, each with these rows in the layers.
    pub fn new(backend: &B, layers: impl Iterator<Item = KvRows>, n_slots: usize) -> Result<KvPool<B>> {
        let layers = layers.map(|rows| backend.kv(n_slots, rows));
        Ok(KvPool { layers: layers.collect::<Result<_>>()? })
    }
}
