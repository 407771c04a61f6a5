//! What live requests keep on the GPU from step to step, and how a request takes its place there.

use super::device::{Buffer, Device, Pinned, launched};
use super::ffi;
use super::results::N_TURNS;
use crate::backend::step::LaneStart;
use crate::error::{Error, Result};

/// Numbers that lanes are started with, staged at once.
const STAGED_NUMBERS: usize = 1 << 20;

/// `[lanes]`, outliving steps.
pub struct Lanes {
    /// `[lanes, max_positions]` the slot of each position.
    pub slots: Buffer,
    /// Tokens of the prompt.
    pub prompt_lens: Buffer,
    /// The token sampled last.
    pub last: Buffer,
    /// How tokens are chosen.
    pub sampling: Buffer,
    /// `[lanes, vocab]` how often each id occurs in prompt and output, of lanes with a penalty.
    pub counts: Buffer,
    /// Tokens counted.
    pub context_lens: Buffer,
    device: Device,
    max_positions: usize,
    vocab: usize,
    /// What lanes are started with; one for each turn.
    staging: [Pinned<u32>; N_TURNS],
    staged: Buffer,
}

impl Lanes {
    /// No lane is taken.
    pub fn new(device: &Device, n_lanes: usize, max_positions: usize, vocab: usize) -> Result<Lanes> {
        let words = |n: usize| device.alloc(n * size_of::<u32>());
        let n_staged = start_words(max_positions);
        Ok(Lanes {
            slots: words(n_lanes * max_positions)?,
            prompt_lens: words(n_lanes)?,
            last: words(n_lanes)?,
            sampling: device.alloc(n_lanes * size_of::<ffi::Sampling>())?,
            counts: words(n_lanes * vocab)?,
            context_lens: words(n_lanes)?,
            device: device.clone(),
            max_positions,
            vocab,
            staging: [device.pinned(n_staged)?, device.pinned(n_staged)?],
            staged: words(n_staged)?,
        })
    }

    /// Gives lanes their slots and parameters, in the turn of the step that is beginning.
    pub fn start(&mut self, starts: &[LaneStart], turn: usize) -> Result<()> {
        let mut starts = &starts[self.start_some(starts, turn)?..];
        while !starts.is_empty() {
            // What was staged for the lanes before has left the buffer once the stream has passed it.
            self.device.synchronize()?;
            starts = &starts[self.start_some(starts, turn)?..];
        }
        Ok(())
    }

    /// As many as fit into the staging buffer; how many.
    fn start_some(&mut self, starts: &[LaneStart], turn: usize) -> Result<usize> {
        let begin_words = size_of::<ffi::LaneBegin>() / 4;
        let words = self.staging[turn].as_mut_slice();
        let room = words.len();
        let needed = |start: &LaneStart| {
            let counted = ffi::Sampling::from(&start.sampling).penalised != 0;
            begin_words + start.slots.len() + if counted { start.prompt.len() } else { 0 }
        };
        let mut used = 0;
        let fits = |start: &&LaneStart| {
            used += needed(start);
            used <= room
        };
        let n = starts.iter().take_while(fits).count();
        if n == 0 {
            return Err(Error::Bug("a request with more slots than positions".into()));
        }
        let mut at = n * begin_words;
        let mut prompts = Vec::new();
        for (index, start) in starts[..n].iter().enumerate() {
            let begin = ffi::LaneBegin {
                lane: start.lane.0 as i32,
                n_slots: start.slots.len() as i32,
                slots: at as i32,
                prompt_len: start.prompt.len() as u32,
                sampling: ffi::Sampling::from(&start.sampling),
            };
            words[index * begin_words..][..begin_words].copy_from_slice(bytemuck::cast_slice(&[begin]));
            words[at..][..start.slots.len()].copy_from_slice(&start.slots);
            at += start.slots.len();
            if begin.sampling.penalised != 0 {
                words[at..][..start.prompt.len()].copy_from_slice(&start.prompt);
                prompts.push((at, start.prompt.len(), begin.lane));
                at += start.prompt.len();
            }
        }
        self.device.upload(&words[..at], self.staged.address())?;
        let staged = &self.staged;
        let params = ffi::StartLanes {
            starts: staged.ptr(),
            staged: staged.ptr(),
            n: n as i32,
            slots: self.slots.ptr(),
            slots_stride: self.max_positions as i64,
            prompt_lens: self.prompt_lens.ptr(),
            lane_last: self.last.ptr(),
            lanes: self.sampling.ptr(),
        };
        // SAFETY: the executor has checked lanes and numbers of slots; the arrays are sized by the shape.
        launched("start_lanes", unsafe { ffi::kv_start_lanes(&params, self.device.stream()) })?;
        for (at, len, lane) in prompts {
            let params = ffi::CountPrompt {
                tokens: staged.at(at * 4),
                n: len as i32,
                lane,
                counts: self.counts.ptr(),
                context_lens: self.context_lens.ptr(),
                vocab: self.vocab as i32,
            };
            // SAFETY: as above.
            launched("count_prompt", unsafe { ffi::kv_count_prompt(&params, self.device.stream()) })?;
        }
        Ok(n)
    }
}

/// Words to start lanes with: one of the longest at least.
fn start_words(max_positions: usize) -> usize {
    STAGED_NUMBERS.max(2 * max_positions + size_of::<ffi::LaneBegin>())
}
