//! The gated activation.

use super::{Tensor, for_each_chunk};
use crate::model::spec::Activation;

/// Multiplications that an exponential is worth.
const EXP_WORK: usize = 16;

/// `out = act(gate) ∘ up`, of `[rows, gate | up]`.
pub fn gate(activation: Activation, rows: usize, gate_up: &Tensor, out: &mut Tensor) {
    let width = out.width;
    for_each_chunk(out.rows_mut(rows), width, rows * width * EXP_WORK, |row, out| {
        let (gate, up) = gate_up.row(row).split_at(width);
        for (out, (&gate, &up)) in out.iter_mut().zip(gate.iter().zip(up)) {
            *out = match activation {
                Activation::Silu => gate / (1.0 + (-gate).exp()) * up,
            };
        }
    });
}
