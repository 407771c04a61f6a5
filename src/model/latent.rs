//! The attention branch of a layer, over a latent: the absorbed form of DeepSeek-V2 (arXiv 2405.04434, appendix C).
//!
//! A key is linear in the latent, `k_nope = W_k · l`, so `q_nope · k_nope = (W_kᵀ · q_nope) · l`: queries are taken to
//! the latent's space, and every head attends to the cached rows `[l｜k_rope]` as to one KV head. What it sums of the
//! latents becomes its value, `W_v · Σ p · l`.

use super::branch::Output;
use super::names::{LayerRole, Role};
use super::spec::{Bias, DecoderSpec, LatentAttention, Layer, Mask};
use super::upload::Upload;
use super::workspace::Workspace;
use crate::backend::{Backend, Heads, KvRows, Product};
use crate::error::{Error, Result};

/// A rank's heads of one layer.
pub struct Latent<B: Backend> {
    /// With the heads of this rank.
    attention: LatentAttention,
    mask: Mask,
    /// To the latent of the queries, and its norm.
    query_down: Option<(B::Weight, B::Norm)>,
    query: B::Weight,
    /// To latent and turning key, one below the other.
    kv_down: B::Weight,
    kv_norm: B::Norm,
    /// `W_kᵀ` of each head.
    key_up: B::HeadWeight,
    /// `W_v` of each head.
    value_up: B::HeadWeight,
    out: Output<B>,
}

impl<B: Backend> Latent<B> {
    /// Takes the layer's tensors to the device.
    pub fn load(
        upload: &Upload<B>,
        spec: &DecoderSpec,
        attention: &LatentAttention,
        number: usize,
        layer: &Layer,
    ) -> Result<Latent<B>> {
        use LayerRole::{
            AttentionPostNorm, KeyUp, KvDown, KvDownNorm, OutputBias, Query, QueryDown, QueryDownNorm,
            ValueUp,
        };
        let LatentAttention { query_rank, kv_rank, nope_dim, value_dim, norm, .. } = *attention;
        let whole = |inputs, role| {
            let part = upload.linear_part(inputs, Role::Layer(number, role), None)?;
            upload.backend.weight(&[part], 1.0)
        };
        let query_down = match query_rank {
            Some(_) => {
                Some((whole(spec.hidden, QueryDown)?, upload.layer_norm(norm, number, QueryDownNorm)?))
            }
            None => None,
        };
        let query =
            upload.linear_part(query_rank.unwrap_or(spec.hidden), Role::Layer(number, Query), None)?;
        let heads = query.weight.rows.len() / attention.query_dim();
        let (key_up, value_up) =
            (upload.part(Role::Layer(number, KeyUp))?, upload.part(Role::Layer(number, ValueUp))?);
        let rows = (query.weight.rows.len(), key_up.rows.len(), value_up.rows.len());
        if heads == 0 || rows != (heads * attention.query_dim(), heads * nope_dim, heads * value_dim) {
            return Err(Error::Checkpoint(format!(
                "layer {number}: {} rows of queries, {} of keys and {} of values on rank {} of {} are no whole heads",
                rows.0, rows.1, rows.2, upload.shard.rank, upload.shard.world
            )));
        }
        let keys: Vec<_> = (0..heads)
            .map(|head| key_up.cut_rows(head * nope_dim..(head + 1) * nope_dim).transposed())
            .collect();
        let values: Vec<_> =
            (0..heads).map(|head| value_up.cut_rows(head * value_dim..(head + 1) * value_dim)).collect();
        let out =
            upload.cut_inputs(number, heads * value_dim, (LayerRole::Output, OutputBias), Bias::Absent)?;
        Ok(Latent {
            attention: LatentAttention { heads, kv_rank, ..*attention },
            mask: layer.mask,
            query_down,
            query: upload.backend.weight(&[query], 1.0)?,
            kv_down: whole(spec.hidden, KvDown)?,
            kv_norm: upload.layer_norm(norm, number, KvDownNorm)?,
            key_up: upload.backend.head_weight(&keys)?,
            value_up: upload.backend.head_weight(&values)?,
            out: Output::load(upload, spec, number, out, AttentionPostNorm)?,
        })
    }

    /// Adds the branch to the residual stream; reads [`Workspace::normed`].
    pub fn add(
        &self,
        backend: &B,
        rows: usize,
        step: &B::Step,
        kv: &mut B::Kv,
        ws: &mut Workspace<B>,
    ) -> Result<()> {
        let room = ws.attention.latent()?;
        match (&self.query_down, &mut room.query_latent) {
            (Some((down, norm)), Some((query_down, query_latent))) => {
                backend.linear(down, rows, &ws.normed, query_down)?;
                backend.norm(norm, rows, query_down, query_latent)?;
                backend.linear(&self.query, rows, query_latent, &mut room.queries)?;
            }
            _ => backend.linear(&self.query, rows, &ws.normed, &mut room.queries)?,
        }
        backend.linear(&self.kv_down, rows, &ws.normed, &mut room.latents)?;
        backend.linear_heads(&self.key_up, rows, &room.queries, &mut room.absorbed)?;
        let attention = &self.attention;
        let norm = &self.kv_norm;
        backend.store_latent(attention, norm, step, &room.queries, &mut room.absorbed, &room.latents, kv)?;
        backend.attend_latent(attention, self.mask, step, &room.absorbed, kv, &mut room.summed)?;
        backend.linear_heads(&self.value_up, rows, &room.summed, &mut room.attended)?;
        self.out.add(backend, rows, &room.attended, &mut ws.branch, &mut ws.residual)
    }

    /// With the heads of this rank.
    pub fn attention(&self) -> &LatentAttention {
        &self.attention
    }

    /// The cached rows as one KV head.
    pub fn heads(&self) -> Heads {
        Heads { heads: self.attention.heads, kv_heads: 1, head_dim: self.attention.row_width() }
    }

    /// What a slot holds in this layer.
    pub fn kv_rows(&self) -> KvRows {
        KvRows::Latent { width: self.attention.row_width() }
    }

    /// The layers by name, and what becomes of their products.
    pub fn products(&self) -> Vec<(&'static str, &B::Weight, Product)> {
        let down = self.query_down.as_ref().map(|(weight, _)| ("query down", weight, Product::Stored));
        let (out, product) = self.out.product();
        let rest = [
            ("query", &self.query, Product::Stored),
            ("kv down", &self.kv_down, Product::Stored),
            ("out", out, product),
        ];
        down.into_iter().chain(rest).collect()
    }
}
