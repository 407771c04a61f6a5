//! A connection to a shard.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

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
    pub async fn info(&mut self) -> Result<v3::InfoResponse> {
        let answer = self.client.info(v3::InfoRequest {}).await;
        answer.map(tonic::Response::into_inner).map_err(|status| refusal("Info", &status))
    }

    /// Where every shard of the server listens.
    ///
    /// # Errors
    /// The shard's.
    pub async fn urls(&mut self) -> Result<Vec<String>> {
        let answer = self.client.service_discovery(v3::ServiceDiscoveryRequest {}).await;
        answer.map(|answer| answer.into_inner().urls).map_err(|status| refusal("ServiceDiscovery", &status))
    }

    /// Starts a batch.
    ///
    /// # Errors
    /// The shard's.
    pub async fn prefill(&mut self, batch: v3::Batch) -> Result<Step> {
        let request = v3::PrefillRequest { batch: Some(batch), cached_batch: None };
        let answer = self.client.prefill(request).await.map_err(|status| refusal("Prefill", &status))?;
        let v3::PrefillResponse { generations, batch, .. } = answer.into_inner();
        Ok(Step { generations, batch })
    }

    /// Runs the next step of batches.
    ///
    /// # Errors
    /// The shard's.
    pub async fn decode(&mut self, batches: Vec<v3::CachedBatch>) -> Result<Step> {
        let answer = self.client.decode(v3::DecodeRequest { batches }).await;
        let answer = answer.map_err(|status| refusal("Decode", &status))?;
        let v3::DecodeResponse { generations, batch, .. } = answer.into_inner();
        Ok(Step { generations, batch })
    }

    /// Drops one batch. Without an id the call would drop a live router's batches too, so there is no such method.
    ///
    /// # Errors
    /// The shard's.
    pub async fn clear(&mut self, batch: u64) -> Result<()> {
        let answer = self.client.clear_cache(v3::ClearCacheRequest { id: Some(batch) }).await;
        answer.map(drop).map_err(|status| refusal("ClearCache", &status))
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

/// The shard's own words are for people; the code says what kind of trouble it is.
fn refusal(call: &str, status: &Status) -> anyhow::Error {
    anyhow!("the shard answered {call} with {:?}: {}", status.code(), status.message())
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
