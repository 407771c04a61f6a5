//! The lanes and the arrays of a step, on the GPU.
//!
//! A decode step whose members and order are those of the step before needs nothing from the host: the rows lie on the
//! device, and the end of a step moves them on. Everything else is staged in pinned memory and copied in one piece.

mod attend;

use std::mem::{offset_of, size_of};

use super::device::{Buffer, Device, Pinned, launched};
use super::ffi;
use super::lanes::Lanes;
use super::latent::kv_attend_latent_workspace_bytes;
use super::results::{N_TURNS, Results};
use super::rotary::Rotary;
use super::world::{LaneTokens, Member};
use crate::backend::step::{Feed, StepInput, StepOutput};
use crate::backend::{Heads, LogitRows, StepShape};
use crate::error::{Error, Result};
use crate::model::checkpoint::DType;
use crate::model::spec::Mask;

/// Lanes, and the step under way.
pub struct Step {
    device: Device,
    dtype: DType,
    shape: StepShape,
    lanes: Lanes,
    lane_tokens: LaneTokens,
    arrays: Arrays,
    attention: Vec<(Mask, Buffer)>,
    attend_workspace: Buffer,
    sample_workspace: Buffer,
    rotaries: Vec<Rotary>,
    results: Results,
    /// One for each turn.
    staging: [Pinned<u32>; N_TURNS],
    /// The rows as they lie on the device once the steps under way have ended; empty when they are not a decode step's.
    resident: Vec<ffi::StepRow>,
    mode: Mode,
}

/// What the ops of the step that began last run over.
#[derive(Debug, Clone, Copy)]
enum Mode {
    /// So many rows at most, each of one token, all sampled.
    Decode {
        max_rows: usize,
    },
    Mixed(Mixed),
}

#[derive(Debug, Clone, Copy, Default)]
struct Mixed {
    n_tokens: usize,
    n_sampled: usize,
    n_decode_rows: usize,
    n_tiles: usize,
    /// Offsets of the staged arrays in words.
    at: Layout,
}

/// Where each array of a mixed step lies in what is staged, in words.
#[derive(Debug, Clone, Copy, Default)]
struct Layout {
    token_rows: usize,
    prompt: usize,
    targets: usize,
    target_tokens: usize,
    sampled_tokens: usize,
    drafts: usize,
    decode_rows: usize,
    prefill_rows: usize,
    tiles: usize,
}

/// What a step is laid out in.
struct Arrays {
    /// [`Head`], then what a mixed step stages.
    staged: Buffer,
    tokens: Buffer,
    positions: Buffer,
    stores: Buffer,
    /// Of decode steps.
    decode_rows: Buffer,
    drafts: Buffer,
    sampled_tokens: Buffer,
}

/// The first words of what is staged.
#[repr(C)]
struct Head {
    n_rows: i32,
    n_decode_rows: i32,
    _pad: [i32; 2],
}

/// Words before the rows.
const HEAD_WORDS: usize = size_of::<Head>() / 4;
const ROW_WORDS: usize = size_of::<ffi::StepRow>() / 4;

impl Step {
    /// Sized for the largest step. Every rank makes its own at once.
    pub fn new(device: &Device, member: &Member, dtype: DType, shape: StepShape) -> Result<Step> {
        let StepShape { max_tokens, n_lanes, max_positions, vocab, heads, .. } = shape.clone();
        let words = |n: usize| device.alloc(n * 4);
        let staged_words = staged_words(max_tokens, n_lanes);
        if shape.frequencies.len() > ffi::KV_MAX_ROTARIES {
            return Err(Error::Bug("more rotary embeddings than `supports` lets pass".into()));
        }
        let (rows, n_heads, kv_heads, width) =
            (n_lanes as i32, heads.heads as i32, heads.kv_heads as i32, heads.head_dim as i32);
        // SAFETY: questions about sizes.
        let (plan_words, attend_bytes, sample_bytes) = unsafe {
            (
                ffi::kv_plan_decode_ints(rows),
                if heads.head_dim > attend::MAX_HEAD_DIM {
                    kv_attend_latent_workspace_bytes(rows, n_heads, width)
                } else {
                    ffi::kv_attend_decode_workspace_bytes(rows, n_heads, kv_heads, width)
                },
                ffi::kv_sample_workspace_bytes(rows, vocab as i32),
            )
        };
        let plan = |mask: &Mask| Ok((*mask, words(plan_words as usize)?));
        let lanes = Lanes::new(device, n_lanes, max_positions, vocab)?;
        Ok(Step {
            lane_tokens: LaneTokens { joint: member.joint(lanes.last.address())?, n_lanes },
            lanes,
            arrays: Arrays {
                staged: words(staged_words)?,
                tokens: words(max_tokens)?,
                positions: words(max_tokens)?,
                stores: words(max_tokens)?,
                decode_rows: device.alloc(n_lanes * size_of::<ffi::DecodeRow>())?,
                drafts: device.alloc(n_lanes * size_of::<ffi::Draft>())?,
                sampled_tokens: words(n_lanes)?,
            },
            attention: shape.masks.iter().map(plan).collect::<Result<_>>()?,
            attend_workspace: device.alloc(attend_bytes as usize)?,
            sample_workspace: device.alloc(sample_bytes as usize)?,
            rotaries: shape
                .frequencies
                .iter()
                .map(|frequencies| Rotary::new(device, frequencies, max_tokens))
                .collect::<Result<_>>()?,
            results: Results::new(device, n_lanes, max_tokens)?,
            staging: [device.pinned(staged_words)?, device.pinned(staged_words)?],
            resident: Vec::with_capacity(n_lanes),
            mode: Mode::Decode { max_rows: 0 },
            device: device.clone(),
            dtype,
            shape,
        })
    }

    /// Takes a step's description to the device.
    pub fn begin(&mut self, input: &StepInput) -> Result<()> {
        self.results.check_room()?;
        if !input.starts.is_empty() {
            self.lanes.start(&input.starts, self.results.turn())?;
        }
        let sampled = input.rows.iter().filter(|row| row.sample).count();
        let decodes =
            |row: &crate::backend::step::Row| row.feed == Feed::Last && row.sample && row.n_targets == 0;
        if !input.rows.is_empty() && input.rows.iter().all(decodes) {
            self.begin_decode(input)?;
        } else {
            self.begin_mixed(input, sampled)?;
        }
        self.results.expect(sampled, input.targets.len());
        Ok(())
    }

    /// The half of the results, and the staging, that the step about to begin uses.
    fn turn(&self) -> usize {
        self.results.turn()
    }

    fn begin_decode(&mut self, input: &StepInput) -> Result<()> {
        self.mode = Mode::Decode { max_rows: input.rows.len() };
        let wanted = |row: &crate::backend::step::Row| ffi::StepRow {
            lane: row.lane.0 as i32,
            start: row.start,
            // Only whether the one position is stored matters, and most are.
            store_from: if row.store_from > row.start { row.store_from } else { 0 },
            token: 0,
            prompt: -1,
        };
        let same = self.resident.len() == input.rows.len()
            && self.resident.iter().zip(&input.rows).all(|(resident, row)| *resident == wanted(row));
        if !same {
            self.resident.clear();
            self.resident.extend(input.rows.iter().map(wanted));
            let turn = self.turn();
            let words = HEAD_WORDS + self.resident.len() * ROW_WORDS;
            let staging = &mut self.staging[turn].as_mut_slice()[..words];
            let n = self.resident.len() as u32;
            staging[..HEAD_WORDS].copy_from_slice(&[n, n, 0, 0]);
            staging[HEAD_WORDS..].copy_from_slice(bytemuck::cast_slice(&self.resident));
            self.device.upload(staging, self.arrays.staged.address())?;
        }
        // As the end of the step leaves them.
        for row in &mut self.resident {
            row.start += 1;
            row.store_from = 0;
        }
        Ok(())
    }

    fn begin_mixed(&mut self, input: &StepInput, n_sampled: usize) -> Result<()> {
        self.resident.clear();
        let n_tokens = input.n_tokens();
        let Heads { heads, kv_heads, head_dim } = self.shape.heads;
        // SAFETY: a question about sizes.
        let tile =
            unsafe { ffi::kv_prefill_tile_tokens(heads as i32, kv_heads as i32, head_dim as i32) }.max(1);
        let turn = self.turn();
        let first_result = self.results.first_choice() as i32;
        let words = self.staging[turn].as_mut_slice();
        let mut stage = Stage { words, used: HEAD_WORDS };
        let (mut token, mut prompt) = (0, 0);
        let mut rows = Vec::with_capacity(input.rows.len());
        let mut token_rows: Vec<u32> = Vec::with_capacity(n_tokens);
        let (mut target_tokens, mut sampled_tokens) = (Vec::new(), Vec::new());
        let (mut drafts, mut decode_rows) = (Vec::new(), Vec::new());
        let (mut prefill_rows, mut tiles) = (Vec::<ffi::PrefillRow>::new(), Vec::new());
        for (number, row) in input.rows.iter().enumerate() {
            let (lane, n) = (row.lane.0 as i32, row.len() as i32);
            let is_prompt = row.feed != Feed::Last;
            let prompt_at = if is_prompt { prompt } else { -1 };
            let (start, store_from) = (row.start, row.store_from);
            rows.push(ffi::StepRow { lane, start, store_from, token, prompt: prompt_at });
            token_rows.extend(std::iter::repeat_n(number as u32, n as usize));
            target_tokens.extend(token as u32..token as u32 + row.n_targets);
            if row.sample {
                let result = first_result + drafts.len() as i32;
                let position = row.start + row.len();
                sampled_tokens.push((token + n - 1) as u32);
                drafts.push(ffi::Draft { lane, position, previous: 0, result });
            }
            let start = row.start as i32;
            if n == 1 {
                decode_rows.push(ffi::DecodeRow { token, lane, kv_len: start + 1, pad: 0 });
            } else {
                let at = prefill_rows.len() as i32;
                tiles.extend((0..n).step_by(tile as usize).map(|first| ffi::PrefillTile { row: at, first }));
                prefill_rows.push(ffi::PrefillRow { token, n, start, lane });
            }
            token += n;
            prompt += if is_prompt { n } else { 0 };
        }
        // Most keys first, so that the last blocks to run are short.
        let keys = |tile: &ffi::PrefillTile| prefill_rows[tile.row as usize].start + tile.first;
        tiles.sort_by_key(|tile| (std::cmp::Reverse(keys(tile)), tile.row));
        // Where the rows of a decode step lie too.
        stage.push(&rows);
        let at = Layout {
            token_rows: stage.push(&token_rows),
            prompt: stage.push(&input.prompt_tokens),
            targets: stage.push(&input.targets),
            target_tokens: stage.push(&target_tokens),
            sampled_tokens: stage.push(&sampled_tokens),
            drafts: stage.push(&drafts),
            decode_rows: stage.push(&decode_rows),
            prefill_rows: stage.push(&prefill_rows),
            tiles: stage.push(&tiles),
        };
        stage.words[..HEAD_WORDS].copy_from_slice(&[input.rows.len() as u32, decode_rows.len() as u32, 0, 0]);
        let staged = &stage.words[..stage.used];
        self.device.upload(staged, self.arrays.staged.address())?;
        let (n_decode_rows, n_tiles) = (decode_rows.len(), tiles.len());
        self.mode = Mode::Mixed(Mixed { n_tokens, n_sampled, n_decode_rows, n_tiles, at });
        Ok(())
    }

    /// What a graph of so many rows is recorded for.
    pub fn shape_for_capture(&mut self, rows: usize) {
        self.mode = Mode::Decode { max_rows: rows };
    }

    /// Tokens, positions, slots, angles; and how attention is cut.
    pub fn lay_out(&self) -> Result<()> {
        let (decode, max_tokens, mixed) = match self.mode {
            Mode::Decode { max_rows } => (1, max_rows, Mixed::default()),
            Mode::Mixed(mixed) => (0, mixed.n_tokens, mixed),
        };
        let at = mixed.at;
        let params = ffi::LayOut {
            decode,
            max_tokens: max_tokens as i32,
            rows: self.staged(HEAD_WORDS),
            n_rows: self.staged(0),
            token_rows: self.staged(at.token_rows),
            prompt: self.staged(at.prompt),
            lane_last: self.lanes.last.ptr(),
            prompt_lens: self.lanes.prompt_lens.ptr(),
            slots: self.lanes.slots.ptr(),
            slots_stride: self.shape.max_positions as i64,
            rotaries: std::array::from_fn(|i| self.rotaries.get(i).map_or(ffi::Rotary::NONE, Rotary::params)),
            n_rotaries: self.rotaries.len() as i32,
            finished: self.results.finished(),
            max_results: self.shape.n_lanes as i32,
            tokens: self.arrays.tokens.ptr(),
            positions: self.arrays.positions.ptr(),
            stores: self.arrays.stores.ptr(),
            decode_rows: self.arrays.decode_rows.ptr(),
            drafts: self.drafts(),
            sampled_tokens: self.sampled_tokens(),
            n_drafts: mixed.n_sampled as i32,
        };
        // SAFETY: the arrays are sized for the largest step.
        launched("lay_out", unsafe { ffi::kv_lay_out(&params, self.device.stream()) })?;
        self.plan_decode()
    }

    /// Rows of one token, where there are any: the rows, their number on the device, the most there can be.
    fn decode_rows(&self) -> Option<(*const ffi::DecodeRow, *const i32, usize)> {
        match self.mode {
            Mode::Decode { max_rows } => {
                Some((self.arrays.decode_rows.ptr(), self.staged(offset_of!(Head, n_rows) / 4), max_rows))
            }
            Mode::Mixed(Mixed { n_decode_rows: 0, .. }) => None,
            Mode::Mixed(Mixed { n_decode_rows, at, .. }) => {
                let n_rows = self.staged(offset_of!(Head, n_decode_rows) / 4);
                Some((self.staged(at.decode_rows), n_rows, n_decode_rows))
            }
        }
    }

    /// The address of a staged word.
    fn staged<T>(&self, word: usize) -> *mut T {
        self.arrays.staged.at(word * 4)
    }

    fn drafts(&self) -> *mut ffi::Draft {
        match self.mode {
            Mode::Decode { .. } => self.arrays.drafts.ptr(),
            Mode::Mixed(mixed) => self.staged(mixed.at.drafts),
        }
    }

    fn sampled_tokens(&self) -> *mut u32 {
        match self.mode {
            Mode::Decode { .. } => self.arrays.sampled_tokens.ptr(),
            Mode::Mixed(mixed) => self.staged(mixed.at.sampled_tokens),
        }
    }

    /// Tokens of the step, padding rows of a bucket included.
    pub fn n_tokens(&self) -> usize {
        match self.mode {
            Mode::Decode { max_rows } => max_rows,
            Mode::Mixed(mixed) => mixed.n_tokens,
        }
    }

    /// Ids fed.
    pub fn tokens(&self) -> *const u32 {
        self.arrays.tokens.ptr()
    }

    /// Slots stored to.
    pub fn stores(&self) -> *const i32 {
        self.arrays.stores.ptr()
    }

    /// Positions of the tokens.
    pub fn positions(&self) -> *const u32 {
        self.arrays.positions.ptr()
    }

    /// Cosines and sines of a rotary embedding, and the pairs that it turns.
    pub fn angles(&self, rotary: usize) -> Result<(*const f32, usize)> {
        let rotary = self.rotaries.get(rotary);
        let rotary =
            rotary.ok_or_else(|| Error::Bug("a rotary embedding that the step does not have".into()))?;
        Ok((rotary.angles(), rotary.half()))
    }

    /// Tokens whose logits are wanted, and how many.
    pub fn logit_tokens(&self, wanted: &LogitRows) -> (*const u32, usize) {
        match (wanted, self.mode) {
            (LogitRows::Sampled, Mode::Decode { max_rows }) => (self.sampled_tokens(), max_rows),
            (LogitRows::Sampled, Mode::Mixed(mixed)) => (self.sampled_tokens(), mixed.n_sampled),
            (LogitRows::Targets(range), Mode::Mixed(mixed)) => {
                (self.staged(mixed.at.target_tokens + range.start), range.len())
            }
            (LogitRows::Targets(_), Mode::Decode { .. }) => (self.sampled_tokens(), 0),
        }
    }

    /// Chooses a token a row; `logits` has a stride.
    pub fn sample(&self, logits: *mut f32, stride: usize) -> Result<()> {
        let (_, rows) = self.logit_tokens(&LogitRows::Sampled);
        let params = ffi::Sample {
            logits,
            stride: stride as i64,
            vocab: self.shape.vocab as i32,
            max_rows: rows as i32,
            drafts: self.drafts(),
            lanes: self.lanes.sampling.ptr(),
            counts: self.lanes.counts.ptr(),
            context_lens: self.lanes.context_lens.ptr(),
            lane_last: self.lanes.last.ptr(),
            choices: self.results.choices(),
            tops: self.results.tops(),
            workspace: self.sample_workspace.ptr(),
        };
        // SAFETY: there is a row of logits for every draft.
        launched("sample", unsafe { ffi::kv_sample(&params, self.device.stream()) })
    }

    /// Log-probabilities of targets, whose logits are the first rows.
    pub fn target_logprobs(
        &self,
        targets: std::ops::Range<usize>,
        logits: *const f32,
        stride: usize,
    ) -> Result<()> {
        let Mode::Mixed(mixed) = self.mode else {
            return Err(Error::Bug("a decode step has no targets".into()));
        };
        let params = ffi::TargetLogprobs {
            logits,
            stride: stride as i64,
            vocab: self.shape.vocab as i32,
            rows: targets.len() as i32,
            targets: self.staged(mixed.at.targets + targets.start),
            logprobs: self.results.target_logprobs(targets.start),
        };
        // SAFETY: there is a row of logits for every target.
        launched("target_logprobs", unsafe { ffi::kv_target_logprobs(&params, self.device.stream()) })
    }

    /// The end of the step: what it produced may be read.
    pub fn finish(&self) -> Result<()> {
        let max_rows = if let Mode::Decode { max_rows } = self.mode { max_rows } else { 0 };
        let params = ffi::Finish {
            rows: self.staged(HEAD_WORDS),
            n_rows: self.staged(0),
            max_rows: max_rows as i32,
            finished: self.results.finished(),
            host_finished: self.results.host_finished(),
        };
        // SAFETY: the arrays are sized for the largest step.
        launched("finish", unsafe { ffi::kv_finish(&params, self.device.stream()) })
    }

    /// What the lanes of all ranks sampled last.
    pub fn lane_tokens(&self) -> &LaneTokens {
        &self.lane_tokens
    }

    /// The rows that sample, padding rows of a bucket included: their drafts, and how many.
    pub fn all_drafts(&self) -> (*const ffi::Draft, usize) {
        let (_, n) = self.logit_tokens(&LogitRows::Sampled);
        (self.drafts(), n)
    }

    /// Waits for the oldest step under way, for as long as `check` finds no fault.
    pub fn output(&mut self, check: &dyn Fn() -> Result<()>) -> Result<StepOutput> {
        self.results.output(check)
    }
}

/// Arrays put one after the other, each at a multiple of 16 bytes.
struct Stage<'a> {
    words: &'a mut [u32],
    used: usize,
}

impl Stage<'_> {
    /// Where the array begins.
    fn push<T: bytemuck::NoUninit>(&mut self, array: &[T]) -> usize {
        let source: &[u32] = bytemuck::cast_slice(array);
        let at = self.used.next_multiple_of(4);
        self.words[at..][..source.len()].copy_from_slice(source);
        self.used = at + source.len();
        at
    }
}

/// Words of the largest step: its rows; for every token its row, its id, a target and the token before it; for every
/// row a sampled token, a draft, and what attention needs; tiles of at least one token.
fn staged_words(max_tokens: usize, n_lanes: usize) -> usize {
    HEAD_WORDS + n_lanes * (ROW_WORDS + 1 + 4 + 4 + 4) + max_tokens * (4 + 2) + 64
}
