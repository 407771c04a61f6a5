//! Batches of requests: what they are answered, and (below) how they are planned and advanced.

mod answer;

pub use answer::{CachedBatch, GeneratedText, Generation, Tokens};
