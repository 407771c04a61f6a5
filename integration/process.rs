//! The process as launchers see it: readiness, signals, exit codes, log lines.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use kvshard::pb::v3;
use tonic::Code;

use crate::support::fixture;
use crate::support::process::{Serving, folder, is_gone, kvshard};
use crate::support::shard::{Collected, decode, greedy, on_slots, prefill, request, run_to_end};

const LONG: &str = "the quick brown fox jumps over the lazy dog and then some more words follow in a row";

/// Arguments that serve a fixture with a small pool.
fn serving(fixture_name: &str, flags: &[&str]) -> Vec<String> {
    let folder = fixture(fixture_name);
    let model = folder.to_str().expect("UTF-8");
    let small = ["--pool-tokens", "20000", "--own-slots", "10000"];
    [model].iter().chain(&small).chain(flags).map(|text| (*text).to_owned()).collect()
}

fn start(fixture_name: &str, flags: &[&str]) -> Serving {
    let arguments = serving(fixture_name, flags);
    let mut serving = Serving::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    serving.wait_until_ready(0);
    serving
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn refused_flags_are_a_usage_error() {
    for arguments in [
        &["serve", "m", "--quantize", "awq"][..],
        &["serve", "m", "--device", "cuda"],
        &["serve", "m", "--no-such-flag"],
        &["serve", "m", "--inject-fault", "fire@3"],
        &["no-such-command"],
    ] {
        let output = kvshard(arguments).output().expect("runs");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output.stderr).starts_with("error: "), "{arguments:?}: {}", text(&output.stderr));
    }
}

#[test]
fn a_living_socket_is_not_taken_over() {
    let mut living = start("llama", &[]);
    let mut second = Serving::start_in(living.folder(), &["m"], &[]);
    let ended = second.wait();
    assert_eq!(ended.code, Some(1));
    let why = "another process answers there: stop it, or choose another --uds-path";
    assert!(ended.last_line().ends_with(why), "{ended:?}");
    assert!(!ended.stderr.contains("panicked"), "{ended:?}");
    living.wait_until_ready(0);
}

#[test]
fn a_signal_ends_a_ready_shard_in_order() {
    for signal in ["-TERM", "-INT"] {
        let mut serving = Serving::start(&["--json-output", "--logger-level", "INFO"], &[]);
        serving.wait_until_ready(0);
        serving.signal(signal);
        let ended = serving.wait();
        assert_eq!(ended.code, Some(0), "{ended:?}");
        assert!(is_gone(&serving.socket(0)));
        let started = format!("Server started at unix://{}", serving.socket(0).display());
        assert!(ended.json_texts().contains(&started), "{ended:?}");
    }
}

#[test]
fn a_dead_shards_socket_is_replaced() {
    let folder = folder();
    drop(UnixListener::bind(folder.path().join("s-0")).expect("binds"));
    let mut serving = Serving::start_in(folder, &[], &[]);
    serving.wait_until_ready(0);
}

#[test]
fn local_models_need_no_download() {
    let empty = tempfile::tempdir().expect("a folder");
    let download = |model: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_text-generation-server"));
        command.arg("download-weights").arg(model).args(["--extension", ".safetensors", "--json-output"]);
        command.env_clear().output().expect("runs")
    };
    let output = download(&fixture("llama"));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stdout));
    let output = download(empty.path());
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("config.json"), "{}", text(&output.stdout));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_runs_when_the_signal_comes_is_answered() {
    // The more prompts, the likelier the signal comes before the answer; where it does not, more are sent.
    for n_prompts in [4, 16, 60, 240] {
        let mut serving = start("llama", &["--logger-level", "DEBUG", "--max-lanes", "256"]);
        let mut client = serving.client().await;
        let requests: Vec<v3::Request> = (0..n_prompts)
            .map(|id| {
                let mut long = request(id, &LONG.repeat(12), 1);
                long.truncate = 60;
                long
            })
            .collect();
        let mut asked = client.clone();
        let running = tokio::spawn(async move { asked.prefill(prefill(1, requests, None)).await });
        tokio::task::yield_now().await;
        // On the same connection, and behind the call: once this is answered, the call has come in.
        client.health(v3::HealthRequest {}).await.unwrap();
        serving.wait_until_told("/Health: ");
        serving.signal("-TERM");
        let answer = running.await.expect("no panic");
        let ended = serving.wait();
        assert!(is_gone(&serving.socket(0)));
        assert_eq!(ended.code, Some(0), "{ended:?}");
        let line_of = |text: &str| ended.stdout.lines().position(|line| line.contains(text));
        let (told, answered) = (line_of("asked to end"), line_of("/Prefill: "));
        // A call that the door closed on has never been in; the next attempt is larger.
        if let Ok(answer) = answer {
            assert_eq!(answer.into_inner().generations.len(), n_prompts as usize);
            assert!(answered.is_some(), "{ended:?}");
            if told < answered {
                return;
            }
        } else {
            assert!(answered.is_none(), "answered, and the answer lost: {ended:?}");
        }
    }
    panic!("no call was running when the signal came");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_does_not_end_is_cut_short() {
    // By a second signal, and by the drain timeout.
    for (drain_timeout, n_signals) in [("100", 2), ("0.05", 1)] {
        let flags = ["--inject-fault", "hang@2", "--drain-timeout", drain_timeout];
        let mut serving = start("llama", &flags);
        let mut client = serving.client().await;
        client.prefill(prefill(1, vec![request(1, LONG, 5)], None)).await.unwrap();
        let mut asked = client.clone();
        let hanging = tokio::spawn(async move { asked.decode(decode(&[1])).await });
        tokio::task::yield_now().await;
        client.health(v3::HealthRequest {}).await.unwrap();
        serving.signal("-TERM");
        if n_signals == 2 {
            serving.wait_until_told("asked to end");
            serving.signal("-TERM");
        }
        let ended = serving.wait();
        assert_eq!(ended.code, Some(5), "{ended:?}");
        assert!(ended.last_line().ends_with("ended with calls still running"), "{ended:?}");
        assert!(is_gone(&serving.socket(0)));
        assert!(hanging.await.unwrap().is_err());
    }
}

/// Faults to order: exit code, and the cause as the last line.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fault_ends_the_process_with_its_code_and_its_cause() {
    for (fault, code, cause) in [
        ("panic@2", 3, "giving up: the engine died: the engine panicked: fault injected at step 2"),
        ("hang@2", 4, "s, the limit is 0.2 s"),
        ("lost@2", 7, "giving up: fault injected at step 2"),
    ] {
        let mut serving =
            start("llama", &["--inject-fault", fault, "--step-timeout", "0.2", "--json-output"]);
        let mut client = serving.client().await;
        client.prefill(prefill(1, vec![request(1, LONG, 5)], None)).await.unwrap();
        client.health(v3::HealthRequest {}).await.unwrap();
        client.decode(decode(&[1])).await.unwrap_err();
        let ended = serving.wait();
        assert_eq!(ended.code, Some(code), "{fault}: {ended:?}");
        let texts = ended.json_texts();
        assert!(texts.last().is_some_and(|last| last.ends_with(cause)), "{fault}: {texts:?}");
        assert!(is_gone(&serving.socket(0)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_step_does_not_end_the_process() {
    let serving = &mut start("llama", &["--inject-fault", "error@2"]);
    let mut client = serving.client().await;
    client.prefill(prefill(1, vec![request(1, LONG, 5)], None)).await.unwrap();
    let status = client.decode(decode(&[1])).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Internal, "fault injected at step 2"));
    client.health(v3::HealthRequest {}).await.unwrap();
    assert_eq!(run_to_end(&mut client, 2, vec![request(2, LONG, 5)]).await[0].ids.len(), 5);
    serving.signal("-TERM");
    assert_eq!(serving.wait().code, Some(0));
}

/// A router outlives its shard: it knows of batches and cached prefixes that the next shard has never seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_goes_on_with_a_shard_that_was_killed() {
    let mut first = start("llama", &[]);
    let mut client = first.client().await;
    let on = |id: u64, cache_len: u32| {
        let mut request = on_slots(request(id, LONG, 6), 1..200);
        request.cache_len = cache_len;
        request
    };
    let expected = run_to_end(&mut client, 1, vec![on(1, 0)]).await;
    client.prefill(prefill(2, vec![on(2, 20)], None)).await.unwrap();
    first.signal("-KILL");
    assert_eq!(first.wait().code, None);
    assert!(!is_gone(&first.socket(0)), "nobody was left to remove it");

    let arguments = serving("llama", &[]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut second = Serving::start_in(first.folder(), &arguments, &[]);
    second.wait_until_ready(0);
    // The router's connection comes back by itself; a call that meets the gap fails.
    let mut lost = client.decode(decode(&[2])).await.unwrap_err();
    while lost.code() != Code::NotFound {
        lost = client.decode(decode(&[2])).await.unwrap_err();
    }
    client.clear_cache(v3::ClearCacheRequest { id: Some(2) }).await.unwrap();
    // No Warmup: served, by an empty memory of prefixes. The claim is false now.
    assert_eq!(run_to_end(&mut client, 3, vec![on(3, 1000)]).await, expected);
    assert_eq!(run_to_end(&mut client, 4, vec![on(4, 1000)]).await, expected);
    second.signal("-TERM");
    let ended = second.wait();
    assert_eq!(ended.code, Some(0));
    let told = ended.stdout.lines().filter(|line| line.contains("said to be cached")).collect::<Vec<_>>();
    assert!(told.len() == 1 && told[0].contains("request 3") && told[0].contains("cached 0 are"), "{told:?}");
}

/// Callers can have much logged, and have it escaped; lines stay what the launcher can read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_is_json_and_short() {
    for level in ["INFO", "TRACE"] {
        let mut serving = start("llama", &["--json-output", "--logger-level", level]);
        let mut client = serving.client().await;
        let mut odd = request(1, "hello", 2);
        odd.adapter_id = Some("\u{1}\"\\\n\u{202e}".repeat(5000));
        client.prefill(prefill(1, vec![odd.clone()], None)).await.unwrap();
        odd.stopping_parameters.as_mut().unwrap().stop_sequences = vec!["\u{1}".repeat(4000); 2];
        odd.parameters = Some(v3::NextTokenChooserParameters { grammar: "x\n".repeat(9000), ..greedy() });
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for id in 0..300 {
            good.push(request(2 * id, "hello", 2));
            bad.push(v3::Request { id: 2 * id + 1, truncate: 0, ..odd.clone() });
        }
        client.prefill(prefill(2, bad.clone(), None)).await.unwrap_err();
        good.extend(bad);
        client.prefill(prefill(3, good, None)).await.unwrap();
        let mut silent = Collected::default();
        silent.add(1, &client.decode(decode(&[3])).await.unwrap().into_inner().generations);
        serving.signal("-TERM");
        let ended = serving.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(ended.json_texts().len() > 300);
    }
}
