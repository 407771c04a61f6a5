//! Connections that speak something else, or nothing, or stop in the middle.

use std::io::Write as _;
use std::os::unix::net::UnixStream;

use kvshard::pb::v3;
use tonic::Code;
use tonic_prost::ProstCodec;

use super::Witness;
use crate::support::http2::{DATA, END_STREAM, HEADERS, Outcome, exchange, frame, headers, opening};
use crate::support::shard::channel;

const PREFILL: &str = "/generate.v3.TextGenerationService/Prefill";

fn path(witness: &Witness) -> String {
    witness.shard.shard.url().trim_start_matches("unix://").to_owned()
}

/// Sends bytes from a thread of its own: the server shares the test's.
async fn send(witness: &Witness, bytes: Vec<u8>) -> Outcome {
    let path = path(witness);
    tokio::task::spawn_blocking(move || exchange(&path, &bytes)).await.unwrap()
}

#[tokio::test]
async fn what_is_not_http2_is_hung_up_on() {
    let mut witness = Witness::start(&[]).await;
    let noise: Vec<u8> =
        (0..100_000u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for (what, bytes) in [
        ("noise", noise.clone()),
        ("zeroes", vec![0; 4096]),
        ("an HTTP/1.1 request", b"GET /health HTTP/1.1\r\nHost: shard\r\n\r\n".to_vec()),
        ("an HTTP/1.1 upload", b"POST /generate HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello".to_vec()),
        ("a TLS handshake", [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &noise[..500]].concat()),
        ("noise after the preface", [opening(), noise.clone()].concat()),
        ("a frame beyond all limits", [opening(), frame(DATA, 0, 1, &vec![0; 1 << 20])].concat()),
        (
            "headers that cannot be decoded",
            [opening(), frame(HEADERS, 4 | END_STREAM, 1, &[0xff; 40])].concat(),
        ),
        ("data for a stream that nobody opened", [opening(), frame(DATA, 0, 7, b"x")].concat()),
    ] {
        // Where the fault is a stream's, the stream ends; else the connection does.
        send(&witness, bytes).await;
        witness.check(what).await;
    }
    witness.finish().await;
}

#[tokio::test]
async fn what_is_not_grpc_is_answered() {
    let mut witness = Witness::start(&[]).await;
    let post = |path: &str, content: &str, body: &[u8]| {
        let fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "shard"),
            ("content-type", content),
            ("te", "trailers"),
        ];
        [opening(), headers(1, 0, &fields), frame(DATA, END_STREAM, 1, body)].concat()
    };
    let get = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "shard")];
    let grpc = "application/grpc";
    for (what, bytes) in [
        ("a browser", [opening(), headers(1, END_STREAM, &get)].concat()),
        ("a form", post(PREFILL, "text/html", b"a=b")),
        ("JSON", post(PREFILL, "application/json", b"{}")),
        ("a service that is not here", post("/nobody/Nothing", grpc, &[0; 5])),
        ("no message at all", post(PREFILL, grpc, b"")),
        ("a message cut short", post(PREFILL, grpc, &[0, 0, 0, 1, 0, 1, 2])),
        ("a message of four gigabytes", post(PREFILL, grpc, &[0, 255, 255, 255, 255, 1, 2])),
        ("a compressed message", post(PREFILL, grpc, &[1, 0, 0, 0, 2, 1, 2])),
        ("a message that is no protobuf", post(PREFILL, grpc, &[0, 0, 0, 0, 4, 255, 255, 255, 255])),
    ] {
        assert_eq!(send(&witness, bytes).await, Outcome::StreamEnded, "{what}");
        witness.check(what).await;
    }
    witness.finish().await;
}

#[tokio::test]
async fn connections_that_stop_in_the_middle_keep_nobody() {
    let mut witness = Witness::start(&[]).await;
    let fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", PREFILL),
        (":authority", "shard"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    let stages = [
        Vec::new(),
        opening()[..10].to_vec(),
        opening(),
        [opening(), headers(1, 0, &fields)[..20].to_vec()].concat(),
        [opening(), headers(1, 0, &fields)].concat(),
        [opening(), headers(1, 0, &fields), frame(DATA, 0, 1, &[0, 0, 0, 1, 0, 9, 9])].concat(),
    ];
    let mut open = Vec::new();
    for stage in stages.iter().cycle().take(60) {
        let mut socket = UnixStream::connect(path(&witness)).unwrap();
        socket.write_all(stage).unwrap();
        open.push(socket);
    }
    witness.check("sixty connections that wait").await;
    // Half of them go, the others stay until the shard is told to stop, which they do not delay.
    open.truncate(30);
    witness.check("thirty connections that broke off").await;
    witness.finish().await;
}

/// Calls a method by its path, with a message of any type.
async fn call<M: prost::Message + Default + 'static>(
    witness: &Witness,
    path: &'static str,
    message: M,
) -> Code {
    let mut grpc = tonic::client::Grpc::new(channel(witness.shard.shard.url()).await);
    grpc.ready().await.unwrap();
    let codec = ProstCodec::<M, v3::HealthResponse>::default();
    let answer = grpc.unary(tonic::Request::new(message), path.try_into().unwrap(), codec).await;
    answer.map_or_else(|status| status.code(), |_| Code::Ok)
}

#[tokio::test]
async fn methods_and_messages_that_do_not_match() {
    let mut witness = Witness::start(&[]).await;
    let health = v3::HealthRequest {};
    assert_eq!(call(&witness, "/generate.v3.TextGenerationService/Health", health).await, Code::Ok);
    for path in ["/generate.v3.TextGenerationService/Embed", "/generate.v9.TextGenerationService/Health", "/"]
    {
        assert_eq!(call(&witness, path, health).await, Code::Unimplemented, "{path}");
    }
    // Field 1 is a number here and a message there.
    let other = v3::FilterBatchRequest { batch_id: 3, request_ids: vec![1] };
    assert_eq!(call(&witness, PREFILL, other).await, Code::Internal);
    witness.check("methods and messages that do not match").await;
    witness.finish().await;
}
