//! kvshard: the process behind an LLM router that holds the GPUs.
//!
//! A router sends requests over gRPC and says where each one's keys and values go; this library tokenises,
//! computes, samples and detokenises. Modules in reading order; who may import whom is checked by
//! `integration/tidy.rs`:
//!
//! | module | what |
//! |---|---|
//! | [`ids`], [`error`] | numbers that cannot be swapped; who is at fault |
//! | [`backend`] | the device: what a step is, the ops of a transformer, the CPU's and the GPU's |
//! | [`model`] | a checkpoint as a spec, its tensors, ranks; the one decoder, as an executor of steps |
//! | [`pool`] | slots: who holds them, and what their contents were computed from |
//! | [`sampling`], [`text`] | parameters and stopping; text to tokens and back |
//! | [`batch`] | requests that step together: planned into steps, advanced by their outcome |
//! | [`engine`] | the one thread that owns all of the above |
//! | [`pb`], [`server`], [`client`] | the wire, and who speaks it |
//! | [`config`], [`cli`], [`hub`], [`telemetry`], [`commands`] | the edge: flags, files, logs |
//!
//! Invariants:
//! - Every rank gets the same steps in the same order.
//! - One compute stream a rank, so a slot freed by the host cannot be overwritten before the device has read it.
//! - After warm-up a step allocates nothing on the device.
//! - Slot 0 is never leased.
//! - A batch is in the store or in a call's step, never both. A step that runs ahead holds none: it knows the batch by
//!   its id, and each request its row.
//! - The core cannot log: what is worth telling, it returns.
//! - No hash map where order reaches the device.

pub mod ids;

pub mod error;

pub mod backend;

pub mod model;

pub mod pool;

pub mod sampling;

pub mod text;

pub mod batch;

pub mod engine;

pub mod pb;

pub mod server;

pub mod client;

pub mod config;

pub mod cli;

pub mod hub;

pub mod telemetry;

pub mod commands;
