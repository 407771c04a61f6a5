//! The attention branch of a layer.

use super::names::{LayerRole, Role};
use super::spec::{self, DecoderSpec, Mask};
use super::upload::Upload;
use super::workspace::Workspace;
use crate::backend::{Backend, Heads, Product};
use crate::error::{Error, Result};

/// A rank's heads of one layer.
pub struct Attention<B: Backend> {
    /// On this rank.
    pub heads: Heads,
    mask: Mask,
    norm: B::Norm,
    /// Queries, keys and values, one below the other.
    qkv: B::Weight,
    out: B::Weight,
}

impl<B: Backend> Attention<B> {
    /// Takes the layer's tensors to the device.
    pub fn load(upload: &Upload<B>, spec: &DecoderSpec, layer: usize) -> Result<Attention<B>> {
        use LayerRole::*;
        let spec::Attention { head_dim, qkv_bias, out_bias, .. } = spec.attention;
        let norm = upload.norm(spec.norm, spec.hidden, Role::Layer(layer, AttentionNorm))?;
        let projection = |roles| upload.cut_outputs(layer, spec.hidden, roles, qkv_bias);
        let parts =
            [projection((Query, QueryBias))?, projection((Key, KeyBias))?, projection((Value, ValueBias))?];
        let [queries, keys, values] = [0, 1, 2].map(|part: usize| parts[part].weight.rows.len());
        let heads = Heads { heads: queries / head_dim, kv_heads: keys / head_dim, head_dim };
        let whole_groups =
            heads.kv_heads > 0 && heads.heads > 0 && heads.heads.is_multiple_of(heads.kv_heads);
        if !whole_groups || queries != heads.query_width() || keys != heads.kv_width() || values != keys {
            return Err(Error::Checkpoint(format!(
                "layer {layer}: {queries} rows of queries, {keys} of keys and {values} of values on rank {} of {} \
                 are no whole groups of heads of {head_dim}",
                upload.shard.rank, upload.shard.world
            )));
        }
        Ok(Attention {
            heads,
            mask: spec.masks[layer],
            norm,
            qkv: upload.backend.weight(&parts)?,
            out: upload.cut_inputs(layer, heads.query_width(), (Output, OutputBias), out_bias)?,
        })
    }

    /// Adds the branch to the residual stream.
    pub fn forward(
        &self,
        backend: &B,
        rows: usize,
        step: &B::Step,
        kv: &mut B::Kv,
        ws: &mut Workspace<B>,
    ) -> Result<()> {
        backend.norm(&self.norm, rows, &ws.residual, &mut ws.normed)?;
        backend.linear(&self.qkv, rows, &ws.normed, &mut ws.qkv)?;
        backend.rope_store(self.heads, step, &mut ws.qkv, kv)?;
        backend.attend(self.heads, self.mask, step, &ws.qkv, kv, &mut ws.attended)?;
        backend.linear_add(&self.out, rows, &ws.attended, &mut ws.branch, &mut ws.residual)
    }

    /// The layers, and what becomes of their products.
    pub fn products(&self) -> [(&B::Weight, Product); 2] {
        [(&self.qkv, Product::Stored), (&self.out, Product::Added)]
    }
}
