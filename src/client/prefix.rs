//! A beginning that all prompts share: computed once, on slots that every request names, as with a router's prefix
//! cache.
//!
//! A prompt is cut at its beginning, so one with a prefix cannot be cut to its length: it is made of words that the
//! model's tokenizer takes for one token each, which the shard is asked about.

use anyhow::{Result, bail};

use super::generate::{random_id, request_of};
use super::load::{Random, WORDS};
use super::placing::Blocks;
use super::shard::{Shard, Step};
use crate::config::Parameters;
use crate::pb::v3;

/// Fewest words that make prompts which differ.
const MIN_WORDS: usize = 8;
/// Repetitions of a word whose tokens are counted, once and twice.
const N_REPEATED: u32 = 8;

/// The beginning of all prompts.
#[derive(Debug)]
pub(super) struct Prefix {
    /// Its length, with what the tokenizer adds before a text.
    pub(super) n_tokens: u32,
    /// Its words.
    pub(super) text: String,
    /// `[n_tokens]` where its KV is; also blocks, of one slot each.
    pub(super) slots: Vec<u32>,
    /// Words of one token.
    pub(super) words: Vec<&'static str>,
}

impl Prefix {
    /// Makes a prefix of `n_tokens`, and has the shard compute it.
    ///
    /// # Errors
    /// The shard's, and a sentence where its tokenizer has too few words of one token, or the prefix does not fit.
    pub(super) async fn compute(
        shard: &mut Shard,
        parameters: &Parameters,
        n_tokens: u32,
        blocks: &mut Blocks,
        random: &mut Random,
    ) -> Result<Prefix> {
        let (words, n_added) = single_words(shard, parameters).await?;
        if words.len() < MIN_WORDS || n_tokens <= n_added {
            bail!(
                "no prefix of {n_tokens} tokens can be made: the tokenizer has {} of the words that are tried as one \
                 token, and adds {n_added}",
                words.len()
            );
        }
        let text = random.text(&words, n_tokens - n_added);
        let Some(slots) = blocks.take(u64::from(n_tokens)) else {
            bail!("a prefix of {n_tokens} tokens does not fit into the shard's pool");
        };
        let request = v3::Request {
            slots: slots.clone(),
            blocks: slots.clone(),
            ..request_of(&text, &Parameters { max_new_tokens: 1, ..parameters.clone() })
        };
        let step = prefill_alone(shard, request).await?;
        if let Some(end) = step.generations.first().and_then(|generation| generation.generated_text.as_ref())
            && end.text.starts_with("[request refused")
        {
            bail!("{}", end.text);
        }
        Ok(Prefix { n_tokens, text, slots, words })
    }
}

/// Words that are one token each, and the number of tokens that come with a text beside its words'.
async fn single_words(shard: &mut Shard, parameters: &Parameters) -> Result<(Vec<&'static str>, u32)> {
    let mut words = Vec::new();
    let mut n_added = 0;
    for word in WORDS {
        let once = count_tokens(shard, parameters, word, N_REPEATED).await?;
        let twice = count_tokens(shard, parameters, word, 2 * N_REPEATED).await?;
        if twice.checked_sub(once) == Some(N_REPEATED) && once >= N_REPEATED {
            words.push(word);
            n_added = once - N_REPEATED;
        }
    }
    Ok((words, n_added))
}

/// Tokens of a word so many times, by the KV slots that a batch with it takes.
async fn count_tokens(shard: &mut Shard, parameters: &Parameters, word: &str, n: u32) -> Result<u32> {
    let text = format!(" {word}").repeat(n as usize);
    let mut request = request_of(&text, &Parameters { max_new_tokens: 2, ..parameters.clone() });
    if let Some(stopping) = &mut request.stopping_parameters {
        stopping.ignore_eos_token = true;
    }
    let Some(batch) = prefill_alone(shard, request).await?.batch else {
        bail!("the shard ends a request of two tokens after one");
    };
    shard.clear(batch.id).await?;
    Ok(batch.max_tokens.saturating_sub(1))
}

async fn prefill_alone(shard: &mut Shard, request: v3::Request) -> Result<Step> {
    let max_blocks = u32::try_from(request.blocks.len())?;
    let batch = v3::Batch { id: random_id(), requests: vec![request], size: 1, max_blocks, max_tokens: 0 };
    Ok(shard.prefill(batch, None).await?)
}
