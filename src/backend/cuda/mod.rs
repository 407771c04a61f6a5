//! NVIDIA GPUs: our kernels, cuBLASLt, and the arrays between them.
//!
//! Ops are queued on one stream and run in order. Weights, activations, keys and values are f16 or bf16, sums f32, logits
//! f32. After loading nothing is allocated. An error of the device is [`Error::DeviceLost`]: no later work can be relied
//! on.

#![allow(unsafe_code)]

#[cfg(test)]
mod conformance;
mod device;
mod ffi;
mod graph;
mod lanes;
mod linear;
mod nccl;
mod peers;
mod results;
mod step;
mod tensor;
mod tune;
mod weight;
mod world;

use std::cell::OnceCell;
use std::ops::Range;
use std::sync::Arc;

use super::step::{StepInput, StepOutput};
use super::{Backend, Heads, LinearPart, LogitRows, Product, StepShape, Tuned};
use crate::error::{Error, Result};
use crate::model::checkpoint::DType;
use crate::model::spec::{Activation, DecoderSpec, Mask, Mlp, Norm, Positions};
use crate::model::weights::TensorPart;
use device::{Buffer, Device, launched};
use linear::{Call, Linear};
use tensor::Numbers;
use weight::Uploader;
use world::Member;

pub use device::{count, exit_now, probe, total_bytes};
pub use graph::Graph;
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

/// A norm with its weight.
pub struct NormWeight {
    kind: Norm,
    weight: Buffer,
    width: usize,
}

/// Keys and values of one layer, `[slots, width]` each.
pub struct Kv {
    keys: Buffer,
    values: Buffer,
    /// Numbers of either.
    #[cfg(test)]
    n_numbers: usize,
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

    /// The GPU's name.
    pub fn name(&self) -> String {
        self.device.name()
    }

    /// Bytes free, and bytes in all.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.device.memory()
    }

    fn copy_rows(&self, params: &ffi::CopyRows) -> Result<()> {
        // SAFETY: wanted rows are inside their table, or become zeros; `out` has as many rows as are wanted.
        launched("copy_rows", unsafe { ffi::kv_copy_rows(params, self.device.stream()) })
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
        // Exhaustive, so that a new variant is a decision here.
        let (Norm::Rms { .. }, Positions::Rope(_), Mlp::Gated { activation: Activation::Silu, .. }) =
            (spec.norm, &spec.positions, spec.mlp);
        let head_dim = spec.attention.head_dim;
        if !head_dim.is_multiple_of(2) || head_dim > 256 {
            return Err(Error::Unsupported(format!(
                "heads of {head_dim} numbers: the GPU's attention takes even widths up to 256"
            )));
        }
        if spec.hidden > 16_384 {
            return Err(Error::Unsupported(format!("a hidden size of {}: at most 16384", spec.hidden)));
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

    fn norm_weight(&self, kind: Norm, weight: &TensorPart) -> Result<NormWeight> {
        Ok(NormWeight { kind, weight: self.uploader()?.vector(weight)?, width: weight.rows.len() })
    }

    fn weight(&self, parts: &[LinearPart]) -> Result<Weight> {
        self.uploader()?.weight(parts)
    }

    fn kv(&self, n_slots: usize, width: usize) -> Result<Kv> {
        let n_bytes = n_slots.checked_mul(width * 2);
        let n_bytes = n_bytes.ok_or_else(|| Error::Exhausted(format!("{n_slots} slots exceed 64 bits")))?;
        let (keys, values) = (self.device.alloc(n_bytes)?, self.device.alloc(n_bytes)?);
        Ok(Kv {
            keys,
            values,
            #[cfg(test)]
            n_numbers: n_slots * width,
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

    fn embed(&self, table: &Weight, step: &Step, out: &mut Tensor) -> Result<()> {
        self.copy_rows(&ffi::CopyRows {
            table: table.numbers.ptr(),
            table_stride: table.stride as i64,
            wanted: step.tokens(),
            rows: step.n_tokens() as i32,
            first: table.first_row as u32,
            table_rows: table.outputs as u32,
            out: out.ptr(),
            out_stride: out.stride as i64,
            width: table.inputs as i32,
        })
    }

    fn norm(&self, norm: &NormWeight, rows: usize, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let Norm::Rms { eps } = norm.kind;
        let params = ffi::NormRows {
            x: x.ptr(),
            x_stride: x.stride as i64,
            weight: norm.weight.ptr(),
            out: out.ptr(),
            out_stride: out.stride as i64,
            rows: rows as i32,
            width: norm.width as i32,
            eps,
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: both tensors have so many rows of the norm's width.
        launched("norm", unsafe { ffi::kv_norm(&params, self.device.stream()) })
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

    fn rope_store(&self, heads: Heads, step: &Step, qkv: &mut Tensor, kv: &mut Kv) -> Result<()> {
        let params = ffi::RopeStore {
            qkv: qkv.ptr(),
            stride: qkv.stride as i64,
            angles: step.angles(),
            stores: step.stores(),
            keys: kv.keys.ptr(),
            values: kv.values.ptr(),
            tokens: step.n_tokens() as i32,
            heads: heads.heads as i32,
            kv_heads: heads.kv_heads as i32,
            head_dim: heads.head_dim as i32,
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: the executor has checked the slots; `qkv` has a row for every token.
        launched("rope_store", unsafe { ffi::kv_rope_store(&params, self.device.stream()) })
    }

    fn attend(
        &self,
        _heads: Heads,
        mask: Mask,
        step: &Step,
        qkv: &Tensor,
        kv: &Kv,
        out: &mut Tensor,
    ) -> Result<()> {
        step.attend(mask, (qkv.ptr(), qkv.stride), kv, (out.ptr(), out.stride))
    }

    fn select(&self, wanted: &LogitRows, step: &Step, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let (tokens, rows) = step.logit_tokens(wanted);
        self.copy_rows(&ffi::CopyRows {
            table: x.ptr(),
            table_stride: x.stride as i64,
            wanted: tokens,
            rows: rows as i32,
            first: 0,
            table_rows: step.n_tokens() as u32,
            out: out.ptr(),
            out_stride: out.stride as i64,
            width: x.width as i32,
        })
    }

    fn all_reduce(&self, rows: usize, x: &mut Tensor) -> Result<()> {
        self.member.all_reduce(rows, x)
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

/// What a product is measured on.
struct Room {
    x: Tensor,
    out: Tensor,
    scratch: Option<Tensor>,
}

impl Room {
    fn new(cuda: &Cuda, Tuned { weights, product, rows }: &Tuned<'_, Cuda>) -> Result<Room> {
        let rows = rows.iter().copied().max().unwrap_or(0);
        let (inputs, outputs) = weights.first().map_or((0, 0), |weight| (weight.inputs, weight.outputs));
        let x = cuda.tensor(rows, inputs)?;
        cuda.randomise(&x, rows)?;
        let (out, scratch) = match product {
            Product::Logits => (cuda.logits(rows, outputs)?, None),
            Product::Gated(_) => (cuda.tensor(rows, outputs / 2)?, Some(cuda.tensor(rows, outputs)?)),
            Product::Stored | Product::Added => (cuda.tensor(rows, outputs)?, None),
        };
        Ok(Room { x, out, scratch })
    }

    fn call<'a>(&'a self, tuned: &Tuned<'a, Cuda>, rows: usize) -> Option<Call<'a>> {
        let (weight, product) = (*tuned.weights.first()?, tuned.product);
        Some(Call { weight, product, rows, x: &self.x, out: &self.out, scratch: self.scratch.as_ref() })
    }
}

impl Cuda {
    /// A layer with the product that is really made of it; nothing where this rank makes none.
    fn as_run<'a>(&self, Tuned { weights, product, rows }: &Tuned<'a, Cuda>) -> Option<Tuned<'a, Cuda>> {
        let product = match product {
            Product::Added if !self.member.adds_first() => Product::Stored,
            other => *other,
        };
        let makes_some = weights.first().is_some_and(|weight| weight.outputs > 0);
        makes_some.then(|| Tuned { weights: weights.clone(), product, rows: rows.clone() })
    }

    /// Fills a tensor's first rows with numbers of the scale of activations.
    fn randomise(&self, tensor: &Tensor, rows: usize) -> Result<()> {
        let params = ffi::FillRandom {
            out: tensor.ptr(),
            out_stride: tensor.stride as i64,
            rows: rows as i64,
            columns: tensor.width as i64,
            first_row: 0,
            first_column: 0,
            all_columns: tensor.width as i64,
            stream: 0,
            reach: 1.0,
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: the tensor has so many rows.
        launched("fill_random", unsafe { ffi::kv_fill_random(&params, self.device.stream()) })
    }
}
