//! NVIDIA GPUs: our kernels, cuBLASLt, and the arrays between them.
//!
//! Ops are queued on one stream and run in order. Weights, activations, keys and values are f16 or bf16, sums f32, logits
//! f32. After loading nothing is allocated. An error of the device is [`Error::DeviceLost`]: no later work can be relied
//! on.

#![allow(unsafe_code)]

#[cfg(test)]
mod conformance;
mod device;
mod experts;
mod ffi;
mod graph;
mod lanes;
mod latent;
mod linear;
mod nccl;
mod norm;
mod peers;
mod results;
mod room;
mod rotary;
mod rows;
mod step;
mod tensor;
mod tune;
mod weight;
mod world;

use std::cell::OnceCell;
use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::step::{StepInput, StepOutput};
use super::{
    Backend, ExpertParts, Heads, KvRows, LinearPart, LogitRows, Product, Scores, StepShape, Tuned, Turn,
};
use crate::error::{Error, Result};
use crate::model::checkpoint::DType;
use crate::model::spec::{
    Activation, Attention, DecoderSpec, Experts, HeadAttention, LatentAttention, Logits, Mask, Mlp, Norm,
    Positions,
};
use crate::model::weights::TensorPart;
use device::{Buffer, Device, launched};
use linear::{Call, Linear};
use room::Room;
use rows::Taken;
use tensor::Numbers;
use weight::Uploader;
use world::Member;

pub use device::{count, exit_now, probe, total_bytes};
pub use experts::{ExpertsRoom, ExpertsWeight};
pub use graph::Graph;
pub use latent::HeadWeight;
pub use norm::NormWeight;
pub use step::Step;
pub use tensor::Tensor;
pub use weight::Weight;
pub use world::World;

/// One GPU, and with it one rank.
pub struct Cuda {
    device: Device,
    member: Member,
    dtype: DType,
    linear: Linear,
    /// Pinned memory, needed while weights are loaded.
    uploader: OnceCell<Uploader>,
}

/// Keys and values of one layer, `[slots, width]` each; or rows of latents, as keys without values.
pub struct Kv {
    keys: Buffer,
    values: Buffer,
    /// Numbers of each.
    #[cfg(test)]
    n_numbers: [usize; 2],
}

impl Cuda {
    /// Opens GPU `ordinal`, to compute alone in a 16-bit dtype.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there is no GPU, or no cuBLASLt, or for f32.
    pub fn new(ordinal: usize, dtype: DType) -> Result<Cuda> {
        Cuda::open(ordinal, Member::new(World::new(1)?, 0), dtype)
    }

    /// Opens the GPU of a world's rank, on the rank's thread.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    pub fn of_world(world: &Arc<World>, rank: usize, dtype: DType) -> Result<Cuda> {
        let opened = Cuda::open(rank, Member::new(Arc::clone(world), rank), dtype);
        // There is no backend yet by which the rank's thread could tell the others.
        opened.inspect_err(|error| world.abort(&format!("rank {rank} failed to open its GPU: {error}")))
    }

    fn open(ordinal: usize, member: Member, dtype: DType) -> Result<Cuda> {
        if dtype == DType::F32 {
            return Err(Error::Unsupported(
                "the GPU computes in float16 or bfloat16: choose one with --dtype, or --device cpu".into(),
            ));
        }
        let device = Device::open(ordinal)?;
        let linear = Linear::new(&device, dtype)?;
        Ok(Cuda { linear, uploader: OnceCell::new(), device, member, dtype })
    }

    fn uploader(&self) -> Result<&Uploader> {
        if self.uploader.get().is_none() {
            let uploader = Uploader::new(&self.device, self.dtype)?;
            return Ok(self.uploader.get_or_init(|| uploader));
        }
        self.uploader.get().ok_or_else(|| Error::Bug("an uploader that is not there".into()))
    }

    fn new_tensor(&self, rows: usize, width: usize, numbers: Numbers) -> Result<Tensor> {
        let n_bytes =
            rows.checked_mul(tensor::padded(width)).and_then(|n| n.checked_mul(numbers.size_bytes()));
        let n_bytes = n_bytes
            .ok_or_else(|| Error::Exhausted(format!("{rows} rows of {width} numbers exceed 64 bits")))?;
        Ok(Tensor::new(self.device.alloc(n_bytes)?, rows, width, numbers))
    }

    /// What a number becomes among activations.
    fn rounded(&self, number: f32) -> f32 {
        match self.dtype {
            DType::F16 => f16::from_f32(number).to_f32(),
            DType::BF16 | DType::F32 => bf16::from_f32(number).to_f32(),
        }
    }

    /// The GPU's name.
    pub fn name(&self) -> String {
        self.device.name()
    }

    /// Bytes free, and bytes in all.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.device.memory()
    }
}

/// The dtype as the kernels know it.
fn dtype_code(dtype: DType) -> i32 {
    match dtype {
        DType::F16 => ffi::KV_F16,
        DType::BF16 | DType::F32 => ffi::KV_BF16,
    }
}

impl Backend for Cuda {
    const DEVICE: &'static str = "cuda";

    type Tensor = Tensor;
    type Norm = NormWeight;
    type Weight = Weight;
    type HeadWeight = HeadWeight;
    type Experts = ExpertsWeight;
    type ExpertsRoom = ExpertsRoom;
    type Vector = Buffer;
    type Kv = Kv;
    type Step = Step;
    type Graph = Graph;

    fn dtype(&self) -> DType {
        self.dtype
    }

    fn attach(&mut self) -> Result<()> {
        self.device.bind()?;
        self.member.open(&self.device, self.dtype)
    }

    fn supports(&self, spec: &DecoderSpec) -> Result<()> {
        let unsupported = |what: String| Err(Error::Unsupported(what));
        // Exhaustive, so that a new variant is a decision here.
        match spec.attention {
            Attention::Heads(HeadAttention { head_dim, .. }) => {
                if !head_dim.is_multiple_of(2) || head_dim > 256 {
                    return unsupported(format!(
                        "heads of {head_dim} numbers: the GPU's attention takes even widths up to 256"
                    ));
                }
            }
            Attention::Latent(attention) => latent::supports(&attention)?,
        }
        for layer in &spec.layers {
            match layer.mlp {
                Mlp::Gated { .. } | Mlp::Plain { .. } => {}
                Mlp::Experts(of) => experts::supports(&of)?,
            }
        }
        let widest = spec.hidden;
        if widest > 16_384 {
            return unsupported(format!("a hidden size of {widest}: at most 16384"));
        }
        if let Positions::Rope(ropes) = &spec.positions
            && ropes.len() > ffi::KV_MAX_ROTARIES
        {
            let (n, most) = (ropes.len(), ffi::KV_MAX_ROTARIES);
            return unsupported(format!(
                "{n} rotary embeddings in one decoder: the GPU takes {most} at most"
            ));
        }
        Ok(())
    }

    fn tensor(&self, rows: usize, width: usize) -> Result<Tensor> {
        self.new_tensor(rows, width, Numbers::Half)
    }

    fn logits(&self, rows: usize, width: usize) -> Result<Tensor> {
        self.new_tensor(rows, width, Numbers::Single)
    }

    fn share(&self, tensor: &mut Tensor) -> Result<()> {
        if !self.member.is_alone() {
            tensor.share(self.member.joint(tensor.buffer().address())?);
        }
        Ok(())
    }

    fn norm_weight(&self, kind: Norm, weight: &TensorPart, bias: Option<&TensorPart>) -> Result<NormWeight> {
        self.new_norm(kind, weight, bias)
    }

    fn weight(&self, parts: &[LinearPart], scale: f32) -> Result<Weight> {
        self.uploader()?.weight(parts, scale)
    }

    fn normalised_weight(&self, part: &LinearPart, scale: f32) -> Result<Weight> {
        self.uploader()?.normalised_weight(part, scale)
    }

    fn head_weight(&self, heads: &[TensorPart]) -> Result<HeadWeight> {
        self.new_head_weight(heads)
    }

    fn experts_weight(&self, spec: &Experts, hidden: usize, parts: &ExpertParts) -> Result<ExpertsWeight> {
        self.new_experts(spec, hidden, parts)
    }

    fn experts_room(&self, spec: &Experts, hidden: usize, width: usize, rows: usize) -> Result<ExpertsRoom> {
        self.new_experts_room(spec, hidden, width, rows)
    }

    fn vector(&self, numbers: &[f32]) -> Result<Buffer> {
        self.uploader()?.singles(numbers)
    }

    fn stored_vector(&self, part: &TensorPart) -> Result<Buffer> {
        self.vector(&weight::widened(part)?)
    }

    fn kv(&self, n_slots: usize, rows: KvRows) -> Result<Kv> {
        let (width, values) = match rows {
            KvRows::KeysValues { width } => (width, width),
            KvRows::Latent { width } => (width, 0),
        };
        let room = |width: usize| {
            let n_bytes = n_slots.checked_mul(width * 2);
            let n_bytes =
                n_bytes.ok_or_else(|| Error::Exhausted(format!("{n_slots} slots exceed 64 bits")))?;
            self.device.alloc(n_bytes)
        };
        Ok(Kv {
            keys: room(width)?,
            values: room(values)?,
            #[cfg(test)]
            n_numbers: [n_slots * width, n_slots * values],
        })
    }

    fn step(&self, shape: StepShape) -> Result<Step> {
        Step::new(&self.device, &self.member, self.dtype, shape)
    }

    fn free_bytes(&self) -> Option<u64> {
        self.device.memory().ok().map(|(free, _)| free)
    }

    fn prepare(&self, layers: &[Tuned<'_, Cuda>]) -> Result<()> {
        self.device.synchronize()?;
        let layers: Vec<Tuned<'_, Cuda>> = layers.iter().filter_map(|tuned| self.as_run(tuned)).collect();
        let room = layers.iter().map(|tuned| Room::new(self, tuned)).collect::<Result<Vec<Room>>>()?;
        // The layers of a step are seen by the same numbers of rows, the head by others.
        for together in layers.chunk_by(|a, b| a.rows == b.rows) {
            let first = layers.iter().position(|tuned| std::ptr::eq(tuned, &together[0])).unwrap_or(0);
            for &rows in &together[0].rows {
                let calls: Vec<_> = together
                    .iter()
                    .zip(&room[first..])
                    .filter_map(|(tuned, room)| Some((room.call(tuned, rows)?, tuned.weights.as_slice())))
                    .collect();
                self.linear.tune(&calls)?;
            }
        }
        Ok(())
    }

    fn meet(&self, number: u64) -> Result<u64> {
        self.member.meet(&self.device, number)
    }

    fn begin(&self, input: &StepInput, step: &mut Step) -> Result<()> {
        step.begin(input)
    }

    fn capture(
        &self,
        rows: usize,
        step: &mut Step,
        record: impl FnOnce(&mut Step) -> Result<()>,
    ) -> Result<Option<Graph>> {
        step.shape_for_capture(rows);
        graph::capture(&self.device, || record(step)).map(Some)
    }

    fn replay(&self, graph: &Graph, _step: &mut Step) -> Result<()> {
        graph.launch()
    }

    fn lay_out(&self, step: &mut Step) -> Result<()> {
        step.lay_out()
    }

    fn embed(&self, table: &Weight, multiplier: f32, step: &Step, out: &mut Tensor) -> Result<()> {
        let rows = Taken::of(table, step.tokens(), step.n_tokens());
        // Gemma's published code rounds it to the dtype of the activations.
        let multiplier = self.rounded(multiplier);
        self.take_rows(&Taken { multiplier, ..rows }, out)
    }

    fn add_positions(&self, table: &Weight, step: &Step, out: &mut Tensor) -> Result<()> {
        let rows = Taken::of(table, step.positions(), step.n_tokens());
        self.take_rows(&Taken { add: true, ..rows }, out)
    }

    fn norm(&self, norm: &NormWeight, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        self.run_norm(norm, rows, x, out, false)
    }

    fn norm_add(&self, norm: &NormWeight, rows: usize, x: &Tensor, residual: &mut Tensor) -> Result<()> {
        self.run_norm(norm, rows, x, residual, true)
    }

    fn reduce_add(&self, multiplier: f32, rows: usize, x: &mut Tensor, residual: &mut Tensor) -> Result<()> {
        if multiplier == 1.0 && !self.member.adds_first() {
            return self.member.add_all(rows, x, residual);
        }
        self.member.all_reduce(rows, x)?;
        self.add_rows(multiplier, rows, x, residual)
    }

    fn linear(&self, weight: &Weight, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let product = match out.numbers {
            Numbers::Half => Product::Stored,
            Numbers::Single => Product::Logits,
        };
        if weight.outputs == 0 {
            // The last ranks may have no part of a small vocabulary.
            return Ok(());
        }
        self.linear.run(&Call { weight, product, rows, x, out, scratch: None })
    }

    fn linear_add(
        &self,
        weight: &Weight,
        rows: usize,
        x: &Tensor,
        branch: &mut Tensor,
        residual: &mut Tensor,
    ) -> Result<()> {
        let (product, out) = match self.member.adds_first() {
            true => (Product::Added, &*residual),
            false => (Product::Stored, &*branch),
        };
        self.linear.run(&Call { weight, product, rows, x, out, scratch: None })?;
        self.member.add_all(rows, branch, residual)
    }

    fn linear_gate(
        &self,
        weight: &Weight,
        activation: Activation,
        rows: usize,
        x: &Tensor,
        gate_up: &mut Tensor,
        out: &mut Tensor,
    ) -> Result<()> {
        let product = Product::Gated(activation);
        self.linear.run(&Call { weight, product, rows, x, out, scratch: Some(gate_up) })
    }

    fn linear_activate(
        &self,
        weight: &Weight,
        activation: Activation,
        rows: usize,
        x: &Tensor,
        out: &mut Tensor,
    ) -> Result<()> {
        let product = Product::Activated(activation);
        self.linear.run(&Call { weight, product, rows, x, out, scratch: None })
    }

    fn linear_heads(&self, weight: &HeadWeight, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        self.run_linear_heads(weight, rows, x, out)
    }

    fn experts(
        &self,
        experts: &ExpertsWeight,
        rows: usize,
        x: &Tensor,
        room: &mut ExpertsRoom,
        out: &mut Tensor,
    ) -> Result<()> {
        self.run_experts(experts, rows, x, room, out)
    }

    fn rope_store(
        &self,
        heads: Heads,
        turn: &Turn<'_, Cuda>,
        step: &Step,
        qkv: &mut Tensor,
        kv: &mut Kv,
    ) -> Result<()> {
        let (angles, half) = turn.rope.map_or(Ok((std::ptr::null(), 0)), |rope| step.angles(rope))?;
        let (kind, eps) = turn.norms.map_or((ffi::KV_RMS, 0.0), |(query, _)| norm::kind_code(query.kind));
        let no_norm = ffi::HeadNorm { weight: std::ptr::null(), head_stride: 0 };
        let params = ffi::RopeStore {
            qkv: qkv.ptr(),
            stride: qkv.stride as i64,
            angles,
            positions: step.positions(),
            stores: step.stores(),
            keys: kv.keys.ptr(),
            values: kv.values.ptr(),
            tokens: step.n_tokens() as i32,
            heads: heads.heads as i32,
            kv_heads: heads.kv_heads as i32,
            head_dim: heads.head_dim as i32,
            rotary_dim: 2 * half as i32,
            normed: i32::from(turn.norms.is_some()),
            query_norm: turn.norms.map_or(no_norm, |(query, _)| query.of_heads()),
            key_norm: turn.norms.map_or(no_norm, |(_, key)| key.of_heads()),
            kind,
            eps,
            log_n: turn.log_n.unwrap_or(0),
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: the executor has checked the slots; `qkv` has a row for every token.
        launched("rope_store", unsafe { ffi::kv_rope_store(&params, self.device.stream()) })
    }

    fn attend(
        &self,
        _heads: Heads,
        scores: &Scores<'_, Cuda>,
        step: &Step,
        qkv: &Tensor,
        kv: &Kv,
        out: &mut Tensor,
    ) -> Result<()> {
        step.attend(scores, (qkv.ptr(), qkv.stride), kv, (out.ptr(), out.stride))
    }

    fn store_latent(
        &self,
        attention: &LatentAttention,
        norm: &NormWeight,
        step: &Step,
        queries: &Tensor,
        absorbed: &mut Tensor,
        latents: &Tensor,
        kv: &mut Kv,
    ) -> Result<()> {
        self.run_store_latent(attention, norm, step, queries, absorbed, latents, kv)
    }

    fn attend_latent(
        &self,
        attention: &LatentAttention,
        mask: Mask,
        step: &Step,
        absorbed: &Tensor,
        kv: &Kv,
        out: &mut Tensor,
    ) -> Result<()> {
        step.attend_latent(attention, mask, absorbed, kv, out)
    }

    fn select(&self, wanted: &LogitRows, step: &Step, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let (tokens, n) = step.logit_tokens(wanted);
        self.take_rows(&Taken::of_tensor(x, step.n_tokens(), tokens, n), out)
    }

    fn all_reduce(&self, rows: usize, x: &mut Tensor) -> Result<()> {
        self.member.all_reduce(rows, x)
    }

    fn warp_logits(&self, warp: Logits, rows: usize, logits: &mut Tensor) -> Result<()> {
        self.run_warp(warp, rows, logits)
    }

    fn gather(&self, rows: usize, part: &Tensor, out: &mut Tensor) -> Result<()> {
        self.member.gather(rows, part, out)
    }

    fn target_logprobs(&self, targets: Range<usize>, logits: &Tensor, step: &mut Step) -> Result<()> {
        step.target_logprobs(targets, logits.ptr(), logits.stride)
    }

    fn sample(&self, logits: &mut Tensor, step: &mut Step) -> Result<()> {
        step.sample(logits.ptr(), logits.stride)
    }

    fn advance(&self, step: &mut Step) -> Result<()> {
        let (drafts, n_drafts) = step.all_drafts();
        self.member.share_tokens(drafts, n_drafts, step.lane_tokens())?;
        step.finish()
    }

    fn output(&self, step: &mut Step) -> Result<StepOutput> {
        step.output(&|| self.device.check().and_then(|()| self.member.check()))
    }

    fn abort(&self, reason: &str) {
        self.member.abort(reason);
    }

    fn links(&self) -> Option<String> {
        self.member.describe()
    }
}
