//! The form of a log line.
//!
//! TGI's launcher reads a shard's standard output in blocks without joining what it cut, so a line is written
//! whole, in one call, and stays short.

use std::fmt;

use serde_json::json;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};
use tracing_subscriber::registry::LookupSpan;

/// Longest text of a line in bytes, counted as JSON writes it.
const MAX_TEXT_BYTES: usize = 7 << 10;

/// One JSON object a line: `text`, and under `record` level, time and origin, as `loguru` serialises them.
pub(super) struct JsonLines;

/// Time, level and text.
pub(super) struct PlainLines;

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let line = json_line(&Text::of(event), *metadata.level(), metadata.target(), &now()?);
        writeln!(writer, "{line}")
    }
}

impl<S, N> FormatEvent<S, N> for PlainLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let text = Text::of(event);
        writeln!(writer, "{} {:>7} {}", now()?, level_name(*event.metadata().level()), shorten(&text))
    }
}

fn now() -> Result<String, fmt::Error> {
    let mut text = String::new();
    SystemTime.format_time(&mut Writer::new(&mut text))?;
    Ok(text)
}

fn json_line(text: &str, level: Level, target: &str, time: &str) -> serde_json::Value {
    json!({
        "text": shorten(text),
        "record": {
            "level": { "name": level_name(level) },
            "name": target,
            "time": { "repr": time },
        },
    })
}

/// The names that TGI's launcher knows.
fn level_name(level: Level) -> &'static str {
    match level {
        Level::TRACE => "TRACE",
        Level::DEBUG => "DEBUG",
        Level::INFO => "INFO",
        Level::WARN => "WARNING",
        Level::ERROR => "ERROR",
    }
}

/// The beginning of `text` that a line has room for.
fn shorten(text: &str) -> String {
    let mut bytes = 0;
    for (index, char) in text.char_indices() {
        // A control character becomes `\u0000`.
        bytes += if char.is_control() || matches!(char, '"' | '\\') { 6 } else { char.len_utf8() };
        if bytes > MAX_TEXT_BYTES {
            return format!("{}…", &text[..index]);
        }
    }
    text.to_owned()
}

/// An event's message, then its fields as ` name=value`.
struct Text {
    message: String,
    fields: String,
}

impl Text {
    fn of(event: &Event<'_>) -> String {
        let mut text = Text { message: String::new(), fields: String::new() };
        event.record(&mut text);
        text.message + &text.fields
    }

    fn put(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        use fmt::Write as _;
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value}"),
            // Left by the bridge from the `log` crate, which repeats what the event says itself.
            name if name.starts_with("log.") => Ok(()),
            name => write!(self.fields, " {name}={value}"),
        };
    }
}

impl Visit for Text {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format_args!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use proptest::prelude::*;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    /// Remembers each call to `write`.
    #[derive(Clone, Default)]
    struct Writes(Arc<Mutex<Vec<Vec<u8>>>>);

    impl Write for Writes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("lock").push(bytes.to_vec());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn lines_of(log: impl FnOnce()) -> Vec<serde_json::Value> {
        let writes = Writes::default();
        let sink = writes.clone();
        let layer =
            tracing_subscriber::fmt::layer().with_writer(move || sink.clone()).event_format(JsonLines);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
        let writes = writes.0.lock().expect("lock");
        writes
            .iter()
            .map(|bytes| {
                assert_eq!(bytes.last(), Some(&b'\n'), "a line is written whole");
                assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), 1);
                serde_json::from_slice(bytes).expect("JSON")
            })
            .collect()
    }

    #[test]
    fn a_json_line_is_what_the_launcher_reads() {
        let lines = lines_of(|| {
            tracing::info!("Server started at unix:///tmp/x-0");
            tracing::warn!(slots = 7, name = "a \"b\"", "line one\nline two");
        });
        assert_eq!(lines[0]["text"], "Server started at unix:///tmp/x-0");
        assert_eq!(lines[0]["record"]["level"]["name"], "INFO");
        assert_eq!(lines[1]["text"], "line one\nline two slots=7 name=a \"b\"");
        assert_eq!(lines[1]["record"]["level"]["name"], "WARNING");
    }

    proptest! {
        #[test]
        fn a_line_stays_short(text in "\\PC{0,50}", n in 1usize..2000, control in any::<bool>()) {
            let text = if control { text + "\u{1}\n\"" } else { text }.repeat(n);
            let line = json_line(&text, Level::INFO, "kvshard::server", "2026-01-01T00:00:00Z").to_string();
            prop_assert!(line.len() < 8 << 10);
        }
    }
}
