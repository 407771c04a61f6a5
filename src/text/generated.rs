//! A tokenizer for a model that came without one: random weights need ids, lengths and texts, but no meaning.

use std::collections::{BTreeMap, BTreeSet};

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Inner};

use super::Tokenizer;
use super::pieces::char_of;
use super::settings::Settings;
use crate::error::{Error, Result};

/// Letters of English text, the most frequent first.
const LETTERS: &str = "etaoinshrdlcumwfgypbvkjxqz";

/// Frequent English words, which get tokens of their own, as in trained vocabularies: half of a text is made of them.
const WORDS: &str = "the of and to in is that for it as was with be by on not he his but at are this have from or had \
     an they which one you were her all she there would their we him been has when who will more no if out so said \
     what up its about into than them can only other new some could time these two may then do first any my now such \
     like our over man me even most made after also did many before must through back years where much your way well \
     down should because each just those people how too little state good very make world still own see men work long \
     get here between both life being under never day same another know while last might us great old year off come \
     since against go came right used take three states himself few house use during without again place around \
     however home small found thought went say part once general high upon school every does got united left number \
     course war until always away something fact though water less public put think almost hand enough far took head \
     yet government system better set told nothing night end why called eyes find going look asked later knew point \
     next city business give group toward young days let room word within given order love family girl boy friend \
     story door book river garden morning light heart answer question music picture letter country second paper white \
     black large important until side four five six ten read write learn play run turn move live believe bring happen";

impl Tokenizer {
    /// A byte-level BPE of `n_ids` tokens, the same one every time: the 256 bytes, then frequent English words letter
    /// by letter, then pairs of letters, and pairs of what there is, likely ones first. English text takes about
    /// three bytes a token. `bos` goes before a text; it and `eos` are special tokens, those beyond `n_ids` left out.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where `n_ids` has no room for bytes and special tokens.
    pub fn generated(n_ids: u32, bos: Option<u32>, eos: &[u32]) -> Result<Tokenizer> {
        let special = special_tokens(n_ids, bos, eos);
        let n_plain = (n_ids as usize).saturating_sub(special.len());
        if n_plain < 256 {
            return Err(Error::Checkpoint(format!(
                "a vocabulary of {n_ids} has no room for the 256 bytes and {} special tokens that a tokenizer needs",
                special.len()
            )));
        }
        let Plain { tokens, merges } = Plain::new(n_plain);
        let free_ids = (0..n_ids).filter(|id| !special.contains_key(id));
        let mut vocab: Vocab = tokens.into_iter().zip(free_ids).collect();
        vocab.extend(special.iter().map(|(id, token)| (token.clone(), *id)));
        let text_of = |id: &u32| special.get(id).cloned();
        let settings = Settings {
            bos: bos.as_ref().and_then(text_of),
            eos: eos.iter().find_map(text_of),
            add_bos: Some(true),
            ..Settings::default()
        };
        let build = || {
            let mut inner = Inner::new(BPE::builder().vocab_and_merges(vocab, merges).build()?);
            inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
            inner.with_decoder(Some(ByteLevel::default()));
            inner.add_special_tokens(special.into_values().map(|token| AddedToken::from(token, true)))?;
            Ok(inner)
        };
        let inner: tokenizers::Result<Inner> = build();
        let inner = inner.map_err(|error| Error::Bug(format!("no tokenizer can be made: {error}")))?;
        Tokenizer::new(inner, &settings)
    }
}

/// Special tokens by id.
fn special_tokens(n_ids: u32, bos: Option<u32>, eos: &[u32]) -> BTreeMap<u32, String> {
    let mut special = BTreeMap::new();
    for id in eos.iter().copied().filter(|id| *id < n_ids) {
        let text = match special.len() {
            0 => "<|end_of_text|>".to_owned(),
            _ => format!("<|end_of_text_{id}|>"),
        };
        special.entry(id).or_insert(text);
    }
    if let Some(bos) = bos.filter(|id| *id < n_ids) {
        special.entry(bos).or_insert_with(|| "<|begin_of_text|>".to_owned());
    }
    special
}

/// Tokens that stand for text, and the merges that make them, highest priority first.
struct Plain {
    tokens: Vec<String>,
    merges: Vec<(String, String)>,
}

impl Plain {
    fn new(n_tokens: usize) -> Plain {
        let mut plain =
            Plain { tokens: (0..=255).map(|byte| char_of(byte).to_string()).collect(), merges: vec![] };
        plain.add_words(n_tokens);
        plain.add_pairs(n_tokens);
        plain
    }

    /// Words with the space before them, each prefix a token.
    fn add_words(&mut self, n_tokens: usize) {
        let mut known = BTreeSet::new();
        for word in WORDS.split_whitespace() {
            let mut prefix = char_of(b' ').to_string();
            for letter in word.chars() {
                let longer = format!("{prefix}{letter}");
                if known.insert(longer.clone()) {
                    if self.tokens.len() == n_tokens {
                        return;
                    }
                    self.merge(&prefix, &letter.to_string());
                }
                prefix = longer;
            }
        }
    }

    /// All pairs of letters, all pairs of these, and so on by two letters more.
    fn add_pairs(&mut self, n_tokens: usize) {
        let letters: Vec<String> = LETTERS.chars().map(String::from).collect();
        let (mut left, mut right) = (letters.clone(), letters);
        loop {
            let from = self.tokens.len();
            for (first, second) in diagonals(left.len(), right.len()) {
                if self.tokens.len() == n_tokens {
                    return;
                }
                self.merge(&left[first], &right[second]);
            }
            left = self.tokens[from..].to_vec();
            if right.len() == LETTERS.len() {
                right.clone_from(&left);
            }
        }
    }

    fn merge(&mut self, left: &str, right: &str) {
        self.tokens.push(format!("{left}{right}"));
        self.merges.push((left.to_owned(), right.to_owned()));
    }
}

/// All pairs of an index below `n_left` and one below `n_right`, small sums first.
fn diagonals(n_left: usize, n_right: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n_left + n_right - 1).flat_map(move |sum| {
        let lefts = sum.saturating_sub(n_right - 1)..=sum.min(n_left - 1);
        lefts.map(move |left| (left, sum - left))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my \
         purse, and nothing particular to interest me on shore, I thought I would sail about a little and see the \
         watery part of the world.";

    #[test]
    fn a_vocabulary_of_any_size_round_trips_and_every_id_has_a_text() {
        for n_ids in [300, 32_000, 128_256] {
            let (bos, eos) = (n_ids - 2, [n_ids - 1, 7]);
            let tokenizer = Tokenizer::generated(n_ids, Some(bos), &eos).expect("a tokenizer");
            assert_eq!((tokenizer.n_ids(), tokenizer.eos()), (n_ids, Some(n_ids - 1)));
            for text in [TEXT, "", " 12 + 30 = 42\n\tÄpfel, 日本語 🎉"] {
                let ids = tokenizer.encode(text, true, usize::MAX).expect("encodes");
                assert_eq!(ids[0], bos);
                assert_eq!(tokenizer.decode(&ids, true), text, "{n_ids}");
            }
            assert!((0..n_ids).all(|id| !tokenizer.decode(&[id], false).is_empty()), "{n_ids}");
            assert!((0..n_ids).all(|id| tokenizer.is_special(id) == [bos, eos[0], eos[1]].contains(&id)));
        }
    }

    #[test]
    fn english_takes_few_tokens_and_frequent_words_one() {
        let tokenizer = Tokenizer::generated(32_000, None, &[]).expect("a tokenizer");
        let n_tokens = |text: &str| tokenizer.encode(text, true, usize::MAX).expect("encodes").len();
        let bytes_per_token = TEXT.len() as f64 / n_tokens(TEXT) as f64;
        assert!((2.5..5.0).contains(&bytes_per_token), "{bytes_per_token}");
        for word in WORDS.split_whitespace() {
            assert_eq!(n_tokens(&format!(" {word}")), 1, "{word}");
        }
    }

    #[test]
    fn special_ids_beyond_the_vocabulary_are_left_out() {
        let tokenizer = Tokenizer::generated(300, Some(300), &[400, 2]).expect("a tokenizer");
        assert_eq!((tokenizer.n_ids(), tokenizer.eos()), (300, Some(2)));
        assert_eq!(tokenizer.encode("e", true, 9).map(|ids| ids.len()), Ok(1));
    }

    #[test]
    fn begin_and_end_may_be_one_token() {
        let tokenizer = Tokenizer::generated(1000, Some(5), &[5]).expect("a tokenizer");
        assert_eq!((tokenizer.encode("", true, 9), tokenizer.eos()), (Ok(vec![5]), Some(5)));
    }

    #[test]
    fn a_vocabulary_smaller_than_the_bytes_is_refused() {
        assert!(matches!(Tokenizer::generated(257, Some(0), &[1]), Err(Error::Checkpoint(_))));
        assert!(Tokenizer::generated(258, Some(0), &[1]).is_ok());
    }
}
