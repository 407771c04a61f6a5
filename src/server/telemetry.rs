//! What is told of each call: a span, and instruments.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Histogram, Meter};
use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::{KeyRef, MetadataMap};
use tonic::{Request, Response, Status};
use tracing::field::Empty;
use tracing::{Instrument as _, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use super::calls::Calls;
use super::status::status_of;
use crate::engine::{EngineHandle, StepAnswer};
use crate::error::{Error, Result};

/// Runs a handler within its call's span, counted among `calls`, and turns its error into a status.
pub(super) async fn answer<Q, A, F>(
    calls: &Calls,
    method: &'static str,
    request: Request<Q>,
    handle: impl FnOnce(Q, Instant) -> F,
) -> Result<Response<A>, Status>
where
    F: Future<Output = Result<A>>,
{
    let _call = calls.enter();
    let began = Instant::now();
    let span = span_of(method, request.metadata());
    async {
        let result = handle(request.into_inner(), began).await;
        let elapsed_ms = began.elapsed().as_secs_f64() * 1e3;
        match result {
            Ok(message) => {
                tracing::debug!("{method}: {elapsed_ms:.1} ms");
                Ok(Response::new(message))
            }
            Err(error) => {
                let status = status_of(&error);
                let span = Span::current();
                span.record("otel.status_code", "ERROR");
                span.record("rpc.grpc.status_code", status.code() as i32);
                match error {
                    Error::Device(_) | Error::DeviceLost(_) | Error::Bug(_) | Error::Checkpoint(_) => {
                        tracing::error!("{method} failed after {elapsed_ms:.1} ms: {error}");
                    }
                    _ => tracing::warn!("{method} is refused: {error}"),
                }
                Err(status)
            }
        }
    }
    .instrument(span)
    .await
}

/// A call's span, named by the full method and continuing the caller's trace, if it sent one.
fn span_of(method: &'static str, metadata: &MetadataMap) -> Span {
    let span = tracing::info_span!(
        "call",
        otel.name = method,
        otel.kind = "server",
        otel.status_code = Empty,
        rpc.system = "grpc",
        rpc.grpc.status_code = Empty,
        batch = Empty,
        requests = Empty,
        prompt_tokens = Empty,
        tokens = Empty,
        rows = Empty,
        forward_ms = Empty,
        decode_ms = Empty,
    );
    if metadata.contains_key("traceparent") {
        let context = TraceContextPropagator::new().extract(&Carrier(metadata));
        // Refused where no traces are exported, which is no loss.
        let _ = span.set_parent(context);
    }
    span
}

/// Ids on a call's span; the list is cut where it gets long.
pub(super) fn record_ids(batch: u64, requests: impl ExactSizeIterator<Item = u64>) {
    let span = Span::current();
    if span.is_disabled() {
        return;
    }
    let n = requests.len();
    let mut ids: Vec<String> = requests.take(32).map(|id| id.to_string()).collect();
    if ids.len() < n {
        ids.push(format!("… ({n})"));
    }
    span.record("batch", batch);
    span.record("requests", ids.join(" "));
}

/// gRPC metadata as a carrier of trace context.
struct Carrier<'a>(&'a MetadataMap);

impl Extractor for Carrier<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        let name = |key| match key {
            KeyRef::Ascii(key) => Some(key.as_str()),
            KeyRef::Binary(_) => None,
        };
        self.0.keys().filter_map(name).collect()
    }
}

/// The shard's instruments; without a collector they do nothing.
pub(super) struct Metrics {
    prompt_tokens: Counter<u64>,
    generated_tokens: Counter<u64>,
    batch_requests: Histogram<u64>,
    step_tokens: Histogram<u64>,
    forward: Histogram<f64>,
    decode: Histogram<f64>,
    concat: Histogram<f64>,
    total: Histogram<f64>,
}

impl Metrics {
    pub(super) fn new(engine: &EngineHandle) -> Metrics {
        let meter = opentelemetry::global::meter("kvshard");
        observe_pool(&meter, engine);
        let seconds = |name, text| meter.f64_histogram(name).with_unit("s").with_description(text).build();
        let counts = |name, text| meter.u64_histogram(name).with_description(text).build();
        Metrics {
            prompt_tokens: meter
                .u64_counter("kvshard.prompt_tokens")
                .with_description("Prompt tokens received")
                .build(),
            generated_tokens: meter
                .u64_counter("kvshard.generated_tokens")
                .with_description("Tokens generated")
                .build(),
            batch_requests: counts("kvshard.batch.requests", "Requests of the batch after a step"),
            step_tokens: counts("kvshard.step.tokens", "Tokens that a step fed"),
            forward: seconds("kvshard.step.forward", "Planning, forward pass and sampling of a step"),
            decode: seconds("kvshard.step.decode", "Detokenisation and stop checks of a step"),
            concat: seconds("kvshard.step.concat", "Merging batches before a step"),
            total: seconds("kvshard.step.total", "The whole call of a step"),
        }
    }

    pub(super) fn prompt_tokens(&self, n: usize) {
        self.prompt_tokens.add(n as u64, &[]);
        Span::current().record("prompt_tokens", n as u64);
    }

    /// What a step did; `method` is `prefill` or `decode`.
    pub(super) fn step(&self, method: &'static str, answer: &StepAnswer, total: Duration) {
        let labels = [KeyValue::new("method", method)];
        let timings = &answer.timings;
        let seconds = |ns: u64| ns as f64 / 1e9;
        let n_generated: usize =
            answer.generations.iter().map(|generation| generation.tokens.ids.len()).sum();
        let batch = answer.batch.as_ref();
        self.generated_tokens.add(n_generated as u64, &[]);
        self.batch_requests.record(batch.map_or(0, |batch| batch.request_ids.len() as u64), &labels);
        self.step_tokens.record(u64::from(timings.n_tokens), &labels);
        self.forward.record(seconds(timings.forward_ns), &labels);
        self.decode.record(seconds(timings.decode_ns), &labels);
        if let Some(concat_ns) = timings.concat_ns {
            self.concat.record(seconds(concat_ns), &labels);
        }
        self.total.record(total.as_secs_f64(), &labels);
        let span = Span::current();
        span.record("tokens", timings.n_tokens);
        span.record("rows", timings.n_rows);
        span.record("forward_ms", timings.forward_ns as f64 / 1e6);
        span.record("decode_ms", timings.decode_ns as f64 / 1e6);
    }
}

/// How full the pool is, read when metrics are collected: also between steps, when batches are dropped.
fn observe_pool(meter: &Meter, engine: &EngineHandle) {
    let n_slots = u64::from(engine.model().n_slots);
    let pulse = Arc::clone(engine.pulse());
    meter
        .u64_observable_gauge("kvshard.pool.slots")
        .with_description("Slots of the pool")
        .with_callback(move |observer| observer.observe(n_slots, &[]))
        .build();
    meter
        .u64_observable_gauge("kvshard.pool.leased")
        .with_description("Slots of the pool under a lease")
        .with_callback(move |observer| observer.observe(u64::from(pulse.n_leased()), &[]))
        .build();
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    #[test]
    fn a_callers_trace_is_continued() {
        let provider = SdkTracerProvider::builder().build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        let mut metadata = MetadataMap::new();
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        metadata.insert("traceparent", parent.parse().expect("ascii"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let span = span_of("/generate.v3.TextGenerationService/Info", &metadata);
            let trace = span.context().span().span_context().trace_id();
            assert_eq!(trace.to_string(), "0af7651916cd43dd8448eb211c80319c");
        });
    }

    #[test]
    fn garbage_for_a_trace_is_no_harm() {
        let mut metadata = MetadataMap::new();
        metadata.insert("traceparent", "00-nonsense".parse().expect("ascii"));
        span_of("/x", &metadata);
    }
}
