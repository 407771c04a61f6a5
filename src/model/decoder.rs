//! The forward pass, once for every family and every backend.

use super::attention::Attention;
use super::kv::KvPool;
use super::mlp::Mlp;
use super::names::Role;
use super::spec::{DecoderSpec, Head};
use super::upload::Upload;
use super::workspace::{Widths, Workspace};
use crate::backend::{Backend, LogitRows, Product, Tuned};
use crate::error::{Error, Result};

/// A rank's part of a decoder-only transformer.
pub struct Decoder<B: Backend> {
    embedding: B::Weight,
    layers: Vec<Layer<B>>,
    final_norm: B::Norm,
    /// Where it is not the embedding.
    head: Option<B::Weight>,
    vocab_part: usize,
}

struct Layer<B: Backend> {
    attention: Attention<B>,
    mlp: Mlp<B>,
}

impl<B: Backend> Decoder<B> {
    /// Takes the rank's weights to its device.
    pub fn load(upload: &Upload<B>, spec: &DecoderSpec) -> Result<Decoder<B>> {
        let table = |role| upload.linear_part(spec.hidden, role, None);
        let embedding = table(Role::Embedding)?;
        let head = match spec.head {
            Head::Tied => None,
            Head::Untied => Some(table(Role::Head)?),
        };
        let vocab_part = head.as_ref().unwrap_or(&embedding).weight.rows.len();
        let layer = |layer| {
            let attention = Attention::load(upload, spec, layer)?;
            Ok(Layer { attention, mlp: Mlp::load(upload, spec, layer)? })
        };
        Ok(Decoder {
            embedding: upload.backend.weight(&[embedding])?,
            layers: (0..spec.masks.len()).map(layer).collect::<Result<_>>()?,
            final_norm: upload.norm(spec.norm, spec.hidden, Role::FinalNorm)?,
            head: head.map(|head| upload.backend.weight(&[head])).transpose()?,
            vocab_part,
        })
    }

    /// Widths of this rank's intermediates.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a decoder without layers, or with layers of different widths.
    pub fn widths(&self, spec: &DecoderSpec) -> Result<Widths> {
        let mut layers = self.layers.iter().map(|layer| (layer.attention.heads, layer.mlp.neurons));
        let Some((heads, neurons)) = layers.next() else {
            return Err(Error::Checkpoint("a decoder without layers".into()));
        };
        if !layers.all(|widths| widths == (heads, neurons)) {
            return Err(Error::Checkpoint("layers of different widths".into()));
        }
        let (vocab_part, vocab) = (self.vocab_part, spec.vocab);
        Ok(Widths { hidden: spec.hidden, heads, neurons, vocab_part, vocab })
    }

    /// The attention of each layer.
    pub fn attentions(&self) -> impl Iterator<Item = &Attention<B>> {
        self.layers.iter().map(|layer| &layer.attention)
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
        backend.embed(&self.embedding, step, &mut ws.residual)?;
        backend.all_reduce(rows, &mut ws.residual)?;
        for (layer, kv) in self.layers.iter().zip(&mut kv.layers) {
            layer.attention.forward(backend, rows, step, kv, ws)?;
            layer.mlp.forward(backend, rows, ws)?;
        }
        Ok(())
    }

    /// The layers whose speed matters, by shape: those of every layer with these numbers of rows, and the head's with
    /// those of logits.
    pub fn tuned(&self, rows: &[usize], logit_rows: &[usize]) -> Vec<Tuned<'_, B>> {
        let mut tuned: Vec<Tuned<'_, B>> = Vec::new();
        for layer in &self.layers {
            let products = layer.attention.products().into_iter().chain(layer.mlp.products());
            for (number, (weight, product)) in products.enumerate() {
                match tuned.get_mut(number) {
                    Some(tuned) => tuned.weights.push(weight),
                    None => tuned.push(Tuned { weights: vec![weight], product, rows: rows.to_vec() }),
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
        match &mut ws.logits_part {
            None => backend.linear(head, rows, &ws.selected, &mut ws.logits),
            Some(part) => {
                backend.linear(head, rows, &ws.selected, part)?;
                backend.gather(rows, part, &mut ws.logits)
            }
        }
    }
}
