//! The core error: who is at fault, and a sentence with the numbers that explain it.

use std::fmt;

/// Shorthand for results of the core.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, by whose fault it was. Messages are lower-case sentences without a full stop, short enough
/// for an end user's screen, without paths where they can reach one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The caller sent what nobody could serve.
    Invalid(String),
    /// The caller named a batch that is not here.
    UnknownBatch(String),
    /// The caller asked for what this build does not do.
    Unsupported(String),
    /// The caller asked out of turn, or beyond what the operator configured.
    Precondition(String),
    /// There is no room: slots, lanes or memory.
    Exhausted(String),
    /// The process is on its way out.
    ShuttingDown,
    /// A model's files are wrong: named, with the numbers.
    Checkpoint(String),
    /// The device failed a step.
    Device(String),
    /// The device, or one of its ranks, is gone: no step can run any more.
    DeviceLost(String),
    /// A fault of ours.
    Bug(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Invalid(text)
            | Error::UnknownBatch(text)
            | Error::Unsupported(text)
            | Error::Precondition(text)
            | Error::Exhausted(text)
            | Error::Checkpoint(text)
            | Error::Device(text)
            | Error::DeviceLost(text)
            | Error::Bug(text) => f.write_str(text),
            Error::ShuttingDown => f.write_str("the shard is shutting down"),
        }
    }
}

impl std::error::Error for Error {}
