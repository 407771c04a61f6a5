//! From a checkpoint to steps.

pub mod checkpoint;
pub mod executor;
pub mod names;
pub mod partition;
pub mod spec;
pub mod weights;
