//! `tokenizer.model`: the file of SentencePiece.
//!
//! Field numbers are those of `src/sentencepiece_model.proto` in github.com/google/sentencepiece.

use std::collections::{BTreeSet, HashMap};

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::Replace;
use tokenizers::{AddedToken, DecoderWrapper, Tokenizer as Inner};

use super::encoder::{Algorithm, Encoder};
use super::normalizer::{Kept, Normalizer, Rules, SPACE};
use super::protobuf::{Fields, Malformed, Value};

/// Longest piece; `SentencePiece` itself makes them of at most 16 characters unless told otherwise.
const MAX_PIECE_BYTES: usize = 512;

/// Most pieces; published models have up to 256,000.
const MAX_PIECES: usize = 1 << 22;

/// What a piece is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    /// What no other piece stands for.
    Unknown,
    /// Of the protocol between model and program: never found in a text.
    Control,
    /// Found in a text before all others, and never part of them.
    UserDefined,
    /// One byte of a character that no piece stands for.
    Byte,
}

#[derive(Debug, Clone, PartialEq)]
struct Piece {
    text: String,
    score: f32,
    kind: Kind,
}

/// A model file.
#[derive(Debug)]
pub(super) struct Model {
    pieces: Vec<Piece>,
    algorithm: Algorithm,
    has_byte_fallback: bool,
    adds_dummy_prefix: bool,
    removes_extra_spaces: bool,
    rules: Option<Rules>,
    /// Names of the begin and end tokens, as the trainer had them.
    pub(super) bos: String,
    pub(super) eos: String,
}

impl Model {
    /// # Errors
    /// What is wrong with the file, as the end of a sentence.
    pub(super) fn parse(file: &[u8]) -> Result<Model, String> {
        let mut model = Model {
            pieces: Vec::new(),
            algorithm: Algorithm::Unigram,
            has_byte_fallback: false,
            adds_dummy_prefix: true,
            removes_extra_spaces: true,
            rules: None,
            bos: "<s>".to_owned(),
            eos: "</s>".to_owned(),
        };
        for field in fields(file) {
            match field? {
                (1, Value::Bytes(_)) if model.pieces.len() == MAX_PIECES => {
                    return Err(format!("it has more than {MAX_PIECES} pieces"));
                }
                (1, Value::Bytes(piece)) => {
                    let piece = Piece::parse(piece, model.pieces.len())?;
                    model.pieces.push(piece);
                }
                (2, Value::Bytes(spec)) => model.read_trainer(spec)?,
                (3, Value::Bytes(spec)) => model.read_normalizer(spec)?,
                (5, Value::Bytes(spec)) => refuse_denormalizer(spec)?,
                _ => {}
            }
        }
        model.check()?;
        Ok(model)
    }

    fn read_trainer(&mut self, spec: &[u8]) -> Result<(), String> {
        for field in fields(spec) {
            match field? {
                (3, Value::Number(1)) => self.algorithm = Algorithm::Unigram,
                (3, Value::Number(2)) => self.algorithm = Algorithm::Bpe,
                (3, Value::Number(other)) => {
                    let name = match other {
                        3 => "WORD",
                        4 => "CHAR",
                        _ => "unknown",
                    };
                    return Err(format!("its model_type is {name}; UNIGRAM and BPE can be read"));
                }
                (24, Value::Number(1..)) => {
                    return Err("it has treat_whitespace_as_suffix, which cannot be read".to_owned());
                }
                (35, Value::Number(is_on)) => self.has_byte_fallback = is_on != 0,
                (46, Value::Bytes(name)) => self.bos = text(name, "the name of its begin token")?,
                (47, Value::Bytes(name)) => self.eos = text(name, "the name of its end token")?,
                _ => {}
            }
        }
        Ok(())
    }

    fn read_normalizer(&mut self, spec: &[u8]) -> Result<(), String> {
        for field in fields(spec) {
            match field? {
                (2, Value::Bytes([])) => {}
                (2, Value::Bytes(charsmap)) => {
                    let rules = Rules::parse(charsmap);
                    self.rules =
                        Some(rules.map_err(|why| format!("its precompiled_charsmap cannot be read: {why}"))?);
                }
                (3, Value::Number(is_on)) => self.adds_dummy_prefix = is_on != 0,
                (4, Value::Number(is_on)) => self.removes_extra_spaces = is_on != 0,
                (5, Value::Number(0)) => {
                    return Err("its escape_whitespaces is false, which cannot be read".to_owned());
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        let mut known = BTreeSet::new();
        for (id, piece) in self.pieces.iter().enumerate() {
            if !known.insert(piece.text.as_str()) {
                return Err(format!("piece {id} is {:?} once more", piece.text));
            }
        }
        match self.of_kind(Kind::Unknown).count() {
            1 => {}
            n => return Err(format!("it has {n} pieces for what is unknown; it must be one")),
        }
        let bytes: BTreeSet<&str> = self.of_kind(Kind::Byte).map(|(_, piece)| piece.text.as_str()).collect();
        let is_missing = |byte: &u8| !bytes.contains(byte_piece(*byte).as_str());
        match (0..=u8::MAX).find(is_missing).filter(|_| self.has_byte_fallback) {
            Some(byte) => Err(format!("it has byte_fallback, and no piece {}", byte_piece(byte))),
            None => Ok(()),
        }
    }

    /// Pieces with their ids.
    fn of_kind(&self, kind: Kind) -> impl Iterator<Item = (u32, &Piece)> {
        let pieces = (0..).zip(&self.pieces);
        pieces.filter(move |(_, piece)| piece.kind == kind)
    }

    /// Number of pieces.
    pub(super) fn n_pieces(&self) -> u32 {
        self.pieces.len() as u32
    }

    /// Texts of the pieces that `transformers` takes for special tokens, wherever they stand in a text.
    pub(super) fn special(&self) -> impl Iterator<Item = &str> {
        let special = self.pieces.iter().filter(|piece| matches!(piece.kind, Kind::Control | Kind::Unknown));
        special.map(|piece| piece.text.as_str())
    }

    /// The crate's tokenizer: which id is which piece, and how pieces become text. It does not encode.
    pub(super) fn vocabulary(&self) -> tokenizers::Result<Inner> {
        let vocab: Vocab = (0..).zip(&self.pieces).map(|(id, piece)| (piece.text.clone(), id)).collect();
        let mut inner = Inner::new(BPE::builder().vocab_and_merges(vocab, Vec::new()).build()?);
        inner.add_special_tokens(
            self.special().map(|text| AddedToken::from(text, true)).collect::<Vec<_>>(),
        )?;
        let mut steps: Vec<DecoderWrapper> = vec![
            Replace::new(SPACE.to_string(), " ")?.into(),
            ByteFallback::new().into(),
            Fuse::new().into(),
        ];
        // SentencePiece removes further spaces too where it removes extra ones. A piece of an answer cannot know how
        // many went before it.
        if self.adds_dummy_prefix || self.removes_extra_spaces {
            steps.push(Strip::new(' ', 1, 0).into());
        }
        inner.with_decoder(Some(Sequence::new(steps)));
        Ok(inner)
    }

    /// How a text is normalized, and how pieces are found in it then.
    pub(super) fn into_rules(self) -> (Normalizer, Encoder) {
        let user_defined =
            Kept::new(self.of_kind(Kind::UserDefined).map(|(_, piece)| piece.text.clone()).collect());
        // With byte fallback SentencePiece has no use for a piece of the character NUL.
        let is_found = |text: &str| !(self.has_byte_fallback && text == "\0");
        let found = self.of_kind(Kind::Normal).chain(self.of_kind(Kind::UserDefined));
        let pieces: HashMap<String, u32> = found
            .filter(|(_, piece)| is_found(&piece.text))
            .map(|(id, piece)| (piece.text.clone(), id))
            .collect();
        let bytes: HashMap<&str, u32> =
            self.of_kind(Kind::Byte).map(|(id, piece)| (piece.text.as_str(), id)).collect();
        let byte = |byte: u8| bytes.get(byte_piece(byte).as_str()).copied();
        let scores = self.of_kind(Kind::Normal).map(|(_, piece)| piece.score);
        let encoder = Encoder {
            algorithm: self.algorithm,
            user_defined: user_defined.clone(),
            score_range: scores
                .fold((f32::MAX, f32::MIN), |(min, max), score| (min.min(score), max.max(score))),
            scores: self.pieces.iter().map(|piece| piece.score).collect(),
            max_piece_bytes: pieces.keys().map(String::len).max().unwrap_or(0),
            pieces,
            unknown: self.of_kind(Kind::Unknown).map(|(id, _)| id).next().unwrap_or(0),
            bytes: if self.has_byte_fallback { (0..=u8::MAX).map(byte).collect() } else { None },
        };
        let normalizer = Normalizer {
            kept: user_defined,
            rules: self.rules,
            adds_dummy_prefix: self.adds_dummy_prefix,
            removes_extra_spaces: self.removes_extra_spaces,
        };
        (normalizer, encoder)
    }
}

impl Piece {
    fn parse(message: &[u8], id: usize) -> Result<Piece, String> {
        let mut piece = Piece { text: String::new(), score: 0.0, kind: Kind::Normal };
        for field in fields(message) {
            match field? {
                (1, Value::Bytes(bytes)) => piece.text = text(bytes, &format!("piece {id}"))?,
                (2, Value::Float(score)) => piece.score = score,
                (3, Value::Number(kind)) => {
                    piece.kind = match kind {
                        1 => Kind::Normal,
                        2 => Kind::Unknown,
                        3 => Kind::Control,
                        4 => Kind::UserDefined,
                        6 => Kind::Byte,
                        5 => return Err(format!("piece {id} is UNUSED, which cannot be read")),
                        other => return Err(format!("piece {id} is of the unknown kind {other}")),
                    }
                }
                _ => {}
            }
        }
        match (piece.text.len(), piece.score) {
            (0, _) => Err(format!("piece {id} is empty")),
            (n @ MAX_PIECE_BYTES.., _) => {
                Err(format!("piece {id} has {n} bytes; fewer than {MAX_PIECE_BYTES} are read"))
            }
            (_, score) if !score.is_finite() => Err(format!("the score of piece {id} is {score}")),
            _ => Ok(piece),
        }
    }
}

/// The piece that stands for a byte.
fn byte_piece(byte: u8) -> String {
    format!("<0x{byte:02X}>")
}

/// A rewriting of decoded text, which no model of a published family has.
fn refuse_denormalizer(spec: &[u8]) -> Result<(), String> {
    for field in fields(spec) {
        if let (2, Value::Bytes([_, ..])) = field? {
            return Err("it has a denormalizer_spec with rules, which cannot be read".to_owned());
        }
    }
    Ok(())
}

fn fields(message: &[u8]) -> impl Iterator<Item = Result<(u64, Value<'_>), String>> {
    Fields::of(message).map(|field| field.map_err(|Malformed| "it is no protobuf, or cut short".to_owned()))
}

fn text(bytes: &[u8], what: &str) -> Result<String, String> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(format!("{what} is no UTF-8")),
    }
}

#[cfg(test)]
mod tests;
