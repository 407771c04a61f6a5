//! `generate.v3` on the wire ↔ the domain, and nothing else.

use std::sync::Arc;
use std::time::Instant;

use tonic::{Request, Response, Status};

use super::draft::{
    ATTENTION, BLOCK_SIZE, BatchDraft, Facts, Grammar, NEUTRAL, PrefillDraft, RequestDraft, WarmupDraft,
    size_of,
};
use super::intake::{Intake, Purpose, check_batch, no_batch};
use super::shard::Shard;
use super::telemetry::answer;
use crate::batch::{CachedBatch, GeneratedText, Generation, Tokens};
use crate::engine::{Arrival, Capacity, StepAnswer};
use crate::error::Result;
use crate::ids::{BatchId, Protocol, RequestId};
use crate::pb::v3 as wire;
use crate::pb::v3::text_generation_service_server::TextGenerationService;
use crate::sampling::{FinishReason, RawSampling, RawStopping};

/// The service of routers from 2.1 on.
#[derive(Clone)]
pub(super) struct Service(pub(super) Arc<Shard>);

#[tonic::async_trait]
impl TextGenerationService for Service {
    async fn info(
        &self,
        request: Request<wire::InfoRequest>,
    ) -> Result<Response<wire::InfoResponse>, Status> {
        let handle = |_, _| async { Ok(info(self.0.facts())) };
        answer(&self.0.calls, "/generate.v3.TextGenerationService/Info", request, handle).await
    }

    async fn service_discovery(
        &self,
        request: Request<wire::ServiceDiscoveryRequest>,
    ) -> Result<Response<wire::ServiceDiscoveryResponse>, Status> {
        let handle = |_, _| async { Ok(wire::ServiceDiscoveryResponse { urls: vec![self.0.url.clone()] }) };
        answer(&self.0.calls, "/generate.v3.TextGenerationService/ServiceDiscovery", request, handle).await
    }

    async fn clear_cache(
        &self,
        request: Request<wire::ClearCacheRequest>,
    ) -> Result<Response<wire::ClearCacheResponse>, Status> {
        let handle = |message: wire::ClearCacheRequest, _| async move {
            self.0.clear(Protocol::V3, message.id).await?;
            Ok(wire::ClearCacheResponse {})
        };
        answer(&self.0.calls, "/generate.v3.TextGenerationService/ClearCache", request, handle).await
    }

    async fn filter_batch(
        &self,
        request: Request<wire::FilterBatchRequest>,
    ) -> Result<Response<wire::FilterBatchResponse>, Status> {
        let handle = |message: wire::FilterBatchRequest, _| async move {
            let keep = message.request_ids.into_iter().map(RequestId).collect();
            let batch = self.0.filter(batch_id(message.batch_id), keep).await?;
            Ok(wire::FilterBatchResponse { batch: Some(cached_batch(batch)) })
        };
        answer(&self.0.calls, "/generate.v3.TextGenerationService/FilterBatch", request, handle).await
    }

    async fn warmup(
        &self,
        request: Request<wire::WarmupRequest>,
    ) -> Result<Response<wire::WarmupResponse>, Status> {
        let handle = |message, _| async move { Ok(capacity(self.0.warmup(warmup_draft(message)).await?)) };
        answer(&self.0.calls, "/generate.v3.TextGenerationService/Warmup", request, handle).await
    }

    async fn prefill(
        &self,
        request: Request<wire::PrefillRequest>,
    ) -> Result<Response<wire::PrefillResponse>, Status> {
        let handle = |message, began: Instant| async move {
            let answer = self.0.prefill(prefill_draft(message), began).await?;
            Ok(step_answer(answer, nanoseconds_since(began)))
        };
        answer(&self.0.calls, "/generate.v3.TextGenerationService/Prefill", request, handle).await
    }

    async fn decode(
        &self,
        request: Request<wire::DecodeRequest>,
    ) -> Result<Response<wire::DecodeResponse>, Status> {
        let handle = |message: wire::DecodeRequest, began: Instant| async move {
            let batches = message.batches.into_iter().map(|batch| batch_id(batch.id)).collect();
            let answer = self.0.decode(batches, began).await?;
            Ok(decode_response(step_answer(answer, nanoseconds_since(began))))
        };
        answer(&self.0.calls, "/generate.v3.TextGenerationService/Decode", request, handle).await
    }

    async fn health(
        &self,
        request: Request<wire::HealthRequest>,
    ) -> Result<Response<wire::HealthResponse>, Status> {
        let handle = |_, _| async { self.0.health().map(|()| wire::HealthResponse {}) };
        answer(&self.0.calls, "/generate.v3.TextGenerationService/Health", request, handle).await
    }
}

impl Intake {
    /// The requests of a Prefill as they reach the engine, for whoever has no shard at hand: fuzzing.
    ///
    /// # Errors
    /// What is wrong with the call as a whole; each arrival says what is wrong with its request alone.
    pub fn arrivals(&self, message: wire::PrefillRequest, capacity: Capacity) -> Result<Vec<Arrival>> {
        let batch = prefill_draft(message).batch.ok_or_else(no_batch)?;
        let purpose = Purpose::Serve(capacity);
        check_batch(&batch.requests, batch.size, purpose)?;
        Ok(self.prepare_all(batch.requests, purpose))
    }
}

fn nanoseconds_since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

fn batch_id(number: u64) -> BatchId {
    BatchId { protocol: Protocol::V3, number }
}

fn info(facts: Facts) -> wire::InfoResponse {
    wire::InfoResponse {
        requires_padding: false,
        dtype: facts.dtype,
        device_type: facts.device.to_owned(),
        window_size: None,
        speculate: 0,
        support_chunking: facts.chunking,
        use_prefix_caching: facts.prefix_caching,
        attention_impl: ATTENTION.to_owned(),
        block_size: BLOCK_SIZE,
    }
}

fn capacity(capacity: Capacity) -> wire::WarmupResponse {
    wire::WarmupResponse {
        max_supported_total_tokens: Some(capacity.max_supported_total_tokens),
        max_input_tokens: capacity.max_input_tokens,
        max_total_tokens: capacity.max_total_tokens,
    }
}

fn warmup_draft(message: wire::WarmupRequest) -> WarmupDraft {
    WarmupDraft {
        batch: message.batch.map(batch_draft),
        max_input_tokens: message.max_input_tokens,
        max_prefill_tokens: message.max_prefill_tokens,
        max_total_tokens: message.max_total_tokens,
    }
}

fn prefill_draft(message: wire::PrefillRequest) -> PrefillDraft {
    PrefillDraft {
        batch: message.batch.map(batch_draft),
        merge: message.cached_batch.map(|batch| batch_id(batch.id)),
    }
}

fn batch_draft(batch: wire::Batch) -> BatchDraft {
    BatchDraft {
        id: batch_id(batch.id),
        requests: batch.requests.into_iter().map(request_draft).collect(),
        size: batch.size,
    }
}

fn request_draft(request: wire::Request) -> RequestDraft {
    let (grammar, sampling) = parameters(request.parameters, request.top_n_tokens);
    let stopping = request.stopping_parameters.unwrap_or_default();
    RequestDraft {
        id: RequestId(request.id),
        prompt: prompt_text(request.input_chunks, request.inputs),
        add_special_tokens: request.add_special_tokens,
        truncate: request.truncate,
        sampling,
        grammar,
        stopping: RawStopping {
            max_new_tokens: stopping.max_new_tokens,
            stop_sequences: stopping.stop_sequences,
            ignore_eos: stopping.ignore_eos_token,
        },
        prompt_logprobs: request.prefill_logprobs,
        n_blocks: request.blocks.len(),
        slots: request.slots,
        cache_len: request.cache_len,
        chunk_len: request.chunk_len,
        adapter: request.adapter_id,
    }
}

/// The text chunks, joined; `inputs` counts where there are no chunks at all.
fn prompt_text(chunks: Option<wire::Input>, inputs: String) -> String {
    use wire::input_chunk::Chunk;
    let mut chunks = match chunks {
        Some(input) if !input.chunks.is_empty() => input.chunks,
        _ => return inputs,
    };
    // One chunk is the rule, and prompts can be large: it is moved.
    let texts = chunks.iter_mut().filter_map(|chunk| match &mut chunk.chunk {
        Some(Chunk::Text(text)) => Some(std::mem::take(text)),
        Some(Chunk::Image(_)) | None => None,
    });
    texts.reduce(|all, text| all + &text).unwrap_or_default()
}

fn parameters(parameters: Option<wire::NextTokenChooserParameters>, top_n: u32) -> (Grammar, RawSampling) {
    let Some(parameters) = parameters else {
        return (Grammar::Unconstrained, RawSampling { top_n, ..NEUTRAL });
    };
    let sampling = RawSampling {
        temperature: parameters.temperature,
        top_k: parameters.top_k,
        top_p: parameters.top_p,
        typical_p: parameters.typical_p,
        do_sample: parameters.do_sample,
        seed: parameters.seed,
        repetition_penalty: parameters.repetition_penalty,
        frequency_penalty: parameters.frequency_penalty,
        watermark: parameters.watermark,
        top_n,
    };
    (Grammar::new(&parameters.grammar, parameters.grammar_type), sampling)
}

/// The answer of Prefill; Decode's has the same fields.
pub(super) fn step_answer(answer: StepAnswer, total_ns: u64) -> wire::PrefillResponse {
    wire::PrefillResponse {
        generations: answer.generations.into_iter().map(generation).collect(),
        batch: answer.batch.map(cached_batch),
        forward_ns: answer.timings.forward_ns,
        decode_ns: answer.timings.decode_ns,
        total_ns,
        concat_ns: answer.timings.concat_ns,
    }
}

fn decode_response(answer: wire::PrefillResponse) -> wire::DecodeResponse {
    wire::DecodeResponse {
        generations: answer.generations,
        batch: answer.batch,
        forward_ns: answer.forward_ns,
        decode_ns: answer.decode_ns,
        total_ns: answer.total_ns,
        concat_ns: answer.concat_ns,
    }
}

fn cached_batch(batch: CachedBatch) -> wire::CachedBatch {
    wire::CachedBatch {
        id: batch.id.number,
        size: size_of(&batch),
        max_tokens: batch.max_tokens,
        current_tokens: batch.current_tokens,
        request_ids: batch.request_ids.into_iter().map(|id| id.0).collect(),
    }
}

fn generation(generation: Generation) -> wire::Generation {
    wire::Generation {
        request_id: generation.request.0,
        prefill_tokens: generation.prefill_tokens.map(tokens),
        tokens: Some(tokens(generation.tokens)),
        generated_text: generation.generated_text.map(generated_text),
        top_tokens: generation.top_tokens.into_iter().map(tokens).collect(),
    }
}

fn tokens(tokens: Tokens) -> wire::Tokens {
    wire::Tokens {
        ids: tokens.ids,
        logprobs: tokens.logprobs,
        texts: tokens.texts,
        is_special: tokens.is_special,
    }
}

fn generated_text(text: GeneratedText) -> wire::GeneratedText {
    let reason = match text.finish_reason {
        FinishReason::Length => wire::FinishReason::Length,
        FinishReason::EndOfText => wire::FinishReason::EosToken,
        FinishReason::StopSequence => wire::FinishReason::StopSequence,
    };
    wire::GeneratedText {
        text: text.text,
        generated_tokens: text.n_tokens,
        finish_reason: reason.into(),
        seed: text.seed,
    }
}

#[cfg(test)]
mod tests;
