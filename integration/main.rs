//! The integration tests: one binary, so that it links once.

mod protocol;
mod schedules;
mod support;
mod tidy;
