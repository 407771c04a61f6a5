//! The way to a shard.

use anyhow::{Context as _, Result};
use tonic::transport::{Channel, Endpoint};

use crate::pb::v3::text_generation_service_client::TextGenerationServiceClient;

/// A connection.
pub type Shard = TextGenerationServiceClient<Channel>;

/// Connects to `unix:///path/to/socket`, a path, `http://host:port`, or `host:port`.
///
/// # Errors
/// What is wrong with the address, or with whoever is there.
pub async fn connect(url: &str) -> Result<Shard> {
    let is_path = url.starts_with('/') || url.starts_with("./");
    let uri = match url.strip_prefix("unix://") {
        Some(path) => format!("unix:{path}"),
        None if is_path => format!("unix:{url}"),
        None if url.contains("://") => url.to_owned(),
        None => format!("http://{url}"),
    };
    let endpoint = Endpoint::try_from(uri).with_context(|| format!("{url} is no address of a shard"))?;
    let channel = endpoint.connect().await.with_context(|| format!("no shard answers at {url}"))?;
    Ok(TextGenerationServiceClient::new(channel))
}
