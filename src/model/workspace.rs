//! Every intermediate of a step, sized once.

use crate::backend::{Backend, Heads};
use crate::error::Result;

/// Widths of a rank's intermediates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Widths {
    /// Of the residual stream.
    pub hidden: usize,
    /// Heads of this rank.
    pub heads: Heads,
    /// Neurons of this rank.
    pub neurons: usize,
    /// Rows of the head on this rank.
    pub vocab_part: usize,
    /// Rows of the whole head.
    pub vocab: usize,
}

/// Tensors of `[max_step_tokens, …]`, but for the logits' side of the decoder, which takes `[logit_rows, …]` at a time.
pub struct Workspace<B: Backend> {
    /// `[tokens, hidden]` the residual stream.
    pub residual: B::Tensor,
    /// `[tokens, hidden]` what a branch reads.
    pub normed: B::Tensor,
    /// `[tokens, hidden]` scratch for what a branch returns.
    pub branch: B::Tensor,
    /// `[tokens, (heads + 2 · kv_heads) · head_dim]`.
    pub qkv: B::Tensor,
    /// `[tokens, heads · head_dim]`.
    pub attended: B::Tensor,
    /// `[tokens, 2 · neurons]`.
    pub gate_up: B::Tensor,
    /// `[tokens, neurons]`.
    pub gated: B::Tensor,
    /// `[logit_rows, hidden]`.
    pub selected: B::Tensor,
    /// `[logit_rows, vocab_part]`, where there is more than one rank.
    pub logits_part: Option<B::Tensor>,
    /// `[logit_rows, vocab]`.
    pub logits: B::Tensor,
    /// Rows of logits at a time.
    pub logit_rows: usize,
}

impl<B: Backend> Workspace<B> {
    /// For steps of up to `tokens` tokens, of which up to `logit_rows` are sampled.
    pub fn new(
        backend: &B,
        widths: Widths,
        tokens: usize,
        logit_rows: usize,
        world: usize,
    ) -> Result<Workspace<B>> {
        let Widths { hidden, heads, neurons, vocab_part, vocab } = widths;
        let shared = |mut tensor| backend.share(&mut tensor).map(|()| tensor);
        Ok(Workspace {
            residual: shared(backend.tensor(tokens, hidden)?)?,
            normed: backend.tensor(tokens, hidden)?,
            branch: shared(backend.tensor(tokens, hidden)?)?,
            qkv: backend.tensor(tokens, heads.qkv_width())?,
            attended: backend.tensor(tokens, heads.query_width())?,
            gate_up: backend.tensor(tokens, 2 * neurons)?,
            gated: backend.tensor(tokens, neurons)?,
            selected: backend.tensor(logit_rows, hidden)?,
            logits_part: (world > 1).then(|| backend.logits(logit_rows, vocab_part)).transpose()?,
            logits: shared(backend.logits(logit_rows, vocab)?)?,
            logit_rows,
        })
    }
}
