//! Rows of the embedding and of the table of positions.

use super::step::Step;
use super::{Tensor, Weight};

/// `out[t] = multiplier · table[token of t]`, or zeros where another rank has the row.
pub fn embed(table: &Weight, multiplier: f32, step: &Step, out: &mut Tensor) {
    let width = out.width;
    for (&token, out) in step.tokens.iter().zip(out.values.chunks_exact_mut(width)) {
        match (token as usize).checked_sub(table.first_row()).filter(|&row| row < table.rows()) {
            Some(row) => {
                table.widen_row(row, out);
                out.iter_mut().for_each(|number| *number *= multiplier);
            }
            None => out.fill(0.0),
        }
    }
}

/// `out[t] += table[position of t]`.
pub fn add_positions(table: &Weight, step: &Step, out: &mut Tensor) {
    let mut row = vec![0.0; out.width];
    let width = out.width;
    for (&position, out) in step.positions.iter().zip(out.values.chunks_exact_mut(width)) {
        table.widen_row(position as usize, &mut row);
        out.iter_mut().zip(&row).for_each(|(out, number)| *out += number);
    }
}
