//! Rotary embeddings on the GPU.

use super::device::{Buffer, Device};
use super::ffi;
use crate::error::Result;
use crate::model::rope::{Frequencies, Lengths};

/// A rotary embedding: its frequencies, and the cosines and sines of a step.
pub struct Rotary {
    usual: Buffer,
    longer: Option<Buffer>,
    lengths: Lengths,
    amplitude: f32,
    /// Pairs that turn.
    half: usize,
    /// `[max_tokens, half, 2]`.
    angles: Buffer,
}

impl Rotary {
    /// Takes the frequencies to the device, with room for so many tokens.
    pub fn new(device: &Device, frequencies: &Frequencies, max_tokens: usize) -> Result<Rotary> {
        let (usual, longer, amplitude, lengths) = frequencies.parts();
        let table = |numbers: &[f32]| -> Result<Buffer> {
            let buffer = device.alloc(size_of_val(numbers))?;
            device.upload(numbers, buffer.address())?;
            // The numbers are in ordinary memory, which must outlive the copy.
            device.synchronize()?;
            Ok(buffer)
        };
        Ok(Rotary {
            usual: table(usual)?,
            longer: longer.map(table).transpose()?,
            lengths,
            amplitude,
            half: usual.len(),
            angles: device.alloc(max_tokens * usual.len() * 2 * size_of::<f32>())?,
        })
    }

    /// Cosines and sines, as [`super::step::Step::lay_out`] leaves them.
    pub fn angles(&self) -> *const f32 {
        self.angles.ptr()
    }

    /// Pairs that turn.
    pub fn half(&self) -> usize {
        self.half
    }

    /// What the kernels take.
    pub fn params(&self) -> ffi::Rotary {
        use ffi::{KV_GROWS_WITH_PROMPT, KV_GROWS_WITH_SEQUENCE};
        let (original, base, factor, growth) = match self.lengths {
            Lengths::Alike => (u32::MAX, 1.0, 1.0, KV_GROWS_WITH_SEQUENCE),
            Lengths::Two { original } => (original, 1.0, 1.0, KV_GROWS_WITH_SEQUENCE),
            Lengths::Each { original, base, factor } => (original, base, factor, KV_GROWS_WITH_SEQUENCE),
            Lengths::Prompt { trained, base } => (trained, base, 1.0, KV_GROWS_WITH_PROMPT),
        };
        ffi::Rotary {
            usual: self.usual.ptr(),
            longer: self.longer.as_ref().map_or(std::ptr::null(), |longer| longer.ptr::<f32>()),
            angles: self.angles.ptr(),
            base,
            factor,
            original,
            growth,
            half: self.half as i32,
            amplitude: self.amplitude,
        }
    }
}
