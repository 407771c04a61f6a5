//! What a step may ask for: checked once, on the engine's thread, before any rank sees it.

use super::executor::ModelInfo;
use crate::backend::step::{Feed, LaneStart, Row, StepInput};
use crate::error::{Error, Result};
use crate::ids::Lane;

/// What the engine's thread knows of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct LaneShape {
    n_slots: usize,
    /// Whether a token was sampled, which [`Feed::Last`] feeds.
    sampled: bool,
}

impl LaneShape {
    /// Before the first token.
    fn of(start: &LaneStart) -> LaneShape {
        LaneShape { n_slots: start.slots.len(), sampled: false }
    }
}

/// Mirrors the lanes' shapes, and refuses steps that would read or write where they may not.
pub struct Guard {
    lanes: Vec<Option<LaneShape>>,
    vocab: u32,
    n_slots: u32,
    max_positions: u32,
    max_step_tokens: u32,
}

impl Guard {
    /// No lane is taken.
    pub fn new(info: &ModelInfo) -> Guard {
        Guard {
            lanes: vec![None; info.n_lanes as usize],
            vocab: info.vocab,
            n_slots: info.n_slots,
            max_positions: info.max_positions,
            max_step_tokens: info.max_step_tokens,
        }
    }

    /// Checks a step, and takes note of it.
    ///
    /// # Errors
    /// [`Error::Bug`] that names what is wrong; nothing is noted then.
    pub fn admit(&mut self, step: &StepInput) -> Result<()> {
        self.check(step).map_err(|text| Error::Bug(format!("a step was refused: {text}")))?;
        for start in &step.starts {
            self.lanes[start.lane.0 as usize] = Some(LaneShape::of(start));
        }
        for row in step.rows.iter().filter(|row| row.sample) {
            if let Some(shape) = &mut self.lanes[row.lane.0 as usize] {
                shape.sampled = true;
            }
        }
        Ok(())
    }

    fn check(&self, step: &StepInput) -> Result<(), String> {
        let n_lanes = self.lanes.len();
        // Which of the starts a lane begins with.
        let mut started = vec![None; if step.starts.is_empty() { 0 } else { n_lanes }];
        let mut seen = vec![false; n_lanes];
        for start in &step.starts {
            self.check_start(start)?;
            once(&mut seen, start.lane)?;
            started[start.lane.0 as usize] = Some(LaneShape::of(start));
        }
        seen.fill(false);
        let (mut n_tokens, mut n_prompt, mut n_targets) = (0u64, 0u64, 0u64);
        for row in &step.rows {
            let n = row.lane.0 as usize;
            once(&mut seen, row.lane)?;
            let shape = started.get(n).copied().flatten().or(self.lanes[n]);
            check_row(row, shape.ok_or_else(|| format!("lane {n} holds no request"))?)?;
            n_tokens += u64::from(row.len());
            n_targets += u64::from(row.n_targets);
            if let Feed::Prompt { len } = row.feed {
                n_prompt += u64::from(len);
            }
        }
        expect("tokens of the step", n_tokens.min(u64::from(self.max_step_tokens)), n_tokens)?;
        expect("prompt tokens", n_prompt, step.prompt_tokens.len() as u64)?;
        expect("targets", n_targets, step.targets.len() as u64)?;
        self.check_ids(&step.prompt_tokens)?;
        self.check_ids(&step.targets)
    }

    fn check_start(&self, start: &LaneStart) -> Result<(), String> {
        let (n_slots, n_prompt) = (start.slots.len(), start.prompt.len());
        if n_slots > self.max_positions as usize {
            return Err(format!("{n_slots} slots for at most {} positions", self.max_positions));
        }
        if n_prompt == 0 || n_prompt > n_slots {
            return Err(format!("a prompt of {n_prompt} tokens with {n_slots} slots"));
        }
        if let Some(slot) = start.slots.iter().find(|&&slot| slot >= self.n_slots) {
            return Err(format!("slot {slot} of a pool of {}", self.n_slots));
        }
        self.check_ids(&start.prompt)
    }

    fn check_ids(&self, ids: &[u32]) -> Result<(), String> {
        match ids.iter().find(|&&id| id >= self.vocab) {
            Some(id) => Err(format!("token {id} of a vocabulary of {}", self.vocab)),
            None => Ok(()),
        }
    }
}

/// A lane that is there, and that did not occur before.
fn once(seen: &mut [bool], Lane(lane): Lane) -> Result<(), String> {
    let n_lanes = seen.len();
    match seen.get_mut(lane as usize) {
        None => Err(format!("lane {lane} of {n_lanes}")),
        Some(true) => Err(format!("lane {lane} occurs twice")),
        Some(seen) => {
            *seen = true;
            Ok(())
        }
    }
}

fn check_row(row: &Row, shape: LaneShape) -> Result<(), String> {
    let (lane, end) = (row.lane.0, u64::from(row.start) + u64::from(row.len()));
    if row.is_empty() {
        return Err(format!("lane {lane} feeds nothing"));
    }
    if end > shape.n_slots as u64 {
        return Err(format!("lane {lane} feeds up to position {end} with {} slots", shape.n_slots));
    }
    if row.feed == Feed::Last && !shape.sampled {
        return Err(format!("lane {lane} feeds its last token and has none"));
    }
    if row.n_targets > row.len() {
        return Err(format!("lane {lane} has {} targets for {} tokens", row.n_targets, row.len()));
    }
    Ok(())
}

fn expect(what: &str, expected: u64, got: u64) -> Result<(), String> {
    if got == expected { Ok(()) } else { Err(format!("{got} {what} instead of {expected}")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::step::SamplingParams;
    use crate::model::executor::{PositionRegime, Progress};

    fn guard() -> Guard {
        Guard::new(&ModelInfo {
            family: "test",
            vocab: 10,
            max_positions: 8,
            n_slots: 20,
            n_lanes: 2,
            max_step_tokens: 6,
            regime: PositionRegime::Fixed,
            dtype: "float32",
            device: "cpu",
            kv_bytes_per_slot: 1,
            weight_bytes: 1,
            kv_bytes: 1,
            graph_bytes: 0,
            links: None,
            progress: Progress::new(1),
        })
    }

    fn prefill() -> StepInput {
        let start = LaneStart {
            lane: Lane(1),
            slots: vec![5, 6, 7, 8],
            prompt: vec![1, 2, 3],
            sampling: SamplingParams::GREEDY,
        };
        let feed = Feed::Prompt { len: 3 };
        let row = Row { lane: Lane(1), start: 0, feed, store_from: 0, sample: true, n_targets: 1 };
        StepInput { starts: vec![start], rows: vec![row], prompt_tokens: vec![1, 2, 3], targets: vec![2] }
    }

    fn decode(start: u32) -> StepInput {
        let row = Row { lane: Lane(1), start, feed: Feed::Last, store_from: 0, sample: true, n_targets: 0 };
        StepInput { rows: vec![row], ..StepInput::default() }
    }

    #[test]
    fn a_prefill_and_a_decode_pass() {
        let mut guard = guard();
        guard.admit(&prefill()).unwrap();
        guard.admit(&decode(3)).unwrap();
        guard.admit(&StepInput::default()).unwrap();
    }

    #[test]
    fn what_is_wrong_is_refused_and_leaves_no_trace() {
        type Spoil = fn(&mut StepInput);
        let wrong: [(&str, Spoil); 14] = [
            ("lane 2 of 2", |s| s.starts[0].lane = Lane(2)),
            ("lane 1 occurs twice", |s| s.starts.push(s.starts[0].clone())),
            ("lane 1 occurs twice", |s| s.rows.push(s.rows[0])),
            ("lane 0 holds no request", |s| s.rows[0].lane = Lane(0)),
            ("slot 20 of a pool of 20", |s| s.starts[0].slots[3] = 20),
            ("9 slots for at most 8", |s| s.starts[0].slots = vec![1; 9]),
            ("a prompt of 0 tokens", |s| s.starts[0].prompt.clear()),
            ("a prompt of 5 tokens with 4 slots", |s| s.starts[0].prompt = vec![1; 5]),
            ("token 10 of a vocabulary of 10", |s| s.prompt_tokens[2] = 10),
            ("token 4294967295 of", |s| s.targets[0] = u32::MAX),
            ("up to position 5 with 4 slots", |s| s.rows[0].start = 2),
            ("up to position 4294967298 with", |s| s.rows[0].start = u32::MAX),
            ("4 targets for 3 tokens", |s| s.rows[0].n_targets = 4),
            ("2 prompt tokens instead of 3", |s| s.prompt_tokens.truncate(2)),
        ];
        for (expected, spoil) in wrong {
            let mut guard = guard();
            let mut step = prefill();
            spoil(&mut step);
            let Err(Error::Bug(text)) = guard.admit(&step) else { panic!("{expected}: accepted") };
            assert!(text.contains(expected), "{text:?} instead of {expected:?}");
            assert_eq!(guard.lanes, [None, None]);
        }
    }

    #[test]
    fn a_lane_feeds_its_last_token_only_when_it_has_one() {
        let mut guard = guard();
        let mut unsampled = prefill();
        unsampled.rows[0].sample = false;
        guard.admit(&unsampled).unwrap();
        assert!(guard.admit(&decode(3)).is_err());
        guard.admit(&prefill()).unwrap();
        assert!(guard.admit(&decode(4)).is_err());
        guard.admit(&decode(3)).unwrap();
    }

    #[test]
    fn a_step_of_too_many_tokens_is_refused() {
        let mut step = prefill();
        step.starts[0].slots = vec![1; 8];
        step.starts[0].prompt = vec![1; 8];
        step.rows[0].feed = Feed::Prompt { len: 7 };
        step.prompt_tokens = vec![1; 7];
        assert!(guard().admit(&step).is_err());
    }
}
