//! The shard's door: sockets, both versions of the protocol, health, and the way out.
//!
//! Handlers are async and hold nothing. What they are asked becomes a draft without wire types (`v3`, `v2`), is
//! tokenised and checked on the worker pool (`intake`), and goes to the engine; `shard` is the path in between.

mod bind;
mod calls;
mod draft;
mod fit;
mod follower;
mod health;
mod intake;
mod leave;
mod listen;
mod load;
mod memory;
mod run;
mod shard;
mod status;
mod telemetry;
mod v2;
mod v3;

pub use health::Fault;
pub use intake::Intake;
pub use leave::leave;
pub use listen::RunningShard;
pub use load::{LoadPlan, Loaded, describe, load, load_around, locate, plan};
pub use run::{Ending, run};

/// Names under which `grpc.health.v1` knows the shard; the empty one is the whole process.
const SERVICES: [&str; 3] = ["", "generate.v3.TextGenerationService", "generate.v2.TextGenerationService"];
