//! What happens to the residual stream and to logits beside norms and products.

use super::*;
use crate::model::spec::Logits;

const PADDING: usize = 2;

pub fn embeddings_are_multiplied_and_positions_added<B: Probe>(backend: &B) {
    let ragged = Ragged::new(&[(0, 9), (4, 1), (20, 30)]);
    let step = ragged.begin(backend, ONE_HEAD);
    let tokens = ragged.tokens();
    for width in [1, 12, 33, 1032] {
        let (table, positions) = (numbers(VOCAB * width, 1), numbers(MAX_POSITIONS * width, 2));
        let weight = |rows, numbers: &[f32]| {
            backend.weight(&[linear_part(stored(DType::F32, &[rows, width], numbers), None)], 1.0).unwrap()
        };
        let (embedding, learned) = (weight(VOCAB, &table), weight(MAX_POSITIONS, &positions));
        let mut out = backend.tensor(tokens.len() + PADDING, width).unwrap();
        backend.fill(&mut out, &[]);
        backend.embed(&embedding, 12.0, &step, &mut out).unwrap();
        let ids = &ragged.input.prompt_tokens;
        let number = |i: usize| 12.0 * f64::from(table[ids[i / width] as usize * width + i % width]);
        let embedded: Vec<f64> = (0..tokens.len() * width).map(number).collect();
        assert_close(&backend.read(&out), &embedded, B::TOLERANCE, &format!("a width of {width}"));
        backend.add_positions(&learned, &step, &mut out).unwrap();
        let position = |i: usize| f64::from(positions[tokens[i / width].1 as usize * width + i % width]);
        let sums: Vec<f64> = embedded.iter().enumerate().map(|(i, x)| x + position(i)).collect();
        let what = format!("positions of {width}");
        assert_sums_close(&backend.read(&out), &sums, &embedded, 2.0 * B::TOLERANCE, &what);
    }
}

pub fn a_branch_is_multiplied_and_added<B: Probe>(backend: &B) {
    for (rows, width) in [(1, 1), (3, 33), (17, 1032)] {
        for multiplier in [1.0, 0.25, -1.5] {
            let (x, before) = (numbers(rows * width, 1), numbers(rows * width, 2));
            let tensor = || backend.tensor(rows + PADDING, width).unwrap();
            let (mut branch, mut residual) = (tensor(), tensor());
            backend.fill(&mut branch, &x);
            backend.fill(&mut residual, &before);
            backend.reduce_add(multiplier, rows, &mut branch, &mut residual).unwrap();
            let sum = |(&x, &y): (&f32, &f32)| f64::from(multiplier) * f64::from(x) + f64::from(y);
            let expected: Vec<f64> = x.iter().zip(&before).map(sum).collect();
            let what = format!("{multiplier} times {rows} rows of {width}");
            assert_close(&backend.read(&residual), &expected, 2.0 * B::TOLERANCE, &what);
        }
    }
}

pub fn logits_are_multiplied_and_capped<B: Probe>(backend: &B) {
    for (multiplier, softcap) in [(0.25, None), (1.0, Some(30.0)), (40.0, Some(30.0)), (-2.0, Some(0.5))] {
        for (rows, width) in [(1, 1), (3, VOCAB), (2, 1003)] {
            let logits = numbers(rows * width, 1);
            let mut tensor = backend.logits(rows + PADDING, width).unwrap();
            backend.fill(&mut tensor, &logits);
            backend.warp_logits(Logits { multiplier, softcap }, rows, &mut tensor).unwrap();
            let warped = |&x: &f32| {
                let x = f64::from(multiplier) * f64::from(x);
                softcap.map_or(x, |cap| f64::from(cap) * (x / f64::from(cap)).tanh())
            };
            let expected: Vec<f64> = logits.iter().map(warped).collect();
            let what = format!("{multiplier}, {softcap:?}, {rows} rows of {width}");
            // Logits are f32 on every device.
            assert_close(&backend.read(&tensor), &expected, 4e-6, &what);
        }
    }
}
