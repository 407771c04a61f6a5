//! Who asks a shard: a connection, and routers small enough for one purpose. They speak the wire and nothing else,
//! so they can ask any shard of the protocol, also beside a live router.

mod bench;
mod generate;
mod load;
mod placing;
mod plot;
mod prefix;
mod record;
mod report;
mod shard;

pub use bench::{Phase, Progress, bench};
pub use generate::{Alternative, Ending, Summary, generate};
pub use plot::svg;
pub use report::{BenchEnding, Distribution, Level, Report};
pub use shard::{CallError, Shard, Step};
