//! One rank: its device, its part of the decoder, and its part of the cache.

use super::decoder::Decoder;
use super::kv::KvPool;
use super::partition::Shard;
use super::rope::Frequencies;
use super::spec::{DecoderSpec, Positions};
use super::upload::Upload;
use super::workspace::Workspace;
use super::{Options, Parts};
use crate::backend::step::{StepInput, StepOutput};
use crate::backend::{Backend, LogitRows, StepShape};
use crate::error::Result;

/// Everything that a step touches on one rank.
pub struct Rank<B: Backend> {
    backend: B,
    shard: Shard,
    decoder: Decoder<B>,
    kv: KvPool<B>,
    workspace: Workspace<B>,
    step: B::Step,
}

impl<B: Backend> Rank<B> {
    /// Takes the weights to the device and makes room for all that steps need. Returns the bytes of the weights
    /// as well.
    pub fn load(
        backend: B,
        shard: Shard,
        spec: &DecoderSpec,
        parts: &Parts,
        options: Options,
        report: &dyn Fn(u64),
    ) -> Result<(Rank<B>, u64)> {
        let upload = Upload::new(&backend, shard, parts, report);
        let decoder = Decoder::load(&upload, spec)?;
        let weight_bytes = upload.n_bytes();
        let Options { n_slots, n_lanes, max_step_tokens, .. } = options;
        let widths = decoder.widths(spec)?;
        let workspace = Workspace::new(&backend, widths, max_step_tokens, n_lanes, shard.world)?;
        let kv = KvPool::new(&backend, decoder.attentions(), n_slots)?;
        let Positions::Rope(rope) = &spec.positions;
        let step = backend.step(StepShape {
            max_tokens: max_step_tokens,
            n_lanes,
            max_positions: spec.max_positions,
            vocab: spec.vocab,
            frequencies: Frequencies::new(rope, spec.attention.head_dim),
        })?;
        Ok((Rank { backend, shard, decoder, kv, workspace, step }, weight_bytes))
    }

    /// Runs a step that the executor has checked. What it produced is rank 0's to tell.
    pub fn run(&mut self, input: &StepInput) -> Result<StepOutput> {
        let Rank { backend, decoder, step, workspace, .. } = self;
        backend.begin(input, step)?;
        let n_tokens = input.n_tokens();
        if n_tokens > 0 {
            decoder.forward(backend, n_tokens, step, &mut self.kv, workspace)?;
        }
        // By chunks: logits of a whole prompt would outgrow every other intermediate.
        let n_targets = input.targets.len();
        for first in (0..n_targets).step_by(workspace.logit_rows.max(1)) {
            let targets = first..(first + workspace.logit_rows).min(n_targets);
            let wanted = LogitRows::Targets(targets.clone());
            decoder.logits(backend, &wanted, targets.len(), step, workspace)?;
            if self.shard.rank == 0 {
                backend.target_logprobs(targets, &workspace.logits, step)?;
            }
        }
        let n_sampled = input.rows.iter().filter(|row| row.sample).count();
        if n_sampled > 0 {
            decoder.logits(backend, &LogitRows::Sampled, n_sampled, step, workspace)?;
            if self.shard.rank == 0 {
                backend.sample(&mut workspace.logits, step)?;
            }
            backend.advance(step)?;
        }
        backend.output(step)
    }

    /// Tells the other ranks that this one has failed.
    pub fn abort(&self, reason: &str) {
        self.backend.abort(reason);
    }
}
