//! Numbers in and out of the GPU, for the tests of the ops.

use super::tensor::Numbers;
use super::{Cuda, Kv, Tensor};
use crate::backend::conformance::Probe;
use crate::model::checkpoint::DType;
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
