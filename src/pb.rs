//! The wire's messages, generated from `proto/`. Imported by `server` and `client` only.

/// Descriptors of both protocols, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// `generate.v2`.
#[allow(missing_docs, unused_qualifications, clippy::all)]
pub mod v2 {
    tonic::include_proto!("generate.v2");
}

/// `generate.v3`.
#[allow(missing_docs, unused_qualifications, clippy::all)]
pub mod v3 {
    tonic::include_proto!("generate.v3");
}
