//! Norms.

use super::sum::{dot, sum};
use super::{Tensor, stored};
use crate::error::{Error, Result};
use crate::model::spec::Norm;
use crate::model::weights::TensorPart;

/// A norm with its weight.
pub struct NormWeight {
    kind: Norm,
    /// By what numbers are multiplied: `[width]`, or `[heads, width]`.
    weight: Vec<f32>,
    /// `[width]`, or empty.
    bias: Vec<f32>,
}

impl NormWeight {
    /// Widens the stored weight.
    pub fn new(kind: Norm, weight: &TensorPart, bias: Option<&TensorPart>) -> Result<NormWeight> {
        let mut weight = stored::vector(weight)?;
        if let Norm::RmsOnePlus { .. } = kind {
            weight.iter_mut().for_each(|weight| *weight += 1.0);
        }
        let bias = bias.map_or(Ok(Vec::new()), stored::vector)?;
        if !bias.is_empty() && bias.len() != weight.len() {
            let (n, width) = (bias.len(), weight.len());
            return Err(Error::Checkpoint(format!("a bias of {n} for a norm over {width} numbers")));
        }
        Ok(NormWeight { kind, weight, bias })
    }

    /// `out = norm(x)`, over the first `rows` rows.
    pub fn norm(&self, rows: usize, x: &Tensor, out: &mut Tensor) {
        for row in 0..rows {
            self.each(x.row(row), |column, normed| out.values[row * x.width + column] = normed);
        }
    }

    /// `residual += norm(x)`, over the first `rows` rows.
    pub fn norm_add(&self, rows: usize, x: &Tensor, residual: &mut Tensor) {
        for row in 0..rows {
            self.each(x.row(row), |column, normed| residual.values[row * x.width + column] += normed);
        }
    }

    /// Norms one vector of `[width]` numbers into `out`.
    pub fn row(&self, x: &[f32], out: &mut [f32]) {
        self.each(x, |column, normed| out[column] = normed);
    }

    /// Norms head number `head` in place, by its own weights where each head has such.
    pub fn head(&self, head: usize, x: &mut [f32]) {
        let (mean, scale) = self.statistics(x);
        let first = if self.weight.len() > x.len() { head * x.len() } else { 0 };
        for (column, x) in x.iter_mut().enumerate() {
            *x = self.weighted(first + column, (*x - mean) * scale);
        }
    }

    fn each(&self, x: &[f32], mut put: impl FnMut(usize, f32)) {
        let (mean, scale) = self.statistics(x);
        for (column, x) in x.iter().enumerate() {
            put(column, self.weighted(column, (x - mean) * scale));
        }
    }

    fn weighted(&self, column: usize, x: f32) -> f32 {
        let weighted = self.weight[column] * x;
        self.bias.get(column).map_or(weighted, |bias| weighted + bias)
    }

    /// What is taken from a number, and by what it is multiplied then.
    fn statistics(&self, x: &[f32]) -> (f32, f32) {
        let width = x.len() as f32;
        match self.kind {
            Norm::Rms { eps } | Norm::RmsOnePlus { eps } => (0.0, 1.0 / (dot(x, x) / width + eps).sqrt()),
            Norm::Layer { eps, .. } => {
                let mean = sum(x) / width;
                let centred: Vec<f32> = x.iter().map(|x| x - mean).collect();
                (mean, 1.0 / (dot(&centred, &centred) / width + eps).sqrt())
            }
        }
    }
}
