//! `kernels/kvshard.h`, line by line.

#![allow(missing_docs)]

use std::ffi::{c_int, c_void};

use cudarc::driver::sys::CUstream;

use crate::backend::step::{Choice, SamplingParams};

pub const KV_BF16: i32 = 0;
pub const KV_F16: i32 = 1;
pub const KV_SILU: i32 = 0;
pub const KV_GELU_TANH: i32 = 1;
pub const KV_GELU: i32 = 2;
pub const KV_CLAMPED_SWIGLU: i32 = 3;
pub const KV_STORE: i32 = 0;
pub const KV_ADD: i32 = 1;
pub const KV_GATE: i32 = 2;
pub const KV_ACTIVATE: i32 = 3;
pub const KV_MAX_TOP_N: usize = 100;
pub const KV_GROWS_WITH_SEQUENCE: i32 = 0;
pub const KV_GROWS_WITH_PROMPT: i32 = 1;
pub const KV_MAX_ROTARIES: usize = 4;
pub const KV_RMS: i32 = 0;
pub const KV_RMS_ONE_PLUS: i32 = 1;
pub const KV_LAYER: i32 = 2;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Scores {
    pub scale: f32,
    pub softcap: f32,
    pub window: i32,
    pub alibi: *const f32,
    pub sinks: *const f32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Cache {
    pub keys: *const c_void,
    pub values: *const c_void,
    pub slots: *const u32,
    pub slots_stride: i64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct DecodeRow {
    pub token: i32,
    pub lane: i32,
    pub kv_len: i32,
    pub pad: i32,
}

#[repr(C)]
pub struct AttendDecode {
    pub q: *const c_void,
    pub q_stride: i64,
    pub out: *mut c_void,
    pub out_stride: i64,
    pub cache: Cache,
    pub scores: Scores,
    pub rows: *const DecodeRow,
    pub n_rows: *const i32,
    pub max_rows: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub plan: *const i32,
    pub workspace: *mut c_void,
    pub dtype: i32,
}

#[repr(C)]
pub struct PlanDecode {
    pub rows: *const DecodeRow,
    pub n_rows: *const i32,
    pub max_rows: i32,
    pub window: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub plan: *mut i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PrefillRow {
    pub token: i32,
    pub n: i32,
    pub start: i32,
    pub lane: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PrefillTile {
    pub row: i32,
    pub first: i32,
}

#[repr(C)]
pub struct AttendPrefill {
    pub q: *const c_void,
    pub q_stride: i64,
    pub out: *mut c_void,
    pub out_stride: i64,
    pub cache: Cache,
    pub scores: Scores,
    pub rows: *const PrefillRow,
    pub tiles: *const PrefillTile,
    pub n_tiles: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub dtype: i32,
}

#[repr(C)]
pub struct Linear {
    pub weight: *const c_void,
    pub bias: *const c_void,
    pub x: *const c_void,
    pub x_stride: i64,
    pub out: *mut c_void,
    pub out_stride: i64,
    pub rows: i32,
    pub outputs: i32,
    pub inputs: i32,
    pub epilogue: i32,
    pub activation: i32,
    pub scale: f32,
    pub limit: f32,
    pub out_f32: i32,
    pub variant: i32,
    pub workspace: *mut c_void,
    pub dtype: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Sampling {
    pub seed: u64,
    pub temperature: f32,
    pub top_p: f32,
    pub typical_p: f32,
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub watermark_gamma: f32,
    pub watermark_delta: f32,
    pub top_k: u32,
    pub top_n: u32,
    pub draw: u32,
    pub penalised: u32,
    pub pad: u32,
}

impl From<&SamplingParams> for Sampling {
    fn from(params: &SamplingParams) -> Sampling {
        let (seed, draw) = match params.choice {
            Choice::Greedy => (0, 0),
            Choice::Draw { seed } => (seed, 1),
        };
        Sampling {
            seed,
            temperature: params.temperature,
            top_p: params.top_p,
            typical_p: params.typical_p,
            repetition_penalty: params.repetition_penalty,
            frequency_penalty: params.frequency_penalty,
            watermark_gamma: params.watermark.map_or(0.0, |watermark| watermark.gamma),
            watermark_delta: params.watermark.map_or(0.0, |watermark| watermark.delta),
            top_k: params.top_k,
            top_n: params.top_n,
            draw,
            penalised: u32::from(params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0),
            pad: 0,
        }
    }
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Draft {
    pub lane: i32,
    pub position: u32,
    pub previous: u32,
    pub result: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Chosen {
    pub id: u32,
    pub logprob: f32,
    pub failed: u32,
    pub n_top: u32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Alternative {
    pub id: u32,
    pub logprob: f32,
}

#[repr(C)]
pub struct Sample {
    pub logits: *mut f32,
    pub stride: i64,
    pub vocab: i32,
    pub max_rows: i32,
    pub drafts: *const Draft,
    pub lanes: *const Sampling,
    pub counts: *mut u32,
    pub context_lens: *mut u32,
    pub lane_last: *mut u32,
    pub choices: *mut Chosen,
    pub tops: *mut Alternative,
    pub workspace: *mut c_void,
}

#[repr(C)]
pub struct TargetLogprobs {
    pub logits: *const f32,
    pub stride: i64,
    pub vocab: i32,
    pub rows: i32,
    pub targets: *const u32,
    pub logprobs: *mut f32,
}

#[repr(C)]
pub struct CountPrompt {
    pub tokens: *const u32,
    pub n: i32,
    pub lane: i32,
    pub counts: *mut u32,
    pub context_lens: *mut u32,
    pub vocab: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct StepRow {
    pub lane: i32,
    pub start: u32,
    pub store_from: u32,
    pub token: i32,
    pub prompt: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub struct LaneBegin {
    pub lane: i32,
    pub n_slots: i32,
    pub slots: i32,
    pub prompt_len: u32,
    pub sampling: Sampling,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Rotary {
    pub usual: *const f32,
    pub longer: *const f32,
    pub angles: *mut f32,
    pub base: f64,
    pub factor: f64,
    pub original: u32,
    pub growth: i32,
    pub half: i32,
    pub amplitude: f32,
}

impl Rotary {
    pub const NONE: Rotary = Rotary {
        usual: std::ptr::null(),
        longer: std::ptr::null(),
        angles: std::ptr::null_mut(),
        base: 1.0,
        factor: 1.0,
        original: u32::MAX,
        growth: KV_GROWS_WITH_SEQUENCE,
        half: 0,
        amplitude: 1.0,
    };
}

#[repr(C)]
pub struct StartLanes {
    pub starts: *const LaneBegin,
    pub staged: *const u32,
    pub n: i32,
    pub slots: *mut u32,
    pub slots_stride: i64,
    pub prompt_lens: *mut u32,
    pub lane_last: *mut u32,
    pub lanes: *mut Sampling,
}

#[repr(C)]
pub struct LayOut {
    pub decode: i32,
    pub max_tokens: i32,
    pub rows: *const StepRow,
    pub n_rows: *const i32,
    pub token_rows: *const u32,
    pub prompt: *const u32,
    pub lane_last: *const u32,
    pub prompt_lens: *const u32,
    pub slots: *const u32,
    pub slots_stride: i64,
    pub rotaries: [Rotary; KV_MAX_ROTARIES],
    pub n_rotaries: i32,
    pub finished: *const u32,
    pub max_results: i32,
    pub tokens: *mut u32,
    pub positions: *mut u32,
    pub stores: *mut i32,
    pub decode_rows: *mut DecodeRow,
    pub drafts: *mut Draft,
    pub sampled_tokens: *mut u32,
    pub n_drafts: i32,
}

#[repr(C)]
pub struct Finish {
    pub rows: *mut StepRow,
    pub n_rows: *const i32,
    pub max_rows: i32,
    pub finished: *mut u32,
    pub host_finished: *mut u32,
}

#[repr(C)]
pub struct TakeRows {
    pub table: *const c_void,
    pub table_stride: i64,
    pub wanted: *const u32,
    pub rows: i32,
    pub first: u32,
    pub table_rows: u32,
    pub out: *mut c_void,
    pub out_stride: i64,
    pub width: i32,
    pub add: i32,
    pub multiplier: f32,
    pub dtype: i32,
}

#[repr(C)]
pub struct AddRows {
    pub x: *const c_void,
    pub x_stride: i64,
    pub out: *mut c_void,
    pub out_stride: i64,
    pub rows: i32,
    pub width: i32,
    pub multiplier: f32,
    pub dtype: i32,
}

#[repr(C)]
pub struct WarpLogits {
    pub logits: *mut f32,
    pub stride: i64,
    pub rows: i32,
    pub width: i32,
    pub multiplier: f32,
    pub softcap: f32,
}

#[repr(C)]
pub struct NormaliseRows {
    pub rows_of: *mut c_void,
    pub stride: i64,
    pub rows: i32,
    pub width: i32,
    pub dtype: i32,
}

#[repr(C)]
pub struct NormRows {
    pub x: *const c_void,
    pub x_stride: i64,
    pub weight: *const c_void,
    pub bias: *const c_void,
    pub out: *mut c_void,
    pub out_stride: i64,
    pub rows: i32,
    pub width: i32,
    pub eps: f32,
    pub kind: i32,
    pub add: i32,
    pub dtype: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct HeadNorm {
    pub weight: *const c_void,
    pub head_stride: i32,
}

#[repr(C)]
pub struct RopeStore {
    pub qkv: *mut c_void,
    pub stride: i64,
    pub angles: *const f32,
    pub positions: *const u32,
    pub stores: *const i32,
    pub keys: *mut c_void,
    pub values: *mut c_void,
    pub tokens: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub rotary_dim: i32,
    pub normed: i32,
    pub query_norm: HeadNorm,
    pub key_norm: HeadNorm,
    pub kind: i32,
    pub eps: f32,
    pub log_n: u32,
    pub dtype: i32,
}

#[repr(C)]
pub struct Gate {
    pub gate_up: *const c_void,
    pub stride: i64,
    pub out: *mut c_void,
    pub out_stride: i64,
    pub rows: i32,
    pub width: i32,
    pub activation: i32,
    pub limit: f32,
    pub dtype: i32,
}

#[repr(C)]
pub struct Activate {
    pub x: *mut c_void,
    pub stride: i64,
    pub rows: i32,
    pub width: i32,
    pub activation: i32,
    pub dtype: i32,
}

pub const KV_MAX_RANKS: usize = 8;
pub const KV_MEETING_BLOCKS: usize = 128;
pub const KV_ONE_SHOT: i32 = 0;
pub const KV_TWO_SHOT: i32 = 1;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct World {
    pub rank: i32,
    pub n_ranks: i32,
    pub flags: [*mut u32; KV_MAX_RANKS],
    pub inboxes: [*mut c_void; KV_MAX_RANKS],
    pub inbox_bytes: i64,
    pub meetings: *mut u32,
    pub turns: *mut u32,
    pub aborted: *const u32,
}

#[repr(C)]
pub struct AllReduce {
    pub world: World,
    pub parts: [*const c_void; KV_MAX_RANKS],
    pub sums: [*mut c_void; KV_MAX_RANKS],
    pub n: i64,
    pub add: i32,
    pub way: i32,
    pub dtype: i32,
}

#[repr(C)]
pub struct Gather {
    pub world: World,
    pub part: *const f32,
    pub part_stride: i64,
    pub out: *mut f32,
    pub out_stride: i64,
    pub rows: i32,
    pub first: i32,
    pub width: i32,
    pub all_width: i32,
}

#[repr(C)]
pub struct ShareTokens {
    pub world: World,
    pub drafts: *const Draft,
    pub n_drafts: i32,
    pub lane_last: [*mut u32; KV_MAX_RANKS],
}

#[repr(C)]
pub struct FillRandom {
    pub out: *mut c_void,
    pub out_stride: i64,
    pub rows: i64,
    pub columns: i64,
    pub first: i64,
    pub row_step: i64,
    pub column_step: i64,
    pub stream: u64,
    pub reach: f32,
    pub dtype: i32,
}

unsafe extern "C" {
    pub fn kv_plan_decode_ints(max_rows: i32) -> i32;
    pub fn kv_attend_decode_workspace_bytes(max_rows: i32, heads: i32, kv_heads: i32, head_dim: i32) -> i64;
    pub fn kv_plan_decode(params: *const PlanDecode, stream: CUstream) -> c_int;
    pub fn kv_attend_decode(params: *const AttendDecode, stream: CUstream) -> c_int;
    pub fn kv_prefill_tile_tokens(heads: i32, kv_heads: i32, head_dim: i32) -> i32;
    pub fn kv_attend_prefill(params: *const AttendPrefill, stream: CUstream) -> c_int;
    pub fn kv_linear_variants(rows: i32, outputs: i32, inputs: i32, epilogue: i32, dtype: i32) -> i32;
    pub fn kv_linear_workspace_bytes() -> i64;
    pub fn kv_linear(params: *const Linear, stream: CUstream) -> c_int;
    pub fn kv_sample_workspace_bytes(max_rows: i32, vocab: i32) -> i64;
    pub fn kv_sample(params: *const Sample, stream: CUstream) -> c_int;
    pub fn kv_target_logprobs(params: *const TargetLogprobs, stream: CUstream) -> c_int;
    pub fn kv_count_prompt(params: *const CountPrompt, stream: CUstream) -> c_int;
    pub fn kv_start_lanes(params: *const StartLanes, stream: CUstream) -> c_int;
    pub fn kv_lay_out(params: *const LayOut, stream: CUstream) -> c_int;
    pub fn kv_finish(params: *const Finish, stream: CUstream) -> c_int;
    pub fn kv_take_rows(params: *const TakeRows, stream: CUstream) -> c_int;
    pub fn kv_add_rows(params: *const AddRows, stream: CUstream) -> c_int;
    pub fn kv_warp_logits(params: *const WarpLogits, stream: CUstream) -> c_int;
    pub fn kv_normalise_rows(params: *const NormaliseRows, stream: CUstream) -> c_int;
    pub fn kv_norm(params: *const NormRows, stream: CUstream) -> c_int;
    pub fn kv_rope_store(params: *const RopeStore, stream: CUstream) -> c_int;
    pub fn kv_gate(params: *const Gate, stream: CUstream) -> c_int;
    pub fn kv_all_reduce(params: *const AllReduce, stream: CUstream) -> c_int;
    pub fn kv_load_collectives(n_ranks: i32, dtype: i32) -> c_int;
    pub fn kv_gather(params: *const Gather, stream: CUstream) -> c_int;
    pub fn kv_share_tokens(params: *const ShareTokens, stream: CUstream) -> c_int;
    pub fn kv_activate(params: *const Activate, stream: CUstream) -> c_int;
    pub fn kv_fill_random(params: *const FillRandom, stream: CUstream) -> c_int;
}
