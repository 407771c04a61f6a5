//! Where keys and values lie.

use super::attention::Attention;
use crate::backend::Backend;
use crate::error::Result;

/// Keys and values of a rank, `[layers][slots][kv_heads · head_dim]`: a slot is one token's place in every layer.
pub struct KvPool<B: Backend> {
    /// `[layers]`.
    pub layers: Vec<B::Kv>,
}

impl<B: Backend> KvPool<B> {
    /// Room for `n_slots` tokens.
    pub fn new<'a>(
        backend: &B,
        layers: impl Iterator<Item = &'a Attention<B>>,
        n_slots: usize,
    ) -> Result<KvPool<B>>
    where
        B: 'a,
    {
        let layers = layers.map(|layer| backend.kv(n_slots, layer.heads.kv_width()));
        Ok(KvPool { layers: layers.collect::<Result<_>>()? })
    }
}
