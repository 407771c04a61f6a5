//! A linear layer for each head.

use super::stored::Weight;
use super::{Tensor, matmul};
use crate::backend::LinearPart;
use crate::error::Result;
use crate::model::weights::TensorPart;

/// `[out, in]` of each head.
pub struct HeadWeight {
    heads: Vec<Weight>,
}

impl HeadWeight {
    /// Refers to the stored parts, or to copies of them.
    pub fn new(heads: &[TensorPart]) -> Result<HeadWeight> {
        let weight = |part: &TensorPart| Weight::new(&[LinearPart { weight: part.clone(), bias: None }], 1.0);
        Ok(HeadWeight { heads: heads.iter().map(weight).collect::<Result<_>>()? })
    }

    /// The first numbers of each head of `x` become the first numbers of that head of `out`.
    pub fn apply(&self, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let n_heads = self.heads.len().max(1);
        let (in_stride, out_stride) = (x.width / n_heads, out.width / n_heads);
        for (head, weight) in self.heads.iter().enumerate() {
            let (inputs, outputs) = (weight.columns(), weight.rows());
            let own = |row| &x.row(row)[head * in_stride..][..inputs];
            let own: Vec<f32> = (0..rows).flat_map(own).copied().collect();
            let mut products = vec![0.0; rows * outputs];
            matmul::matmul(weight, &own, &mut products)?;
            for (row, products) in products.chunks_exact(outputs.max(1)).enumerate() {
                out.values[row * out.width + head * out_stride..][..outputs].copy_from_slice(products);
            }
        }
        Ok(())
    }
}
