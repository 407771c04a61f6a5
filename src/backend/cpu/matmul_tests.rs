//! Same bits for any number of rows, and the right ones.

use proptest::prelude::*;

use super::*;
use crate::backend::LinearPart;
use crate::model::checkpoint::StoredTensor;
use crate::model::weights::TensorPart;

fn stored(dtype: DType, shape: [usize; 2], numbers: &[f32]) -> StoredTensor {
    let bytes = match dtype {
        DType::F32 => numbers.iter().flat_map(|n| n.to_le_bytes()).collect(),
        DType::F16 => numbers.iter().flat_map(|&n| half::f16::from_f32(n).to_le_bytes()).collect(),
        DType::BF16 => numbers.iter().flat_map(|&n| half::bf16::from_f32(n).to_le_bytes()).collect(),
    };
    StoredTensor::from_bytes(dtype, shape.to_vec(), bytes).unwrap()
}

fn part(dtype: DType, shape: [usize; 2], numbers: &[f32]) -> LinearPart {
    let tensor = stored(dtype, shape, numbers);
    LinearPart { weight: TensorPart::whole(tensor), bias: None }
}

fn numbers(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32)
        .map(|i| crate::backend::random::philox([i, 0, 0, 0], [seed, 1])[0] as f32 / u32::MAX as f32 - 0.5)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_row_has_the_same_bits_alone_and_among_others(
        tokens in 1usize..80, rows in 1usize..60, columns in 1usize..50, seed: u32, dtype in 0usize..3,
    ) {
        let dtype = [DType::F32, DType::F16, DType::BF16][dtype];
        let split = rows / 2;
        let all = numbers(rows * columns, seed);
        let parts = [
            part(dtype, [split, columns], &all[..split * columns]),
            part(DType::F32, [rows - split, columns], &all[split * columns..]),
        ];
        let weight = Weight::new(&parts, 1.0).unwrap();
        let x = numbers(tokens * columns, seed ^ 7);
        let mut together = vec![0.0; tokens * rows];
        matmul(&weight, &x, &mut together).unwrap();
        let mut wide = vec![0.0; columns];
        for (x, together) in x.chunks(columns).zip(together.chunks(rows)) {
            let mut alone = vec![0.0; rows];
            matmul(&weight, x, &mut alone).unwrap();
            prop_assert_eq!(&alone, together);
            for (row, &sum) in alone.iter().enumerate() {
                weight.widen_row(row, &mut wide);
                let exact: f64 = x.iter().zip(&wide).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                prop_assert!((f64::from(sum) - exact).abs() < 1e-5, "{} for {}", sum, exact);
            }
        }
    }
}

#[test]
fn large_products_on_all_cores_agree_with_small_ones() {
    let (tokens, rows, columns) = (130, 100, 200);
    let weight =
        Weight::new(&[part(DType::BF16, [rows, columns], &numbers(rows * columns, 1))], 1.0).unwrap();
    let x = numbers(tokens * columns, 2);
    let mut together = vec![0.0; tokens * rows];
    matmul(&weight, &x, &mut together).unwrap();
    for n in [1, 2, 3, 4, 5, 63, 64, 65] {
        let mut some = vec![0.0; n * rows];
        matmul(&weight, &x[..n * columns], &mut some).unwrap();
        assert_eq!(some, together[..n * rows]);
    }
}
