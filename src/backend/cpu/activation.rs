//! Activations, alone and as gates.

use std::f64::consts::{PI, SQRT_2};

use super::{Tensor, for_each_chunk};
use crate::model::spec::Activation;

/// Multiplications that an activation is worth.
const WORK: usize = 16;

/// `x = act(x)`.
pub fn activate(activation: Activation, rows: usize, x: &mut Tensor) {
    let width = x.width;
    for_each_chunk(x.rows_mut(rows), width, rows * width * WORK, |_, x| {
        x.iter_mut().for_each(|x| *x = activated(activation, *x));
    });
}

/// `out = act(gate) ∘ up`, of `[rows, gate | up]`.
pub fn gate(activation: Activation, rows: usize, gate_up: &Tensor, out: &mut Tensor) {
    let width = out.width;
    for_each_chunk(out.rows_mut(rows), width, rows * width * WORK, |row, out| {
        let (gate, up) = gate_up.row(row).split_at(width);
        for (out, (&gate, &up)) in out.iter_mut().zip(gate.iter().zip(up)) {
            *out = gated(activation, gate, up);
        }
    });
}

fn gated(activation: Activation, gate: f32, up: f32) -> f32 {
    match activation {
        Activation::ClampedSwiglu { limit } => activated(activation, gate) * (up.clamp(-limit, limit) + 1.0),
        Activation::Silu | Activation::GeluTanh | Activation::Gelu => activated(activation, gate) * up,
    }
}

fn activated(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            const SLOPE: f32 = 0.797_884_6; // sqrt(2/π)
            0.5 * x * (1.0 + (SLOPE * (x + 0.044715 * x * x * x)).tanh())
        }
        Activation::Gelu => (0.5 * f64::from(x) * (1.0 + erf(f64::from(x) / SQRT_2))) as f32,
        Activation::ClampedSwiglu { limit } => {
            let x = x.min(limit);
            x / (1.0 + (-1.702 * x).exp())
        }
    }
}

/// The error function, by its series without cancellation (Abramowitz and Stegun, 7.1.6), to the precision of f64 times
/// the number of terms.
fn erf(x: f64) -> f64 {
    // Beyond, its distance from ±1 is below half the precision of f64.
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    let mut odd = 1.0;
    while term.abs() > 1e-17 * sum.abs() {
        odd += 2.0;
        term *= 2.0 * x * x / odd;
        sum += term;
    }
    2.0 / PI.sqrt() * (-x * x).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_function_has_its_published_values() {
        // Abramowitz and Stegun, table 7.1.
        let published = [
            (0.0, 0.0),
            (0.1, 0.1124629160),
            (0.5, 0.5204998778),
            (1.0, 0.8427007929),
            (1.9, 0.9927904292),
            (3.0, 0.9999779095),
            (5.0, 0.9999999999),
        ];
        for (x, expected) in published {
            assert!((erf(x) - expected).abs() < 2e-10, "erf({x}) = {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
        assert_eq!((erf(7.0), erf(f64::NEG_INFINITY)), (1.0, -1.0));
        assert!(erf(f64::NAN).is_nan());
    }

    #[test]
    fn activations_at_known_points() {
        let at = |activation, points: [(f32, f64); 3]| {
            for (x, expected) in points {
                let got = f64::from(activated(activation, x));
                assert!((got - expected).abs() < 1e-6, "{activation:?}({x}) = {got}, not {expected}");
            }
        };
        at(Activation::Silu, [(0.0, 0.0), (1.0, 0.7310585786), (-2.0, -0.2384058440)]);
        at(Activation::Gelu, [(0.0, 0.0), (1.0, 0.8413447461), (-2.0, -0.0455002639)]);
        at(Activation::GeluTanh, [(0.0, 0.0), (1.0, 0.8411919906), (-2.0, -0.0454023059)]);
        // 2 / (1 + e^−3.404), and nothing beyond the limit.
        at(Activation::ClampedSwiglu { limit: 2.0 }, [(0.0, 0.0), (2.0, 1.9356586), (9.0, 1.9356586)]);
        let clamped = Activation::ClampedSwiglu { limit: 2.0 };
        assert_eq!(gated(clamped, 1.0, -7.0), -activated(clamped, 1.0));
        assert_eq!(gated(Activation::Silu, 1.0, -7.0), -7.0 * activated(Activation::Silu, 1.0));
    }
}
