//! HTTP/2 by hand (RFC 9113, RFC 7541), for what no well-behaved client sends.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// What a connection begins with: the preface and empty settings.
pub fn opening() -> Vec<u8> {
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frame(SETTINGS, 0, 0, &[])].concat()
}

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;

pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A HEADERS frame: literal fields, neither indexed nor Huffman-coded.
pub fn headers(stream: u32, flags: u8, fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).ok().filter(|len| *len < 127).unwrap());
            block.extend(text.bytes());
        }
    }
    frame(HEADERS, END_HEADERS | flags, stream, &block)
}

/// How a server took it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The stream was answered to its end, or reset.
    StreamEnded,
    /// The connection was closed.
    Closed,
}

/// Sends bytes on a connection and waits until the server ends the stream or the connection.
pub fn exchange(path: &str, bytes: &[u8]) -> Outcome {
    let mut socket = UnixStream::connect(path).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // A server that has seen enough may close before it has read everything.
    let _ = socket.write_all(bytes);
    loop {
        let mut head = [0; 9];
        if socket.read_exact(&mut head).is_err_and(|error| ended(&error)) {
            return Outcome::Closed;
        }
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        if socket.read_exact(&mut vec![0; len]).is_err_and(|error| ended(&error)) {
            return Outcome::Closed;
        }
        let (kind, flags) = (head[3], head[4]);
        let stream = u32::from_be_bytes(head[5..].try_into().unwrap());
        let is_last = kind == RST_STREAM || (kind <= HEADERS && flags & END_STREAM != 0);
        if stream != 0 && is_last {
            return Outcome::StreamEnded;
        }
    }
}

fn ended(error: &std::io::Error) -> bool {
    assert!(error.kind() != std::io::ErrorKind::WouldBlock, "the server neither answered nor closed");
    true
}
