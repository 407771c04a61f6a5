//! How what a branch returns joins the residual stream.

use super::names::LayerRole;
use super::spec::{Block, DecoderSpec};
use super::upload::Upload;
use crate::backend::{Backend, LinearPart, Product};
use crate::error::Result;

/// The last linear layer of a branch.
pub struct Output<B: Backend> {
    weight: B::Weight,
    /// Of its products, where the block has such norms.
    post_norm: Option<B::Norm>,
}

impl<B: Backend> Output<B> {
    /// Takes it to the device; `post_norm` is the role of the norm behind it, for blocks that have one.
    pub fn load(
        upload: &Upload<B>,
        spec: &DecoderSpec,
        layer: usize,
        part: LinearPart,
        post_norm: LayerRole,
    ) -> Result<Output<B>> {
        let has_norm = spec.block == Block::SerialPostNorms;
        let post_norm = has_norm.then(|| upload.layer_norm(spec.norm, layer, post_norm)).transpose()?;
        Ok(Output { weight: upload.backend.weight(&[part], spec.branch_multiplier)?, post_norm })
    }

    /// Adds its products with `x` to the residual stream. `branch` is scratch.
    pub fn add(
        &self,
        backend: &B,
        rows: usize,
        x: &B::Tensor,
        branch: &mut B::Tensor,
        residual: &mut B::Tensor,
    ) -> Result<()> {
        let Some(norm) = &self.post_norm else {
            return backend.linear_add(&self.weight, rows, x, branch, residual);
        };
        backend.linear(&self.weight, rows, x, branch)?;
        backend.all_reduce(rows, branch)?;
        backend.norm_add(norm, rows, branch, residual)
    }

    /// The layer, and what becomes of its products.
    pub fn product(&self) -> (&B::Weight, Product) {
        let product = if self.post_norm.is_some() { Product::Stored } else { Product::Added };
        (&self.weight, product)
    }
}
