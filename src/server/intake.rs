//! From a caller's requests to what the engine takes: tokenised and checked, each on its own.
//!
//! A request that cannot be served becomes an [`Arrival`] that says why; the engine decides what that means for
//! the call. What is wrong with the call as a whole is the call's error.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::draft::{Grammar, RequestDraft};
use crate::engine::{Arrival, Capacity, Placement, Prepared};
use crate::error::{Error, Result};
use crate::ids::RequestId;
use crate::sampling::Limits;
use crate::text::Tokenizer;

/// What requests are checked against. Shared by calls.
pub struct Intake {
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The model's end-of-text ids, sorted.
    pub eos: Arc<[u32]>,
    /// What the operator configured for sampling; its `vocab` bounds prompt ids too.
    pub limits: Limits,
    /// Whether log-probabilities of prompt tokens are answered.
    pub prompt_logprobs: bool,
    /// Names by which clients may call the model itself.
    pub model_names: Vec<String>,
    /// When an unknown adapter was last mentioned.
    pub adapter_warning: Mutex<Option<Instant>>,
}

/// What the prompts of a call are for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Purpose {
    /// An answer, within these limits.
    Serve(Capacity),
    /// Finding out what the limits are; only the length of a prompt matters.
    Warmup,
}

/// Unknown adapters are mentioned this often at most.
const ADAPTER_WARNING_EVERY: Duration = Duration::from_secs(60);
/// Of a longer warm-up text this much is tokenised, and repeated.
const WARMUP_PIECE_BYTES: usize = 16 << 10;
/// Fewer bytes of text than this are not worth a second thread.
const PARALLEL_FROM_BYTES: usize = 4 << 10;

pub(super) fn no_batch() -> Error {
    Error::Invalid("the call has no batch".to_owned())
}

/// Checks what concerns a call as a whole: that it has requests, as many as it says, and (in service) each once.
///
/// # Errors
/// [`Error::Invalid`].
pub(super) fn check_batch(drafts: &[RequestDraft], size: u32, purpose: Purpose) -> Result<()> {
    if drafts.is_empty() {
        return Err(Error::Invalid("the batch has no requests".to_owned()));
    }
    if usize::try_from(size) != Ok(drafts.len()) {
        let n = drafts.len();
        return Err(Error::Invalid(format!("the batch says size {size} and has {n} requests")));
    }
    let mut seen = HashSet::with_capacity(drafts.len());
    match (purpose, drafts.iter().find(|draft| !seen.insert(draft.id))) {
        (Purpose::Serve(_), Some(twice)) => {
            Err(Error::Invalid(format!("request {} is in the batch twice", twice.id)))
        }
        _ => Ok(()),
    }
}

impl Intake {
    /// Prepares the requests of a call, on the threads of the worker pool. Blocks.
    pub(super) fn prepare_all(&self, drafts: Vec<RequestDraft>, purpose: Purpose) -> Vec<Arrival> {
        for draft in &drafts {
            self.mention_unknown_adapter(draft);
        }
        let arrival = |draft: RequestDraft| Arrival { id: draft.id, prepared: self.prepare(draft, purpose) };
        let n_bytes: usize = drafts.iter().map(|draft| draft.prompt.len()).sum();
        if drafts.len() == 1 || n_bytes < PARALLEL_FROM_BYTES {
            return drafts.into_iter().map(arrival).collect();
        }
        drafts.into_par_iter().map(arrival).collect()
    }

    fn prepare(&self, draft: RequestDraft, purpose: Purpose) -> Result<Prepared> {
        if draft.truncate == 0 {
            return Err(Error::Invalid("truncate is 0; it must be at least 1".to_owned()));
        }
        check_grammar(draft.grammar)?;
        let sampling = draft.sampling.validate(self.limits)?;
        let prompt = self.encode(&draft, purpose)?;
        let stopping = draft.stopping.clone().validate(&self.eos)?;
        let max_new_tokens = stopping.max_new_tokens();
        check_prompt(&prompt, self.limits.vocab)?;
        // Lengths above u32 cannot come from a message of less than 4 GiB.
        let prompt_len = u32::try_from(prompt.len())
            .map_err(|_| Error::Invalid(format!("the prompt has {} tokens", prompt.len())))?;
        if let Purpose::Serve(capacity) = purpose {
            check_length(prompt_len, max_new_tokens, capacity)?;
        }
        let (placement, chunk_len) = place(&draft, prompt_len, max_new_tokens)?;
        let prompt_logprobs = draft.prompt_logprobs && self.prompt_logprobs;
        Ok(Prepared { prompt, sampling, stopping, prompt_logprobs, placement, chunk_len })
    }

    fn encode(&self, draft: &RequestDraft, purpose: Purpose) -> Result<Vec<u32>> {
        let truncate = usize::try_from(draft.truncate).unwrap_or(usize::MAX);
        let piece = match purpose {
            Purpose::Warmup => leading_bytes(&draft.prompt, WARMUP_PIECE_BYTES),
            Purpose::Serve(_) => draft.prompt.as_str(),
        };
        let ids = self.tokenizer.encode(piece, draft.add_special_tokens, truncate)?;
        Ok(stretch(ids, piece.len(), draft.prompt.len(), truncate))
    }

    /// Routers put the client's name for the model here, so an unknown name is no error.
    fn mention_unknown_adapter(&self, draft: &RequestDraft) {
        let Some(name) = draft.adapter.as_deref().filter(|name| !name.is_empty()) else { return };
        if self.model_names.iter().any(|known| known == name) {
            return;
        }
        // A poisoned lock protects nothing but the time of the last warning.
        let mut last = self.adapter_warning.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if last.is_none_or(|at| at.elapsed() >= ADAPTER_WARNING_EVERY) {
            *last = Some(Instant::now());
            let name: String = name.chars().take(80).collect();
            tracing::warn!(
                "adapter {name:?} is not loaded: the base model answers (told once a minute at most)"
            );
        }
    }
}

/// At most `limit` bytes of `text`, cut between characters.
fn leading_bytes(text: &str, limit: usize) -> &str {
    let end = (0..=limit.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

/// Ids of `text_len` bytes, of which only the first `piece_len` were tokenised: repeated in proportion, `truncate`
/// at most.
fn stretch(ids: Vec<u32>, piece_len: usize, text_len: usize, truncate: usize) -> Vec<u32> {
    if piece_len == text_len || piece_len == 0 {
        return ids;
    }
    let n_ids = (ids.len() as u128 * text_len as u128 / piece_len as u128).min(truncate as u128);
    let n_ids = usize::try_from(n_ids).unwrap_or(truncate);
    ids.iter().copied().cycle().take(n_ids).collect()
}

fn check_grammar(grammar: Grammar) -> Result<()> {
    match grammar {
        Grammar::Unconstrained => Ok(()),
        Grammar::Regex => {
            Err(Error::Unsupported("grammars (regex) are not supported by this shard".to_owned()))
        }
        Grammar::Json => {
            Err(Error::Unsupported("grammars (JSON schema) are not supported by this shard".to_owned()))
        }
        Grammar::Unknown(kind) => Err(Error::Invalid(format!("grammar type {kind} is not known"))),
    }
}

fn check_prompt(prompt: &[u32], vocab: u32) -> Result<()> {
    if prompt.is_empty() {
        return Err(Error::Invalid("the prompt is empty after tokenization".to_owned()));
    }
    match prompt.iter().find(|id| **id >= vocab) {
        Some(id) => {
            Err(Error::Invalid(format!("the prompt has token {id}, and the model ends below {vocab}")))
        }
        None => Ok(()),
    }
}

fn check_length(prompt_len: u32, max_new_tokens: u32, capacity: Capacity) -> Result<()> {
    if prompt_len > capacity.max_input_tokens {
        let limit = capacity.max_input_tokens;
        return Err(Error::Invalid(format!("the prompt has {prompt_len} tokens, the limit is {limit}")));
    }
    let total = u64::from(prompt_len) + u64::from(max_new_tokens);
    if total > u64::from(capacity.max_total_tokens) {
        let limit = capacity.max_total_tokens;
        return Err(Error::Invalid(format!(
            "{prompt_len} prompt tokens and {max_new_tokens} new ones are {total}, the limit is {limit}"
        )));
    }
    Ok(())
}

/// Who places the request's KV, and how much of the prompt the first step computes.
///
/// Claims that go beyond the prompt's end come from routers that count tokens differently, and are clamped.
fn place(draft: &RequestDraft, prompt_len: u32, max_new_tokens: u32) -> Result<(Placement, Option<u32>)> {
    if draft.slots.is_empty() != (draft.n_blocks == 0) {
        let (blocks, slots) = (draft.n_blocks, draft.slots.len());
        return Err(Error::Invalid(format!("{blocks} blocks and {slots} slots contradict each other")));
    }
    // A health probe must not touch what the router's requests hold, whatever it says.
    if draft.slots.is_empty() || draft.id == RequestId::PROBE {
        let chunk_len = draft.chunk_len.filter(|len| (1..prompt_len).contains(len));
        return Ok((Placement::Own, chunk_len));
    }
    let needed = u64::from(prompt_len) + u64::from(max_new_tokens) - 1;
    if (draft.slots.len() as u64) < needed {
        let n = draft.slots.len();
        return Err(Error::Invalid(format!(
            "{n} slots are too few: {prompt_len} prompt tokens and {max_new_tokens} new ones need {needed}"
        )));
    }
    let mut sorted = draft.slots.clone();
    sorted.sort_unstable();
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::Invalid(format!("slot {} is there twice", pair[0])));
    }
    let cache_len = draft.cache_len.min(prompt_len - 1);
    let rest = prompt_len - cache_len;
    let chunk_len = draft.chunk_len.filter(|len| (1..rest).contains(len));
    Ok((Placement::Router { slots: draft.slots.clone(), cache_len }, chunk_len))
}

#[cfg(test)]
mod tests;
