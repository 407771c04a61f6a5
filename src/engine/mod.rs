//! The one thread that owns pool, batches and executor.

mod call;
mod pulse;
mod thread;

pub use call::{
    Arrival, Capacity, EngineStats, Placement, PrefillCall, Prepared, StepAnswer, Timings, WarmupCall,
};
pub use pulse::{Condition, Pulse};
pub use thread::{EngineConfig, EngineHandle};
