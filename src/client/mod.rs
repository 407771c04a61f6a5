//! Who asks a shard: a connection, and routers small enough for one purpose. They speak the wire and nothing else,
//! so they can ask any shard of the protocol, also beside a live router.

mod generate;
mod shard;

pub use generate::{Alternative, Ending, Summary, generate};
pub use shard::{Shard, Step};
