//! What the real binary exports, as a collector receives it over OTLP.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kvshard::pb::v3;
use opentelemetry_proto::tonic::collector::metrics::v1 as metrics_service;
use opentelemetry_proto::tonic::collector::trace::v1 as trace_service;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::metrics::v1::metric::Data;
use opentelemetry_proto::tonic::metrics::v1::{Metric, NumberDataPoint, number_data_point};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::support::fixture;
use crate::support::process::Serving;
use crate::support::shard::{decode, on_slots, prefill, request};

/// Everything that came, in order.
#[derive(Clone, Default)]
struct Collector {
    spans: Arc<Mutex<Vec<Span>>>,
    /// By name; the last export's.
    metrics: Arc<Mutex<BTreeMap<String, Metric>>>,
    services: Arc<Mutex<Vec<String>>>,
}

fn text_of(value: Option<&AnyValue>) -> String {
    match value.and_then(|value| value.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    }
}

fn attributes(attributes: &[KeyValue]) -> BTreeMap<&str, String> {
    attributes.iter().map(|pair| (pair.key.as_str(), text_of(pair.value.as_ref()))).collect()
}

#[tonic::async_trait]
impl trace_service::trace_service_server::TraceService for Collector {
    async fn export(
        &self,
        request: Request<trace_service::ExportTraceServiceRequest>,
    ) -> Result<Response<trace_service::ExportTraceServiceResponse>, Status> {
        for of_resource in request.into_inner().resource_spans {
            let resource = of_resource.resource.unwrap_or_default();
            let name = attributes(&resource.attributes).remove("service.name").unwrap_or_default();
            self.services.lock().unwrap().push(name);
            let spans = of_resource.scope_spans.into_iter().flat_map(|of_scope| of_scope.spans);
            self.spans.lock().unwrap().extend(spans);
        }
        Ok(Response::new(Default::default()))
    }
}

#[tonic::async_trait]
impl metrics_service::metrics_service_server::MetricsService for Collector {
    async fn export(
        &self,
        request: Request<metrics_service::ExportMetricsServiceRequest>,
    ) -> Result<Response<metrics_service::ExportMetricsServiceResponse>, Status> {
        let resources = request.into_inner().resource_metrics.into_iter();
        let metrics = resources.flat_map(|of_resource| of_resource.scope_metrics);
        let metrics = metrics.flat_map(|of_scope| of_scope.metrics);
        self.metrics.lock().unwrap().extend(metrics.map(|metric| (metric.name.clone(), metric)));
        Ok(Response::new(Default::default()))
    }
}

impl Collector {
    /// Collects on a port of its own.
    async fn start() -> (Collector, String) {
        let collector = Collector::default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let traces = trace_service::trace_service_server::TraceServiceServer::new(collector.clone());
        let metrics = metrics_service::metrics_service_server::MetricsServiceServer::new(collector.clone());
        let server = Server::builder().add_service(traces).add_service(metrics);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        (collector, address)
    }

    /// The spans of a method.
    fn spans_of(&self, method: &str) -> Vec<Span> {
        let name = format!("/generate.v3.TextGenerationService/{method}");
        self.spans.lock().unwrap().iter().filter(|span| span.name == name).cloned().collect()
    }

    /// The sum over the points of a counter or gauge.
    fn number(&self, name: &str) -> u64 {
        let number = |point: &NumberDataPoint| match point.value {
            Some(number_data_point::Value::AsInt(number)) => number as u64,
            ref other => panic!("{name}: {other:?}"),
        };
        match &self.metric(name).data {
            Some(Data::Sum(sum)) => sum.data_points.iter().map(number).sum(),
            Some(Data::Gauge(gauge)) => gauge.data_points.iter().map(number).sum(),
            other => panic!("{name}: {other:?}"),
        }
    }

    /// Number and sum of what a histogram has seen, by the attribute `method`.
    fn histogram(&self, name: &str) -> BTreeMap<String, (u64, f64)> {
        let Some(Data::Histogram(histogram)) = self.metric(name).data else { panic!("{name}") };
        let points = histogram.data_points.iter().map(|point| {
            let method = attributes(&point.attributes).remove("method").expect("a method");
            (method, (point.count, point.sum.expect("a sum")))
        });
        points.collect()
    }

    fn metric(&self, name: &str) -> Metric {
        let metrics = self.metrics.lock().unwrap();
        metrics.get(name).unwrap_or_else(|| panic!("no {name} among {:?}", metrics.keys())).clone()
    }
}

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_gets_a_span_a_call_and_the_metrics() {
    let (collector, address) = Collector::start().await;
    let model = fixture("llama");
    let flags = ["--pool-tokens", "2000", "--own-slots", "500", "--otlp-service-name", "a shard"];
    let mut arguments = vec![model.to_str().unwrap(), "--otlp-endpoint", &address];
    arguments.extend(flags);
    let mut serving = Serving::start(&arguments, &[]);
    serving.wait_until_ready(0);
    let mut client = serving.client().await;

    let text = "the quick brown fox";
    let mut traced = Request::new(prefill(7, vec![request(70, text, 5), request(71, text, 9)], None));
    traced.metadata_mut().insert("traceparent", format!("00-{TRACE}-{PARENT}-01").parse().unwrap());
    let first = client.prefill(traced).await.unwrap().into_inner().batch.unwrap();
    let other = on_slots(request(80, text, 100), 1..300);
    let second = client.prefill(prefill(8, vec![other], None)).await.unwrap().into_inner().batch.unwrap();
    client.decode(decode(&[7])).await.unwrap();
    client.decode(decode(&[8])).await.unwrap();
    client.decode(decode(&[999])).await.unwrap_err();
    client.info(v3::InfoRequest {}).await.unwrap();
    client.health(v3::HealthRequest {}).await.unwrap();
    let (leased, n_prompt) = (first.max_tokens + second.max_tokens, second.max_tokens - 99);
    serving.signal("-TERM");
    assert_eq!(serving.wait().code, Some(0));

    assert!(collector.services.lock().unwrap().iter().all(|name| name == "a shard"));
    assert_eq!(collector.spans.lock().unwrap().len(), 7, "a span a call, and none else");
    for (method, n) in [("Prefill", 2), ("Decode", 3), ("Info", 1), ("Health", 1)] {
        let spans = collector.spans_of(method);
        assert_eq!(spans.len(), n, "{method}");
        assert!(spans.iter().all(|span| span.kind() == SpanKind::Server));
        assert!(spans.iter().all(|span| span.end_time_unix_nano >= span.start_time_unix_nano));
    }
    let prefills = collector.spans_of("Prefill");
    let (traced, untraced): (Vec<_>, Vec<_>) = prefills.iter().partition(|span| hex(&span.trace_id) == TRACE);
    assert_eq!((traced.len(), hex(&traced[0].parent_span_id).as_str()), (1, PARENT));
    assert!(untraced[0].parent_span_id.is_empty());
    let told = attributes(&traced[0].attributes);
    let of_two = (2 * n_prompt).to_string();
    for (name, value) in [
        ("rpc.system", "grpc"),
        ("batch", "7"),
        ("requests", "70 71"),
        ("prompt_tokens", &of_two),
        ("tokens", &of_two),
        ("rows", "2"),
    ] {
        assert_eq!(told.get(name).map(String::as_str), Some(value), "{name} of {told:?}");
    }
    for name in ["forward_ms", "decode_ms"] {
        assert!(told[name].parse::<f64>().is_ok_and(|ms| ms > 0.0), "{told:?}");
    }
    let failed = collector.spans_of("Decode").into_iter().filter(|span| {
        let told = attributes(&span.attributes);
        // NOT_FOUND.
        told.get("rpc.grpc.status_code").is_some_and(|code| code == "5")
            && span.status.as_ref().is_some_and(|status| status.code == 2)
    });
    assert_eq!(failed.count(), 1);

    assert_eq!(collector.number("kvshard.prompt_tokens"), 3 * u64::from(n_prompt));
    assert_eq!(collector.number("kvshard.generated_tokens"), 3 + 3);
    assert_eq!(collector.number("kvshard.pool.slots"), 2000);
    assert_eq!(collector.number("kvshard.pool.leased"), u64::from(leased), "of both batches");
    let by_method = |name| collector.histogram(name);
    assert_eq!(by_method("kvshard.batch.requests")["prefill"], (2, 3.0));
    assert_eq!(by_method("kvshard.batch.requests")["decode"], (2, 3.0));
    assert_eq!(by_method("kvshard.step.tokens")["prefill"], (2, f64::from(3 * n_prompt)));
    assert_eq!(by_method("kvshard.step.tokens")["decode"], (2, 3.0));
    for name in ["kvshard.step.forward", "kvshard.step.decode", "kvshard.step.total"] {
        for method in ["prefill", "decode"] {
            let (n, seconds) = by_method(name)[method];
            assert!(n == 2 && seconds > 0.0 && seconds < 60.0, "{name} of {method}: {n} took {seconds} s");
        }
        assert_eq!(collector.metric(name).unit, "s");
    }
}

/// A collector that nobody runs costs neither calls nor the exit code.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_not_there_is_no_harm() {
    let model = fixture("llama");
    let flags = [model.to_str().unwrap(), "--pool-tokens", "2000", "--otlp-endpoint", "http://127.0.0.1:1"];
    let mut serving = Serving::start(&flags, &[]);
    serving.wait_until_ready(0);
    let mut client = serving.client().await;
    client.prefill(prefill(1, vec![request(1, "hello", 2)], None)).await.unwrap();
    serving.signal("-TERM");
    assert_eq!(serving.wait().code, Some(0));
}
