//! Sampling parameters as callers send them, and when to stop.

mod params;
mod stopping;

pub use params::{Limits, RawSampling};
pub use stopping::{FinishReason, RawStopping, Stopping};
