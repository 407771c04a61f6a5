//! The process as launchers see it: readiness, signals, exit codes, log lines.

use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longer than any wait of a healthy run, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn kvshard(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvshard"));
    command.args(arguments).env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A running `serve`, killed if a test fails before it ends.
struct Serving {
    child: Option<Child>,
    folder: TempDir,
}

impl Serving {
    fn start(arguments: &[&str], environment: &[(&str, &str)]) -> Serving {
        Serving::start_in(tempfile::tempdir().expect("a folder"), arguments, environment)
    }

    fn start_in(folder: TempDir, arguments: &[&str], environment: &[(&str, &str)]) -> Serving {
        let path = folder.path().join("s");
        let mut command = kvshard(&["serve"]);
        command.args(arguments).arg("--uds-path").arg(&path).envs(environment.iter().copied());
        Serving { child: Some(command.spawn().expect("starts")), folder }
    }

    fn socket(&self, rank: usize) -> PathBuf {
        self.folder.path().join(format!("s-{rank}"))
    }

    fn wait_until_ready(&mut self, rank: usize) {
        let began = Instant::now();
        while UnixStream::connect(self.socket(rank)).is_err() {
            if self.child.as_mut().expect("not waited for").try_wait().expect("waits").is_some() {
                panic!("it ended before it was ready: {:?}", self.wait());
            }
            assert!(began.elapsed() < PATIENCE, "not ready");
            sleep(Duration::from_millis(20));
        }
    }

    fn signal(&self, name: &str) {
        let id = self.child.as_ref().expect("not waited for").id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().expect("kill").success());
    }

    fn wait(&mut self) -> Output {
        let mut child = self.child.take().expect("not waited for");
        let began = Instant::now();
        while child.try_wait().expect("waits").is_none() {
            if began.elapsed() > PATIENCE {
                let _ = child.kill();
                panic!("it did not end");
            }
            sleep(Duration::from_millis(20));
        }
        child.wait_with_output().expect("output")
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
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
        &["no-such-command"],
    ] {
        let output = kvshard(arguments).output().expect("runs");
        assert_eq!(code(&output), Some(2), "{arguments:?}");
        assert!(text(&output.stderr).starts_with("error: "), "{arguments:?}: {}", text(&output.stderr));
    }
}

#[test]
fn a_model_that_cannot_be_loaded_is_one_sentence() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut serving = Serving::start(&[folder.path().to_str().expect("UTF-8"), "--json-output"], &[]);
    let output = serving.wait();
    assert_eq!(code(&output), Some(1));
    assert!(!serving.socket(0).exists());
    let last = text(&output.stdout).lines().last().map(str::to_owned).expect("a line");
    let line: serde_json::Value = serde_json::from_str(&last).expect("JSON");
    assert_eq!(line["record"]["level"]["name"], "ERROR");
    assert!(line["text"].as_str().is_some_and(|text| !text.is_empty() && !text.contains('\n')), "{line}");
    assert!(!text(&output.stderr).contains("panicked"), "{}", text(&output.stderr));
}

#[test]
fn a_living_socket_is_not_taken_over() {
    let folder = tempfile::tempdir().expect("a folder");
    let _living = UnixListener::bind(folder.path().join("s-0")).expect("binds");
    let path = folder.path().join("s");
    let output =
        kvshard(&["serve", "m", "--uds-path", path.to_str().expect("UTF-8")]).output().expect("runs");
    assert_eq!(code(&output), Some(1));
    assert!(text(&output.stdout).contains("another process answers there"), "{}", text(&output.stdout));
}

#[test]
fn a_signal_ends_a_ready_shard_in_order() {
    for signal in ["-TERM", "-INT"] {
        let mut serving = Serving::start(&["--json-output", "--logger-level", "INFO"], &[]);
        serving.wait_until_ready(0);
        serving.signal(signal);
        let output = serving.wait();
        assert_eq!(code(&output), Some(0), "{}", text(&output.stdout));
        assert!(!serving.socket(0).exists());
        let started = format!("Server started at unix://{}", serving.socket(0).display());
        let told = text(&output.stdout).lines().any(|line| {
            let line: serde_json::Value = serde_json::from_str(line).expect("every line is JSON");
            line["text"] == started.as_str()
        });
        assert!(told, "{}", text(&output.stdout));
    }
}

#[test]
fn a_dead_shards_socket_is_replaced() {
    let folder = tempfile::tempdir().expect("a folder");
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
    let output = download(&crate::support::fixture("llama"));
    assert_eq!(code(&output), Some(0), "{}", text(&output.stdout));
    let output = download(empty.path());
    assert_eq!(code(&output), Some(1));
    assert!(text(&output.stdout).contains("config.json"), "{}", text(&output.stdout));
}

const RANK_1: &[(&str, &str)] = &[("RANK", "1"), ("WORLD_SIZE", "2")];

fn follower() -> (Serving, Option<UnixListener>) {
    let mut serving = Serving::start(&["m", "--sharded"], RANK_1);
    let leader = UnixListener::bind(serving.socket(0)).expect("binds");
    serving.wait_until_ready(1);
    (serving, Some(leader))
}

fn is_gone(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err()
}

#[test]
fn a_rank_above_0_ends_well_at_a_signal() {
    let (mut serving, _leader) = follower();
    serving.signal("-TERM");
    assert_eq!(code(&serving.wait()), Some(0));
    assert!(is_gone(&serving.socket(1)));
}

#[test]
fn a_rank_above_0_ends_with_rank_0() {
    let (mut serving, mut leader) = follower();
    fs::remove_file(serving.socket(0)).expect("removed");
    drop(leader.take());
    assert_eq!(code(&serving.wait()), Some(0));
    assert!(is_gone(&serving.socket(1)));
}

#[test]
fn a_rank_above_0_tells_of_rank_0s_death() {
    let (mut serving, mut leader) = follower();
    drop(leader.take());
    let output = serving.wait();
    assert_eq!(code(&output), Some(6));
    assert!(text(&output.stdout).contains("rank 0 died"));
    assert!(is_gone(&serving.socket(1)));
}
