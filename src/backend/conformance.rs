//! Op tests, written once and instantiated for every backend.
//!
//! Each op is compared with a naive reference in f64 that shares no code with any backend. What an op may not read
//! (rows of padding, slots of nobody) holds NaN; what it may not write is compared afterwards.

mod attention;
mod experts;
mod latent;
mod norms;
mod products;
mod rows;
mod sampling;
mod streams;
mod turns;

use super::random::philox;
use super::step::{Feed, LaneStart, Row, SamplingParams, StepInput};
use super::{Backend, Heads, LinearPart, StepShape};
use crate::ids::Lane;
use crate::model::checkpoint::{DType, StoredTensor};
use crate::model::rope::Frequencies;
use crate::model::spec::{Mask, Rope, RopeScaling};
use crate::model::weights::TensorPart;

/// What the tests need besides the ops: numbers in and out.
pub trait Probe: Backend {
    /// Writes the first rows of a tensor and poisons the others.
    fn fill(&self, tensor: &mut Self::Tensor, numbers: &[f32]);

    /// All rows of a tensor.
    fn read(&self, tensor: &Self::Tensor) -> Vec<f32>;

    /// Writes the keys and the values of all slots; of latent attention its rows, and no values.
    fn fill_kv(&self, kv: &mut Self::Kv, keys: &[f32], values: &[f32]);

    /// Keys and values of all slots.
    fn read_kv(&self, kv: &Self::Kv) -> (Vec<f32>, Vec<f32>);

    /// Error of an op on numbers around one, from the width of its numbers.
    const TOLERANCE: f64;
}

/// The tests of one backend, made by `$new`.
macro_rules! conformance {
    ($name:ident, $new:expr) => {
        mod $name {
            use super::*;

            conformance!(@tests $new;
                rows: embed_takes_the_ranks_rows_only, norm_has_unit_mean_square, linear_is_a_matrix_product,
                    linear_reads_a_rectangle_of_what_is_stored, linear_add_adds, linear_gate_multiplies,
                    select_copies_the_wanted_rows;
                norms: every_norm_of_every_width;
                products: products_are_scaled, products_are_activated, every_gate, rows_of_unit_length,
                    weights_are_read_where_they_lie;
                streams: embeddings_are_multiplied_and_positions_added, a_branch_is_multiplied_and_added,
                    logits_are_multiplied_and_capped;
                turns: every_rotary_width, every_norm_of_heads, log_n_and_frequencies_by_the_prompt;
                attention: rope_store_rotates_and_stores, attend_over_every_length, attend_over_every_shape,
                    attend_over_ragged_rows, attend_by_every_score, attend_with_one_kv_head;
                latent: linear_of_each_head, latents_are_normed_turned_and_stored, heads_attend_to_latents,
                    many_heads_attend_to_latents;
                experts: every_router_of_every_shape, experts_of_many_rows, experts_with_biases_and_clamped_gates,
                    ranks_share_the_neurons_of_experts;
                sampling: greedy_rows_are_independent, a_lane_feeds_what_it_sampled, targets_follow_raw_logits,
                    a_lane_forgets_what_it_held_before;
            );
        }
    };
    (@tests $new:expr; $($module:ident: $($test:ident),+;)+) => {
        $($(
            #[test]
            fn $test() {
                $module::$test(&$new);
            }
        )+)+
    };
}

conformance!(cpu, crate::backend::cpu::Cpu::alone());
// These need a GPU, and fail without one: who builds with the feature means to use it.
#[cfg(feature = "cuda")]
conformance!(cuda_bf16, cuda(DType::BF16));
#[cfg(feature = "cuda")]
conformance!(cuda_f16, cuda(DType::F16));

#[cfg(feature = "cuda")]
fn cuda(dtype: DType) -> crate::backend::cuda::Cuda {
    let mut cuda = crate::backend::cuda::Cuda::new(0, dtype).unwrap();
    cuda.attach().unwrap();
    cuda
}

impl Probe for crate::backend::cpu::Cpu {
    fn fill(&self, tensor: &mut Self::Tensor, numbers: &[f32]) {
        tensor.values.fill(f32::NAN);
        tensor.values[..numbers.len()].copy_from_slice(numbers);
    }

    fn read(&self, tensor: &Self::Tensor) -> Vec<f32> {
        tensor.values.clone()
    }

    fn fill_kv(&self, kv: &mut Self::Kv, keys: &[f32], values: &[f32]) {
        kv.keys.copy_from_slice(keys);
        kv.values.copy_from_slice(values);
    }

    fn read_kv(&self, kv: &Self::Kv) -> (Vec<f32>, Vec<f32>) {
        (kv.keys.clone(), kv.values.clone())
    }

    const TOLERANCE: f64 = 2e-6;
}

/// Numbers in [−1, 1] that every dtype holds exactly.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let number = |i: u32| philox([i, 0, 0, 0], [seed, 0])[0] as f32 / 2f32.powi(31) - 1.0;
    // Not so small that f16 would round them.
    let held = |x: f32| half::bf16::from_f32(if x.abs() < 1e-3 { 0.125 } else { x }).to_f32();
    (0..n as u32).map(|i| held(number(i))).collect()
}

/// A whole tensor, stored.
fn stored(dtype: DType, shape: &[usize], numbers: &[f32]) -> TensorPart {
    let bytes = match dtype {
        DType::F32 => numbers.iter().flat_map(|n| n.to_le_bytes()).collect(),
        DType::F16 => numbers.iter().flat_map(|&n| half::f16::from_f32(n).to_le_bytes()).collect(),
        DType::BF16 => numbers.iter().flat_map(|&n| half::bf16::from_f32(n).to_le_bytes()).collect(),
    };
    let tensor = StoredTensor::from_bytes(dtype, shape.to_vec(), bytes).unwrap();
    TensorPart::whole(tensor)
}

/// What a number becomes where it is stored.
fn rounded(dtype: DType, number: f32) -> f64 {
    f64::from(match dtype {
        DType::F32 => number,
        DType::F16 => half::f16::from_f32(number).to_f32(),
        DType::BF16 => half::bf16::from_f32(number).to_f32(),
    })
}

/// Compares the first numbers, and expects poison behind them.
fn assert_close(got: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_sums_close(got, expected, expected, tolerance, what);
}

/// As [`assert_close`], for sums of which one term may be rounded before it is added: larger than the sum, it errs by
/// more.
fn assert_sums_close(got: &[f32], expected: &[f64], terms: &[f64], tolerance: f64, what: &str) {
    for (i, ((&got, &expected), &term)) in got.iter().zip(expected).zip(terms).enumerate() {
        let error = (f64::from(got) - expected).abs();
        assert!(
            error <= tolerance * expected.abs().max(term.abs()).max(1.0),
            "{what}, number {i}: {got} instead of {expected}"
        );
    }
    assert!(got[expected.len()..].iter().all(|number| number.is_nan()), "{what}: padding was written");
}

/// Requests in one step, row `i` on lane `n − 1 − i`; the slots of each are scattered over the pool.
struct Ragged {
    input: StepInput,
    /// `[rows]` the slots of each lane.
    slots: Vec<Vec<u32>>,
    n_slots: usize,
}

/// Slots that a lane has beyond what a row feeds.
const SPARE: u32 = 3;

impl Ragged {
    /// Rows of `(start, len)`, fed as prompts.
    fn new(rows: &[(u32, u32)]) -> Ragged {
        let n: u32 = rows.iter().map(|(start, len)| start + len + SPARE).sum();
        // Coprime to the number of slots, so that no slot comes twice.
        let n_slots = (n + 2) | 1;
        let mut free = (1..n_slots).map(|i| if n_slots.is_multiple_of(5) { i * 2 } else { i * 5 } % n_slots);
        let mut ragged = Ragged { input: StepInput::default(), slots: vec![], n_slots: n_slots as usize };
        for (i, &(start, len)) in rows.iter().enumerate() {
            assert!((start + len + SPARE) as usize <= MAX_POSITIONS, "a lane has no room for its slots");
            let lane = Lane((rows.len() - 1 - i) as u32);
            let slots: Vec<u32> = free.by_ref().take((start + len + SPARE) as usize).collect();
            let prompt: Vec<u32> = (0..start + len).map(|position| (position * 7 + i as u32) % 50).collect();
            ragged.input.prompt_tokens.extend(&prompt[start as usize..]);
            let feed = Feed::Prompt { len };
            let row = Row { lane, start, feed, store_from: 0, sample: true, n_targets: 0 };
            ragged.input.rows.push(row);
            let sampling = SamplingParams::GREEDY;
            ragged.input.starts.push(LaneStart { lane, slots: slots.clone(), prompt, sampling });
            ragged.slots.push(slots);
        }
        ragged
    }

    /// The row and the position of each token.
    fn tokens(&self) -> Vec<(usize, u32)> {
        let positions = |(i, row): (usize, &Row)| (row.start..row.start + row.len()).map(move |p| (i, p));
        self.input.rows.iter().enumerate().flat_map(positions).collect()
    }

    /// The step, begun.
    fn begin<B: Backend>(&self, backend: &B, heads: Heads) -> B::Step {
        let mut step = new_step(backend, heads);
        begin(backend, &self.input, &mut step);
        step
    }
}

const VOCAB: usize = 50;
/// Longest slot table of a lane.
const MAX_POSITIONS: usize = 160;
const ROPE_BASE: f64 = 10_000.0;

/// Where a test is not about heads.
const ONE_HEAD: Heads = Heads { heads: 1, kv_heads: 1, head_dim: 8 };
const MASKS: [Mask; 4] =
    [Mask::Causal, Mask::Window { window: 1 }, Mask::Window { window: 7 }, Mask::Window { window: 64 }];

fn new_step<B: Backend>(backend: &B, heads: Heads) -> B::Step {
    let rope = Rope { base: ROPE_BASE, width: heads.head_dim, scaling: RopeScaling::Unscaled };
    step_with(backend, heads, vec![Frequencies::new(&rope)])
}

fn step_with<B: Backend>(backend: &B, heads: Heads, frequencies: Vec<Frequencies>) -> B::Step {
    let shape = StepShape {
        max_tokens: 128,
        n_lanes: 8,
        max_positions: MAX_POSITIONS,
        vocab: VOCAB,
        frequencies,
        masks: MASKS.to_vec(),
        heads,
    };
    backend.step(shape).unwrap()
}

fn begin<B: Backend>(backend: &B, input: &StepInput, step: &mut B::Step) {
    backend.begin(input, step).unwrap();
    backend.lay_out(step).unwrap();
}

fn linear_part(weight: TensorPart, bias: Option<TensorPart>) -> LinearPart {
    LinearPart { weight, bias }
}
