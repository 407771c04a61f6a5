//! Texts for vocabularies of SentencePiece: special tokens are found first, and each part between them is normalized.

use std::collections::HashMap;

use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::{AddedToken, AddedVocabulary, OffsetReferential, OffsetType, Tokenizer as Inner};

use super::normalizer::Normalizer;

/// How a text is prepared for the `tokenizers` crate.
pub(super) struct Parts {
    /// Tokens that are found in a text as it is written.
    added: AddedVocabulary,
    /// Their ids, by those that `added` gives them.
    ids: HashMap<u32, u32>,
    normalizer: Normalizer,
    /// Whether each part gets the prefix that a text gets, or only one that begins the text.
    begins_anew: bool,
    /// Whether byte pieces that are spelled in a text must be hidden from the crate.
    hides_bytes: bool,
}

impl Parts {
    /// For texts in which `added` tokens are found, those of them that `inner` knows.
    pub(super) fn new(
        inner: &Inner,
        added: impl IntoIterator<Item = AddedToken>,
        normalizer: Normalizer,
        begins_anew: bool,
        hides_bytes: bool,
    ) -> tokenizers::Result<Parts> {
        let known = added.into_iter().filter(|token| inner.token_to_id(&token.content).is_some());
        let as_written = known.map(|token| token.normalized(false)).collect::<Vec<_>>();
        let mut added = AddedVocabulary::new();
        added.add_tokens(as_written, inner.get_model(), None::<&NormalizerWrapper>)?;
        let id_of = |(id, token): (&u32, &AddedToken)| Some((*id, inner.token_to_id(&token.content)?));
        let ids = added.get_added_tokens_decoder().iter().filter_map(id_of).collect();
        Ok(Parts { added, ids, normalizer, begins_anew, hides_bytes })
    }

    /// Ids of a text.
    pub(super) fn encode(&self, text: &str, inner: &Inner) -> tokenizers::Result<Vec<u32>> {
        let parts = self.added.extract_and_normalize(None::<&NormalizerWrapper>, text);
        let mut ids = Vec::new();
        for (part, (start, _), tokens) in parts.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            if let Some(tokens) = tokens {
                ids.extend(tokens.iter().filter_map(|token| self.ids.get(&token.id)));
                continue;
            }
            let normalized = self.normalizer.normalize(part, self.begins_anew || start == 0);
            let mut rest = normalized.as_str();
            while !rest.is_empty() {
                let (first, others) = rest.split_at(if self.hides_bytes { uncut(rest) } else { rest.len() });
                ids.extend(inner.encode_fast(first, false)?.get_ids());
                rest = others;
            }
        }
        Ok(ids)
    }
}

/// Bytes of a text up to the middle of what may be spelled like a byte piece, such as `<0x41>`.
fn uncut(text: &str) -> usize {
    text.find("<0x").map_or(text.len(), |at| at + 1)
}
