//! What a step answers, in the core's own terms.

use crate::ids::{BatchId, RequestId};
use crate::sampling::FinishReason;

/// Tokens as parallel arrays of equal length.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tokens {
    /// Ids.
    pub ids: Vec<u32>,
    /// Log-probabilities; NaN where there is none.
    pub logprobs: Vec<f32>,
    /// Texts.
    pub texts: Vec<String>,
    /// Whether the id is special.
    pub is_special: Vec<bool>,
}

/// One request's news in a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Whose.
    pub request: RequestId,
    /// The prompt's tokens, with the request's first generation, where asked for and enabled.
    pub prefill_tokens: Option<Tokens>,
    /// At least one token.
    pub tokens: Tokens,
    /// Present when the request ends.
    pub generated_text: Option<GeneratedText>,
    /// For each token the likeliest alternatives; empty unless asked for.
    pub top_tokens: Vec<Tokens>,
}

/// A request's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GeneratedText {
    /// The whole output, special tokens left out.
    pub text: String,
    /// Tokens generated, the last included; at least 1.
    pub n_tokens: u32,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The seed, where tokens were drawn.
    pub seed: Option<u64>,
}

/// What the router is told of a batch that stays in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedBatch {
    /// Its handle.
    pub id: BatchId,
    /// Every request still held, ended ones included.
    pub request_ids: Vec<RequestId>,
    /// Distinct slots under its leases.
    pub max_tokens: u32,
    /// Input tokens of its next step.
    pub current_tokens: u32,
}
