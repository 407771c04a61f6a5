//! The integration tests: one binary, so that it links once.

mod abandoned;
mod bench;
mod broken_models;
mod families;
mod faults;
mod golden;
mod hostile;
mod invariance;
mod launcher;
mod loading;
mod neighbours;
mod process;
mod protocol;
mod run_ahead;
mod schedules;
mod support;
mod telemetry;
mod tidy;
mod tokenizers;
mod transcript;
