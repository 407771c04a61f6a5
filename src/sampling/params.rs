//! From a caller's parameters to the device's.

use crate::backend::step::{SamplingParams, Watermark};
use crate::error::Result;

/// Parameters as they came over the wire.
#[derive(Debug, Clone, PartialEq)]
pub struct RawSampling {
    /// Finite, above 0; neutral 1.
    pub temperature: f32,
    /// Neutral 0.
    pub top_k: u32,
    /// In (0, 1]; neutral 1.
    pub top_p: f32,
    /// In (0, 1]; neutral 1.
    pub typical_p: f32,
    /// Asks for a draw also where every other parameter is neutral.
    pub do_sample: bool,
    /// Of the draw.
    pub seed: u64,
    /// Finite, above 0; neutral 1.
    pub repetition_penalty: f32,
    /// Finite; neutral 0.
    pub frequency_penalty: f32,
    /// Asks for the watermark.
    pub watermark: bool,
    /// Alternatives to report.
    pub top_n: u32,
}

/// What the operator configured for sampling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Width of a row of logits; `top_k` and `top_n` are clamped to it.
    pub vocab: u32,
    /// Strength of the watermark where a request asks for one.
    pub watermark: Watermark,
}

impl RawSampling {
    /// Checks and completes the parameters.
    ///
    /// # Errors
    /// [`crate::error::Error::Invalid`] naming the parameter, its value and what it may be.
    pub fn validate(&self, _limits: Limits) -> Result<SamplingParams> {
        todo!()
    }
}
