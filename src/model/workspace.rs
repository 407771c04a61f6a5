//! Every intermediate of a step, sized once.

use super::spec::{self, Block, DecoderSpec, LatentAttention};
use crate::backend::{Backend, Heads};
use crate::error::{Error, Result};

/// Widths of a rank's intermediates.
#[derive(Debug, Clone, PartialEq)]
pub struct Widths {
    /// Of the residual stream.
    pub hidden: usize,
    /// Of attention.
    pub attention: AttentionWidth,
    /// Of the MLPs, each width once.
    pub mlps: Vec<MlpWidth>,
    /// Of the experts, where there are any.
    pub experts: Option<ExpertsWidth>,
    /// Whether MLPs read another norm of the residual stream than attention does.
    pub two_norms: bool,
    /// Rows of the head on this rank.
    pub vocab_part: usize,
    /// Rows of the whole head.
    pub vocab: usize,
}

/// What attention needs on a rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum AttentionWidth {
    /// These heads.
    Heads(Heads),
    /// These heads over a latent.
    Latent(LatentAttention),
}

impl AttentionWidth {
    /// The heads of the attention kernel: over a latent, one KV head as wide as a cached row.
    pub fn heads(&self) -> Heads {
        match self {
            AttentionWidth::Heads(heads) => *heads,
            AttentionWidth::Latent(latent) => {
                Heads { heads: latent.heads, kv_heads: 1, head_dim: latent.row_width() }
            }
        }
    }

    /// Numbers that a token takes.
    pub fn numbers(&self) -> usize {
        match self {
            AttentionWidth::Heads(heads) => heads.qkv_width() + heads.query_width(),
            AttentionWidth::Latent(latent) => {
                let of_a_head = latent.query_dim() + latent.row_width() + latent.kv_rank + latent.value_dim;
                2 * latent.query_rank.unwrap_or(0) + latent.row_width() + latent.heads * of_a_head
            }
        }
    }
}

/// A rank's part of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlpWidth {
    /// Neurons.
    pub neurons: usize,
    /// Whether each has a gate.
    pub gated: bool,
}

impl MlpWidth {
    /// Numbers that a token takes.
    pub fn numbers(self) -> usize {
        if self.gated { 3 * self.neurons } else { self.neurons }
    }
}

/// A rank's part of the experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertsWidth {
    /// All of them.
    pub experts: spec::Experts,
    /// Neurons of each on this rank.
    pub neurons: usize,
}

impl Widths {
    /// Numbers that a token takes, but for the scratch of experts, which is the backend's.
    pub fn numbers(&self) -> usize {
        let streams = if self.two_norms { 4 } else { 3 };
        let mlps: usize = self.mlps.iter().map(|mlp| mlp.numbers()).sum();
        streams * self.hidden + self.attention.numbers() + mlps
    }

    /// Whether MLPs of such a decoder read another norm than attention does.
    pub fn has_two_norms(spec: &DecoderSpec) -> bool {
        spec.block == Block::ParallelTwoNorms
    }
}

/// Tensors of `[max_step_tokens, …]`, but for the logits' side of the decoder, which takes `[logit_rows, …]` at a time.
pub struct Workspace<B: Backend> {
    /// `[tokens, hidden]` the residual stream.
    pub residual: B::Tensor,
    /// `[tokens, hidden]` what a branch reads.
    pub normed: B::Tensor,
    /// `[tokens, hidden]` what an MLP reads, where attention reads another norm of the same numbers.
    pub normed_for_mlp: Option<B::Tensor>,
    /// `[tokens, hidden]` scratch for what a branch returns.
    pub branch: B::Tensor,
    /// Of attention.
    pub attention: AttentionRoom<B>,
    /// Of MLPs.
    pub mlps: MlpRooms<B>,
    /// Of experts.
    pub experts: Option<B::ExpertsRoom>,
    /// `[logit_rows, hidden]`.
    pub selected: B::Tensor,
    /// `[logit_rows, vocab_part]`, where there is more than one rank.
    pub logits_part: Option<B::Tensor>,
    /// `[logit_rows, vocab]`.
    pub logits: B::Tensor,
    /// Rows of logits at a time.
    pub logit_rows: usize,
}

/// Intermediates of attention.
pub enum AttentionRoom<B: Backend> {
    /// By heads.
    Heads(HeadsRoom<B>),
    /// Over a latent.
    Latent(LatentRoom<B>),
}

/// Intermediates of attention by heads.
pub struct HeadsRoom<B: Backend> {
    /// `[tokens, (heads + 2 · kv_heads) · head_dim]`.
    pub qkv: B::Tensor,
    /// `[tokens, heads · head_dim]`.
    pub attended: B::Tensor,
}

/// Intermediates of attention over a latent.
pub struct LatentRoom<B: Backend> {
    /// `[tokens, query_rank]` twice: before and after the norm.
    pub query_latent: Option<(B::Tensor, B::Tensor)>,
    /// `[tokens, heads · (nope_dim + rope_dim)]`.
    pub queries: B::Tensor,
    /// `[tokens, kv_rank + rope_dim]`.
    pub latents: B::Tensor,
    /// `[tokens, heads · (kv_rank + rope_dim)]` queries in the latent's space.
    pub absorbed: B::Tensor,
    /// `[tokens, heads · kv_rank]` weighted sums of latents.
    pub summed: B::Tensor,
    /// `[tokens, heads · value_dim]`.
    pub attended: B::Tensor,
}

impl<B: Backend> AttentionRoom<B> {
    fn new(backend: &B, width: AttentionWidth, tokens: usize) -> Result<AttentionRoom<B>> {
        let tensor = |width| backend.tensor(tokens, width);
        Ok(match width {
            AttentionWidth::Heads(heads) => AttentionRoom::Heads(HeadsRoom {
                qkv: tensor(heads.qkv_width())?,
                attended: tensor(heads.query_width())?,
            }),
            AttentionWidth::Latent(latent) => AttentionRoom::Latent(LatentRoom {
                query_latent: match latent.query_rank {
                    Some(rank) => Some((tensor(rank)?, tensor(rank)?)),
                    None => None,
                },
                queries: tensor(latent.heads * latent.query_dim())?,
                latents: tensor(latent.row_width())?,
                absorbed: tensor(latent.heads * latent.row_width())?,
                summed: tensor(latent.heads * latent.kv_rank)?,
                attended: tensor(latent.heads * latent.value_dim)?,
            }),
        })
    }

    /// Those by heads.
    pub fn heads(&mut self) -> Result<&mut HeadsRoom<B>> {
        match self {
            AttentionRoom::Heads(room) => Ok(room),
            AttentionRoom::Latent(_) => Err(Error::Bug("attention by heads in room for a latent".into())),
        }
    }

    /// Those over a latent.
    pub fn latent(&mut self) -> Result<&mut LatentRoom<B>> {
        match self {
            AttentionRoom::Latent(room) => Ok(room),
            AttentionRoom::Heads(_) => Err(Error::Bug("latent attention in room for heads".into())),
        }
    }
}

/// Intermediates of MLPs, by their widths.
pub struct MlpRooms<B: Backend> {
    rooms: Vec<(MlpWidth, MlpRoom<B>)>,
}

/// Intermediates of MLPs of one width.
pub struct MlpRoom<B: Backend> {
    /// `[tokens, 2 · neurons]`, where there are gates.
    pub gate_up: Option<B::Tensor>,
    /// `[tokens, neurons]`.
    pub neurons: B::Tensor,
}

impl<B: Backend> MlpRooms<B> {
    fn new(backend: &B, widths: &[MlpWidth], tokens: usize) -> Result<MlpRooms<B>> {
        let room = |width: MlpWidth| {
            let gate_up = width.gated.then(|| backend.tensor(tokens, 2 * width.neurons)).transpose()?;
            Ok((width, MlpRoom { gate_up, neurons: backend.tensor(tokens, width.neurons)? }))
        };
        Ok(MlpRooms { rooms: widths.iter().copied().map(room).collect::<Result<_>>()? })
    }

    /// Those of a width.
    pub fn room(&mut self, width: MlpWidth) -> Result<&mut MlpRoom<B>> {
        let room = self.rooms.iter_mut().find(|(of, _)| *of == width);
        room.map(|(_, room)| room).ok_or_else(|| Error::Bug(format!("an MLP of {width:?} without room")))
    }
}

impl<B: Backend> Workspace<B> {
    /// For steps of up to `tokens` tokens, of which up to `logit_rows` are sampled.
    pub fn new(
        backend: &B,
        widths: &Widths,
        tokens: usize,
        logit_rows: usize,
        world: usize,
    ) -> Result<Workspace<B>> {
        let Widths { hidden, vocab_part, vocab, .. } = *widths;
        let shared = |mut tensor| backend.share(&mut tensor).map(|()| tensor);
        let experts =
            |width: ExpertsWidth| backend.experts_room(&width.experts, hidden, width.neurons, tokens);
        Ok(Workspace {
            residual: shared(backend.tensor(tokens, hidden)?)?,
            normed: backend.tensor(tokens, hidden)?,
            normed_for_mlp: widths.two_norms.then(|| backend.tensor(tokens, hidden)).transpose()?,
            branch: shared(backend.tensor(tokens, hidden)?)?,
            attention: AttentionRoom::new(backend, widths.attention, tokens)?,
            mlps: MlpRooms::new(backend, &widths.mlps, tokens)?,
            experts: widths.experts.map(experts).transpose()?,
            selected: backend.tensor(logit_rows, hidden)?,
            logits_part: (world > 1).then(|| backend.logits(logit_rows, vocab_part)).transpose()?,
            logits: shared(backend.logits(logit_rows, vocab)?)?,
            logit_rows,
        })
    }
}
