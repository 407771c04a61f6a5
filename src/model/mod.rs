//! From a checkpoint to steps.

pub mod spec;
pub mod families;
pub mod names;
pub mod partition;
pub mod checkpoint;
pub mod weights;
pub mod rope;
pub mod plan;
pub mod executor;
