//! Newtypes for the numbers that travel together, so that they cannot be swapped.

use std::fmt;

/// A request, numbered by the router that sent it; unique among that router's live requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

impl RequestId {
    /// The id of a router's model-level health probe, and of the batch that carries it.
    pub const PROBE: RequestId = RequestId(u64::MAX);
}

/// Which revision of the shard protocol a batch came in by; each numbers its batches on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// `generate.v2`.
    V2,
    /// `generate.v3`.
    V3,
}

/// A cached batch: the handle of Decode, FilterBatch and ClearCache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId {
    /// The protocol by which the batch came.
    pub protocol: Protocol,
    /// The router's number.
    pub number: u64,
}

/// A live request's place on the device: its slot table, last token and sampling state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lane(pub u32);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for BatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.number.fmt(f)
    }
}
