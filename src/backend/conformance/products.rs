//! What becomes of products beside sums: scales, non-linearities, heads of unit rows, weights that are stored otherwise.

use super::*;
use crate::model::runs::Runs;
use crate::model::spec::Activation;

const PADDING: usize = 2;

/// Rows, inputs and outputs.
const SHAPES: [(usize, usize, usize); 6] =
    [(1, 1, 2), (1, 24, 92), (5, 33, 34), (8, 128, 256), (70, 60, 64), (300, 16, 130)];

const GATES: [Activation; 4] =
    [Activation::Silu, Activation::GeluTanh, Activation::Gelu, Activation::ClampedSwiglu { limit: 0.75 }];

/// Abramowitz and Stegun 7.1.5, which converges everywhere.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}

fn activated(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            x / 2.0 * (1.0 + u.tanh())
        }
        // Beyond 5 the series loses its digits, and the function is flat.
        Activation::Gelu => x / 2.0 * (1.0 + erf((x / 2f64.sqrt()).clamp(-4.0, 4.0))),
        Activation::ClampedSwiglu { .. } => panic!("a function of two numbers"),
    }
}

fn gated(activation: Activation, gate: f64, up: f64) -> f64 {
    let Activation::ClampedSwiglu { limit } = activation else { return activated(activation, gate) * up };
    let limit = f64::from(limit);
    let (g, u) = (gate.min(limit), up.clamp(-limit, limit));
    g / (1.0 + (-1.702 * g).exp()) * (u + 1.0)
}

/// A layer with random numbers, rows of others, and `scale · (x · weightᵀ + bias)`.
fn layer<B: Probe>(
    backend: &B,
    (rows, inputs, outputs): (usize, usize, usize),
    scale: f32,
) -> (B::Weight, B::Tensor, Vec<f64>) {
    let (w, b) = (numbers(outputs * inputs, 1), numbers(outputs, 2));
    let part =
        linear_part(stored(DType::F32, &[outputs, inputs], &w), Some(stored(DType::F32, &[outputs], &b)));
    let values = numbers(rows * inputs, 3);
    let mut x = backend.tensor(rows + PADDING, inputs).unwrap();
    backend.fill(&mut x, &values);
    let product = |i: usize| {
        let (row, output) = (i / outputs, i % outputs);
        let terms = values[row * inputs..][..inputs].iter().zip(&w[output * inputs..][..inputs]);
        let sum = terms.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum::<f64>();
        f64::from(scale) * (sum + f64::from(b[output]))
    };
    (backend.weight(&[part], scale).unwrap(), x, (0..rows * outputs).map(product).collect())
}

pub fn products_are_scaled<B: Probe>(backend: &B) {
    for shape in SHAPES {
        let (rows, _, outputs) = shape;
        let (weight, x, products) = layer(backend, shape, 0.375);
        let tensor = || backend.tensor(rows + PADDING, outputs).unwrap();
        let (mut out, mut branch, mut residual) = (tensor(), tensor(), tensor());
        let before = numbers(rows * outputs, 4);
        backend.fill(&mut out, &[]);
        backend.fill(&mut residual, &before);
        backend.linear(&weight, rows, &x, &mut out).unwrap();
        backend.linear_add(&weight, rows, &x, &mut branch, &mut residual).unwrap();
        let what = format!("{shape:?}");
        assert_close(&backend.read(&out), &products, 4.0 * B::TOLERANCE, &what);
        let sums: Vec<f64> = products.iter().zip(&before).map(|(x, &y)| x + f64::from(y)).collect();
        assert_sums_close(&backend.read(&residual), &sums, &products, 4.0 * B::TOLERANCE, &what);
    }
}

pub fn products_are_activated<B: Probe>(backend: &B) {
    for shape in SHAPES {
        let (rows, _, outputs) = shape;
        let (weight, x, products) = layer(backend, shape, 1.0);
        for activation in &GATES[..3] {
            let mut out = backend.tensor(rows + PADDING, outputs).unwrap();
            backend.fill(&mut out, &[]);
            backend.linear_activate(&weight, *activation, rows, &x, &mut out).unwrap();
            let expected: Vec<f64> = products.iter().map(|&x| activated(*activation, x)).collect();
            let what = format!("{activation:?} of {shape:?}");
            assert_sums_close(&backend.read(&out), &expected, &products, 4.0 * B::TOLERANCE, &what);
        }
    }
}

pub fn every_gate<B: Probe>(backend: &B) {
    for shape in SHAPES {
        let (rows, _, outputs) = shape;
        let (weight, x, products) = layer(backend, shape, 1.0);
        for activation in GATES {
            let mut gate_up = backend.tensor(rows + PADDING, outputs).unwrap();
            let mut out = backend.tensor(rows + PADDING, outputs / 2).unwrap();
            backend.fill(&mut out, &[]);
            backend.linear_gate(&weight, activation, rows, &x, &mut gate_up, &mut out).unwrap();
            let pairs = products.chunks(outputs).flat_map(|row| {
                let (gates, ups) = row.split_at(outputs / 2);
                gates.iter().zip(ups)
            });
            let (mut expected, mut terms) = (Vec::new(), Vec::new());
            for (&gate, &up) in pairs {
                expected.push(gated(activation, gate, up));
                // Gate and up may be rounded before they are multiplied.
                terms.push((1.0 + gate.abs()) * (1.0 + up.abs()));
            }
            let what = format!("{activation:?} of {shape:?}");
            assert_sums_close(&backend.read(&out), &expected, &terms, 4.0 * B::TOLERANCE, &what);
        }
    }
}

pub fn rows_of_unit_length<B: Probe>(backend: &B) {
    for (rows, inputs, outputs) in [(1, 8, 5), (3, 60, 33), (4, 520, 130)] {
        for dtype in [DType::F32, DType::BF16] {
            let mut w = numbers(outputs * inputs, 1);
            w.iter_mut().zip(0..).for_each(|(w, i)| *w *= (1 + i / inputs % 7) as f32);
            w[..inputs].fill(0.0);
            let part = linear_part(stored(dtype, &[outputs, inputs], &w), None);
            let weight = backend.normalised_weight(&part, 2.0).unwrap();
            let values = numbers(rows * inputs, 2);
            let mut x = backend.tensor(rows + PADDING, inputs).unwrap();
            let mut out = backend.logits(rows + PADDING, outputs).unwrap();
            backend.fill(&mut x, &values);
            backend.fill(&mut out, &[]);
            backend.linear(&weight, rows, &x, &mut out).unwrap();
            let product = |i: usize| {
                let (x, w) =
                    (&values[i / outputs * inputs..][..inputs], &w[i % outputs * inputs..][..inputs]);
                let w: Vec<f64> = w.iter().map(|&w| rounded(dtype, w)).collect();
                let length = w.iter().map(|w| w * w).sum::<f64>().sqrt().max(1e-12);
                2.0 * x.iter().zip(&w).map(|(&x, w)| f64::from(x) * w).sum::<f64>() / length
            };
            let expected: Vec<f64> = (0..rows * outputs).map(product).collect();
            let what = format!("{rows} rows, {inputs} → {outputs}, {dtype:?}");
            assert_close(&backend.read(&out), &expected, 4.0 * B::TOLERANCE, &what);
        }
    }
}

/// Runs of rows, strides and transposed matrices: as fused and turned layouts have them.
pub fn weights_are_read_where_they_lie<B: Probe>(backend: &B) {
    let (stored_rows, stored_columns) = (48, 56);
    let w = numbers(stored_rows * stored_columns, 1);
    let whole = |dtype| stored(dtype, &[stored_rows, stored_columns], &w);
    let pairs: Runs = (0..16).map(|i| i / 8 * 16 + i % 4 * 2 + i % 8 / 4).collect();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let parts = [
            TensorPart { rows: Runs::equal(3, 4, 11, 5), ..whole(dtype) },
            TensorPart { rows: Runs::equal(1, 20, 2, 1), ..whole(dtype) },
            TensorPart { rows: pairs.clone(), columns: Runs::range(4..37), ..whole(dtype) },
            TensorPart { columns: Runs::equal(2, 3, 15, 9), ..whole(dtype) },
            TensorPart { columns: pairs.clone(), ..whole(dtype) },
            whole(dtype).transposed(),
            TensorPart { rows: Runs::equal(0, 24, 2, 1), ..whole(dtype) }.transposed(),
            TensorPart { rows: pairs.clone(), columns: Runs::equal(1, 20, 2, 1), ..whole(dtype) }
                .transposed(),
        ];
        for part in parts {
            let (outputs, inputs) = (part.rows.len(), part.columns.len());
            let places: Vec<(usize, usize)> = part
                .rows
                .iter()
                .flat_map(|row| part.columns.iter().map(move |column| (row, column)))
                .collect();
            let numbers_of_part: Vec<f64> =
                places.iter().map(|&(row, column)| rounded(dtype, w[part.number(row, column)])).collect();
            let what = format!("{outputs} × {inputs}, {:?} × {:?}, {dtype:?}", part.rows, part.columns);
            let weight = backend.weight(&[linear_part(part, None)], 1.0).unwrap();
            let n = 3;
            let values = numbers(n * inputs, 2);
            let mut x = backend.tensor(n, inputs).unwrap();
            let mut out = backend.tensor(n, outputs).unwrap();
            backend.fill(&mut x, &values);
            backend.linear(&weight, n, &x, &mut out).unwrap();
            let product = |i: usize| {
                let (x, w) =
                    (&values[i / outputs * inputs..][..inputs], &numbers_of_part[i % outputs * inputs..]);
                x.iter().zip(w).map(|(&x, w)| f64::from(x) * w).sum::<f64>()
            };
            let expected: Vec<f64> = (0..n * outputs).map(product).collect();
            assert_close(&backend.read(&out), &expected, 4.0 * B::TOLERANCE, &what);
        }
    }
}
