//! One request: its tokens, how far their KV is computed, and what it holds.

use super::ahead::Ahead;
use super::answer::{GeneratedText, Generation, Tokens};
use super::lanes::LaneLease;
use crate::backend::step::{Choice, Feed, LaneStart, Row, Sampled, SamplingParams};
use crate::error::Result;
use crate::ids::RequestId;
use crate::model::executor::PositionRegime;
use crate::pool::{Chain, Lease, Pool, Tag};
use crate::sampling::{FinishReason, Stopping};
use crate::text::{Detokenizer, Tokenizer};

/// A request in a batch.
pub struct Request {
    id: RequestId,
    /// Prompt and output.
    tokens: Vec<u32>,
    prompt_len: usize,
    /// Positions whose KV is in place; the next one to feed.
    computed: usize,
    /// `[positions reached]` what each position's KV is of; grows with the output.
    tags: Vec<Tag>,
    chain: Chain,
    regime: PositionRegime,
    is_own: bool,
    sampling: SamplingParams,
    stopping: Stopping,
    detokenizer: Detokenizer,
    prompt_logprobs: Option<PromptLogprobs>,
    /// Where the first Prefill ends; the sizes of later chunks are the shard's choice.
    first_until: usize,
    /// Slots and lane; given back when the request ends, though it stays listed until it is filtered out.
    hold: Option<Hold>,
}

/// What a live request holds.
struct Hold {
    lease: Lease,
    lane: Option<LaneLease>,
    ahead: Ahead,
}

/// Log-probabilities of the prompt's tokens, collected over its chunks.
struct PromptLogprobs {
    /// `[prompt_len]`; NaN for the first token, and where the KV was cached.
    logprobs: Vec<f32>,
}

/// Everything that makes a request.
pub struct NewRequest {
    /// The router's number.
    pub id: RequestId,
    /// The prompt's ids; at least one.
    pub prompt: Vec<u32>,
    /// Tags of the prompt's first positions; those that are missing are made when their KV is written.
    pub tags: Vec<Tag>,
    /// Leading positions whose KV is in place already; below `prompt.len()`.
    pub n_cached: usize,
    /// Where the first Prefill ends.
    pub first_until: usize,
    /// Slots of all positions.
    pub lease: Lease,
    /// Whether the shard chose them.
    pub is_own: bool,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// When it ends.
    pub stopping: Stopping,
    /// Whether the prompt's log-probabilities are wanted.
    pub prompt_logprobs: bool,
}

impl Request {
    /// A request before its first step.
    pub fn new(new: NewRequest, chain: Chain, regime: PositionRegime) -> Request {
        let prompt_len = new.prompt.len();
        Request {
            id: new.id,
            detokenizer: Detokenizer::new(&new.prompt),
            prompt_logprobs: new
                .prompt_logprobs
                .then(|| PromptLogprobs { logprobs: vec![f32::NAN; prompt_len] }),
            tokens: new.prompt,
            prompt_len,
            computed: new.n_cached.min(prompt_len - 1),
            tags: new.tags,
            chain,
            regime,
            is_own: new.is_own,
            sampling: new.sampling,
            stopping: new.stopping,
            first_until: new.first_until.clamp(1, prompt_len),
            hold: Some(Hold { lease: new.lease, lane: None, ahead: Ahead::Nothing }),
        }
    }

    /// The router's number.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// Whether the shard chose its slots.
    pub fn is_own(&self) -> bool {
        self.is_own
    }

    /// Whether it has ended, and holds nothing any more.
    pub fn has_ended(&self) -> bool {
        self.hold.is_none()
    }

    /// Whether its prompt is complete, so that each step feeds one sampled token.
    pub fn is_decoding(&self) -> bool {
        self.tokens.len() > self.prompt_len
    }

    /// Positions computed so far.
    pub fn computed(&self) -> usize {
        self.computed
    }

    /// Prompt tokens still to compute; 0 once it decodes.
    pub fn prompt_left(&self) -> usize {
        self.prompt_len.saturating_sub(self.computed)
    }

    /// Where its first Prefill ends.
    pub fn first_until(&self) -> usize {
        self.first_until
    }

    /// Its slots, while it lives.
    pub fn lease(&self) -> Option<&Lease> {
        self.hold.as_ref().map(|hold| &hold.lease)
    }

    /// Whether it has a place on the device.
    pub fn has_lane(&self) -> bool {
        self.hold.as_ref().is_some_and(|hold| hold.lane.is_some())
    }

    /// Takes a place on the device; the record that tells the device so.
    pub(super) fn take_lane(&mut self, lane: LaneLease) -> Option<LaneStart> {
        let hold = self.hold.as_mut()?;
        let start = LaneStart {
            lane: lane.lane(),
            slots: hold.lease.slots().to_vec(),
            prompt: self.tokens[..self.prompt_len].to_vec(),
            sampling: self.sampling,
        };
        hold.lane = Some(lane);
        Some(start)
    }

    pub(super) fn lane(&self) -> Option<&LaneLease> {
        self.hold.as_ref()?.lane.as_ref()
    }

    /// Prompt tokens at positions `from..until`.
    pub(super) fn prompt(&self, from: usize, until: usize) -> &[u32] {
        &self.tokens[from..until.min(self.prompt_len)]
    }

    /// Whether log-probabilities of the prompt are collected.
    pub(super) fn wants_prompt_logprobs(&self) -> bool {
        self.prompt_logprobs.is_some()
    }

    /// Marks positions `from..until` as being written, but for leading ones of the prompt that hold the right KV
    /// already; where writing begins.
    pub(super) fn begin_writing(&mut self, pool: &Pool, from: usize, until: usize) -> usize {
        self.extend_tags(until);
        let Some(hold) = &self.hold else { return until };
        let slots = hold.lease.slots();
        // Slots of the output are the request's alone, so that writing them again does no harm.
        let store_from = (from..until)
            .find(|&position| {
                position >= self.prompt_len || !pool.holds(slots[position], self.tags[position])
            })
            .unwrap_or(until);
        (store_from..until).for_each(|position| pool.writing(slots[position]));
        store_from
    }

    /// Makes the tags of positions below `until`, whose tokens are known.
    fn extend_tags(&mut self, until: usize) {
        while self.tags.len() < until {
            let position = self.tags.len();
            let before = self.tags.last().copied().unwrap_or(Tag::NONE);
            let salt = self.regime.salt(self.prompt_len as u32, position as u32);
            self.tags.push(self.chain.next(before, self.tokens[position], salt));
        }
    }

    /// The row that feeds the token `sampled`, which is not accepted yet, as the `row`-th of the step that runs ahead;
    /// `None` if the request ends with it for certain. Its text is not known, and no tag is made: the device waits.
    pub(super) fn plan_ahead(&mut self, sampled: &Sampled, row: usize, pool: &Pool) -> Option<Row> {
        let Sampled::Token { id, .. } = sampled else { return None };
        if self.stopping.ends_with(*id) {
            return None;
        }
        let hold = self.hold.as_mut()?;
        let position = self.computed;
        let lane = hold.lane.as_ref()?.lane();
        pool.writing(*hold.lease.slots().get(position)?);
        hold.ahead = Ahead::UnderWay { row };
        let start = position as u32;
        Some(Row { lane, start, feed: Feed::Last, store_from: start, sample: true, n_targets: 0 })
    }

    /// Its row in the step that runs ahead, while that is under way.
    pub(super) fn row_ahead(&self) -> Option<usize> {
        match self.hold.as_ref()?.ahead {
            Ahead::UnderWay { row } => Some(row),
            Ahead::Nothing | Ahead::Done(_) => None,
        }
    }

    /// Whether its next token was computed before it is asked for, or is on its way.
    pub(super) fn has_run_ahead(&self) -> bool {
        self.hold.as_ref().is_some_and(|hold| !matches!(hold.ahead, Ahead::Nothing))
    }

    pub(super) fn keep_ahead(&mut self, sampled: Result<Sampled>) {
        if let Some(hold) = &mut self.hold {
            hold.ahead = Ahead::Done(sampled);
        }
    }

    pub(super) fn take_ahead(&mut self) -> Ahead {
        self.hold.as_mut().map_or(Ahead::Nothing, |hold| std::mem::replace(&mut hold.ahead, Ahead::Nothing))
    }

    /// The step has computed positions up to `until`, and written those from `store_from`.
    pub(super) fn advance(&mut self, pool: &Pool, store_from: usize, until: usize) {
        if let Some(hold) = &self.hold {
            for position in store_from..until {
                pool.written(hold.lease.slots()[position], self.tags[position]);
            }
        }
        self.computed = until;
    }

    /// Keeps the log-probabilities of the prompt tokens that follow positions from `from`.
    pub(super) fn keep_prompt_logprobs(&mut self, from: usize, logprobs: &[f32]) {
        if let Some(prompt) = &mut self.prompt_logprobs {
            for (kept, &logprob) in prompt.logprobs[from + 1..].iter_mut().zip(logprobs) {
                *kept = logprob;
            }
        }
    }

    /// Accepts what was sampled; the news for the router. A request that ends gives its slots and lane back.
    pub(super) fn accept(&mut self, sampled: Sampled, tokenizer: &Tokenizer, eos: u32) -> Generation {
        let (id, logprob, top, failed) = match sampled {
            Sampled::Token { id, logprob, top } => (id, logprob, top, false),
            Sampled::NoDistribution => (eos, 0.0, Vec::new(), true),
        };
        self.tokens.push(id);
        let text = self.detokenizer.push(tokenizer, &self.tokens);
        let ending = self.stopping.accept(id, &text).or(failed.then_some(FinishReason::EndOfText));
        if ending.is_none() {
            self.extend_tags(self.tokens.len());
        }
        let tokens = Tokens {
            ids: vec![id],
            logprobs: vec![logprob],
            texts: vec![text],
            is_special: vec![tokenizer.is_special(id)],
        };
        let top_tokens =
            if self.sampling.top_n == 0 { Vec::new() } else { vec![spelled_alone(&top, tokenizer)] };
        Generation {
            request: self.id,
            prefill_tokens: self.take_prompt_tokens(tokenizer),
            tokens,
            generated_text: ending.map(|reason| self.end(reason, tokenizer)),
            top_tokens,
        }
    }

    fn end(&mut self, finish_reason: FinishReason, tokenizer: &Tokenizer) -> GeneratedText {
        self.hold = None;
        GeneratedText {
            text: self.detokenizer.whole(tokenizer, &self.tokens, self.prompt_len),
            n_tokens: self.stopping.n_tokens(),
            finish_reason,
            seed: match self.sampling.choice {
                Choice::Draw { seed } => Some(seed),
                Choice::Greedy => None,
            },
        }
    }

    fn take_prompt_tokens(&mut self, tokenizer: &Tokenizer) -> Option<Tokens> {
        let collected = self.prompt_logprobs.take()?;
        let ids = self.tokens[..self.prompt_len].to_vec();
        Some(Tokens {
            texts: ids.iter().map(|&id| tokenizer.decode(&[id], false)).collect(),
            is_special: ids.iter().map(|&id| tokenizer.is_special(id)).collect(),
            logprobs: collected.logprobs,
            ids,
        })
    }
}

/// Alternatives, each decoded on its own.
fn spelled_alone(top: &[(u32, f32)], tokenizer: &Tokenizer) -> Tokens {
    Tokens {
        ids: top.iter().map(|&(id, _)| id).collect(),
        logprobs: top.iter().map(|&(_, logprob)| logprob).collect(),
        texts: top.iter().map(|&(id, _)| tokenizer.decode(&[id], false)).collect(),
        is_special: top.iter().map(|&(id, _)| tokenizer.is_special(id)).collect(),
    }
}
