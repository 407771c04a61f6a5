//! Tensors on which the ways of a product are measured.

use super::device::launched;
use super::linear::Call;
use super::tensor::Tensor;
use super::{Cuda, dtype_code, ffi};
use crate::backend::{Backend, Product, Tuned};
use crate::error::Result;

/// What a product is measured on.
pub struct Room {
    x: Tensor,
    out: Tensor,
    scratch: Option<Tensor>,
}

impl Room {
    /// For the largest number of rows.
    pub fn new(cuda: &Cuda, Tuned { weights, product, rows }: &Tuned<'_, Cuda>) -> Result<Room> {
        let rows = rows.iter().copied().max().unwrap_or(0);
        let (inputs, outputs) = weights.first().map_or((0, 0), |weight| (weight.inputs, weight.outputs));
        let x = cuda.tensor(rows, inputs)?;
        cuda.randomise(&x, rows)?;
        let (out, scratch) = match product {
            Product::Logits => (cuda.logits(rows, outputs)?, None),
            Product::Gated(_) => (cuda.tensor(rows, outputs / 2)?, Some(cuda.tensor(rows, outputs)?)),
            Product::Stored | Product::Added | Product::Activated(_) => (cuda.tensor(rows, outputs)?, None),
        };
        Ok(Room { x, out, scratch })
    }

    /// A product of so many rows.
    pub fn call<'a>(&'a self, tuned: &Tuned<'a, Cuda>, rows: usize) -> Option<Call<'a>> {
        let (weight, product) = (*tuned.weights.first()?, tuned.product);
        Some(Call { weight, product, rows, x: &self.x, out: &self.out, scratch: self.scratch.as_ref() })
    }
}

impl Cuda {
    /// A layer with the product that is really made of it; nothing where this rank makes none.
    pub(super) fn as_run<'a>(
        &self,
        Tuned { weights, product, rows }: &Tuned<'a, Cuda>,
    ) -> Option<Tuned<'a, Cuda>> {
        let product = match product {
            Product::Added if !self.member.adds_first() => Product::Stored,
            other => *other,
        };
        let makes_some = weights.first().is_some_and(|weight| weight.outputs > 0);
        makes_some.then(|| Tuned { weights: weights.clone(), product, rows: rows.clone() })
    }

    /// Fills a tensor's first rows with numbers of the scale of activations.
    fn randomise(&self, tensor: &Tensor, rows: usize) -> Result<()> {
        let params = ffi::FillRandom {
            out: tensor.ptr(),
            out_stride: tensor.stride as i64,
            rows: rows as i64,
            columns: tensor.width as i64,
            first: 0,
            row_step: tensor.width as i64,
            column_step: 1,
            stream: 0,
            reach: 1.0,
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: the tensor has so many rows.
        launched("fill_random", unsafe { ffi::kv_fill_random(&params, self.device.stream()) })
    }
}
