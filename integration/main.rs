//! The integration tests: one binary, so that it links once.

mod golden;
mod process;
mod protocol;
mod schedules;
mod support;
mod tidy;
mod tokenizers;
