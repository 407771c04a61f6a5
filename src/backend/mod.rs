//! The seam under the decoder.

pub mod random;
pub mod step;
