//! Norms of every kind.

use super::*;
use crate::model::spec::{Bias, Norm};

const EPS: f32 = 1e-5;

/// Every kind of norm, with and without a bias.
pub const KINDS: [Norm; 4] = [
    Norm::Rms { eps: EPS },
    Norm::RmsOnePlus { eps: EPS },
    Norm::Layer { eps: EPS, bias: Bias::Absent },
    Norm::Layer { eps: EPS, bias: Bias::Present },
];

pub fn has_bias(kind: Norm) -> bool {
    matches!(kind, Norm::Layer { bias: Bias::Present, .. })
}

/// The norm of some numbers; biases are zeros where there are none.
pub fn normed(kind: Norm, x: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
    let n = x.len() as f64;
    let (mean, plus, eps) = match kind {
        Norm::Rms { eps } => (0.0, 0.0, eps),
        Norm::RmsOnePlus { eps } => (0.0, 1.0, eps),
        Norm::Layer { eps, .. } => (x.iter().sum::<f64>() / n, 0.0, eps),
    };
    let square = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let scale = 1.0 / (square + f64::from(eps)).sqrt();
    let numbers = x.iter().zip(weight).zip(bias);
    numbers.map(|((x, w), b)| (x - mean) * scale * (w + plus) + b).collect()
}

pub fn wide(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|&x| f64::from(x)).collect()
}

pub fn every_norm_of_every_width<B: Probe>(backend: &B) {
    for kind in KINDS {
        for (rows, width) in [(1, 1), (3, 2), (17, 8), (3, 60), (2, 129), (5, 4104), (2, 5120), (1, 16384)] {
            let (w, mut b) = (numbers(width, 1), vec![0.0; width]);
            let weight = stored(DType::F32, &[width], &w);
            let bias = has_bias(kind).then(|| {
                b = numbers(width, 2);
                stored(DType::F32, &[width], &b)
            });
            let norm = backend.norm_weight(kind, &weight, bias.as_ref()).unwrap();
            // A mean far from zero, as a layer norm has to take it away.
            let shifted = |x: &f32| half::bf16::from_f32(x + 3.0).to_f32();
            let values: Vec<f32> = numbers(rows * width, 3).iter().map(shifted).collect();
            let before = numbers(rows * width, 4);
            let tensor = || backend.tensor(rows + 2, width).unwrap();
            let (mut x, mut out, mut residual) = (tensor(), tensor(), tensor());
            backend.fill(&mut x, &values);
            backend.fill(&mut out, &[]);
            backend.fill(&mut residual, &before);
            backend.norm(&norm, rows, &x, &mut out).unwrap();
            backend.norm_add(&norm, rows, &x, &mut residual).unwrap();

            let expected: Vec<f64> =
                values.chunks(width).flat_map(|row| normed(kind, &wide(row), &wide(&w), &wide(&b))).collect();
            let what = format!("{kind:?} of {rows} rows of {width}");
            assert_close(&backend.read(&out), &expected, 4.0 * B::TOLERANCE, &what);
            let sums: Vec<f64> = expected.iter().zip(&before).map(|(x, &y)| x + f64::from(y)).collect();
            assert_sums_close(&backend.read(&residual), &sums, &expected, 4.0 * B::TOLERANCE, &what);
        }
    }
}
