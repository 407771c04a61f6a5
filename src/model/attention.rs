//! The attention branch of a layer, by heads.

use super::branch::Output;
use super::names::{LayerRole, Role};
use super::spec::{DecoderSpec, HeadAttention, HeadNorm, Layer, Mask, Positions, Sinks};
use super::upload::Upload;
use super::workspace::Workspace;
use crate::backend::{Backend, Heads, KvRows, Product, Scores, Turn};
use crate::error::{Error, Result};

/// A rank's heads of one layer.
pub struct Attention<B: Backend> {
    /// On this rank.
    pub heads: Heads,
    mask: Mask,
    /// Queries, keys and values, one below the other.
    qkv: B::Weight,
    /// Of queries and of keys.
    norms: Option<(B::Norm, B::Norm)>,
    rope: Option<usize>,
    log_n: Option<u32>,
    scale: f32,
    softcap: Option<f32>,
    slopes: Option<B::Vector>,
    sinks: Option<B::Vector>,
    out: Output<B>,
}

impl<B: Backend> Attention<B> {
    /// Takes the layer's tensors to the device.
    pub fn load(
        upload: &Upload<B>,
        spec: &DecoderSpec,
        attention: &HeadAttention,
        number: usize,
        layer: &Layer,
    ) -> Result<Attention<B>> {
        use LayerRole::{
            AttentionPostNorm, Key, KeyBias, KeyNorm, OutputBias, Query, QueryBias, QueryNorm, Value,
            ValueBias,
        };
        let HeadAttention { head_dim, qkv_bias, out_bias, scale, softcap, log_n, .. } = *attention;
        let projection = |roles| upload.cut_outputs(number, spec.hidden, roles, qkv_bias);
        let parts =
            [projection((Query, QueryBias))?, projection((Key, KeyBias))?, projection((Value, ValueBias))?];
        let [queries, keys, values] = [0, 1, 2].map(|part: usize| parts[part].weight.rows.len());
        let heads = Heads { heads: queries / head_dim, kv_heads: keys / head_dim, head_dim };
        let whole_groups =
            heads.kv_heads > 0 && heads.heads > 0 && heads.heads.is_multiple_of(heads.kv_heads);
        if !whole_groups || queries != heads.query_width() || keys != heads.kv_width() || values != keys {
            return Err(Error::Checkpoint(format!(
                "layer {number}: {queries} rows of queries, {keys} of keys and {values} of values on rank {} of {} \
                 are no whole groups of heads of {head_dim}",
                upload.shard.rank, upload.shard.world
            )));
        }
        let norm = |role| {
            let kind = attention.qk_norm.map(HeadNorm::norm);
            kind.map(|kind| upload.layer_norm(kind, number, role)).transpose()
        };
        let norms = norm(QueryNorm)?.zip(norm(KeyNorm)?);
        let slopes = match spec.positions {
            Positions::Alibi => Some(own_slopes(upload, attention.heads, heads.heads)?),
            Positions::Rope(_) | Positions::Learned => None,
        };
        let sinks = match attention.sinks {
            Sinks::Absent => None,
            Sinks::Present => {
                let part = upload.part(Role::Layer(number, LayerRole::Sinks))?;
                Some(upload.backend.stored_vector(&part)?)
            }
        };
        let out =
            upload.cut_inputs(number, heads.query_width(), (LayerRole::Output, OutputBias), out_bias)?;
        Ok(Attention {
            heads,
            mask: layer.mask,
            qkv: upload.backend.weight(&parts, 1.0)?,
            norms,
            rope: (!spec.ropes().is_empty()).then_some(layer.rope),
            log_n,
            scale,
            softcap,
            slopes,
            sinks,
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
        let turn = Turn {
            norms: self.norms.as_ref().map(|(of_queries, of_keys)| (of_queries, of_keys)),
            rope: self.rope,
            log_n: self.log_n,
        };
        let scores = Scores {
            scale: self.scale,
            softcap: self.softcap,
            mask: self.mask,
            slopes: self.slopes.as_ref(),
            sinks: self.sinks.as_ref(),
        };
        let room = ws.attention.heads()?;
        backend.linear(&self.qkv, rows, &ws.normed, &mut room.qkv)?;
        backend.rope_store(self.heads, &turn, step, &mut room.qkv, kv)?;
        backend.attend(self.heads, &scores, step, &room.qkv, kv, &mut room.attended)?;
        self.out.add(backend, rows, &room.attended, &mut ws.branch, &mut ws.residual)
    }

    /// What a slot holds in this layer.
    pub fn kv_rows(&self) -> KvRows {
        KvRows::KeysValues { width: self.heads.kv_width() }
    }

    /// The layers by name, and what becomes of their products.
    pub fn products(&self) -> Vec<(&'static str, &B::Weight, Product)> {
        let (out, product) = self.out.product();
        vec![("qkv", &self.qkv, Product::Stored), ("out", out, product)]
    }
}

/// The slopes of a rank's heads, which follow from their numbers in the whole layer.
fn own_slopes<B: Backend>(upload: &Upload<B>, all: usize, own: usize) -> Result<B::Vector> {
    let slopes = alibi_slopes(all);
    let first = upload.shard.rank * own;
    let own = slopes.get(first..first + own);
    upload.backend.vector(own.ok_or_else(|| Error::Bug(format!("heads from {first} on of {all}")))?)
}

/// The slopes of all heads (Press et al., arXiv 2108.12409, and its code for numbers of heads that are no power of
/// two): with `p` the largest power of two up to `heads`, head `k = 1 … p` has `2^(−8k/p)`, and of the others the
/// `j`th has `2^(−8(2j−1)/(2p))`.
pub fn alibi_slopes(heads: usize) -> Vec<f32> {
    let p = if heads == 0 { 0 } else { 1usize << heads.ilog2() };
    let slope = |exponent: f64| (-8.0 * exponent).exp2() as f32;
    let first = (1..=p).map(|k| slope(k as f64 / p as f64));
    let rest = (1..=heads - p).map(|j| slope((2 * j - 1) as f64 / (2 * p) as f64));
    first.chain(rest).collect()
}

#[cfg(test)]
mod tests {
    use super::alibi_slopes;

    /// As the published code gives them.
    #[test]
    fn slopes_of_any_number_of_heads() {
        assert_eq!(alibi_slopes(8), [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]);
        let six = alibi_slopes(6);
        let expected = [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125];
        assert!(six.iter().zip(expected).all(|(slope, expected)| (slope - expected).abs() < 1e-7), "{six:?}");
        let forty = alibi_slopes(40);
        let exponents = [(0, 0.25), (1, 0.5), (31, 8.0), (32, 0.125), (33, 0.375), (39, 1.875)];
        for (head, exponent) in exponents {
            assert!((f64::from(forty[head]).log2() + exponent).abs() < 1e-6, "head {head}");
        }
        assert_eq!((alibi_slopes(1), alibi_slopes(0)), (vec![0.00390625], vec![]));
    }
}
