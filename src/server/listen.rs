//! A shard behind its sockets: bound, watched, drained.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::server::HealthReporter;

use super::bind::{SocketFile, bind_tcp, bind_unix};
use super::calls::Calls;
use super::health::{self, Fault};
use super::load::Loaded;
use super::shard::Shard;
use super::telemetry::Metrics;
use super::{v2, v3};
use crate::config::{ShardConfig, SocketConfig};
use crate::engine::EngineHandle;
use crate::error::{Error, Result};
use crate::pb;

/// A shard that answers. Ends with [`RunningShard::stop`]; when dropped, its socket's file goes.
pub struct RunningShard {
    url: String,
    tcp: Option<SocketAddr>,
    shard: Arc<Shard>,
    /// Becomes true when no new connections are wanted.
    closing: watch::Sender<bool>,
    servers: JoinSet<()>,
    watchdog: JoinHandle<Fault>,
    drain_timeout: Duration,
    file: SocketFile,
}

/// For answers to leave, when nothing but streams of watchers keeps the servers.
const FLUSH: Duration = Duration::from_millis(500);
/// For the answer of a call that came while the engine ended.
const LAST_ANSWERS: Duration = Duration::from_millis(20);

impl RunningShard {
    /// Binds the sockets of a loaded model, the unix one last: its file says that the shard is ready.
    ///
    /// # Errors
    /// [`Error::Precondition`] when a socket cannot be bound.
    pub async fn start(shard: &ShardConfig, socket: &SocketConfig, loaded: Loaded) -> Result<RunningShard> {
        let tcp = match socket.listen {
            Some(address) => Some(bind_tcp(address).await?),
            None => None,
        };
        let path = socket.path_of(0);
        let url = format!("unix://{}", path.display());
        let Loaded { engine, intake } = loaded;
        let reporter = HealthReporter::new();
        health::report(&reporter, true).await;
        let progress = engine.model().progress.clone();
        let watchdog = health::watch(engine.pulse().clone(), progress, shard.step_timeout, reporter.clone());
        let handlers = Arc::new(Shard {
            metrics: Metrics::new(&engine),
            engine,
            intake: Arc::new(intake),
            calls: Calls::new(),
            url: url.clone(),
            chunking: shard.chunking,
            prefix_caching: shard.prefix_caching,
            step_timeout: shard.step_timeout,
        });
        let routes = routes(handlers.clone(), reporter, socket.max_message_bytes)?;
        let (unix, file) = bind_unix(&path).await?;
        let (closing, closed) = watch::channel(false);
        let mut servers = JoinSet::new();
        servers.spawn(serve_unix(routes.clone(), unix, closed.clone()));
        let tcp = tcp.map(|(listener, address)| {
            servers.spawn(serve_tcp(routes, listener, closed));
            address
        });
        Ok(RunningShard {
            url,
            tcp,
            shard: handlers,
            closing,
            servers,
            watchdog: tokio::spawn(watchdog),
            drain_timeout: socket.drain_timeout,
            file,
        })
    }

    /// Where routers connect: `unix://` and an absolute path.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Where it listens on TCP, if it does.
    pub fn tcp(&self) -> Option<SocketAddr> {
        self.tcp
    }

    /// The engine behind it.
    pub fn engine(&self) -> &EngineHandle {
        &self.shard.engine
    }

    /// Waits until the shard must be given up.
    pub async fn fault(&mut self) -> Fault {
        match (&mut self.watchdog).await {
            Ok(fault) => fault,
            Err(error) => Fault::EngineDied(format!("the watchdog failed: {error}")),
        }
    }

    /// Accepts nothing new, lets running calls finish, ends the engine. Tells whether all of it went within the
    /// drain timeout; what still runs then is abandoned.
    pub async fn stop(mut self) -> bool {
        // Receivers are gone where the servers have ended already.
        let _ = self.closing.send(true);
        // Gone before the listener: whoever watches the file sees an end in order, not a death.
        drop(self.file);
        let drain = async {
            let servers = async { while self.servers.join_next().await.is_some() {} };
            let answered = async {
                self.shard.calls.none().await;
                tokio::time::sleep(FLUSH).await;
            };
            tokio::select! {
                () = servers => {}
                () = answered => {}
            }
            self.shard.engine.stop().await;
            // A call may have come in on an open connection since; its answer must leave too.
            self.shard.calls.none().await;
            tokio::time::sleep(LAST_ANSWERS).await;
        };
        let drained = tokio::time::timeout(self.drain_timeout, drain).await.is_ok();
        self.watchdog.abort();
        drained
    }
}

/// Both versions of the protocol, health and reflection, side by side.
fn routes(shard: Arc<Shard>, reporter: HealthReporter, max_message_bytes: usize) -> Result<Routes> {
    let v3 =
        pb::v3::text_generation_service_server::TextGenerationServiceServer::new(v3::Service(shard.clone()))
            .max_decoding_message_size(max_message_bytes);
    let v2 = pb::v2::text_generation_service_server::TextGenerationServiceServer::new(v2::Service(shard))
        .max_decoding_message_size(max_message_bytes);
    let health = tonic_health::pb::health_server::HealthServer::new(
        tonic_health::server::HealthService::from_health_reporter(reporter),
    );
    // Either version of reflection tells of both.
    let described = || {
        tonic_reflection::server::Builder::configure()
            .include_reflection_service(false)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(pb::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let broken = |error| Error::Bug(format!("the descriptor set cannot be served: {error}"));
    Ok(Routes::new(v3)
        .add_service(v2)
        .add_service(health)
        .add_service(described().build_v1().map_err(broken)?)
        .add_service(described().build_v1alpha().map_err(broken)?)
        .prepare())
}

/// Windows that let a large request pass in few round trips.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;

fn server() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(STREAM_WINDOW_BYTES)
}

async fn serve_unix(routes: Routes, listener: UnixListener, mut closed: watch::Receiver<bool>) {
    // The sender's end closes too.
    let closing = async move { drop(closed.wait_for(|closed| *closed).await) };
    let incoming = UnixListenerStream::new(listener);
    let served = server().add_routes(routes).serve_with_incoming_shutdown(incoming, closing).await;
    if let Err(error) = served {
        tracing::error!("the unix socket's server failed: {error}");
    }
}

async fn serve_tcp(routes: Routes, listener: TcpListener, mut closed: watch::Receiver<bool>) {
    let closing = async move { drop(closed.wait_for(|closed| *closed).await) };
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let served = server().add_routes(routes).serve_with_incoming_shutdown(incoming, closing).await;
    if let Err(error) = served {
        tracing::error!("the TCP server failed: {error}");
    }
}
