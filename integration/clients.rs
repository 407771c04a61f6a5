//! Real clients against the real binary: `grpcurl` by reflection, `ghz` for load.
//!
//! Where a tool is missing its trials count as ignored, and say so: a harness of our own can do that at run time.

use std::env;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::{Value, json};
use tempfile::TempDir;

const SERVICE: &str = "generate.v3.TextGenerationService";

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let (grpcurl, ghz) = (find("grpcurl"), find("ghz"));
    let trial = |name: &str, tool: &Option<PathBuf>, run: fn(&Path) -> Result<(), Failed>| match tool.clone()
    {
        Some(tool) => Trial::test(name, move || run(&tool)),
        None => {
            let kind = name.split("::").next().unwrap_or_default();
            println!("{name} is ignored: {kind} is neither on the PATH nor in ~/go/bin");
            Trial::test(name, || Ok(())).with_ignored_flag(true)
        }
    };
    let trials = vec![
        trial("grpcurl::finds_every_service_by_reflection", &grpcurl, reflection),
        trial("grpcurl::calls_every_rpc_over_tcp_and_over_the_unix_socket", &grpcurl, every_rpc),
        trial("grpcurl::generates_by_both_protocols", &grpcurl, whole_generations),
        trial("grpcurl::sees_clear_statuses", &grpcurl, statuses),
        trial("ghz::thousands_of_health_calls", &ghz, health_load),
        trial("ghz::prefill_cycles_beside_a_running_generation", &ghz, prefill_load),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A tool on the PATH, or where Go installs it.
fn find(tool: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let go = env::var_os("HOME").map(|home| PathBuf::from(home).join("go/bin"));
    env::split_paths(&path).chain(go).map(|folder| folder.join(tool)).find(|candidate| candidate.is_file())
}

/// The demo model, served by the real binary.
struct Serving {
    process: Child,
    tcp: String,
    uds: PathBuf,
    _folder: TempDir,
}

impl Serving {
    fn start() -> Serving {
        let folder = tempfile::tempdir().unwrap();
        // A port that is free now; nobody else on this machine asks for ports in between.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (tcp, uds) = (format!("127.0.0.1:{port}"), folder.path().join("s-0"));
        let process = Command::new(env!("CARGO_BIN_EXE_kvshard"))
            .args(["serve", "--listen", &tcp, "--pool-tokens", "20000", "--own-slots", "10000"])
            .arg("--uds-path")
            .arg(folder.path().join("s"))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let serving = Serving { process, tcp, uds, _folder: folder };
        let began = Instant::now();
        while !serving.uds.exists() {
            assert!(began.elapsed() < Duration::from_secs(60), "the server did not start");
            sleep(Duration::from_millis(20));
        }
        serving
    }

    /// Calls an RPC by grpcurl with a JSON message; its JSON answer, or what it printed on failure.
    fn call(&self, grpcurl: &Path, method: &str, message: &Value) -> Result<Value, String> {
        let output = Command::new(grpcurl)
            .args(["-plaintext", "-d", &message.to_string(), &self.tcp, method])
            .output()
            .map_err(|error| error.to_string())?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn check(holds: bool, what: impl Into<String>) -> Result<(), Failed> {
    if holds { Ok(()) } else { Err(what.into().into()) }
}

fn request(id: u64, max_new_tokens: u32) -> Value {
    json!({"id": id, "inputs": "Once upon a time", "truncate": 200, "add_special_tokens": true,
           "stopping_parameters": {"max_new_tokens": max_new_tokens, "ignore_eos_token": true}})
}

fn prefill(batch: u64, max_new_tokens: u32) -> Value {
    json!({"batch": {"id": batch, "size": 1, "requests": [request(batch, max_new_tokens)]}})
}

fn reflection(grpcurl: &Path) -> Result<(), Failed> {
    let serving = Serving::start();
    let output = Command::new(grpcurl).args(["-plaintext", &serving.tcp, "list"]).output()?;
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    let expected = [
        "generate.v2.TextGenerationService",
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    ];
    check(listed.lines().eq(expected), listed)?;
    let output = Command::new(grpcurl).args(["-plaintext", &serving.tcp, "describe", SERVICE]).output()?;
    let described = String::from_utf8_lossy(&output.stdout).into_owned();
    for rpc in
        ["Info", "ServiceDiscovery", "ClearCache", "FilterBatch", "Warmup", "Prefill", "Decode", "Health"]
    {
        check(described.contains(&format!("rpc {rpc} ")), format!("{rpc} is not in {described}"))?;
    }
    // Tools of today ask the newer reflection service; older ones know only the other.
    for version in ["v1", "v1alpha"] {
        let method = format!("grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        let answer = serving.call(grpcurl, &method, &json!({"list_services": "*"}))?;
        let services =
            answer["listServicesResponse"]["service"].as_array().map(Vec::as_slice).unwrap_or_default();
        check(services.iter().any(|service| service["name"] == SERVICE), format!("{version}: {answer}"))?;
    }
    Ok(())
}

fn every_rpc(grpcurl: &Path) -> Result<(), Failed> {
    let serving = Serving::start();
    let call = |rpc: &str, message: Value| serving.call(grpcurl, &format!("{SERVICE}/{rpc}"), &message);
    check(call("Health", json!({}))? == json!({}), "Health answers nothing")?;
    let info = call("Info", json!({}))?;
    check(info["blockSize"] == 1 && info["supportChunking"] == true, info.to_string())?;
    let urls = call("ServiceDiscovery", json!({}))?;
    check(urls["urls"] == json!([format!("unix://{}", serving.uds.display())]), urls.to_string())?;
    call("ClearCache", json!({}))?;
    let warmup = json!({"batch": prefill(0, 1)["batch"], "max_prefill_tokens": 100});
    let capacity = call("Warmup", warmup)?;
    check(capacity["maxSupportedTotalTokens"] == 10000, capacity.to_string())?;
    let two = json!({"batch": {"id": 1, "size": 2, "requests": [request(1, 5), request(2, 5)]}});
    let answer = call("Prefill", two)?;
    check(answer["batch"]["requestIds"] == json!(["1", "2"]), answer.to_string())?;
    let kept = call("FilterBatch", json!({"batch_id": 1, "request_ids": [2]}))?;
    check(kept["batch"]["requestIds"] == json!(["2"]), kept.to_string())?;
    let answer = call("Decode", json!({"batches": [{"id": 1}]}))?;
    check(answer["generations"][0]["requestId"] == "2", answer.to_string())?;
    call("ClearCache", json!({"id": 1}))?;
    let health = serving.call(grpcurl, "grpc.health.v1.Health/Check", &json!({"service": SERVICE}))?;
    check(health["status"] == "SERVING", health.to_string())?;
    let output = Command::new(grpcurl)
        .args(["-plaintext", "-authority", "localhost", "-d", "{}"])
        .arg(format!("unix://{}", serving.uds.display()))
        .arg(format!("{SERVICE}/Info"))
        .output()?;
    check(output.status.success(), String::from_utf8_lossy(&output.stderr))?;
    check(serde_json::from_slice::<Value>(&output.stdout)? == info, "another answer on the unix socket")
}

/// Prefill and Decode to the end by one protocol; the whole text.
fn generate(serving: &Serving, grpcurl: &Path, service: &str) -> Result<String, Failed> {
    let mut message = prefill(7, 12);
    if service.contains("v2") {
        message["batch"]["requests"][0].as_object_mut().unwrap().remove("add_special_tokens");
    }
    let mut answer = serving.call(grpcurl, &format!("{service}/Prefill"), &message)?;
    let mut streamed = String::new();
    loop {
        let generation = &answer["generations"][0];
        streamed += generation["tokens"]["texts"][0].as_str().unwrap_or_default();
        if let Some(text) = generation["generatedText"]["text"].as_str() {
            check(answer["batch"].is_null(), "an ended batch is still there")?;
            check(text == streamed, format!("{text:?} is not {streamed:?}"))?;
            return Ok(streamed);
        }
        answer =
            serving.call(grpcurl, &format!("{service}/Decode"), &json!({"batches": [answer["batch"]]}))?;
    }
}

fn whole_generations(grpcurl: &Path) -> Result<(), Failed> {
    let serving = Serving::start();
    let newer = generate(&serving, grpcurl, SERVICE)?;
    let older = generate(&serving, grpcurl, "generate.v2.TextGenerationService")?;
    check(newer.len() > 10 && newer == older, format!("{newer:?} and {older:?}"))
}

fn statuses(grpcurl: &Path) -> Result<(), Failed> {
    let serving = Serving::start();
    let call = |rpc: &str, message: Value| serving.call(grpcurl, &format!("{SERVICE}/{rpc}"), &message);
    let mut grammar = prefill(1, 5);
    grammar["batch"]["requests"][0]["parameters"] = json!({"temperature": 1, "top_p": 1, "typical_p": 1,
        "repetition_penalty": 1, "grammar": "[a-z]+", "grammar_type": "GRAMMAR_TYPE_REGEX"});
    for (rpc, message, status, sentence) in [
        ("Decode", json!({"batches": [{"id": 9}]}), "NotFound", "batch 9 is not here"),
        ("Prefill", json!({}), "InvalidArgument", "batch"),
        ("Prefill", prefill(1, 0), "InvalidArgument", "max_new_tokens is 0"),
        ("Prefill", prefill(1, 5000), "InvalidArgument", "5000"),
        ("Prefill", grammar, "Unimplemented", "grammars"),
        (
            "Warmup",
            json!({"batch": prefill(0, 1)["batch"], "max_prefill_tokens": 99999}),
            "FailedPrecondition",
            "99999",
        ),
    ] {
        let told = call(rpc, message).err().ok_or_else(|| Failed::from(format!("{rpc}: no {status}")))?;
        check(told.contains(status) && told.contains(sentence), format!("{rpc}: {told}"))?;
    }
    Ok(())
}

/// Runs ghz; its report.
fn load(ghz: &Path, serving: &Serving, rpc: &str, message: &str, more: &[&str]) -> Result<Value, Failed> {
    let report = serving.uds.with_file_name(format!("{rpc}.json"));
    let output = Command::new(ghz)
        .args(["--insecure", "--call", &format!("{SERVICE}.{rpc}"), "-d", message, "-O", "json"])
        .arg("-o")
        .arg(&report)
        .args(more)
        .arg(&serving.tcp)
        .output()?;
    check(output.status.success(), String::from_utf8_lossy(&output.stderr))?;
    Ok(serde_json::from_slice(&fs::read(&report)?)?)
}

fn all_ok(report: &Value, n_calls: u64) -> Result<(), Failed> {
    let statuses = &report["statusCodeDistribution"];
    check(*statuses == json!({"OK": n_calls}), format!("{statuses} {}", report["errorDistribution"]))
}

fn health_load(ghz: &Path) -> Result<(), Failed> {
    let serving = Serving::start();
    let report = load(ghz, &serving, "Health", "{}", &["-n", "4000", "-c", "40", "--connections", "20"])?;
    all_ok(&report, 4000)
}

/// Batches that stay until they are cleared, by the numbers that they were given.
fn kept_batches(ghz: &Path, grpcurl: &Path, serving: &Serving) -> Result<(), Failed> {
    let message = r#"{"batch": {"id": "{{add 2000 .RequestNumber}}", "size": 1, "requests": [{"id": 1,
        "inputs": "The little fox", "truncate": 100, "stopping_parameters": {"max_new_tokens": 50}}]}}"#;
    let decode = |batch: u64| {
        serving.call(grpcurl, &format!("{SERVICE}/Decode"), &json!({"batches": [{"id": batch}]}))
    };
    for _ in 0..2 {
        all_ok(&load(ghz, serving, "Prefill", message, &["-n", "40", "-c", "8"])?, 40)?;
        decode(2020)?;
        let id = r#"{"id": "{{add 2000 .RequestNumber}}"}"#;
        all_ok(&load(ghz, serving, "ClearCache", id, &["-n", "40", "-c", "8"])?, 40)?;
        let told = decode(2020).err().unwrap_or_default();
        check(told.contains("batch 2020 is not here"), told)?;
    }
    Ok(())
}

fn prefill_load(ghz: &Path) -> Result<(), Failed> {
    let serving = Serving::start();
    let Some(grpcurl) = find("grpcurl") else { return Err("grpcurl is missing beside ghz".into()) };
    let alone = generate(&serving, &grpcurl, SERVICE)?;
    // Each call is a batch of its own that ends with its only token, so nothing has to be cleared.
    let message = r#"{"batch": {"id": "{{add 1000 .RequestNumber}}", "size": 1, "requests": [{"id": "{{.RequestNumber}}",
        "inputs": "The little fox", "truncate": 100, "add_special_tokens": true,
        "stopping_parameters": {"max_new_tokens": 1}}]}}"#;
    let beside = std::thread::scope(|scope| {
        let beside =
            scope.spawn(|| (0..3).map(|_| generate(&serving, &grpcurl, SERVICE)).collect::<Vec<_>>());
        let report =
            load(ghz, &serving, "Prefill", message, &["-n", "300", "-c", "10", "--connections", "5"]);
        report.and_then(|report| all_ok(&report, 300)).map(|()| beside.join())
    })?;
    for text in beside.map_err(|_| Failed::from("the generation beside it panicked"))? {
        let text = text?;
        check(text == alone, format!("{text:?} is not {alone:?}"))?;
    }
    kept_batches(ghz, &grpcurl, &serving)?;
    let message = r#"{"batch": {"id": 5, "size": 1, "requests": [{"id": 5, "inputs": "x", "truncate": 9,
        "stopping_parameters": {"max_new_tokens": 900, "ignore_eos_token": true}}]}}"#;
    serving.call(&grpcurl, &format!("{SERVICE}/Prefill"), &serde_json::from_str(message)?)?;
    let report = load(ghz, &serving, "Decode", r#"{"batches": [{"id": 5}]}"#, &["-n", "500", "-c", "1"])?;
    all_ok(&report, 500)
}
