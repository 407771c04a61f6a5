//! Rows of the embedding.

use super::step::Step;
use super::{Tensor, Weight};

/// `out[t] = table[token of t]`, or zeros where another rank has the row.
pub fn embed(table: &Weight, step: &Step, out: &mut Tensor) {
    let width = out.width;
    for (&token, out) in step.tokens.iter().zip(out.values.chunks_exact_mut(width)) {
        match (token as usize).checked_sub(table.first_row()).filter(|&row| row < table.rows()) {
            Some(row) => table.widen_row(row, out),
            None => out.fill(0.0),
        }
    }
}
