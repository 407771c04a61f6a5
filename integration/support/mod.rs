//! The harness of the integration tests.

pub mod backend;
pub mod driver;
pub mod engine;
pub mod executor;
pub mod golden;
pub mod http2;
pub mod log;
pub mod oracle;
pub mod process;
pub mod shard;
pub mod synthetic;
pub mod textproto;

pub use engine::{EngineOptions, start_engine, start_patient_engine};

use std::path::PathBuf;

/// A folder of `integration/fixtures`.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("integration/fixtures").join(name)
}
