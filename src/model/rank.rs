//! One rank: its device, its part of the decoder, and its part of the cache.

use super::decoder::Decoder;
use super::executor::Progress;
use super::graphed::{Graphs, measured_rows, step_rows};
use super::inject::InjectedFault;
use super::kv::KvPool;
use super::partition::Shard;
use super::rope::Frequencies;
use super::spec::{DecoderSpec, Mask};
use super::upload::Upload;
use super::workspace::Workspace;
use super::{Options, Parts, PoolSize, warm};
use crate::backend::step::{Feed, StepInput, StepOutput};
use crate::backend::{Backend, KvRows, LogitRows, StepShape};
use crate::error::{Error, Result};

/// Bytes of a GPU's memory that stay free beside the pool: for what driver and libraries take as they go, and the graphs,
/// which are recorded once the pool has its place.
pub const HEADROOM_BYTES: u64 = 1 << 30;

/// Everything that a step touches on one rank.
pub struct Rank<B: Backend> {
    backend: B,
    shard: Shard,
    decoder: Decoder<B>,
    kv: KvPool<B>,
    workspace: Workspace<B>,
    step: B::Step,
    graphs: Graphs<B>,
    fault: Option<InjectedFault>,
    progress: Progress,
    /// Steps that began since the loading.
    n_submitted: u64,
}

/// What a rank took of its device, in bytes where the device can tell.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    /// Weights as stored in the files.
    pub weight_bytes: u64,
    /// Slots of its pool, slot 0 included.
    pub n_slots: usize,
    /// Keys and values of the pool.
    pub kv_bytes: u64,
    /// Recorded graphs.
    pub graph_bytes: u64,
    /// Left free.
    pub free_bytes: u64,
}

impl<B: Backend> Rank<B> {
    /// Attaches the backend to this thread, takes the weights to the device, makes room for all that steps need, runs the
    /// largest steps once, and gives the pool its share of what is left. All ranks do so at once, and wait for each other
    /// where it matters: one that fails tells the others. `report` hears of bytes, `progress` of steps.
    pub fn load(
        backend: B,
        shard: Shard,
        spec: &DecoderSpec,
        parts: &Parts,
        options: &Options,
        report: &dyn Fn(u64),
        progress: &Progress,
    ) -> Result<(Rank<B>, Taken)> {
        let (mut rank, weight_bytes) = Rank::fill(backend, shard, spec, parts, options, report)?;
        let taken = rank.settle(spec, options, weight_bytes);
        let taken = taken.inspect_err(|error| rank.abort(&failed_loading(shard.rank, error)))?;
        rank.progress = progress.clone();
        Ok((rank, taken))
    }

    /// Weights, and room for all that steps need but the pool.
    fn fill(
        mut backend: B,
        shard: Shard,
        spec: &DecoderSpec,
        parts: &Parts,
        options: &Options,
        report: &dyn Fn(u64),
    ) -> Result<(Rank<B>, u64)> {
        let attached = backend.attach();
        let fill = || {
            attached?;
            backend.supports(spec)?;
            let upload = Upload::new(&backend, shard, parts, report);
            let decoder = Decoder::load(&upload, spec)?;
            let Options { n_lanes, max_step_tokens, .. } = *options;
            let widths = decoder.widths(spec)?;
            let workspace = Workspace::new(&backend, &widths, max_step_tokens, n_lanes, shard.world)?;
            let step = backend.step(StepShape {
                max_tokens: max_step_tokens,
                n_lanes,
                max_positions: spec.max_positions,
                vocab: spec.vocab,
                frequencies: spec.ropes().iter().map(Frequencies::new).collect(),
                masks: distinct(spec.layers.iter().map(|layer| layer.mask)),
                heads: widths.attention.heads(),
            })?;
            backend.prepare(&decoder.tuned(&step_rows(n_lanes, max_step_tokens), &measured_rows(n_lanes)))?;
            // Slot 0 alone, until it is known how many there can be.
            let kv = KvPool::new(&backend, decoder.kv_rows(), 1)?;
            Ok((decoder, workspace, step, kv, upload.n_bytes()))
        };
        let filled = fill();
        let filled = filled.inspect_err(|error| backend.abort(&failed_loading(shard.rank, error)))?;
        let (decoder, workspace, step, kv, weight_bytes) = filled;
        let graphs = Graphs::none();
        // The last rank's, whom the others wait for.
        let fault = options.fault.filter(|_| shard.rank + 1 == shard.world);
        let progress = Progress::new(shard.world);
        let rank =
            Rank { backend, shard, decoder, kv, workspace, step, graphs, fault, progress, n_submitted: 0 };
        Ok((rank, weight_bytes))
    }

    /// The first steps, the pool, and the graphs.
    fn settle(&mut self, spec: &DecoderSpec, options: &Options, weight_bytes: u64) -> Result<Taken> {
        if self.backend.free_bytes().is_some() {
            warm::run(self, spec, options)?;
        }
        self.n_submitted = 0;
        let n_slots = self.fitting_slots(spec, options)?;
        // The smallest rank's pool is everybody's.
        let n_slots = self.backend.meet(n_slots as u64)? as usize;
        self.kv = KvPool::new(&self.backend, self.decoder.kv_rows(), n_slots)?;
        let before = self.backend.free_bytes().unwrap_or(0);
        if options.graphs {
            let Rank { backend, shard, decoder, kv, workspace, step, .. } = self;
            let (rank, max_rows) = (shard.rank, options.n_lanes);
            self.graphs = Graphs::record(backend, max_rows, step, |rows, step| {
                ops(backend, rank, decoder, kv, workspace, step, Extent::decode(rows))
            })?;
        }
        // No rank runs a step while another still takes memory: on a device that may wait for all that runs there.
        self.backend.meet(0)?;
        let free_bytes = self.backend.free_bytes().unwrap_or(0);
        debug_assert_eq!(spec.layers(), self.kv.layers.len());
        Ok(Taken {
            weight_bytes,
            n_slots,
            kv_bytes: n_slots as u64 * self.slot_bytes(),
            graph_bytes: before.saturating_sub(free_bytes),
            free_bytes,
        })
    }

    /// Slots of the pool for which this rank has room.
    fn fitting_slots(&self, spec: &DecoderSpec, options: &Options) -> Result<usize> {
        let slot_bytes = self.slot_bytes();
        match (options.pool, self.backend.free_bytes()) {
            (PoolSize::Slots(n), None) => Ok(n),
            (PoolSize::Slots(n), Some(free)) => {
                let needed = (n as u64).saturating_mul(slot_bytes).saturating_add(HEADROOM_BYTES);
                if needed > free {
                    return Err(no_room(&format!("a pool of {n} tokens"), needed, free));
                }
                Ok(n)
            }
            (PoolSize::Rest { unused_bytes }, Some(free)) => {
                let spare = free.saturating_sub(unused_bytes).saturating_sub(HEADROOM_BYTES);
                // More than all lanes can fill at once would only keep prefixes.
                let useful = (options.n_lanes as u64).saturating_mul(spec.max_positions as u64);
                let n = (spare / slot_bytes.max(1)).min(useful.max(2)).min(u64::from(u32::MAX)) as usize;
                if n < 2 {
                    return Err(no_room("the smallest pool", 2 * slot_bytes + HEADROOM_BYTES, free));
                }
                Ok(n)
            }
            (PoolSize::Rest { .. }, None) => {
                Err(Error::Bug("the rest of a memory whose size nobody can tell".into()))
            }
        }
    }

    /// Bytes of keys and values of one slot on this rank.
    pub fn slot_bytes(&self) -> u64 {
        let numbers: usize = self.decoder.kv_rows().map(KvRows::numbers).sum();
        (numbers * self.backend.dtype().size_bytes()) as u64
    }

    /// Starts a step that the executor has checked.
    pub fn submit(&mut self, input: &StepInput) -> Result<()> {
        self.n_submitted += 1;
        if let Some(fault) = self.fault {
            fault.strike_rank(self.n_submitted)?;
        }
        self.progress.begin(self.shard.rank, self.n_submitted);
        let Rank { backend, shard, decoder, kv, workspace, step, graphs, .. } = self;
        backend.begin(input, step)?;
        let extent = Extent::of(input);
        if is_decode(input)
            && let Some(graph) = graphs.for_rows(extent.n_tokens)
        {
            return backend.replay(graph, step);
        }
        ops(backend, shard.rank, decoder, kv, workspace, step, extent)
    }

    /// As [`Rank::submit`], never by a graph.
    pub fn submit_eager(&mut self, input: &StepInput) -> Result<()> {
        let Rank { backend, shard, decoder, kv, workspace, step, .. } = self;
        backend.begin(input, step)?;
        ops(backend, shard.rank, decoder, kv, workspace, step, Extent::of(input))
    }

    /// Waits for the oldest step under way. What it produced is rank 0's to tell.
    pub fn output(&mut self) -> Result<StepOutput> {
        self.backend.output(&mut self.step)
    }

    /// The rank's device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Steps that began since the loading.
    pub fn n_submitted(&self) -> u64 {
        self.n_submitted
    }

    /// Tells the other ranks that this one has failed.
    pub fn abort(&self, reason: &str) {
        self.backend.abort(reason);
    }
}

fn failed_loading(rank: usize, error: &Error) -> String {
    format!("rank {rank} failed to load: {error}")
}

fn no_room(what: &str, needed: u64, free: u64) -> Error {
    Error::Exhausted(format!(
        "{what} takes {} MiB beside weights and intermediates, and {} MiB of the GPU are free: lower --pool-tokens, \
         --max-batch-prefill-tokens or --max-lanes",
        needed >> 20,
        free >> 20
    ))
}

/// How much a step runs.
#[derive(Debug, Clone, Copy)]
struct Extent {
    n_tokens: usize,
    n_targets: usize,
    n_sampled: usize,
}

impl Extent {
    fn of(input: &StepInput) -> Extent {
        Extent {
            n_tokens: input.n_tokens(),
            n_targets: input.targets.len(),
            n_sampled: input.rows.iter().filter(|row| row.sample).count(),
        }
    }

    fn decode(rows: usize) -> Extent {
        Extent { n_tokens: rows, n_targets: 0, n_sampled: rows }
    }
}

/// Whether every row feeds the token it sampled last, and samples the next.
fn is_decode(input: &StepInput) -> bool {
    input.rows.iter().all(|row| row.feed == Feed::Last && row.sample && row.n_targets == 0)
}

/// The forward pass and what follows it, for the step that began.
fn ops<B: Backend>(
    backend: &B,
    rank: usize,
    decoder: &Decoder<B>,
    kv: &mut KvPool<B>,
    workspace: &mut Workspace<B>,
    step: &mut B::Step,
    Extent { n_tokens, n_targets, n_sampled }: Extent,
) -> Result<()> {
    backend.lay_out(step)?;
    if n_tokens > 0 {
        decoder.forward(backend, n_tokens, step, kv, workspace)?;
    }
    // By chunks: logits of a whole prompt would outgrow every other intermediate.
    for first in (0..n_targets).step_by(workspace.logit_rows.max(1)) {
        let targets = first..(first + workspace.logit_rows).min(n_targets);
        let wanted = LogitRows::Targets(targets.clone());
        decoder.logits(backend, &wanted, targets.len(), step, workspace)?;
        if rank == 0 {
            backend.target_logprobs(targets, &workspace.logits, step)?;
        }
    }
    if n_sampled > 0 {
        decoder.logits(backend, &LogitRows::Sampled, n_sampled, step, workspace)?;
        if rank == 0 {
            backend.sample(&mut workspace.logits, step)?;
        }
    }
    // Also where nothing is sampled: the step ends here.
    backend.advance(step)
}

fn distinct(masks: impl Iterator<Item = Mask>) -> Vec<Mask> {
    let mut seen = Vec::new();
    for mask in masks {
        if !seen.contains(&mask) {
            seen.push(mask);
        }
    }
    seen
}
