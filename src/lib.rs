//! kvshard: the process behind an LLM router that holds the GPUs.

pub mod error;
pub mod ids;

pub mod backend;
pub mod batch;
pub mod engine;
pub mod model;
pub mod pool;
pub mod sampling;
pub mod text;

pub mod cli;
pub mod client;
pub mod config;
pub mod hub;
pub mod pb;
pub mod server;
pub mod telemetry;
