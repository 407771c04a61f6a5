//! The real binaries as children, their output in files so that it can be read while they run.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::shard::{Client, connect};

/// Longer than any wait of a healthy run, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// The program, with an empty environment.
pub fn kvshard(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvshard"));
    command.args(arguments).env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A running shard process, killed if a test fails before it ends.
pub struct Serving {
    child: Child,
    folder: Arc<TempDir>,
    /// Of its output: several processes may share the folder of their sockets.
    name: String,
}

/// A process that has ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Serving {
    pub fn start(arguments: &[&str], environment: &[(&str, &str)]) -> Serving {
        Serving::start_in(folder(), arguments, environment)
    }

    /// `kvshard serve` with its socket in a folder that may hold others.
    pub fn start_in(folder: Arc<TempDir>, arguments: &[&str], environment: &[(&str, &str)]) -> Serving {
        let mut command = kvshard(&["serve"]);
        command.args(arguments).arg("--uds-path").arg(folder.path().join("s"));
        command.envs(environment.iter().copied());
        Serving::spawn(folder, command)
    }

    pub fn spawn(folder: Arc<TempDir>, mut command: Command) -> Serving {
        let n_files = fs::read_dir(folder.path()).expect("a folder").count();
        let name = format!("output-{n_files}");
        let file =
            |ending: &str| File::create(folder.path().join(format!("{name}.{ending}"))).expect("a file");
        command.stdin(Stdio::null()).stdout(file("stdout")).stderr(file("stderr"));
        Serving { child: command.spawn().expect("starts"), folder, name }
    }

    pub fn folder(&self) -> Arc<TempDir> {
        self.folder.clone()
    }

    pub fn socket(&self, rank: usize) -> PathBuf {
        self.folder.path().join(format!("s-{rank}"))
    }

    /// A connection to its rank 0.
    pub async fn client(&self) -> Client {
        connect(&format!("unix://{}", self.socket(0).display())).await
    }

    /// What it has written so far.
    pub fn stdout(&self) -> String {
        self.read("stdout")
    }

    fn read(&self, ending: &str) -> String {
        let bytes = fs::read(self.folder.path().join(format!("{}.{ending}", self.name))).expect("a file");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub fn wait_until_ready(&mut self, rank: usize) {
        let socket = self.socket(rank);
        self.wait_for("readiness", || UnixStream::connect(&socket).is_ok());
    }

    /// Waits until it has said `text`.
    pub fn wait_until_told(&mut self, text: &str) {
        let path = self.folder.path().join(format!("{}.stdout", self.name));
        self.wait_for(text, || fs::read_to_string(&path).is_ok_and(|stdout| stdout.contains(text)));
    }

    fn wait_for(&mut self, what: &str, is_there: impl Fn() -> bool) {
        let began = Instant::now();
        while !is_there() {
            if self.child.try_wait().expect("waits").is_some() {
                panic!("it ended before {what}: {:?}", self.ended());
            }
            assert!(began.elapsed() < PATIENCE, "no {what}");
            sleep(Duration::from_millis(10));
        }
    }

    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().expect("kill").success());
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Ended {
        let began = Instant::now();
        while self.child.try_wait().expect("waits").is_none() {
            if began.elapsed() > PATIENCE {
                let _ = self.child.kill();
                panic!("it did not end: {}", self.stdout());
            }
            sleep(Duration::from_millis(10));
        }
        self.ended()
    }

    fn ended(&mut self) -> Ended {
        let code = self.child.wait().expect("ended").code();
        Ended { code, stdout: self.read("stdout"), stderr: self.read("stderr") }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Without effect on a process that was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// The texts of its log, which has to be JSON lines that TGI's launcher can read.
    pub fn json_texts(&self) -> Vec<String> {
        let text = |line: &str| {
            assert!(line.len() < 8 << 10, "a line of {} bytes", line.len());
            let line: serde_json::Value =
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            let level = line["record"]["level"]["name"].as_str().expect("a level");
            assert!(["TRACE", "DEBUG", "INFO", "WARNING", "ERROR"].contains(&level), "{level}");
            line["text"].as_str().expect("a text").to_owned()
        };
        self.stdout.lines().map(text).collect()
    }

    pub fn last_line(&self) -> &str {
        self.stdout.lines().last().unwrap_or_else(|| panic!("it said nothing: {self:?}"))
    }
}

/// A new folder, to be shared by processes.
pub fn folder() -> Arc<TempDir> {
    Arc::new(tempfile::tempdir().expect("a folder"))
}

pub fn is_gone(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err()
}
