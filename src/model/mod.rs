//! From a checkpoint to steps.

pub mod checkpoint;
pub mod executor;
pub mod families;
pub mod names;
pub mod partition;
pub mod plan;
pub mod rope;
pub mod spec;
pub mod weights;
