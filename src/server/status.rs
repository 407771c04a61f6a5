//! The one table from errors to gRPC statuses.

use tonic::{Code, Status};

use crate::error::Error;

/// The code of an error; routers read the message only, people and other clients both.
fn code_of(error: &Error) -> Code {
    match error {
        Error::Invalid(_) => Code::InvalidArgument,
        Error::UnknownBatch(_) => Code::NotFound,
        Error::Unsupported(_) => Code::Unimplemented,
        Error::Precondition(_) => Code::FailedPrecondition,
        Error::Exhausted(_) => Code::ResourceExhausted,
        Error::ShuttingDown => Code::Unavailable,
        Error::Checkpoint(_) | Error::Device(_) | Error::DeviceLost(_) | Error::Bug(_) => Code::Internal,
    }
}

/// Longest message: it travels in an HTTP/2 header, and ends on a user's screen.
const MAX_MESSAGE_BYTES: usize = 2048;

/// The status of an error.
pub(super) fn status_of(error: &Error) -> Status {
    let mut message = error.to_string();
    if message.len() > MAX_MESSAGE_BYTES {
        let end = (0..=MAX_MESSAGE_BYTES).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
        message.truncate(end);
        message.push('…');
    }
    Status::new(code_of(error), message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_has_its_code() {
        let text = || "why".to_owned();
        for (error, code) in [
            (Error::Invalid(text()), Code::InvalidArgument),
            (Error::UnknownBatch(text()), Code::NotFound),
            (Error::Unsupported(text()), Code::Unimplemented),
            (Error::Precondition(text()), Code::FailedPrecondition),
            (Error::Exhausted(text()), Code::ResourceExhausted),
            (Error::ShuttingDown, Code::Unavailable),
            (Error::Checkpoint(text()), Code::Internal),
            (Error::Device(text()), Code::Internal),
            (Error::DeviceLost(text()), Code::Internal),
            (Error::Bug(text()), Code::Internal),
        ] {
            let status = status_of(&error);
            assert_eq!(status.code(), code);
            assert_eq!(status.message(), error.to_string());
        }
    }

    #[test]
    fn a_message_fits_a_header() {
        let status = status_of(&Error::Invalid("ü".repeat(5000)));
        assert!(status.message().len() <= MAX_MESSAGE_BYTES + 3);
    }
}
