//! The forward pass, once for every family and every backend.

use super::kv::KvPool;
use super::layer::{Layer, NamedProduct};
use super::names::Role;
use super::spec::{DecoderSpec, Head, Logits, Positions};
use super::upload::Upload;
use super::workspace::{MlpWidth, Widths, Workspace};
use crate::backend::{Backend, KvRows, LogitRows, Product, Tuned};
use crate::error::{Error, Result};

/// A rank's part of a decoder-only transformer.
pub struct Decoder<B: Backend> {
    embedding: B::Weight,
    embedding_multiplier: f32,
    /// Of positions, added to the embedding.
    positions: Option<B::Weight>,
    /// Of the embedded tokens.
    embedding_norm: Option<B::Norm>,
    layers: Vec<Layer<B>>,
    final_norm: B::Norm,
    /// Where it is not the embedding.
    head: Option<B::Weight>,
    logits: Logits,
    vocab_part: usize,
}

impl<B: Backend> Decoder<B> {
    /// Takes the rank's weights to its device.
    pub fn load(upload: &Upload<B>, spec: &DecoderSpec) -> Result<Decoder<B>> {
        let (backend, hidden) = (upload.backend, spec.hidden);
        let table = |role| upload.linear_part(hidden, role, None);
        let embedding = table(Role::Embedding)?;
        let head = match spec.head {
            Head::Tied => None,
            Head::Untied | Head::Normalised => Some(table(Role::Head)?),
        };
        let vocab_part = head.as_ref().unwrap_or(&embedding).weight.rows.len();
        let head = match (head, spec.head) {
            (Some(head), Head::Normalised) => Some(backend.normalised_weight(&head, 1.0)?),
            (head, _) => head.map(|head| backend.weight(&[head], 1.0)).transpose()?,
        };
        let positions = match spec.positions {
            Positions::Learned => Some(backend.weight(&[table(Role::Positions)?], 1.0)?),
            Positions::Rope(_) | Positions::Alibi => None,
        };
        let norm = |kind, weight, bias| upload.norm(kind, hidden, weight, bias);
        let embedding_norm = match spec.embedding.norm {
            Some(kind) => Some(norm(kind, Role::EmbeddingNorm, Role::EmbeddingNormBias)?),
            None => None,
        };
        Ok(Decoder {
            embedding: backend.weight(&[embedding], 1.0)?,
            embedding_multiplier: spec.embedding.multiplier,
            positions,
            embedding_norm,
            layers: (0..spec.layers())
                .map(|layer| Layer::load(upload, spec, layer))
                .collect::<Result<_>>()?,
            final_norm: norm(spec.norm, Role::FinalNorm, Role::FinalNormBias)?,
            head,
            logits: spec.logits,
            vocab_part,
        })
    }

    /// Widths of this rank's intermediates.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a decoder without layers, or with layers of different heads or experts.
    pub fn widths(&self, spec: &DecoderSpec) -> Result<Widths> {
        let Some(attention) = self.layers.first().map(Layer::attention_width) else {
            return Err(Error::Checkpoint("a decoder without layers".into()));
        };
        let mut mlps: Vec<MlpWidth> = Vec::new();
        let mut experts = None;
        for layer in &self.layers {
            mlps.extend(layer.mlp_width().filter(|width| !mlps.contains(width)));
            let of_layer = layer.experts_width();
            let alike = of_layer.is_none() || experts.is_none() || of_layer == experts;
            if layer.attention_width() != attention || !alike {
                return Err(Error::Checkpoint("layers of different widths".into()));
            }
            experts = experts.or(of_layer);
        }
        Ok(Widths {
            hidden: spec.hidden,
            attention,
            mlps,
            experts,
            two_norms: Widths::has_two_norms(spec),
            vocab_part: self.vocab_part,
            vocab: spec.vocab,
        })
    }

    /// What a slot holds in each layer.
    pub fn kv_rows(&self) -> impl Iterator<Item = KvRows> {
        self.layers.iter().map(Layer::kv_rows)
    }

    /// From tokens to the residual stream after the last layer, in [`Workspace::residual`]. `rows` is the step's number
    /// of tokens.
    pub fn forward(
        &self,
        backend: &B,
        rows: usize,
        step: &B::Step,
        kv: &mut KvPool<B>,
        ws: &mut Workspace<B>,
    ) -> Result<()> {
        let embedded = if self.embedding_norm.is_some() { &mut ws.branch } else { &mut ws.residual };
        backend.embed(&self.embedding, self.embedding_multiplier, step, embedded)?;
        backend.all_reduce(rows, embedded)?;
        if let Some(table) = &self.positions {
            backend.add_positions(table, step, embedded)?;
        }
        if let Some(norm) = &self.embedding_norm {
            backend.norm(norm, rows, &ws.branch, &mut ws.residual)?;
        }
        for (layer, kv) in self.layers.iter().zip(&mut kv.layers) {
            layer.forward(backend, rows, step, kv, ws)?;
        }
        Ok(())
    }

    /// The layers whose speed matters, by shape: those of every layer with these numbers of rows, and the head's with
    /// those of logits.
    pub fn tuned(&self, rows: &[usize], logit_rows: &[usize]) -> Vec<Tuned<'_, B>> {
        let mut tuned: Vec<Tuned<'_, B>> = Vec::new();
        let mut shapes = Vec::new();
        for layer in &self.layers {
            for NamedProduct { shape, weight, product } in layer.products() {
                match shapes.iter().position(|known| *known == shape) {
                    Some(number) => tuned[number].weights.push(weight),
                    None => {
                        shapes.push(shape);
                        tuned.push(Tuned { weights: vec![weight], product, rows: rows.to_vec() });
                    }
                }
            }
        }
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        tuned.push(Tuned { weights: vec![head], product: Product::Logits, rows: logit_rows.to_vec() });
        tuned
    }

    /// Logits of `rows` wanted positions, complete on rank 0, in [`Workspace::logits`].
    pub fn logits(
        &self,
        backend: &B,
        wanted: &LogitRows,
        rows: usize,
        step: &B::Step,
        ws: &mut Workspace<B>,
    ) -> Result<()> {
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        backend.select(wanted, step, &ws.residual, &mut ws.normed)?;
        backend.norm(&self.final_norm, rows, &ws.normed, &mut ws.selected)?;
        let own = ws.logits_part.as_mut().unwrap_or(&mut ws.logits);
        backend.linear(head, rows, &ws.selected, own)?;
        if !self.logits.is_plain() {
            backend.warp_logits(self.logits, rows, own)?;
        }
        match &ws.logits_part {
            None => Ok(()),
            Some(part) => backend.gather(rows, part, &mut ws.logits),
        }
    }
}
