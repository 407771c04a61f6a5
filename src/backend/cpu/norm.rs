//! Norms.

use super::sum::dot;
use super::{Tensor, stored};
use crate::error::Result;
use crate::model::spec::Norm;
use crate::model::weights::TensorPart;

/// A norm with its weight.
pub struct NormWeight {
    kind: Norm,
    weight: Vec<f32>,
}

impl NormWeight {
    /// Widens the stored weight.
    pub fn new(kind: Norm, weight: &TensorPart) -> Result<NormWeight> {
        Ok(NormWeight { kind, weight: stored::vector(weight)? })
    }

    /// `out = norm(x)`, over the first `rows` rows.
    pub fn norm(&self, rows: usize, x: &Tensor, out: &mut Tensor) {
        let width = self.weight.len();
        for row in 0..rows {
            let x = x.row(row);
            let Norm::Rms { eps } = self.kind;
            let scale = 1.0 / (dot(x, x) / width as f32 + eps).sqrt();
            let out = &mut out.values[row * width..][..width];
            for (out, (x, weight)) in out.iter_mut().zip(x.iter().zip(&self.weight)) {
                *out = weight * (x * scale);
            }
        }
    }
}
