//! Text to tokens and back.

mod bytes;
mod detokenize;
mod tokenizer;

pub use detokenize::Detokenizer;
pub use tokenizer::Tokenizer;
