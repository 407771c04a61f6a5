//! What a step is: plain host records, the same for every backend and every rank.
//!
//! A step is ragged and mixed: each row feeds either a run of prompt tokens or the token that its lane sampled
//! last. Prefill, chunked prefill and decode differ in their bounds only.

use crate::ids::Lane;

/// One forward pass.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepInput {
    /// Lanes that begin a request, before any row runs. What the lane held before is forgotten.
    pub starts: Vec<LaneStart>,
    /// `[rows]`, in the order in which their tokens are flattened. A lane occurs at most once.
    pub rows: Vec<Row>,
    /// `[prompt tokens]` fed by the rows with [`Feed::Prompt`], flattened in row order.
    pub prompt_tokens: Vec<u32>,
    /// `[targets]` ids whose raw log-probabilities are wanted, flattened in row order; see [`Row::n_targets`].
    pub targets: Vec<u32>,
}

/// A request that takes a lane.
#[derive(Debug, Clone, PartialEq)]
pub struct LaneStart {
    /// The place taken.
    pub lane: Lane,
    /// `[prompt_len + max_new_tokens − 1]` the slot of each position.
    pub slots: Vec<u32>,
    /// `[prompt_len]` the prompt's ids: the context of the penalties, and the length that position regimes use.
    pub prompt: Vec<u32>,
    /// How its tokens are chosen.
    pub sampling: SamplingParams,
}

/// One request's part in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The request.
    pub lane: Lane,
    /// Absolute position of the first token fed. Positions before it are read from the lane's slots.
    pub start: u32,
    /// What is fed.
    pub feed: Feed,
    /// Keys and values of positions below this one are in their slots already and are not stored again: a
    /// shared slot is never rewritten.
    pub store_from: u32,
    /// Whether a token is sampled from the last position's logits.
    pub sample: bool,
    /// The first `n_targets` positions fed have an entry in [`StepInput::targets`], whose log-probability under
    /// the raw logits of that position is wanted. 0: none.
    pub n_targets: u32,
}

/// The tokens that a row feeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feed {
    /// The next `len` ids of [`StepInput::prompt_tokens`]; at least one.
    Prompt {
        /// Number of tokens.
        len: u32,
    },
    /// The token that the lane sampled last.
    Last,
}

impl Row {
    /// Number of tokens fed.
    pub fn len(&self) -> u32 {
        match self.feed {
            Feed::Prompt { len } => len,
            Feed::Last => 1,
        }
    }

    /// Whether nothing is fed; a valid row feeds at least one token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl StepInput {
    /// Number of tokens that the step runs.
    pub fn n_tokens(&self) -> usize {
        self.rows.iter().map(|row| row.len() as usize).sum()
    }
}

/// What a step produced.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepOutput {
    /// One for each row with [`Row::sample`], in row order.
    pub sampled: Vec<Sampled>,
    /// `[targets]` raw log-probabilities, in the order of [`StepInput::targets`].
    pub target_logprobs: Vec<f32>,
}

/// The outcome of sampling one row.
#[derive(Debug, Clone, PartialEq)]
pub enum Sampled {
    /// A token; the lane has taken it as its last.
    Token {
        /// Its id.
        id: u32,
        /// Its log-probability under the final, warped distribution.
        logprob: f32,
        /// Up to [`SamplingParams::top_n`] likeliest ids of the same distribution with their log-probabilities,
        /// likeliest first, ties by lowest id.
        top: Vec<(u32, f32)>,
    },
    /// The logits hold NaN, or nothing but −∞, so there is no distribution to choose from.
    NoDistribution,
}

/// How a row's tokens are chosen: validated, with neutral values where a stage is off.
///
/// Stages in order: watermark, repetition penalty, frequency penalty, temperature, top-k, top-p, typical-p, choice.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingParams {
    /// Arg-max, or a draw.
    pub choice: Choice,
    /// Logits are divided by it; 1.0 is neutral.
    pub temperature: f32,
    /// Only the `top_k` largest stay, with ties; 0 is neutral.
    pub top_k: u32,
    /// The smallest set of likeliest tokens with at least this mass stays; 1.0 is neutral.
    pub top_p: f32,
    /// The set of most typical tokens with this mass stays; 1.0 is neutral.
    pub typical_p: f32,
    /// Logits of ids in the context: divided if positive, multiplied if negative; 1.0 is neutral.
    pub repetition_penalty: f32,
    /// Times the id's relative frequency in the context, subtracted; 0.0 is neutral.
    pub frequency_penalty: f32,
    /// Green-list bias of Kirchenbauer et al.
    pub watermark: Option<Watermark>,
    /// Alternatives to report; 0 for none.
    pub top_n: u32,
}

/// The last stage of sampling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// The largest logit, ties to the lowest id.
    Greedy,
    /// A draw by the counter-based generator of [`super::random`], keyed by the seed and the token's position.
    Draw {
        /// The request's seed.
        seed: u64,
    },
}

/// A watermark's strength (Kirchenbauer et al., *A Watermark for Large Language Models*, arXiv 2301.10226).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Watermark {
    /// Share of the vocabulary that is green, in (0, 1).
    pub gamma: f32,
    /// Added to green logits.
    pub delta: f32,
}

impl SamplingParams {
    /// Arg-max of the unchanged logits.
    pub const GREEDY: SamplingParams = SamplingParams {
        choice: Choice::Greedy,
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        typical_p: 1.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        watermark: None,
        top_n: 0,
    };
}
