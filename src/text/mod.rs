//! Text to tokens and back.

mod detokenize;
mod generated;
mod pieces;
mod settings;
mod tokenizer;

pub use detokenize::Detokenizer;
pub use tokenizer::Tokenizer;

#[cfg(test)]
mod tests;
