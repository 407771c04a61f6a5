//! A connection to a shard.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::pb::v3;
use crate::pb::v3::text_generation_service_client::TextGenerationServiceClient;

/// A shard that listens takes a connection at once, also during a long step.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest answer: with log-probabilities of a long prompt, far more than tonic's 4 MiB.
const MAX_ANSWER_BYTES: usize = 256 << 20;

/// A shard, by `generate.v3`.
#[derive(Debug, Clone)]
pub struct Shard {
    client: TextGenerationServiceClient<Channel>,
}

/// What Prefill and Decode answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// News of requests.
    pub generations: Vec<v3::Generation>,
    /// The batch to ask for next; `None` when every request has ended.
    pub batch: Option<v3::CachedBatch>,
    /// Start of the step until its tokens were on the host.
    pub forward_ns: u64,
    /// Building the answer.
    pub decode_ns: u64,
    /// The whole call, as the shard saw it.
    pub total_ns: u64,
}

/// A call that failed. The shard's own words are for people; the code says what kind of trouble it is.
#[derive(Debug, Clone)]
pub struct CallError {
    call: &'static str,
    status: Status,
}

impl CallError {
    /// Whether the shard is gone, or about to go: no other call will fare better.
    pub fn is_lost(&self) -> bool {
        // What a shard answers comes from nowhere else.
        self.status.code() == Code::Unavailable || self.status.source().is_some()
    }
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CallError { call, status } = self;
        match status.source() {
            None => write!(f, "the shard answered {call} with {:?}: {}", status.code(), status.message()),
            Some(mut cause) => {
                // The errors between say the same, or nothing.
                while let Some(below) = cause.source() {
                    cause = below;
                }
                write!(f, "the connection was lost during {call}: {cause}")
            }
        }
    }
}

impl Error for CallError {}

fn failed(call: &'static str) -> impl Fn(Status) -> CallError {
    move |status| CallError { call, status }
}

impl Shard {
    /// Connects to `unix:///path`, a bare path, `http://host:port` or `host:port`.
    ///
    /// # Errors
    /// A sentence, where the address is none or nobody listens there.
    pub async fn connect(url: &str) -> Result<Shard> {
        let endpoint =
            Endpoint::from_shared(endpoint_of(url)?).with_context(|| format!("{url} is no address"))?;
        let channel = endpoint.connect_timeout(CONNECT_TIMEOUT).connect().await;
        // The errors between say the same, or nothing.
        let why = |error| anyhow!("no shard listens at {url}: {}", anyhow::Error::from(error).root_cause());
        let channel = channel.map_err(why)?;
        let client = TextGenerationServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
        Ok(Shard { client })
    }

    /// What the shard says of its model.
    ///
    /// # Errors
    /// The shard's.
    pub async fn info(&mut self) -> Result<v3::InfoResponse, CallError> {
        let answer = self.client.info(v3::InfoRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(failed("Info"))
    }

    /// Where every shard of the server listens.
    ///
    /// # Errors
    /// The shard's.
    pub async fn urls(&mut self) -> Result<Vec<String>, CallError> {
        let answer = self.client.service_discovery(v3::ServiceDiscoveryRequest {}).await;
        answer.map(|answer| answer.into_inner().urls).map_err(failed("ServiceDiscovery"))
    }

    /// Whether this is its server's only shard, so that one client can call it.
    ///
    /// # Errors
    /// A sentence where it is not; the shard's.
    pub async fn check_alone(&mut self) -> Result<()> {
        let n_shards = self.urls().await?.len();
        if n_shards > 1 {
            // Every shard of such a server waits for the others in each step.
            bail!("the server has {n_shards} shards that must be called together; this client calls one");
        }
        Ok(())
    }

    /// Drops whatever the shard holds, runs its largest step, and learns its limits.
    ///
    /// # Errors
    /// The shard's.
    pub async fn warmup(&mut self, request: v3::WarmupRequest) -> Result<v3::WarmupResponse, CallError> {
        let answer = self.client.warmup(request).await;
        answer.map(tonic::Response::into_inner).map_err(failed("Warmup"))
    }

    /// Starts a batch, and merges it with a running one if that is named: both step.
    ///
    /// # Errors
    /// The shard's.
    pub async fn prefill(
        &mut self,
        batch: v3::Batch,
        running: Option<v3::CachedBatch>,
    ) -> Result<Step, CallError> {
        let request = v3::PrefillRequest { batch: Some(batch), cached_batch: running };
        let answer = self.client.prefill(request).await.map_err(failed("Prefill"))?;
        let v3::PrefillResponse { generations, batch, forward_ns, decode_ns, total_ns, .. } =
            answer.into_inner();
        Ok(Step { generations, batch, forward_ns, decode_ns, total_ns })
    }

    /// Runs the next step of batches.
    ///
    /// # Errors
    /// The shard's.
    pub async fn decode(&mut self, batches: Vec<v3::CachedBatch>) -> Result<Step, CallError> {
        let answer = self.client.decode(v3::DecodeRequest { batches }).await.map_err(failed("Decode"))?;
        let v3::DecodeResponse { generations, batch, forward_ns, decode_ns, total_ns, .. } =
            answer.into_inner();
        Ok(Step { generations, batch, forward_ns, decode_ns, total_ns })
    }

    /// Keeps only these requests of a batch.
    ///
    /// # Errors
    /// The shard's.
    pub async fn filter(
        &mut self,
        batch_id: u64,
        request_ids: Vec<u64>,
    ) -> Result<Option<v3::CachedBatch>, CallError> {
        let answer = self.client.filter_batch(v3::FilterBatchRequest { batch_id, request_ids }).await;
        answer.map(|answer| answer.into_inner().batch).map_err(failed("FilterBatch"))
    }

    /// Drops one batch. Without an id the call would drop a live router's batches too, so there is no such method.
    ///
    /// # Errors
    /// The shard's.
    pub async fn clear(&mut self, batch: u64) -> Result<(), CallError> {
        let answer = self.client.clear_cache(v3::ClearCacheRequest { id: Some(batch) }).await;
        answer.map(drop).map_err(failed("ClearCache"))
    }
}

/// An address as tonic takes it.
fn endpoint_of(url: &str) -> Result<String> {
    if let Some(path) = url.strip_prefix("unix:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        if path.is_empty() {
            bail!("{url} names no socket");
        }
        return Ok(format!("unix:{path}"));
    }
    if url.starts_with("http://") {
        return Ok(url.to_owned());
    }
    if let Some((scheme, _)) = url.split_once("://") {
        bail!("{url} begins with {scheme}://; shards listen at unix:///path or http://host:port");
    }
    let is_host = |host: &str, port: &str| {
        !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|port| port != 0)
    };
    match url.rsplit_once(':') {
        Some((host, port)) if is_host(host, port) => Ok(format!("http://{url}")),
        _ if url.is_empty() => {
            bail!("the address is empty; shards listen at unix:///path or http://host:port")
        }
        _ => Ok(format!("unix:{url}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_paths_or_hosts_with_ports() {
        for (url, endpoint) in [
            ("unix:///tmp/s-0", "unix:/tmp/s-0"),
            ("unix:/tmp/s-0", "unix:/tmp/s-0"),
            ("/tmp/s-0", "unix:/tmp/s-0"),
            ("./s-0", "unix:./s-0"),
            ("s-0", "unix:s-0"),
            ("/tmp/with:80", "unix:/tmp/with:80"),
            ("s:port", "unix:s:port"),
            ("localhost:3000", "http://localhost:3000"),
            ("[::1]:3000", "http://[::1]:3000"),
            ("http://10.0.0.1:80", "http://10.0.0.1:80"),
        ] {
            assert_eq!(endpoint_of(url).unwrap(), endpoint, "{url}");
        }
        for url in ["", "unix:", "unix://", "https://host:443", "tcp://host:1"] {
            assert!(endpoint_of(url).is_err(), "{url}");
        }
    }
}
