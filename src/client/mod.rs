//! Callers of a shard: they speak the wire and nothing else, so any shard will do.

mod generate;
mod shard;

pub use generate::{Ending, Summary, generate};
pub use shard::connect;
