//! Set-up of logs, traces and metrics; called once, by the program itself.

mod lines;
mod progress;

use std::io;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{MetricExporter, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::Level;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::config::{LogLevel, LogStream, TelemetryConfig};
pub use progress::Progress;

/// Keeps exporters alive; what they hold is sent when it is dropped.
#[derive(Debug, Default)]
pub struct Telemetry {
    traces: Option<SdkTracerProvider>,
    metrics: Option<SdkMeterProvider>,
}

impl Telemetry {
    /// Starts logging, and exporting if a collector is named. Within a tokio runtime, which the exporters use.
    ///
    /// # Errors
    /// When the collector's address is malformed. Logging works then nevertheless.
    pub fn start(config: &TelemetryConfig) -> Result<Telemetry, String> {
        let (telemetry, failure) = match Telemetry::exporters(config) {
            Ok(telemetry) => (telemetry, None),
            Err(error) => (Telemetry::default(), Some(format!("--otlp-endpoint: {error}"))),
        };
        let writer = match config.stream {
            LogStream::Out => BoxMakeWriter::new(io::stdout),
            LogStream::Err => BoxMakeWriter::new(io::stderr),
        };
        let logs = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(false);
        let logs = if config.json {
            logs.event_format(lines::JsonLines).boxed()
        } else {
            logs.event_format(lines::PlainLines).boxed()
        };
        let traces = telemetry.traces.as_ref().map(|provider| {
            let tracer = provider.tracer("kvshard");
            // Calls are worth a span at every level of logging, dependencies' spans at none.
            let own = Targets::new().with_target("kvshard", Level::INFO);
            tracing_opentelemetry::layer().with_tracer(tracer).with_filter(own)
        });
        // A second call in one process (tests) keeps the first one's logs.
        let _ = tracing_subscriber::registry()
            .with(logs.with_filter(targets(config.level)))
            .with(traces)
            .try_init();
        match failure {
            None => Ok(telemetry),
            Some(message) => Err(message),
        }
    }

    fn exporters(config: &TelemetryConfig) -> Result<Telemetry, opentelemetry_otlp::ExporterBuildError> {
        let Some(endpoint) = &config.otlp_endpoint else { return Ok(Telemetry::default()) };
        let resource = Resource::builder_empty().with_service_name(config.service_name.clone()).build();
        let spans = SpanExporter::builder().with_tonic().with_endpoint(endpoint).build()?;
        let metrics = MetricExporter::builder().with_tonic().with_endpoint(endpoint).build()?;
        let traces =
            SdkTracerProvider::builder().with_resource(resource.clone()).with_batch_exporter(spans).build();
        let metrics =
            SdkMeterProvider::builder().with_resource(resource).with_periodic_exporter(metrics).build();
        opentelemetry::global::set_meter_provider(metrics.clone());
        Ok(Telemetry { traces: Some(traces), metrics: Some(metrics) })
    }

    /// Sends what is left and ends the exporters. Blocks for as long as the collector takes, a few seconds at most.
    pub fn stop(self) {
        // A collector that is gone is no reason to end otherwise than well.
        if let Some(traces) = &self.traces {
            let _ = traces.shutdown_with_timeout(std::time::Duration::from_secs(2));
        }
        if let Some(metrics) = &self.metrics {
            let _ = metrics.shutdown_with_timeout(std::time::Duration::from_secs(2));
        }
    }
}

/// Our own lines from `level` on, those of dependencies only where they warn or everything is wanted.
fn targets(level: LogLevel) -> Targets {
    let own = match level {
        LogLevel::Trace => Level::TRACE,
        LogLevel::Debug => Level::DEBUG,
        LogLevel::Info => Level::INFO,
        LogLevel::Warning => Level::WARN,
        LogLevel::Error => Level::ERROR,
    };
    let others = match level {
        LogLevel::Trace => Level::DEBUG,
        LogLevel::Error => Level::ERROR,
        _ => Level::WARN,
    };
    Targets::new().with_default(others).with_target("kvshard", own)
}
