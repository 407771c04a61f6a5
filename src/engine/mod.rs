//! The one thread that owns pool, batches and executor.

mod call;

pub use call::{
    Arrival, Capacity, EngineStats, Placement, PrefillCall, Prepared, StepAnswer, Timings, WarmupCall,
};
