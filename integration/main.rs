//! The integration tests: one binary, so that it links once.

mod golden;
mod hostile;
mod neighbours;
mod process;
mod protocol;
mod schedules;
mod support;
mod tidy;
mod tokenizers;
mod transcript;
