//! kvshard: the process behind an LLM router that holds the GPUs.

pub mod ids;
pub mod error;

pub mod pool;
pub mod sampling;
pub mod text;
pub mod backend;
pub mod model;
pub mod batch;
pub mod engine;

pub mod pb;
pub mod config;
pub mod cli;
pub mod hub;
pub mod telemetry;
pub mod server;
pub mod client;
pub mod commands;
