//! Residual add and norm.

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

    /// `residual += branch`, then `out = norm(residual)`, over the first `rows` rows.
    pub fn add_norm(&self, rows: usize, branch: Option<&Tensor>, residual: &mut Tensor, out: &mut Tensor) {
        let width = self.weight.len();
        for row in 0..rows {
            let residual = &mut residual.values[row * width..][..width];
            if let Some(branch) = branch {
                residual.iter_mut().zip(branch.row(row)).for_each(|(residual, branch)| *residual += branch);
            }
            let Norm::Rms { eps } = self.kind;
            let scale = 1.0 / (dot(residual, residual) / width as f32 + eps).sqrt();
            let out = &mut out.values[row * width..][..width];
            for (out, (x, weight)) in out.iter_mut().zip(residual.iter().zip(&self.weight)) {
                *out = weight * (x * scale);
            }
        }
    }
}
