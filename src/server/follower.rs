//! A rank above 0 under TGI's launcher, which starts a process a rank and waits for the socket of each.
//!
//! Rank 0 runs all ranks as threads, so this process holds nothing: it binds its socket when rank 0 is ready,
//! answers that it is well, and ends with rank 0.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use tokio::time::sleep;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::bind::{Probe, bind_unix, check_path, probe};
use super::run::Ending;
use super::status::status_of;
use crate::config::SocketConfig;
use crate::error::{Error, Result};
use crate::pb::v3 as wire;
use crate::pb::v3::text_generation_service_server::{TextGenerationService, TextGenerationServiceServer};

/// How often rank 0 is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Stands beside rank 0 until `end`, or until rank 0 ends.
///
/// # Errors
/// [`Error::Precondition`] when the socket cannot be bound.
pub(super) async fn run(rank: usize, socket: &SocketConfig, end: impl Future<Output = ()>) -> Result<Ending> {
    let (leader, own) = (socket.path_of(0), socket.path_of(rank));
    check_path(&own).await?;
    tracing::info!("rank {rank} holds nothing: rank 0 runs all ranks in its process");
    let stand = async {
        while !matches!(probe(&leader).await, Probe::Answers) {
            sleep(LOOK_EVERY).await;
        }
        let (listener, file) = bind_unix(&own).await?;
        tracing::info!("Server started at unix://{}", own.display());
        let service =
            TextGenerationServiceServer::new(Idle { rank, leader: format!("unix://{}", leader.display()) });
        let serve =
            Server::builder().add_service(service).serve_with_incoming(UnixListenerStream::new(listener));
        let ending = tokio::select! {
            ending = leaders_end(&leader) => Ok(ending),
            served = serve => Err(Error::Bug(format!("the server ended: {served:?}"))),
        };
        drop(file);
        ending
    };
    tokio::select! {
        () = end => Ok(Ending::Drained),
        ending = stand => ending,
    }
}

/// Rank 0 takes its socket's file along when it ends in order; a file that nobody listens on is left by a death.
async fn leaders_end(leader: &Path) -> Ending {
    loop {
        sleep(LOOK_EVERY).await;
        match probe(leader).await {
            Probe::Answers | Probe::Unknown(_) => {}
            Probe::Missing => {
                tracing::info!("rank 0 has ended");
                return Ending::Drained;
            }
            Probe::Stale => return Ending::LeaderDied,
        }
    }
}

/// The service of a rank that holds nothing.
struct Idle {
    rank: usize,
    leader: String,
}

impl Idle {
    fn refuse<T>(&self) -> Result<Response<T>, Status> {
        let text = format!("rank {} holds nothing: ask rank 0", self.rank);
        Err(status_of(&Error::Precondition(text)))
    }
}

#[tonic::async_trait]
impl TextGenerationService for Idle {
    async fn health(
        &self,
        _: Request<wire::HealthRequest>,
    ) -> Result<Response<wire::HealthResponse>, Status> {
        Ok(Response::new(wire::HealthResponse {}))
    }

    async fn service_discovery(
        &self,
        _: Request<wire::ServiceDiscoveryRequest>,
    ) -> Result<Response<wire::ServiceDiscoveryResponse>, Status> {
        Ok(Response::new(wire::ServiceDiscoveryResponse { urls: vec![self.leader.clone()] }))
    }

    async fn info(&self, _: Request<wire::InfoRequest>) -> Result<Response<wire::InfoResponse>, Status> {
        self.refuse()
    }

    async fn clear_cache(
        &self,
        _: Request<wire::ClearCacheRequest>,
    ) -> Result<Response<wire::ClearCacheResponse>, Status> {
        Ok(Response::new(wire::ClearCacheResponse {}))
    }

    async fn filter_batch(
        &self,
        _: Request<wire::FilterBatchRequest>,
    ) -> Result<Response<wire::FilterBatchResponse>, Status> {
        self.refuse()
    }

    async fn warmup(
        &self,
        _: Request<wire::WarmupRequest>,
    ) -> Result<Response<wire::WarmupResponse>, Status> {
        self.refuse()
    }

    async fn prefill(
        &self,
        _: Request<wire::PrefillRequest>,
    ) -> Result<Response<wire::PrefillResponse>, Status> {
        self.refuse()
    }

    async fn decode(
        &self,
        _: Request<wire::DecodeRequest>,
    ) -> Result<Response<wire::DecodeResponse>, Status> {
        self.refuse()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use tokio::net::UnixListener;
    use tonic::Code;

    use super::*;
    use crate::pb::v3::text_generation_service_client::TextGenerationServiceClient;

    #[tokio::test]
    async fn a_follower_stands_while_rank_0_does() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = SocketConfig::private(folder.path());
        let (leader, own) = (socket.path_of(0), socket.path_of(1));
        let standing = tokio::spawn(async move { run(1, &socket, std::future::pending()).await });
        let listener = UnixListener::bind(&leader).expect("binds");
        while !own.exists() {
            sleep(Duration::from_millis(5)).await;
        }
        let url = format!("unix://{}", own.display());
        let mut client = TextGenerationServiceClient::connect(url).await.expect("connects");
        client.health(wire::HealthRequest {}).await.expect("well");
        let urls = client.service_discovery(wire::ServiceDiscoveryRequest {}).await.expect("answers");
        assert_eq!(urls.into_inner().urls, [format!("unix://{}", leader.display())]);
        let refused = client.decode(wire::DecodeRequest::default()).await.expect_err("refused");
        assert_eq!(refused.code(), Code::FailedPrecondition);

        fs::remove_file(&leader).expect("removed");
        drop(listener);
        assert_eq!(standing.await.expect("no panic"), Ok(Ending::Drained));
        assert!(!own.exists());
    }
}
