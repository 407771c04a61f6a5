//! As TGI's launcher starts and ends shards: a process a rank, environment rebuilt, a socket of each to wait for.

use std::fs;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::sync::Arc;

use kvshard::pb::v3;
use tempfile::TempDir;

use crate::support::fixture;
use crate::support::process::{Serving, folder, is_gone};
use crate::support::shard::{TestShard, connect, request, run_to_end};

const LONG: &str = "the quick brown fox jumps over the lazy dog and then some more words follow in a row";

/// One of two processes, started as `launcher/src/main.rs` starts it.
fn start_rank(folder: &Arc<TempDir>, rank: usize) -> Serving {
    let mut command = Command::new(env!("CARGO_BIN_EXE_text-generation-server"));
    command.arg("serve").arg(fixture("llama")).arg("--uds-path").arg(folder.path().join("s"));
    command.args(["--logger-level", "INFO", "--json-output", "--trust-remote-code", "--sharded"]);
    command.args(["--dtype", "float16", "--otlp-service-name", "text-generation-inference.server"]);
    command.args(["--max-input-tokens", "100"]).env_clear();
    command.envs([
        ("RANK", rank.to_string().as_str()),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_PORT", "29500"),
        ("TORCH_NCCL_AVOID_RECORD_STREAMS", "1"),
        ("ATTENTION", "flashinfer"),
        ("PREFIX_CACHING", "1"),
        ("PREFILL_CHUNKING", "1"),
        ("CUDA_MEMORY_FRACTION", "1.0"),
        ("CUDA_GRAPHS", "1,2,4,8,16,32"),
        ("SAFETENSORS_FAST_GPU", "1"),
        ("HF_HUB_ENABLE_HF_TRANSFER", "1"),
        ("HUGGINGFACE_HUB_CACHE", "/nowhere"),
        ("RUST_BACKTRACE", "full"),
    ]);
    Serving::spawn(folder.clone(), command)
}

fn start_both(folder: &Arc<TempDir>) -> [Serving; 2] {
    // The launcher does not wait for one before it starts the next; the higher may be first.
    let mut second = start_rank(folder, 1);
    let mut first = start_rank(folder, 0);
    first.wait_until_ready(0);
    second.wait_until_ready(1);
    [first, second]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_ranks_are_two_sockets_and_one_shard() {
    let folder = folder();
    let [mut first, mut second] = start_both(&folder);
    for rank in [0, 1] {
        let mut client = connect(&format!("unix://{}", first.socket(rank).display())).await;
        let found = client.service_discovery(v3::ServiceDiscoveryRequest {}).await.unwrap().into_inner();
        assert_eq!(found.urls, [format!("unix://{}", first.socket(0).display())], "asked of rank {rank}");
        client.health(v3::HealthRequest {}).await.unwrap();
        client.clear_cache(v3::ClearCacheRequest { id: None }).await.unwrap();
    }
    let mut alone = TestShard::start("llama", &[]).await;
    let mut client = first.client().await;
    let got = run_to_end(&mut client, 1, vec![request(1, LONG, 9)]).await.remove(0);
    let expected = run_to_end(&mut alone.client, 1, vec![request(1, LONG, 9)]).await.remove(0);
    assert_eq!((got.ids, got.text), (expected.ids, expected.text));
    alone.finish().await;
    first.signal("-TERM");
    second.signal("-TERM");
    for ended in [first.wait(), second.wait()] {
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let texts = ended.json_texts();
        assert!(texts.iter().any(|text| text.starts_with("Server started at unix:///")), "{texts:?}");
    }
    assert!(is_gone(&first.socket(0)) && is_gone(&first.socket(1)));
}

#[test]
fn rank_1_ends_with_rank_0_whose_signal_is_the_only_one() {
    let folder = folder();
    let [mut first, mut second] = start_both(&folder);
    first.signal("-TERM");
    assert_eq!((first.wait().code, second.wait().code), (Some(0), Some(0)));
    assert!(is_gone(&first.socket(1)));
}

#[test]
fn rank_1_tells_of_rank_0s_death() {
    let folder = folder();
    let [mut first, mut second] = start_both(&folder);
    first.signal("-KILL");
    first.wait();
    let ended = second.wait();
    assert_eq!(ended.code, Some(6));
    assert_eq!(ended.json_texts().last().map(String::as_str), Some("rank 0 died"));
    assert!(is_gone(&second.socket(1)));
}

/// Rank 1 beside a rank 0 that is played by the test, and has yet to be ready.
#[test]
fn rank_1_is_ready_when_rank_0_is() {
    let folder = folder();
    let mut second = start_rank(&folder, 1);
    second.wait_until_told("rank 1 holds nothing");
    assert!(is_gone(&second.socket(1)));
    let leader = UnixListener::bind(second.socket(0)).expect("binds");
    second.wait_until_ready(1);
    fs::remove_file(second.socket(0)).expect("removed");
    drop(leader);
    assert_eq!(second.wait().code, Some(0));
    assert!(is_gone(&second.socket(1)));
}

#[test]
fn rank_1_ends_at_a_signal_before_rank_0_is_there() {
    let folder = folder();
    let mut second = start_rank(&folder, 1);
    second.wait_until_told("rank 1 holds nothing");
    second.signal("-TERM");
    assert_eq!(second.wait().code, Some(0));
}
