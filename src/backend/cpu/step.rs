//! The lanes, and the arrays of the step under way.

use super::lanes::LaneState;
use crate::backend::step::{Feed, Sampled, StepInput};
use crate::backend::{LogitRows, StepShape};
use crate::error::{Error, Result};
use crate::ids::Lane;

/// Lanes outlive a step; all the rest is laid out anew by [`Step::begin`].
pub struct Step {
    shape: StepShape,
    lanes: Vec<Option<LaneState>>,
    /// `[tokens]` ids fed.
    pub tokens: Vec<u32>,
    /// `[tokens]` absolute positions.
    pub positions: Vec<u32>,
    /// `[tokens]` slot that keys and values are stored to.
    pub store: Vec<Option<u32>>,
    /// `[tokens]` the request.
    lane_of: Vec<Lane>,
    /// Of each rotary embedding.
    angles: Vec<Angles>,
    /// `[targets]` token whose logits predict the target.
    target_tokens: Vec<u32>,
    /// `[targets]` ids.
    pub targets: Vec<u32>,
    /// `[sampled rows]` token whose logits are sampled.
    sampled_tokens: Vec<u32>,
    /// `[targets]` filled by chunks.
    pub target_logprobs: Vec<f32>,
    /// `[sampled rows]`; on rank 0.
    pub sampled: Vec<Sampled>,
}

/// Cosines and sines of the tokens under one rotary embedding.
#[derive(Default)]
struct Angles {
    /// `[tokens, width / 2]`.
    cos: Vec<f32>,
    /// `[tokens, width / 2]`.
    sin: Vec<f32>,
}

/// One row of logits to choose from.
pub struct Draft<'a> {
    /// The request.
    pub lane: &'a LaneState,
    /// Absolute position of the token to be chosen.
    pub position: u32,
    /// The token before it.
    pub previous: u32,
}

impl Step {
    /// No lane is taken.
    pub fn new(shape: StepShape) -> Step {
        Step {
            lanes: vec![None; shape.n_lanes],
            tokens: Vec::with_capacity(shape.max_tokens),
            positions: Vec::with_capacity(shape.max_tokens),
            store: Vec::with_capacity(shape.max_tokens),
            lane_of: Vec::with_capacity(shape.max_tokens),
            angles: shape.frequencies.iter().map(|_| Angles::default()).collect(),
            target_tokens: Vec::new(),
            targets: Vec::new(),
            sampled_tokens: Vec::with_capacity(shape.n_lanes),
            target_logprobs: Vec::new(),
            sampled: Vec::with_capacity(shape.n_lanes),
            shape,
        }
    }

    /// Starts lanes and lays out the step, which the executor has checked.
    pub fn begin(&mut self, input: &StepInput) -> Result<()> {
        for start in &input.starts {
            self.lanes[start.lane.0 as usize] = Some(LaneState::new(start));
        }
        self.clear();
        self.targets.extend_from_slice(&input.targets);
        self.target_logprobs.resize(input.targets.len(), f32::NAN);
        let mut prompt = input.prompt_tokens.iter().copied();
        for row in &input.rows {
            let Some(lane) = &self.lanes[row.lane.0 as usize] else {
                return Err(Error::Bug(format!("lane {} holds no request", row.lane.0)));
            };
            let first = self.tokens.len() as u32;
            match row.feed {
                Feed::Prompt { len } => self.tokens.extend(prompt.by_ref().take(len as usize)),
                Feed::Last => self.tokens.push(lane.last),
            }
            for position in row.start..row.start + row.len() {
                let stored = position >= row.store_from;
                self.positions.push(position);
                self.store.push(stored.then(|| lane.slots[position as usize]));
                self.lane_of.push(row.lane);
                for (angles, frequencies) in self.angles.iter_mut().zip(&self.shape.frequencies) {
                    let (inverse, amplitude) = frequencies.for_position(lane.prompt_len, position);
                    for inverse in inverse.iter() {
                        let (sin, cos) = (position as f32 * inverse).sin_cos();
                        angles.cos.push(cos * amplitude);
                        angles.sin.push(sin * amplitude);
                    }
                }
            }
            self.target_tokens.extend(first..first + row.n_targets);
            if row.sample {
                self.sampled_tokens.push(first + row.len() - 1);
            }
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.store.clear();
        self.lane_of.clear();
        for angles in &mut self.angles {
            angles.cos.clear();
            angles.sin.clear();
        }
        self.target_tokens.clear();
        self.targets.clear();
        self.sampled_tokens.clear();
        self.target_logprobs.clear();
        self.sampled.clear();
    }

    /// Cosines and sines of a token under one of the rotary embeddings, `[width / 2]` each.
    pub fn angles(&self, rope: usize, token: usize) -> (&[f32], &[f32]) {
        let Angles { cos, sin } = &self.angles[rope];
        let half = cos.len() / self.tokens.len();
        let range = token * half..(token + 1) * half;
        (&cos[range.clone()], &sin[range])
    }

    /// The slot of each position of the token's lane.
    pub fn slots(&self, token: usize) -> &[u32] {
        self.lane(token).map_or(&[], |lane| lane.slots.as_slice())
    }

    fn lane(&self, token: usize) -> Option<&LaneState> {
        self.lanes[self.lane_of[token].0 as usize].as_ref()
    }

    /// Tokens whose logits are wanted.
    pub fn logit_tokens(&self, wanted: &LogitRows) -> &[u32] {
        match wanted {
            LogitRows::Targets(range) => &self.target_tokens[range.clone()],
            LogitRows::Sampled => &self.sampled_tokens,
        }
    }

    /// Number of rows that sample.
    pub fn n_sampled(&self) -> usize {
        self.sampled_tokens.len()
    }

    /// What the choice of each sampled row depends on, besides its logits.
    pub fn drafts(&self) -> Vec<Draft<'_>> {
        let draft = |&token: &u32| {
            let token = token as usize;
            let lane = self.lane(token)?;
            Some(Draft { lane, position: self.positions[token] + 1, previous: self.tokens[token] })
        };
        self.sampled_tokens.iter().filter_map(draft).collect()
    }

    /// The lanes take the `[sampled rows]` chosen tokens as their last.
    pub fn advance(&mut self, ids: &[u32]) {
        for (&token, &id) in self.sampled_tokens.iter().zip(ids) {
            if let Some(lane) = &mut self.lanes[self.lane_of[token as usize].0 as usize] {
                lane.last = id;
                lane.context.push(id);
            }
        }
    }
}
