//! Numbers in and out of the GPU, for the tests of the ops; and the ways of a product, of which a step takes one.

use super::linear::{Call, Choice};
use super::tensor::Numbers;
use super::{Cuda, Kv, Tensor};
use crate::backend::conformance::Probe;
use crate::backend::{Backend, LinearPart, Product};
use crate::model::checkpoint::{DType, StoredTensor};
use crate::model::spec::Activation;
use crate::model::weights::TensorPart;
use half::{bf16, f16};

impl Cuda {
    fn narrow(&self, x: f32) -> u16 {
        if self.dtype == DType::F16 { f16::from_f32(x).to_bits() } else { bf16::from_f32(x).to_bits() }
    }

    fn widen(&self, bits: u16) -> f32 {
        if self.dtype == DType::F16 { f16::from_bits(bits).to_f32() } else { bf16::from_bits(bits).to_f32() }
    }

    fn write<T>(&self, numbers: &[T], to: u64) {
        self.device.upload(numbers, to).unwrap();
        self.device.synchronize().unwrap();
    }

    fn read_back<T: Copy + Default>(&self, n: usize, from: u64) -> Vec<T> {
        let mut numbers = vec![T::default(); n];
        self.device.synchronize().unwrap();
        // SAFETY: the buffer has so many numbers.
        unsafe { cudarc::driver::result::memcpy_dtoh_sync(&mut numbers, from) }.unwrap();
        numbers
    }
}

impl Probe for Cuda {
    /// Of the narrower of the two: bf16 keeps eight bits.
    const TOLERANCE: f64 = 1.0 / 256.0;

    fn fill(&self, tensor: &mut Tensor, numbers: &[f32]) {
        let n_rows = tensor.rows;
        // Between the rows there are zeros, on which products rely.
        let mut values = vec![0f32; n_rows * tensor.stride];
        for row in 0..n_rows {
            for column in 0..tensor.width {
                let given = numbers.get(row * tensor.width + column);
                values[row * tensor.stride + column] = given.copied().unwrap_or(f32::NAN);
            }
        }
        let to = tensor.buffer().address();
        match tensor.numbers {
            Numbers::Single => self.write(&values, to),
            Numbers::Half => {
                self.write(&values.iter().map(|&x| self.narrow(x)).collect::<Vec<u16>>(), to);
            }
        }
    }

    fn read(&self, tensor: &Tensor) -> Vec<f32> {
        let n_rows = tensor.rows;
        let (n, from) = (n_rows * tensor.stride, tensor.buffer().address());
        let values: Vec<f32> = match tensor.numbers {
            Numbers::Single => self.read_back(n, from),
            Numbers::Half => self.read_back(n, from).into_iter().map(|bits| self.widen(bits)).collect(),
        };
        values.chunks(tensor.stride).flat_map(|row| row[..tensor.width].to_vec()).collect()
    }

    fn fill_kv(&self, kv: &mut Kv, keys: &[f32], values: &[f32]) {
        for (buffer, numbers) in [(&kv.keys, keys), (&kv.values, values)] {
            self.write(&numbers.iter().map(|&x| self.narrow(x)).collect::<Vec<u16>>(), buffer.address());
        }
    }

    fn read_kv(&self, kv: &Kv) -> (Vec<f32>, Vec<f32>) {
        let read = |buffer: &super::Buffer, n| {
            let bits: Vec<u16> = self.read_back(n, buffer.address());
            bits.into_iter().map(|bits| self.widen(bits)).collect()
        };
        let [n_keys, n_values] = kv.n_numbers;
        (read(&kv.keys, n_keys), read(&kv.values, n_values))
    }
}

/// Eighths in [−1, 1], which every dtype holds exactly, as their products' sums are in f32.
fn eighths(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + i / 13 + seed * 31) % 17) as f32 / 8.0 - 1.0).collect()
}

/// Rows of a bf16 tensor.
fn part(rows: usize, columns: usize, numbers: &[f32]) -> TensorPart {
    let bytes = numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
    let tensor = StoredTensor::from_bytes(DType::BF16, vec![rows, columns], bytes).unwrap();
    TensorPart::whole(tensor)
}

/// What a product must give: of `[rows, outputs]`, bias included, and what `out` held before.
fn expected(product: Product, outputs: usize, products: &[f64], before: &[f32]) -> Vec<f64> {
    let silu = |x: f64| x / (1.0 + (-x).exp());
    match product {
        Product::Stored | Product::Logits => products.to_vec(),
        Product::Activated(_) => products.iter().copied().map(silu).collect(),
        Product::Added => products.iter().zip(before).map(|(x, &before)| x + f64::from(before)).collect(),
        Product::Gated(_) => {
            let row = |row: &[f64]| -> Vec<f64> {
                let (gate, up) = row.split_at(outputs / 2);
                gate.iter().zip(up).map(|(&gate, &up)| silu(gate) * up).collect()
            };
            products.chunks(outputs).flat_map(row).collect()
        }
    }
}

#[test]
fn every_way_of_a_product_gives_it() {
    // Numbers of rows for every kind of kernel, on either side of its tiles; inputs and outputs that fill none.
    let shapes =
        [(1, 64, 96), (9, 200, 52), (70, 136, 260), (130, 328, 500), (256, 64, 512), (300, 72, 1000)];
    let products = [
        Product::Stored,
        Product::Logits,
        Product::Added,
        Product::Gated(Activation::Silu),
        Product::Activated(Activation::Silu),
    ];
    for dtype in [DType::BF16, DType::F16] {
        let mut cuda = Cuda::new(0, dtype).unwrap();
        cuda.attach().unwrap();
        for ((rows, inputs, outputs), has_bias) in shapes.into_iter().zip([true, false].into_iter().cycle()) {
            let (w, b) = (eighths(outputs * inputs, 1), eighths(outputs, 2));
            let bias = has_bias.then(|| part(outputs, 1, &b));
            let weight = cuda.weight(&[LinearPart { weight: part(outputs, inputs, &w), bias }], 1.0).unwrap();
            let values = eighths(rows * inputs, 3);
            let mut x = cuda.tensor(rows + 3, inputs).unwrap();
            cuda.fill(&mut x, &values);
            let sum = |(row, output): (usize, usize)| {
                let terms = values[row * inputs..][..inputs].iter().zip(&w[output * inputs..][..inputs]);
                let bias = if has_bias { f64::from(b[output]) } else { 0.0 };
                terms.map(|(&x, &w)| f64::from(x * w)).sum::<f64>() + bias
            };
            let sums: Vec<f64> =
                (0..rows).flat_map(|row| (0..outputs).map(move |output| (row, output))).map(sum).collect();
            for product in products {
                let width = if matches!(product, Product::Gated(_)) { outputs / 2 } else { outputs };
                let before = eighths(rows * width, 4);
                let expected = expected(product, outputs, &sums, &before);
                let mut out = match product {
                    Product::Logits => cuda.logits(rows + 3, width).unwrap(),
                    _ => cuda.tensor(rows + 3, width).unwrap(),
                };
                let scratch = cuda.tensor(rows, outputs).unwrap();
                let call = Call { weight: &weight, product, rows, x: &x, out: &out, scratch: Some(&scratch) };
                let own = (0..cuda.linear.n_own_variants(&call)).map(|variant| Choice::Own { variant });
                let library = cuda.linear.candidates(&call, 6).unwrap().into_iter().map(Choice::Library);
                let ways: Vec<Choice> = own.chain(library).collect();
                assert!(!ways.is_empty(), "no way for {rows} × {inputs} → {outputs}, {product:?}");
                for way in ways {
                    cuda.fill(&mut out, if product == Product::Added { &before } else { &[] });
                    let call =
                        Call { weight: &weight, product, rows, x: &x, out: &out, scratch: Some(&scratch) };
                    if !cuda.linear.run_by(&call, &way).unwrap() {
                        continue;
                    }
                    let got = cuda.read(&out);
                    for (i, (&got, &expected)) in got.iter().zip(&expected).enumerate() {
                        // The library may round product, bias and residual one after the other.
                        let term = if product == Product::Added { sums[i].abs() } else { 1.0 };
                        let scale = expected.abs().max(term).max(1.0);
                        assert!(
                            (f64::from(got) - expected).abs() <= 4.0 * Cuda::TOLERANCE * scale,
                            "{way:?}, {rows} × {inputs} → {outputs}, {product:?}, {dtype:?}, number {i}: {got} \
                             instead of {expected}"
                        );
                    }
                    assert!(
                        got[rows * width..].iter().all(|x| x.is_nan()),
                        "{way:?} wrote beyond {rows} rows"
                    );
                }
            }
        }
    }
}
