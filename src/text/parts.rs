//! Texts for vocabularies of SentencePiece: special tokens are found first, then pieces in each part between them.

use std::collections::HashMap;

use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::{AddedToken, AddedVocabulary, OffsetReferential, OffsetType, Tokenizer as Inner};

use super::encoder::Encoder;
use super::normalizer::Normalizer;

/// How a text becomes ids.
pub(super) struct Parts {
    /// Tokens that are found in a text as it is written.
    added: AddedVocabulary,
    /// Their ids, by those that `added` gives them.
    ids: HashMap<u32, u32>,
    normalizer: Normalizer,
    encoder: Encoder,
    /// Whether each part gets the prefix that a text gets, or only one that begins the text.
    begins_anew: bool,
}

impl Parts {
    /// For texts in which `added` tokens are found, those of them that `inner` knows.
    pub(super) fn new(
        inner: &Inner,
        added: impl IntoIterator<Item = AddedToken>,
        (normalizer, encoder): (Normalizer, Encoder),
        begins_anew: bool,
    ) -> tokenizers::Result<Parts> {
        let known = added.into_iter().filter(|token| inner.token_to_id(&token.content).is_some());
        let as_written = known.map(|token| token.normalized(false)).collect::<Vec<_>>();
        let mut added = AddedVocabulary::new();
        added.add_tokens(as_written, inner.get_model(), None::<&NormalizerWrapper>)?;
        let id_of = |(id, token): (&u32, &AddedToken)| Some((*id, inner.token_to_id(&token.content)?));
        let ids = added.get_added_tokens_decoder().iter().filter_map(id_of).collect();
        Ok(Parts { added, ids, normalizer, encoder, begins_anew })
    }

    /// Ids of a text.
    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        let parts = self.added.extract_and_normalize(None::<&NormalizerWrapper>, text);
        let mut ids = Vec::new();
        for (part, (start, _), tokens) in parts.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            if let Some(tokens) = tokens {
                ids.extend(tokens.iter().filter_map(|token| self.ids.get(&token.id)));
                continue;
            }
            let normalized = self.normalizer.normalize(part, self.begins_anew || start == 0);
            ids.extend(self.encoder.encode(&normalized));
        }
        ids
    }
}
