//! Binding: a unix socket that replaces a dead one and refuses a living one, and TCP beside it.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use tokio::net::{TcpListener, UnixListener, UnixSocket};

use crate::error::{Error, Result};

/// Longest path of a unix socket: `sun_path` has 108 bytes, the last of them 0.
const MAX_PATH_BYTES: usize = 107;
/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// A socket's file, removed when dropped, unless somebody else's stands in its place by then.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.identity) {
            // At the end there is nobody left to tell.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether a socket could be bound here: checked before a model is loaded, so that a mistake shows at once.
///
/// # Errors
/// [`Error::Precondition`] with what is wrong with the path, or that somebody answers there.
pub(super) async fn check_path(path: &Path) -> Result<()> {
    let n_bytes = path.as_os_str().len();
    if n_bytes > MAX_PATH_BYTES {
        return Err(refused(
            path,
            &format!("its {n_bytes} bytes are more than the {MAX_PATH_BYTES} of a socket's path"),
        ));
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    if !folder.is_dir() {
        return Err(refused(path, "its folder does not exist"));
    }
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(refused(path, &error.to_string())),
    };
    if !found.file_type().is_socket() {
        return Err(refused(path, "a file that is no socket is in the way"));
    }
    match probe(path).await {
        Probe::Answers => {
            Err(refused(path, "another process answers there: stop it, or choose another --uds-path"))
        }
        Probe::Stale | Probe::Missing => Ok(()),
        Probe::Unknown(error) => Err(refused(path, &error.to_string())),
    }
}

/// Binds a unix socket that only this user may connect to. A dead socket's file is replaced.
///
/// # Errors
/// As [`check_path`], and what the system says.
pub(super) async fn bind_unix(path: &Path) -> Result<(UnixListener, SocketFile)> {
    check_path(path).await?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(refused(path, &error.to_string())),
        _ => {}
    }
    listen(path).map_err(|error| refused(path, &error.to_string()))
}

/// Between binding and listening nobody can connect, so nobody connects before the mode is set.
fn listen(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let socket = UnixSocket::new_stream()?;
    socket.bind(path)?;
    let bound = fs::symlink_metadata(path)?;
    let file = SocketFile { path: path.to_owned(), identity: (bound.dev(), bound.ino()) };
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok((socket.listen(BACKLOG)?, file))
}

/// Binds TCP.
///
/// # Errors
/// [`Error::Precondition`] with the address and what the system says.
pub(super) async fn bind_tcp(address: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    let refused = |error: io::Error| Error::Precondition(format!("cannot listen on {address}: {error}"));
    let listener = TcpListener::bind(address).await.map_err(refused)?;
    let bound = listener.local_addr().map_err(refused)?;
    if !bound.ip().is_loopback() {
        tracing::warn!(
            "listening on {bound}: whoever reaches it can use the shard, nothing is authenticated"
        );
    }
    Ok((listener, bound))
}

/// What is behind a socket's path.
#[derive(Debug)]
pub(super) enum Probe {
    /// A process accepts connections.
    Answers,
    /// A file that nobody listens on.
    Stale,
    /// No file.
    Missing,
    /// It cannot be told.
    Unknown(io::Error),
}

/// Tries to connect.
pub(super) async fn probe(path: &Path) -> Probe {
    match tokio::net::UnixStream::connect(path).await {
        Ok(_) => Probe::Answers,
        Err(error) => match error.kind() {
            ErrorKind::ConnectionRefused => Probe::Stale,
            ErrorKind::NotFound => Probe::Missing,
            // Its queue of connections is full: it lives.
            ErrorKind::WouldBlock => Probe::Answers,
            _ => Probe::Unknown(error),
        },
    }
}

fn refused(path: &Path, why: &str) -> Error {
    Error::Precondition(format!("cannot bind {}: {why}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("a folder")
    }

    fn message<T>(result: Result<T>) -> String {
        result.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[tokio::test]
    async fn a_socket_is_private_and_goes_with_its_owner() {
        let folder = folder();
        let path = folder.path().join("shard-0");
        let (listener, file) = bind_unix(&path).await.expect("binds");
        assert_eq!(fs::metadata(&path).expect("exists").permissions().mode() & 0o777, 0o600);
        assert!(matches!(probe(&path).await, Probe::Answers));
        drop((listener, file));
        assert!(matches!(probe(&path).await, Probe::Missing));
    }

    #[tokio::test]
    async fn a_living_socket_is_refused_and_a_dead_one_replaced() {
        let folder = folder();
        let path = folder.path().join("shard-0");
        let living = std::os::unix::net::UnixListener::bind(&path).expect("binds");
        assert!(message(bind_unix(&path).await).contains("another process answers"));
        drop(living);
        assert!(matches!(probe(&path).await, Probe::Stale));
        let _bound = bind_unix(&path).await.expect("replaces");
        assert!(matches!(probe(&path).await, Probe::Answers));
    }

    #[tokio::test]
    async fn a_successors_socket_is_left_alone() {
        let folder = folder();
        let path = folder.path().join("shard-0");
        let (listener, file) = bind_unix(&path).await.expect("binds");
        fs::remove_file(&path).expect("removed by the launcher");
        let _successor = std::os::unix::net::UnixListener::bind(&path).expect("binds");
        drop((listener, file));
        assert!(path.exists());
    }

    #[tokio::test]
    async fn paths_that_cannot_be_say_why() {
        let folder = folder();
        let file = folder.path().join("file");
        fs::write(&file, "text").expect("written");
        assert!(message(bind_unix(&file).await).contains("no socket"));
        assert!(file.exists());
        assert!(
            message(bind_unix(&folder.path().join("none/shard-0")).await).contains("folder does not exist")
        );
        let long = folder.path().join("x".repeat(120));
        assert!(message(bind_unix(&long).await).contains("107"));
        let longest = folder.path().join("x".repeat(MAX_PATH_BYTES - folder.path().as_os_str().len() - 1));
        assert!(bind_unix(&longest).await.is_ok());
    }

    #[tokio::test]
    async fn tcp_tells_its_port() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (_listener, bound) = bind_tcp(any).await.expect("binds");
        assert_ne!(bound.port(), 0);
        assert!(message(bind_tcp(bound).await).contains(&bound.to_string()));
    }
}
