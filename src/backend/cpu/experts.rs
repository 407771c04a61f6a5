//! A mixture of experts.

use super::route::route;
use super::stored::{self, Weight};
use super::{Tensor, activation, matmul};
use crate::backend::ExpertParts;
use crate::error::Result;
use crate::model::spec::Experts;

/// A router and its experts.
pub struct ExpertsWeight {
    spec: Experts,
    router: Weight,
    /// `[experts]`, or empty.
    choice_bias: Vec<f32>,
    /// Gate and up of each, one below the other, and down.
    experts: Vec<(Weight, Weight)>,
}

impl ExpertsWeight {
    /// Refers to the stored parts, or to copies of them.
    pub fn new(spec: &Experts, parts: &ExpertParts) -> Result<ExpertsWeight> {
        let one = |[gate, up, down]: &[_; 3]| {
            let gate_up = Weight::new(&[gate, up].map(Clone::clone), 1.0)?;
            Ok((gate_up, Weight::new(std::slice::from_ref(down), 1.0)?))
        };
        Ok(ExpertsWeight {
            spec: *spec,
            router: Weight::new(std::slice::from_ref(&parts.router), 1.0)?,
            choice_bias: parts.choice_bias.as_ref().map_or(Ok(Vec::new()), stored::vector)?,
            experts: parts.experts.iter().map(one).collect::<Result<_>>()?,
        })
    }

    /// `out = Σ w_e · expert_e(x)`, in the order of the experts' numbers: it does not depend on the other rows.
    pub fn apply(&self, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let mut logits = vec![0.0; rows * self.router.rows()];
        matmul::matmul(&self.router, x.rows(rows), &mut logits)?;
        // Of each expert the rows that chose it, and what it weighs there.
        let mut chosen: Vec<Vec<(usize, f32)>> = vec![Vec::new(); self.experts.len()];
        for (row, logits) in logits.chunks_exact(self.router.rows().max(1)).enumerate() {
            for (expert, weight) in route(&self.spec, logits, &self.choice_bias) {
                chosen[expert].push((row, weight));
            }
        }
        out.rows_mut(rows).fill(0.0);
        for ((gate_up, down), chosen) in self.experts.iter().zip(&chosen).filter(|(_, rows)| !rows.is_empty())
        {
            let n = chosen.len();
            let own: Vec<f32> = chosen.iter().flat_map(|&(row, _)| x.row(row)).copied().collect();
            let mut products = Tensor { values: vec![0.0; n * gate_up.rows()], width: gate_up.rows() };
            matmul::matmul(gate_up, &own, &mut products.values)?;
            let mut neurons = Tensor { values: vec![0.0; n * down.columns()], width: down.columns() };
            activation::gate(self.spec.activation, n, &products, &mut neurons);
            let mut results = vec![0.0; n * down.rows()];
            matmul::matmul(down, &neurons.values, &mut results)?;
            for (result, &(row, weight)) in results.chunks_exact(down.rows().max(1)).zip(chosen) {
                let out = &mut out.values[row * out.width..][..out.width];
                out.iter_mut().zip(result).for_each(|(out, result)| *out += weight * result);
            }
        }
        Ok(())
    }
}
