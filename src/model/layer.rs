//! One layer: norms, attention, feed-forward part, and how they join the residual stream.

use super::attention::Attention;
use super::experts::Experts;
use super::latent::Latent;
use super::mlp::{Mlp, MlpShape};
use super::names::{LayerRole, Role};
use super::spec::{self, Block, DecoderSpec};
use super::upload::Upload;
use super::workspace::{AttentionWidth, ExpertsWidth, MlpWidth, Workspace};
use crate::backend::{Backend, KvRows, Product};
use crate::error::{Error, Result};

/// A rank's part of one layer.
pub struct Layer<B: Backend> {
    block: Block,
    attention_norm: B::Norm,
    attention: AnyAttention<B>,
    /// Where the MLP does not read what attention reads.
    mlp_norm: Option<B::Norm>,
    mlp: AnyMlp<B>,
}

enum AnyAttention<B: Backend> {
    Heads(Attention<B>),
    Latent(Latent<B>),
}

enum AnyMlp<B: Backend> {
    One(Mlp<B>),
    Experts(Experts<B>),
}

/// A linear layer, and what becomes of its products. Those of one name and one MLP's width have the same shape in all
/// layers.
pub struct NamedProduct<'a, B: Backend> {
    /// What it is called, and the width of the MLP that it is of.
    pub shape: (&'static str, Option<MlpWidth>),
    /// The layer.
    pub weight: &'a B::Weight,
    /// What becomes of its products.
    pub product: Product,
}

impl<B: Backend> Layer<B> {
    /// Takes the layer's tensors to the device.
    pub fn load(upload: &Upload<B>, spec: &DecoderSpec, number: usize) -> Result<Layer<B>> {
        use LayerRole::{AttentionNorm, AttentionNormBias, MlpNorm, MlpNormBias};
        let layer = spec.layers.get(number).ok_or_else(|| Error::Bug(format!("no layer {number}")))?;
        let norm = |weight, bias| {
            upload.norm(spec.norm, spec.hidden, Role::Layer(number, weight), Role::Layer(number, bias))
        };
        let attention_norm = norm(AttentionNorm, AttentionNormBias)?;
        let attention = match &spec.attention {
            spec::Attention::Heads(heads) => {
                AnyAttention::Heads(Attention::load(upload, spec, heads, number, layer)?)
            }
            spec::Attention::Latent(latent) => {
                AnyAttention::Latent(Latent::load(upload, spec, latent, number, layer)?)
            }
        };
        let mlp_norm = match spec.block {
            Block::ParallelOneNorm => None,
            Block::Serial | Block::SerialPostNorms | Block::ParallelTwoNorms => {
                Some(norm(MlpNorm, MlpNormBias)?)
            }
        };
        let one =
            |shape| Ok::<_, Error>(AnyMlp::One(Mlp::load(upload, spec, number, shape, LayerRole::Mlp)?));
        let mlp = match layer.mlp {
            spec::Mlp::Gated { activation, bias, .. } => one(MlpShape { activation, bias, gated: true })?,
            spec::Mlp::Plain { activation, bias, .. } => one(MlpShape { activation, bias, gated: false })?,
            spec::Mlp::Experts(experts) => AnyMlp::Experts(Experts::load(upload, spec, &experts, number)?),
        };
        Ok(Layer { block: spec.block, attention_norm, attention, mlp_norm, mlp })
    }

    /// Adds both branches to the residual stream.
    pub fn forward(
        &self,
        backend: &B,
        rows: usize,
        step: &B::Step,
        kv: &mut B::Kv,
        ws: &mut Workspace<B>,
    ) -> Result<()> {
        backend.norm(&self.attention_norm, rows, &ws.residual, &mut ws.normed)?;
        match (self.block, &self.mlp_norm) {
            (Block::Serial | Block::SerialPostNorms, Some(norm)) => {
                self.add_attention(backend, rows, step, kv, ws)?;
                backend.norm(norm, rows, &ws.residual, &mut ws.normed)?;
            }
            (Block::ParallelTwoNorms, Some(norm)) => {
                if let Some(normed) = &mut ws.normed_for_mlp {
                    backend.norm(norm, rows, &ws.residual, normed)?;
                }
                self.add_attention(backend, rows, step, kv, ws)?;
            }
            _ => self.add_attention(backend, rows, step, kv, ws)?,
        }
        match &self.mlp {
            AnyMlp::One(mlp) => mlp.add(backend, rows, ws),
            AnyMlp::Experts(experts) => experts.add(backend, rows, ws),
        }
    }

    fn add_attention(
        &self,
        backend: &B,
        rows: usize,
        step: &B::Step,
        kv: &mut B::Kv,
        ws: &mut Workspace<B>,
    ) -> Result<()> {
        match &self.attention {
            AnyAttention::Heads(attention) => attention.add(backend, rows, step, kv, ws),
            AnyAttention::Latent(attention) => attention.add(backend, rows, step, kv, ws),
        }
    }

    /// What a slot holds in this layer.
    pub fn kv_rows(&self) -> KvRows {
        match &self.attention {
            AnyAttention::Heads(attention) => attention.kv_rows(),
            AnyAttention::Latent(attention) => attention.kv_rows(),
        }
    }

    /// What its attention needs.
    pub fn attention_width(&self) -> AttentionWidth {
        match &self.attention {
            AnyAttention::Heads(attention) => AttentionWidth::Heads(attention.heads),
            AnyAttention::Latent(attention) => AttentionWidth::Latent(*attention.attention()),
        }
    }

    /// The width of its MLP, or of the one that every token passes beside its experts.
    pub fn mlp_width(&self) -> Option<MlpWidth> {
        match &self.mlp {
            AnyMlp::One(mlp) => Some(mlp.width),
            AnyMlp::Experts(experts) => experts.shared().map(|shared| shared.width),
        }
    }

    /// The width of its experts, where it has any.
    pub fn experts_width(&self) -> Option<ExpertsWidth> {
        match &self.mlp {
            AnyMlp::One(_) => None,
            AnyMlp::Experts(experts) => Some(experts.width),
        }
    }

    /// The linear layers, but for those of experts, which run together.
    pub fn products(&self) -> Vec<NamedProduct<'_, B>> {
        let of_attention = match &self.attention {
            AnyAttention::Heads(attention) => attention.products(),
            AnyAttention::Latent(attention) => attention.products(),
        };
        let mlp = match &self.mlp {
            AnyMlp::One(mlp) => Some(mlp),
            AnyMlp::Experts(experts) => experts.shared(),
        };
        let named =
            |width| move |(name, weight, product)| NamedProduct { shape: (name, width), weight, product };
        let of_mlp = mlp.into_iter().flat_map(|mlp| mlp.products().into_iter().map(named(Some(mlp.width))));
        of_attention.into_iter().map(named(None)).chain(of_mlp).collect()
    }
}
