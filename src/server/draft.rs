//! What a caller asks, without the wire: the same for both versions of the protocol.

use crate::batch::CachedBatch;
use crate::ids::{BatchId, RequestId};
use crate::sampling::{RawSampling, RawStopping};

/// A request as it came, not yet checked.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RequestDraft {
    pub(super) id: RequestId,
    /// The prompt's text; images are left out.
    pub(super) prompt: String,
    pub(super) add_special_tokens: bool,
    /// Longest prompt in tokens.
    pub(super) truncate: u32,
    pub(super) sampling: RawSampling,
    pub(super) grammar: Grammar,
    pub(super) stopping: RawStopping,
    pub(super) prompt_logprobs: bool,
    pub(super) n_blocks: usize,
    pub(super) slots: Vec<u32>,
    pub(super) cache_len: u32,
    pub(super) chunk_len: Option<u32>,
    pub(super) adapter: Option<String>,
}

/// A constraint on the output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Grammar {
    Unconstrained,
    Regex,
    Json,
    /// A number that the protocol does not define.
    Unknown(i32),
}

impl Grammar {
    /// From a grammar's text and type as both versions number it; an empty text constrains nothing.
    pub(super) fn new(text: &str, kind: i32) -> Grammar {
        match (text.is_empty(), kind) {
            (true, _) | (_, 0) => Grammar::Unconstrained,
            (_, 1) => Grammar::Json,
            (_, 2) => Grammar::Regex,
            (_, kind) => Grammar::Unknown(kind),
        }
    }
}

/// The parameters of a request that has none: arg-max, and every other stage neutral.
pub(super) const NEUTRAL: RawSampling = RawSampling {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    typical_p: 1.0,
    do_sample: false,
    seed: 0,
    repetition_penalty: 1.0,
    frequency_penalty: 0.0,
    watermark: false,
    top_n: 0,
};

/// A batch as it came.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct BatchDraft {
    pub(super) id: BatchId,
    pub(super) requests: Vec<RequestDraft>,
    /// What the caller says is the number of requests.
    pub(super) size: u32,
}

/// Prefill as it came.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PrefillDraft {
    pub(super) batch: Option<BatchDraft>,
    pub(super) merge: Option<BatchId>,
}

/// Warmup as it came.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct WarmupDraft {
    pub(super) batch: Option<BatchDraft>,
    pub(super) max_input_tokens: Option<u32>,
    pub(super) max_prefill_tokens: u32,
    pub(super) max_total_tokens: Option<u32>,
}

/// What `Info` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    /// As torch prints it: `torch.float16`.
    pub(super) dtype: String,
    pub(super) device: &'static str,
    pub(super) chunking: bool,
    pub(super) prefix_caching: bool,
}

/// The attention that TGI combines with one token a block. Routers store the name and read it nowhere.
pub(super) const ATTENTION: &str = "flashinfer";
/// Tokens in a KV block: the pool is token-granular.
pub(super) const BLOCK_SIZE: u32 = 1;

/// `size` as the wire has it.
pub(super) fn size_of(batch: &CachedBatch) -> u32 {
    u32::try_from(batch.request_ids.len()).unwrap_or(u32::MAX)
}
