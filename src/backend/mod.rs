//! The seam under the decoder: what a device must do, in the transformer's words.
//!
//! A backend belongs to one rank and is used by one thread. Ops run in the order in which they are called; on a
//! device they are queued, so an `Ok` says that an op was queued, and [`Backend::output`] waits.

mod barrier;
#[cfg(test)]
mod conformance;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod random;
pub mod step;

use crate::error::Result;
use crate::model::checkpoint::DType;
use crate::model::rope::Frequencies;
#[cfg(doc)]
use crate::model::spec::Router;
use crate::model::spec::{Activation, DecoderSpec, Experts, LatentAttention, Logits, Mask, Norm};
use crate::model::weights::TensorPart;
use step::{StepInput, StepOutput};

/// Heads on this rank. The `[tokens, (heads + 2 · kv_heads) · head_dim]` output of the projections holds queries,
/// keys and values side by side, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub heads: usize,
    /// KV heads; a divisor of `heads`. Query head `h` reads KV head `h / (heads / kv_heads)`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Heads {
    /// Width of the queries.
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys, and of the values.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Width of queries, keys and values side by side.
    pub fn qkv_width(&self) -> usize {
        self.query_width() + 2 * self.kv_width()
    }
}

/// One block of rows of a linear layer; its rows follow those of the block before it.
#[derive(Clone)]
pub struct LinearPart {
    /// `[out, in]`.
    pub weight: TensorPart,
    /// `[out]`, added to the block's outputs.
    pub bias: Option<TensorPart>,
}

/// Linear layers of one shape, whose speed matters.
pub struct Tuned<'a, B: Backend> {
    /// The layers.
    pub weights: Vec<&'a B::Weight>,
    /// What becomes of their products.
    pub product: Product,
    /// Numbers of rows that they will see, ascending; those between them count as the next larger one.
    pub rows: Vec<usize>,
}

/// What a rank's experts are made of. Each expert's tensors are cut as those of a gated MLP.
pub struct ExpertParts {
    /// `[n_experts, hidden]`.
    pub router: LinearPart,
    /// `[n_experts]`, added for the choice alone; of [`Router::Sigmoid`].
    pub choice_bias: Option<TensorPart>,
    /// Of each expert: gate, up and down. The bias of a down projection is on rank 0 alone.
    pub experts: Vec<[LinearPart; 3]>,
}

/// What is done to queries and keys between their projection and the cache, in this order: norms, rotary embedding,
/// LogN.
pub struct Turn<'a, B: Backend> {
    /// Of queries and of keys, over the width of a head.
    pub norms: Option<(&'a B::Norm, &'a B::Norm)>,
    /// Which of [`StepShape::frequencies`], if any.
    pub rope: Option<usize>,
    /// See [`crate::model::spec::HeadAttention::log_n`].
    pub log_n: Option<u32>,
}

/// How scores are made of `q·k`: `softcap(scale · q·k) + slope · (j − i)`, of visible keys.
pub struct Scores<'a, B: Backend> {
    /// Multiplier.
    pub scale: f32,
    /// `c · tanh(score / c)`.
    pub softcap: Option<f32>,
    /// Which keys a query sees.
    pub mask: Mask,
    /// `[heads]` of this rank.
    pub slopes: Option<&'a B::Vector>,
    /// `[heads]` of this rank: logits that take part in the softmax without a value.
    pub sinks: Option<&'a B::Vector>,
}

/// Rows of one layer's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvRows {
    /// Keys and values of `width` numbers each.
    KeysValues {
        /// KV heads times head width.
        width: usize,
    },
    /// One row of `width` numbers.
    Latent {
        /// Latent and turned key.
        width: usize,
    },
}

impl KvRows {
    /// Numbers of a slot in this layer.
    pub fn numbers(self) -> usize {
        match self {
            KvRows::KeysValues { width } => 2 * width,
            KvRows::Latent { width } => width,
        }
    }
}

/// What becomes of a product.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Product {
    /// [`Backend::linear`].
    Stored,
    /// [`Backend::linear`] into f32.
    Logits,
    /// [`Backend::linear_add`].
    Added,
    /// [`Backend::linear_gate`].
    Gated(Activation),
    /// [`Backend::linear_activate`].
    Activated(Activation),
}

/// What a step's arrays and lanes are sized for.
#[derive(Debug, Clone)]
pub struct StepShape {
    /// Most tokens of one step.
    pub max_tokens: usize,
    /// Lanes.
    pub n_lanes: usize,
    /// Longest slot table of a lane.
    pub max_positions: usize,
    /// Width of a row of logits.
    pub vocab: usize,
    /// Of each rotary embedding.
    pub frequencies: Vec<Frequencies>,
    /// The masks of the layers, each once.
    pub masks: Vec<Mask>,
    /// Heads of a layer on this rank; of latent attention, one KV head as wide as a cached row.
    pub heads: Heads,
}

/// Which positions' logits are wanted, among those that the step feeds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogitRows {
    /// Those that predict these of the step's targets.
    Targets(std::ops::Range<usize>),
    /// The last of every row that samples.
    Sampled,
}

/// A device with the ops of a decoder. `rows` counts rows of a tensor in use, from its first.
pub trait Backend: Sized {
    /// Its name, as `Info` reports it.
    const DEVICE: &'static str;

    /// Activations: a row-major matrix of numbers, of which a step uses the first rows.
    type Tensor;
    /// A norm with its weight.
    type Norm;
    /// A linear layer, or a table of rows.
    type Weight;
    /// A linear layer for each head.
    type HeadWeight;
    /// A router and its experts.
    type Experts;
    /// Scratch of [`Backend::experts`], for all layers.
    type ExpertsRoom;
    /// Numbers in f32.
    type Vector;
    /// Keys and values of one layer: a row for each slot.
    type Kv;
    /// The lanes, and the arrays of the step under way.
    type Step;
    /// Ops recorded once, to be run again as one.
    type Graph;

    /// What it computes in.
    fn dtype(&self) -> DType;

    /// Called once by the thread that makes all later calls, before any of them.
    ///
    /// # Errors
    /// [`crate::error::Error::Exhausted`] where the device cannot be used from this thread.
    fn attach(&mut self) -> Result<()>;

    /// Whether this backend computes such a decoder; asked once, before anything is loaded.
    ///
    /// # Errors
    /// [`crate::error::Error::Unsupported`] with a sentence that names what is missing.
    fn supports(&self, spec: &DecoderSpec) -> Result<()>;

    /// An uninitialised `[rows, width]`.
    fn tensor(&self, rows: usize, width: usize) -> Result<Self::Tensor>;

    /// An uninitialised `[rows, width]` of f32, for logits.
    fn logits(&self, rows: usize, width: usize) -> Result<Self::Tensor>;

    /// Lets the other ranks see a tensor: every rank calls it for its own of the same shape. Sums over the ranks run over
    /// such tensors only, and logits are gathered in one.
    fn share(&self, tensor: &mut Self::Tensor) -> Result<()>;

    /// A norm of `[width]` weights, or of `[heads, width]`: each head its own.
    fn norm_weight(&self, kind: Norm, weight: &TensorPart, bias: Option<&TensorPart>) -> Result<Self::Norm>;

    /// A linear layer of `[Σ out, in]`, whose products are multiplied by `scale`: `scale · (x · weightᵀ + bias)`. As a
    /// table its rows are as stored.
    fn weight(&self, parts: &[LinearPart], scale: f32) -> Result<Self::Weight>;

    /// As [`Backend::weight`] of one part, each row divided by its length.
    fn normalised_weight(&self, part: &LinearPart, scale: f32) -> Result<Self::Weight>;

    /// A linear layer for each head: `heads` times `[out, in]`.
    fn head_weight(&self, heads: &[TensorPart]) -> Result<Self::HeadWeight>;

    /// A router and its experts.
    fn experts_weight(&self, spec: &Experts, hidden: usize, parts: &ExpertParts) -> Result<Self::Experts>;

    /// Scratch for `rows` rows through such experts, of which this rank holds `width` neurons each.
    fn experts_room(
        &self,
        spec: &Experts,
        hidden: usize,
        width: usize,
        rows: usize,
    ) -> Result<Self::ExpertsRoom>;

    /// Numbers on the device.
    fn vector(&self, numbers: &[f32]) -> Result<Self::Vector>;

    /// The numbers of a stored vector, widened, as [`Backend::vector`] takes them.
    fn stored_vector(&self, part: &TensorPart) -> Result<Self::Vector>;

    /// Room for the cache of `n_slots` tokens in one layer.
    fn kv(&self, n_slots: usize, rows: KvRows) -> Result<Self::Kv>;

    /// Lanes, and the arrays of a step.
    fn step(&self, shape: StepShape) -> Result<Self::Step>;

    /// Bytes of device memory still free, where the device can tell.
    fn free_bytes(&self) -> Option<u64>;

    /// Makes everything ready that the first step would otherwise wait for: measures which of several algorithms is
    /// best for these layers, for example. Called once, after the loading.
    fn prepare(&self, layers: &[Tuned<'_, Self>]) -> Result<()>;

    /// Waits until every rank has come, and returns the least of the numbers that they bring. On a device, ops that need
    /// the other ranks do their own part only before the first meeting: what a device takes as an op first runs has to be
    /// taken while no rank's device waits for another's.
    fn meet(&self, number: u64) -> Result<u64>;

    /// Takes the step's description to the device and starts lanes.
    fn begin(&self, input: &StepInput, step: &mut Self::Step) -> Result<()>;

    /// Records the ops of a decode step of `rows` rows, so that they can be run as one; `None` where there is no such
    /// thing. Whoever records runs nothing.
    fn capture(
        &self,
        rows: usize,
        step: &mut Self::Step,
        record: impl FnOnce(&mut Self::Step) -> Result<()>,
    ) -> Result<Option<Self::Graph>>;

    /// Runs the recorded ops for the step that began last, which has at most as many rows, all of them decoding.
    fn replay(&self, graph: &Self::Graph, step: &mut Self::Step) -> Result<()>;

    /// Lays out the step that began: tokens (of [`step::Feed::Last`]: what the lane sampled last), positions, the slots
    /// that are stored to, cosines and sines.
    fn lay_out(&self, step: &mut Self::Step) -> Result<()>;

    /// `out[t] = multiplier · table[token of t]`, or zeros where the table is a rank's part and another rank has the row.
    fn embed(
        &self,
        table: &Self::Weight,
        multiplier: f32,
        step: &Self::Step,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out[t] += table[position of t]`.
    fn add_positions(&self, table: &Self::Weight, step: &Self::Step, out: &mut Self::Tensor) -> Result<()>;

    /// `out = norm(x)`.
    fn norm(&self, norm: &Self::Norm, rows: usize, x: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;

    /// `residual += norm(x)`.
    fn norm_add(
        &self,
        norm: &Self::Norm,
        rows: usize,
        x: &Self::Tensor,
        residual: &mut Self::Tensor,
    ) -> Result<()>;

    /// `residual += multiplier · x`, summed over the ranks in their order. `x` is scratch afterwards.
    fn reduce_add(
        &self,
        multiplier: f32,
        rows: usize,
        x: &mut Self::Tensor,
        residual: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out = scale · (x · weightᵀ + bias)`.
    fn linear(
        &self,
        weight: &Self::Weight,
        rows: usize,
        x: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `residual += scale · (x · weightᵀ + bias)`, summed over the ranks in their order. `branch` is scratch.
    fn linear_add(
        &self,
        weight: &Self::Weight,
        rows: usize,
        x: &Self::Tensor,
        branch: &mut Self::Tensor,
        residual: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out = act(gate) ∘ up`, where `[gate | up] = x · weightᵀ + bias`. `gate_up` is scratch.
    fn linear_gate(
        &self,
        weight: &Self::Weight,
        activation: Activation,
        rows: usize,
        x: &Self::Tensor,
        gate_up: &mut Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out = act(x · weightᵀ + bias)`.
    fn linear_activate(
        &self,
        weight: &Self::Weight,
        activation: Activation,
        rows: usize,
        x: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out[t, h · out_stride ..][..out] = weight_h · x[t, h · in_stride ..][..in]` for each head `h`, where the strides
    /// are the tensors' widths divided by the number of heads. What stands between is left as it is.
    fn linear_heads(
        &self,
        weight: &Self::HeadWeight,
        rows: usize,
        x: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out = Σ w_e · expert_e(x)` over the experts that each row's router chooses: a rank's part of the sum, by its
    /// neurons.
    fn experts(
        &self,
        experts: &Self::Experts,
        rows: usize,
        x: &Self::Tensor,
        room: &mut Self::ExpertsRoom,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// Turns queries in place and keys, and stores keys and values in the slots of their positions, but for those below
    /// [`step::Row::store_from`]. What then stands in `qkv` beside the queries is undefined.
    fn rope_store(
        &self,
        heads: Heads,
        turn: &Turn<'_, Self>,
        step: &Self::Step,
        qkv: &mut Self::Tensor,
        kv: &mut Self::Kv,
    ) -> Result<()>;

    /// `out = softmax(scores) · v` over the slots of the visible positions of the same lane, and of no other slot. `out`
    /// is `[tokens, heads · head_dim]`.
    fn attend(
        &self,
        heads: Heads,
        scores: &Scores<'_, Self>,
        step: &Self::Step,
        qkv: &Self::Tensor,
        kv: &Self::Kv,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// The rope parts of the queries `[tokens, heads · (nope + rope)]`, turned, become the last `rope_dim` numbers of each
    /// head of `absorbed` `[tokens, heads · (kv_rank + rope_dim)]`; the normed latent and the turned key of `latents`
    /// `[tokens, kv_rank + rope_dim]` are stored in the slots of their positions, but for those below
    /// [`step::Row::store_from`]. They turn by the first of [`StepShape::frequencies`]. `attention.heads` are those of
    /// this rank.
    #[allow(clippy::too_many_arguments)]
    fn store_latent(
        &self,
        attention: &LatentAttention,
        norm: &Self::Norm,
        step: &Self::Step,
        queries: &Self::Tensor,
        absorbed: &mut Self::Tensor,
        latents: &Self::Tensor,
        kv: &mut Self::Kv,
    ) -> Result<()>;

    /// As [`Backend::attend`], with one KV head of width `kv_rank + rope_dim`, whose values are the first `kv_rank`
    /// numbers of its keys: `out` is `[tokens, heads · kv_rank]`.
    fn attend_latent(
        &self,
        attention: &LatentAttention,
        mask: Mask,
        step: &Self::Step,
        absorbed: &Self::Tensor,
        kv: &Self::Kv,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// Copies rows of `x`, in the order in which they are wanted.
    fn select(
        &self,
        wanted: &LogitRows,
        step: &Self::Step,
        x: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// Sums `x` over the ranks, in the order of ranks: every rank gets the same bits.
    fn all_reduce(&self, rows: usize, x: &mut Self::Tensor) -> Result<()>;

    /// `logits = softcap(multiplier · logits)`.
    fn warp_logits(&self, warp: Logits, rows: usize, logits: &mut Self::Tensor) -> Result<()>;

    /// On rank 0, joins the ranks' columns in the order of ranks; elsewhere `out` is left undefined.
    fn gather(&self, rows: usize, part: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;

    /// Log-probabilities of `targets` under the raw logits of their rows, kept in the step.
    fn target_logprobs(
        &self,
        targets: std::ops::Range<usize>,
        logits: &Self::Tensor,
        step: &mut Self::Step,
    ) -> Result<()>;

    /// Chooses a token for every row that samples, kept in the step. `logits` is scratch afterwards.
    fn sample(&self, logits: &mut Self::Tensor, step: &mut Self::Step) -> Result<()>;

    /// On every rank, the lanes take the tokens that rank 0 chose.
    fn advance(&self, step: &mut Self::Step) -> Result<()>;

    /// Waits for the oldest step under way; on rank 0, what it produced.
    fn output(&self, step: &mut Self::Step) -> Result<StepOutput>;

    /// Tells the other ranks that this one has failed, so that who waits for it gets an error instead.
    fn abort(&self, reason: &str);

    /// How the ranks' devices reach each other, as a log says it; nothing where there is nothing to say.
    fn links(&self) -> Option<String>;
}
