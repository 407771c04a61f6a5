//! Text to tokens and back.

mod detokenize;
mod tokenizer;

pub use detokenize::Detokenizer;
pub use tokenizer::Tokenizer;
