//! Ops on rows, each on its own.

use super::*;
use crate::backend::LogitRows;
use crate::model::spec::{Activation, Norm};

/// Rows beyond those in use.
const PADDING: usize = 2;

pub fn embed_takes_the_ranks_rows_only<B: Probe>(backend: &B) {
    let ragged = Ragged::new(&[(0, 9), (4, 1), (0, 30)]);
    let step = ragged.begin(backend, ONE_HEAD);
    let n = ragged.input.n_tokens();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (width, rows) in [(1, 0..50), (12, 0..50), (33, 0..25), (16, 25..50), (16, 50..50)] {
            let table = numbers(VOCAB * width, 1);
            let part = stored(dtype, &[VOCAB, width], &table).cut_rows(rows.clone());
            let table_weight = backend.weight(&[linear_part(part, None)], 1.0).unwrap();
            let mut out = backend.tensor(n + PADDING, width).unwrap();
            backend.fill(&mut out, &[]);
            backend.embed(&table_weight, 1.0, &step, &mut out).unwrap();
            let number = |token: u32, column: usize| match rows.contains(&(token as usize)) {
                true => rounded(dtype, table[token as usize * width + column]),
                false => 0.0,
            };
            let tokens = &ragged.input.prompt_tokens;
            let expected: Vec<f64> = tokens
                .iter()
                .flat_map(|&token| (0..width).map(move |column| number(token, column)))
                .collect();
            assert_close(
                &backend.read(&out),
                &expected,
                0.0,
                &format!("{dtype:?}, rows {rows:?} of {width}"),
            );
        }
    }
}

pub fn norm_has_unit_mean_square<B: Probe>(backend: &B) {
    for width in [1, 2, 8, 60, 129, 256, 4104] {
        // Of many rows a GPU takes each by a warp.
        let many = if width <= 256 { 1030 } else { 1 };
        for rows in [1, 3, 17, many] {
            for dtype in [DType::F32, DType::BF16] {
                let eps = 1e-5;
                let weights = numbers(width, 1);
                let weight = stored(dtype, &[width], &weights);
                let norm = backend.norm_weight(Norm::Rms { eps }, &weight, None).unwrap();
                let mut values = numbers(rows * width, 2);
                values[0] = 8192.0; // An outlier in the first row; nothing at all in the last.
                values[(rows - 1) * width..].fill(0.0);
                let mut x = backend.tensor(rows + PADDING, width).unwrap();
                let mut out = backend.tensor(rows + PADDING, width).unwrap();
                backend.fill(&mut x, &values);
                backend.fill(&mut out, &[]);
                backend.norm(&norm, rows, &x, &mut out).unwrap();
                let normed = values.chunks(width).flat_map(|row| {
                    let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / width as f64;
                    let scale = 1.0 / (mean + f64::from(eps)).sqrt();
                    row.iter().zip(&weights).map(move |(&x, &w)| f64::from(x) * scale * f64::from(w))
                });
                let what = format!("{rows} rows of {width}, {dtype:?}");
                assert_close(&backend.read(&out), &normed.collect::<Vec<_>>(), B::TOLERANCE, &what);
            }
        }
    }
}

pub fn linear_is_a_matrix_product<B: Probe>(backend: &B) {
    let widths = [(1, 1), (8, 24), (60, 7), (64, 100), (130, 33)];
    for (seed, (inputs, outputs)) in (0..).zip(widths) {
        for rows in [1, 2, 3, 4, 5, 9, 64, 70] {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let (w, b) = (numbers(outputs * inputs, seed), numbers(outputs, seed + 100));
                // In two parts, the first of which has no bias.
                let cut = outputs / 3;
                let parts = [
                    linear_part(stored(dtype, &[cut, inputs], &w[..cut * inputs]), None),
                    linear_part(
                        stored(dtype, &[outputs - cut, inputs], &w[cut * inputs..]),
                        Some(stored(dtype, &[outputs - cut], &b[cut..])),
                    ),
                ];
                let weight = backend.weight(&parts, 1.0).unwrap();
                let values = numbers(rows * inputs, seed + 200);
                let mut x = backend.tensor(rows + PADDING, inputs).unwrap();
                let mut out = backend.tensor(rows + PADDING, outputs).unwrap();
                backend.fill(&mut x, &values);
                backend.fill(&mut out, &[]);
                backend.linear(&weight, rows, &x, &mut out).unwrap();
                let output = |row: usize, column: usize| {
                    let product = |i: usize| {
                        f64::from(values[row * inputs + i]) * rounded(dtype, w[column * inputs + i])
                    };
                    let bias = if column < cut { 0.0 } else { rounded(dtype, b[column]) };
                    (0..inputs).map(product).sum::<f64>() + bias
                };
                let expected: Vec<f64> =
                    (0..rows * outputs).map(|i| output(i / outputs, i % outputs)).collect();
                let what = format!("{rows} rows, {inputs} → {outputs}, {dtype:?}");
                assert_close(&backend.read(&out), &expected, 2.0 * B::TOLERANCE, &what);
            }
        }
    }
}

pub fn linear_reads_a_rectangle_of_what_is_stored<B: Probe>(backend: &B) {
    let (stored_rows, stored_columns) = (40, 50);
    let w = numbers(stored_rows * stored_columns, 1);
    for (rows, columns) in [(0..40, 0..50), (3..20, 0..50), (0..40, 25..50), (39..40, 7..8), (11..30, 3..44)]
    {
        let part = stored(DType::BF16, &[stored_rows, stored_columns], &w).cut(rows.clone(), columns.clone());
        let weight = backend.weight(&[linear_part(part, None)], 1.0).unwrap();
        for n in [1, 6] {
            let values = numbers(n * columns.len(), 2);
            let mut x = backend.tensor(n, columns.len()).unwrap();
            let mut out = backend.tensor(n, rows.len()).unwrap();
            backend.fill(&mut x, &values);
            backend.linear(&weight, n, &x, &mut out).unwrap();
            let mut expected = Vec::new();
            for x in values.chunks(columns.len()) {
                for row in rows.clone() {
                    let stored =
                        columns.clone().map(|column| rounded(DType::BF16, w[row * stored_columns + column]));
                    expected.push(stored.zip(x).map(|(w, &x)| w * f64::from(x)).sum());
                }
            }
            assert_close(
                &backend.read(&out),
                &expected,
                2.0 * B::TOLERANCE,
                &format!("{rows:?} × {columns:?}"),
            );
        }
    }
}

/// A layer of random numbers, and its products with rows of others.
fn layer<B: Probe>(
    backend: &B,
    rows: usize,
    inputs: usize,
    outputs: usize,
) -> (B::Weight, B::Tensor, Vec<f64>) {
    let (w, b) = (numbers(outputs * inputs, 1), numbers(outputs, 2));
    let bias = stored(DType::F32, &[outputs], &b);
    let part = linear_part(stored(DType::F32, &[outputs, inputs], &w), Some(bias));
    let values = numbers(rows * inputs, 3);
    let mut x = backend.tensor(rows + PADDING, inputs).unwrap();
    backend.fill(&mut x, &values);
    let product = |(row, output): (usize, usize)| {
        let terms = values[row * inputs..][..inputs].iter().zip(&w[output * inputs..][..inputs]);
        terms.map(|(&x, &w)| f64::from(x) * f64::from(w)).sum::<f64>() + f64::from(b[output])
    };
    let products = (0..rows).flat_map(|row| (0..outputs).map(move |output| (row, output))).map(product);
    (backend.weight(&[part], 1.0).unwrap(), x, products.collect())
}

const SHAPES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (1, 24, 92), (5, 33, 33), (8, 128, 256), (70, 60, 64), (120, 16, 130)];

pub fn linear_add_adds<B: Probe>(backend: &B) {
    for (rows, inputs, outputs) in SHAPES {
        let (weight, x, products) = layer(backend, rows, inputs, outputs);
        let before = numbers(rows * outputs, 4);
        let tensor = || backend.tensor(rows + PADDING, outputs).unwrap();
        let (mut branch, mut residual) = (tensor(), tensor());
        backend.fill(&mut residual, &before);
        backend.linear_add(&weight, rows, &x, &mut branch, &mut residual).unwrap();
        let expected: Vec<f64> =
            products.iter().zip(&before).map(|(product, &before)| product + f64::from(before)).collect();
        let what = format!("{rows} rows, {inputs} → {outputs}");
        // cuBLASLt rounds also between product, bias and residual.
        let tolerance = 4.0 * B::TOLERANCE;
        assert_sums_close(&backend.read(&residual), &expected, &products, tolerance, &what);
    }
}

pub fn linear_gate_multiplies<B: Probe>(backend: &B) {
    for (rows, inputs, width) in SHAPES {
        let (weight, x, products) = layer(backend, rows, inputs, 2 * width);
        let mut gate_up = backend.tensor(rows + PADDING, 2 * width).unwrap();
        let mut out = backend.tensor(rows + PADDING, width).unwrap();
        backend.fill(&mut out, &[]);
        backend.linear_gate(&weight, Activation::Silu, rows, &x, &mut gate_up, &mut out).unwrap();
        let expected = products.chunks(2 * width).flat_map(|row| {
            let (gate, up) = row.split_at(width);
            let silu = |x: f64| x / (1.0 + (-x).exp());
            gate.iter().zip(up).map(move |(&gate, &up)| silu(gate) * up)
        });
        let what = format!("{rows} rows, {inputs} → {width}");
        assert_close(&backend.read(&out), &expected.collect::<Vec<_>>(), 4.0 * B::TOLERANCE, &what);
    }
}

pub fn select_copies_the_wanted_rows<B: Probe>(backend: &B) {
    let mut ragged = Ragged::new(&[(0, 5), (3, 1), (2, 4)]);
    ragged.input.rows[1].sample = false;
    ragged.input.rows[0].n_targets = 3;
    ragged.input.rows[2].n_targets = 4;
    ragged.input.targets = vec![1; 7];
    let step = ragged.begin(backend, ONE_HEAD);
    let width = 12;
    let values = numbers(ragged.input.n_tokens() * width, 1);
    let mut x = backend.tensor(16, width).unwrap();
    backend.fill(&mut x, &values);
    let wanted: [(LogitRows, &[usize]); 4] = [
        (LogitRows::Sampled, &[4, 9]),
        (LogitRows::Targets(0..7), &[0, 1, 2, 6, 7, 8, 9]),
        (LogitRows::Targets(2..5), &[2, 6, 7]),
        (LogitRows::Targets(6..7), &[9]),
    ];
    for (wanted, tokens) in wanted {
        let mut out = backend.tensor(8, width).unwrap();
        backend.fill(&mut out, &[]);
        backend.select(&wanted, &step, &x, &mut out).unwrap();
        let expected = tokens.iter().flat_map(|token| &values[token * width..(token + 1) * width]);
        let expected: Vec<f64> = expected.map(|&number| f64::from(number)).collect();
        assert_close(&backend.read(&out), &expected, 0.0, &format!("{wanted:?}"));
    }
}
