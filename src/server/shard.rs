//! The eight calls in domain terms, the same for both versions of the protocol.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::calls::Calls;
use super::draft::{BatchDraft, Facts, PrefillDraft, WarmupDraft};
use super::fit::fit;
use super::health;
use super::intake::{Intake, Purpose, check_batch, no_batch};
use super::telemetry::{Metrics, record_ids};
use crate::batch::CachedBatch;
use crate::engine::{Arrival, Capacity, EngineHandle, PrefillCall, StepAnswer, WarmupCall};
use crate::error::{Error, Result};
use crate::ids::{BatchId, Protocol, RequestId};

/// What the handlers of both versions share.
pub(super) struct Shard {
    pub(super) engine: EngineHandle,
    pub(super) intake: Arc<Intake>,
    pub(super) metrics: Metrics,
    /// Calls being answered.
    pub(super) calls: Calls,
    /// Where routers find this shard: `unix://` and an absolute path.
    pub(super) url: String,
    pub(super) chunking: bool,
    pub(super) prefix_caching: bool,
    pub(super) step_timeout: Duration,
}

impl Shard {
    pub(super) fn facts(&self) -> Facts {
        let model = self.engine.model();
        Facts {
            dtype: format!("torch.{}", model.dtype),
            device: model.device,
            chunking: self.chunking,
            prefix_caching: self.prefix_caching,
        }
    }

    pub(super) fn health(&self) -> Result<()> {
        health::check(self.engine.pulse(), self.step_timeout)
    }

    pub(super) async fn warmup(&self, draft: WarmupDraft) -> Result<Capacity> {
        let (_, arrivals) = self.arrivals(draft.batch, Purpose::Warmup).await?;
        let call = WarmupCall {
            arrivals,
            max_input_tokens: draft.max_input_tokens,
            max_prefill_tokens: draft.max_prefill_tokens,
            max_total_tokens: draft.max_total_tokens,
        };
        let capacity = self.engine.warmup(call).await?;
        tracing::info!(
            "warmed up: {} slots for the router, prompts up to {} tokens, {} with output",
            capacity.max_supported_total_tokens,
            capacity.max_input_tokens,
            capacity.max_total_tokens
        );
        Ok(capacity)
    }

    pub(super) async fn prefill(&self, draft: PrefillDraft, began: Instant) -> Result<StepAnswer> {
        let merge = draft.merge;
        let answer = self.try_prefill(draft, began).await;
        // A router never mentions the running batch of a failed Prefill again, so nobody else would drop it.
        if let (Err(error), Some(running)) = (&answer, merge)
            && *error != Error::ShuttingDown
        {
            let _ = self.engine.clear(running.protocol, Some(running.number)).await;
        }
        answer
    }

    async fn try_prefill(&self, draft: PrefillDraft, began: Instant) -> Result<StepAnswer> {
        let purpose = Purpose::Serve(self.engine.capacity());
        let (batch, arrivals) = self.arrivals(draft.batch, purpose).await?;
        let prompts = arrivals.iter().filter_map(|arrival| arrival.prepared.as_ref().ok());
        let n_prompt_tokens: usize = prompts.map(|prepared| prepared.prompt.len()).sum();
        self.metrics.prompt_tokens(n_prompt_tokens);
        let call = PrefillCall { batch, arrivals, merge: draft.merge };
        let answer = self.engine.prefill(call).await?;
        Ok(self.finish("prefill", answer, began))
    }

    pub(super) async fn decode(&self, batches: Vec<BatchId>, began: Instant) -> Result<StepAnswer> {
        if batches.is_empty() {
            return Err(Error::Invalid("decode names no batch".to_owned()));
        }
        let mut seen = HashSet::with_capacity(batches.len());
        if let Some(twice) = batches.iter().find(|batch| !seen.insert(**batch)) {
            return Err(Error::Invalid(format!("decode names batch {twice} twice")));
        }
        if let Some(first) = batches.first() {
            record_ids(first.number, [].into_iter());
        }
        let answer = self.engine.decode(batches).await?;
        Ok(self.finish("decode", answer, began))
    }

    pub(super) async fn filter(&self, batch: BatchId, keep: Vec<RequestId>) -> Result<CachedBatch> {
        self.engine.filter(batch, keep).await
    }

    pub(super) async fn clear(&self, protocol: Protocol, number: Option<u64>) -> Result<()> {
        self.engine.clear(protocol, number).await
    }

    /// Tokenises and checks the requests of a batch off the async threads.
    async fn arrivals(&self, batch: Option<BatchDraft>, purpose: Purpose) -> Result<(BatchId, Vec<Arrival>)> {
        let batch = batch.ok_or_else(no_batch)?;
        record_ids(batch.id.number, batch.requests.iter().map(|request| request.id.0));
        check_batch(&batch.requests, batch.size, purpose)?;
        let intake = self.intake.clone();
        let prepare = move || intake.prepare_all(batch.requests, purpose);
        let arrivals = tokio::task::spawn_blocking(prepare)
            .await
            .map_err(|error| Error::Bug(format!("tokenization panicked: {error}")))?;
        Ok((batch.id, arrivals))
    }

    fn finish(&self, method: &'static str, mut answer: StepAnswer, began: Instant) -> StepAnswer {
        for notice in &answer.notices {
            tracing::warn!("{notice}");
        }
        for notice in fit(&mut answer.generations) {
            tracing::warn!("{notice}");
        }
        self.metrics.step(method, &answer, began.elapsed());
        answer
    }
}
