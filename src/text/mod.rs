//! Text to tokens and back.

mod detokenize;
mod encoder;
mod from_sentencepiece;
mod generated;
mod normalizer;
mod parts;
mod pieces;
mod protobuf;
mod sentencepiece;
mod settings;
mod tiktoken;
mod tokenizer;

pub use detokenize::Detokenizer;
pub use tokenizer::Tokenizer;

#[cfg(test)]
mod tests;
