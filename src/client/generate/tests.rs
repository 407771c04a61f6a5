//! Against a shard that answers from a script: what is asked, in which order, and what is cleaned up.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::*;
use crate::pb::v3::text_generation_service_server::{TextGenerationService, TextGenerationServiceServer};

const GREEDY: Parameters = Parameters {
    max_new_tokens: 10,
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    typical_p: 1.0,
    do_sample: false,
    seed: 0,
    repetition_penalty: 1.0,
    frequency_penalty: 0.0,
    watermark: false,
    top_n: 0,
    stop: Vec::new(),
};

/// One answer of Prefill or Decode: the token's text, whether it is special, and the end.
type Line = Result<(&'static str, bool, Option<v3::GeneratedText>), &'static str>;

/// Answers a script, a line a step; keeps what it was asked.
struct Script {
    lines: Mutex<VecDeque<Line>>,
    calls: Arc<Mutex<Vec<String>>>,
    batch: Mutex<Option<v3::Batch>>,
    urls: Vec<String>,
}

impl Script {
    fn note(&self, call: impl Into<String>) {
        self.calls.lock().unwrap().push(call.into());
    }

    fn step(&self) -> Result<(Vec<v3::Generation>, Option<v3::CachedBatch>), Status> {
        let batch = self.batch.lock().unwrap().clone().unwrap();
        let line = self.lines.lock().unwrap().pop_front().expect("a line of the script");
        let (text, special, end) = line.map_err(Status::resource_exhausted)?;
        let request_id = batch.requests[0].id;
        let is_last = end.is_some();
        let tokens = v3::Tokens {
            ids: vec![5],
            logprobs: vec![-0.5],
            texts: vec![text.into()],
            is_special: vec![special],
        };
        let generation =
            v3::Generation { request_id, tokens: Some(tokens), generated_text: end, ..Default::default() };
        let cached =
            v3::CachedBatch { id: batch.id, request_ids: vec![request_id], size: 1, ..Default::default() };
        Ok((vec![generation], (!is_last).then_some(cached)))
    }
}

#[tonic::async_trait]
impl TextGenerationService for Script {
    async fn info(&self, _: Request<v3::InfoRequest>) -> Result<Response<v3::InfoResponse>, Status> {
        Ok(Response::new(v3::InfoResponse::default()))
    }

    async fn service_discovery(
        &self,
        _: Request<v3::ServiceDiscoveryRequest>,
    ) -> Result<Response<v3::ServiceDiscoveryResponse>, Status> {
        Ok(Response::new(v3::ServiceDiscoveryResponse { urls: self.urls.clone() }))
    }

    async fn clear_cache(
        &self,
        request: Request<v3::ClearCacheRequest>,
    ) -> Result<Response<v3::ClearCacheResponse>, Status> {
        let own = self.batch.lock().unwrap().as_ref().map(|batch| batch.id);
        assert!(own.is_some(), "nothing was prefilled");
        self.note(if request.into_inner().id == own { "clear own" } else { "clear others" });
        Ok(Response::new(v3::ClearCacheResponse {}))
    }

    async fn filter_batch(
        &self,
        _: Request<v3::FilterBatchRequest>,
    ) -> Result<Response<v3::FilterBatchResponse>, Status> {
        self.note("filter");
        Err(Status::unimplemented("nobody filters one request"))
    }

    async fn warmup(&self, _: Request<v3::WarmupRequest>) -> Result<Response<v3::WarmupResponse>, Status> {
        self.note("warmup");
        Err(Status::unimplemented("a warm-up would disturb a router"))
    }

    async fn prefill(
        &self,
        request: Request<v3::PrefillRequest>,
    ) -> Result<Response<v3::PrefillResponse>, Status> {
        self.note("prefill");
        *self.batch.lock().unwrap() = request.into_inner().batch;
        let (generations, batch) = self.step()?;
        Ok(Response::new(v3::PrefillResponse { generations, batch, ..Default::default() }))
    }

    async fn decode(
        &self,
        request: Request<v3::DecodeRequest>,
    ) -> Result<Response<v3::DecodeResponse>, Status> {
        self.note(format!("decode {}", request.into_inner().batches.len()));
        let (generations, batch) = self.step()?;
        Ok(Response::new(v3::DecodeResponse { generations, batch, ..Default::default() }))
    }

    async fn health(&self, _: Request<v3::HealthRequest>) -> Result<Response<v3::HealthResponse>, Status> {
        Ok(Response::new(v3::HealthResponse {}))
    }
}

fn end(text: &str, reason: i32) -> Option<v3::GeneratedText> {
    Some(v3::GeneratedText { text: text.into(), generated_tokens: 3, finish_reason: reason, seed: Some(7) })
}

/// The summary, what was written, and what the shard was asked.
struct Outcome {
    summary: Result<Summary>,
    written: String,
    calls: Vec<String>,
}

async fn ask(lines: Vec<Line>, urls: &[&str], out: &mut impl Write) -> (Result<Summary>, Vec<String>) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("s");
    let calls = Arc::new(Mutex::new(Vec::new()));
    let script = Script {
        lines: Mutex::new(lines.into()),
        calls: calls.clone(),
        batch: Mutex::new(None),
        urls: urls.iter().map(|url| url.to_string()).collect(),
    };
    let listener = UnixListenerStream::new(UnixListener::bind(&path).unwrap());
    let server = Server::builder().add_service(TextGenerationServiceServer::new(script));
    let serving = tokio::spawn(server.serve_with_incoming(listener));
    let summary = generate(&path.to_string_lossy(), "Say hello", &GREEDY, out).await;
    serving.abort();
    let calls = calls.lock().unwrap().clone();
    (summary, calls)
}

async fn ask_one(lines: Vec<Line>) -> Outcome {
    let mut out = Vec::new();
    let (summary, calls) = ask(lines, &["unix:///s"], &mut out).await;
    Outcome { summary, written: String::from_utf8(out).unwrap(), calls }
}

#[tokio::test]
async fn the_text_is_streamed_without_special_tokens_and_completed_at_the_end() {
    let lines = vec![
        Ok(("Hel", false, None)),
        Ok(("lo", false, None)),
        Ok(("", false, None)),
        Ok(("</s>", true, end("Hello\u{FFFD}", 1))),
    ];
    let Outcome { summary, written, calls } = ask_one(lines).await;
    let summary = summary.unwrap();
    assert_eq!(written, "Hello\u{FFFD}");
    assert_eq!(calls, ["prefill", "decode 1", "decode 1", "decode 1"]);
    assert_eq!((summary.text.as_str(), summary.n_tokens), ("Hello\u{FFFD}", 4));
    assert_eq!((summary.ending, summary.seed), (Ending::EndOfText, Some(7)));
    assert!(summary.time_to_first_token.unwrap() <= summary.elapsed);
}

#[tokio::test]
async fn a_refused_step_is_told_and_cleaned_up() {
    let Outcome { summary, written, calls } =
        ask_one(vec![Ok(("Hel", false, None)), Err("no slots are left")]).await;
    let message = summary.unwrap_err().to_string();
    assert!(message.contains("Decode") && message.contains("no slots are left"), "{message}");
    assert_eq!(written, "Hel");
    assert_eq!(calls, ["prefill", "decode 1", "clear own"]);
}

#[tokio::test]
async fn an_end_for_no_known_reason_is_refused() {
    let Outcome { summary, .. } = ask_one(vec![Ok(("x", false, end("x", 9)))]).await;
    assert!(summary.unwrap_err().to_string().contains('9'));
}

/// A pipe whose reader takes one write.
struct Gone(usize);

impl Write for Gone {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += 1;
        if self.0 > 1 { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(bytes.len()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_reader_that_has_gone_ends_the_request_quietly() {
    let lines = vec![Ok(("Hel", false, None)), Ok(("lo", false, None)), Ok(("!", false, None))];
    let (summary, calls) = ask(lines, &["unix:///s"], &mut Gone(0)).await;
    let summary = summary.unwrap();
    assert_eq!((summary.ending, summary.text.as_str()), (Ending::ReaderGone, "Hel"));
    assert_eq!(calls, ["prefill", "decode 1", "clear own"]);
}

#[tokio::test]
async fn a_server_of_several_shards_is_left_alone() {
    let mut out = Vec::new();
    let (summary, calls) = ask(Vec::new(), &["unix:///s-0", "unix:///s-1"], &mut out).await;
    assert!(summary.unwrap_err().to_string().contains("2 shards"));
    assert!(calls.is_empty());
}

#[test]
fn a_summary_is_one_line() {
    let summary = Summary {
        text: "Hello".into(),
        n_tokens: 21,
        ending: Ending::Length,
        seed: None,
        alternatives: Vec::new(),
        time_to_first_token: Some(Duration::from_millis(250)),
        elapsed: Duration::from_millis(750),
    };
    assert_eq!(summary.to_string(), "21 tokens, 40.0 tokens/s, the first after 250 ms; ended by length");
    let none = Summary { n_tokens: 0, time_to_first_token: None, ..summary };
    assert_eq!(none.to_string(), "0 tokens; ended by length");
}

#[test]
fn random_ids_collide_neither_with_each_other_nor_with_a_router() {
    let ids: std::collections::BTreeSet<u64> = (0..1000).map(|_| random_id()).collect();
    assert_eq!(ids.len(), 1000);
    assert!(ids.iter().all(|id| (1 << 32..u64::MAX).contains(id)));
}
