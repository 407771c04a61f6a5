use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use tempfile::TempDir;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn write(folder: &Path, files: &[(&str, &str)]) {
    fs::create_dir_all(folder).unwrap();
    for (name, contents) in files {
        fs::write(folder.join(name), contents).unwrap();
    }
}

fn source(cache: &Path, name: &str, revision: Option<&str>) -> ModelSource {
    ModelSource {
        name: name.to_owned(),
        revision: revision.map(str::to_owned),
        token: Some("secret".to_owned()),
        cache: Some(cache.to_owned()),
        endpoint: None,
        weights: WeightFiles::Beside,
        offline: true,
    }
}

fn offline(cache: &Path, name: &str, revision: Option<&str>) -> Result<Located> {
    locate(&source(cache, name, revision), &mut |_| ())
}

#[test]
fn a_directory_is_taken_as_it_is() {
    let folder = TempDir::new().unwrap();
    let model = folder.path().join("model");
    write(&model, &[]);
    let refusal = || offline(folder.path(), model.to_str().unwrap(), None).unwrap_err().to_string();
    assert_eq!(refusal(), "the model's folder has no config.json");
    write(&model, &[("config.json", "{}")]);
    assert_eq!(
        refusal(),
        "the model has neither model.safetensors nor model.safetensors.index.json, nor pytorch_model.bin nor \
         pytorch_model.bin.index.json"
    );
    let located = || offline(folder.path(), model.to_str().unwrap(), None).unwrap().folder;
    for (index, file) in
        [("pytorch_model.bin.index.json", "x.bin"), ("model.safetensors.index.json", "x.safetensors")]
    {
        write(&model, &[(index, &format!(r#"{{"weight_map": {{"a": "{file}"}}}}"#))]);
        assert_eq!(refusal(), format!("{index} lists {file}, which is not there"));
        write(&model, &[(file, "")]);
        assert_eq!(located(), model);
    }
}

#[test]
fn what_is_no_id_is_refused() {
    let cache = TempDir::new().unwrap();
    for id in ["", "/no/such/folder", "a/b/c", "../x", "a/..", "org/na me", "org/", ".hidden", "a\u{0}b"] {
        let error = offline(cache.path(), id, None).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{id}: {error}");
    }
    for revision in ["", "..", "../../x", "/etc", "a//b", "x y"] {
        let error = offline(cache.path(), "org/name", Some(revision)).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)), "{revision}: {error}");
    }
}

#[test]
fn a_filled_cache_works_without_network() {
    let cache = TempDir::new().unwrap();
    let root = cache.path().join("models--org--name");
    let snapshot = root.join("snapshots").join(COMMIT);
    write(&snapshot, &[("config.json", "{}"), ("model.safetensors", "")]);
    write(&root.join("refs"), &[("main", COMMIT)]);
    write(&root.join("refs/pr"), &[("1", &format!("{COMMIT}\n"))]);
    write(&root.join("refs/evil"), &[("ref", "../../..")]);
    for revision in [None, Some("main"), Some("pr/1"), Some(COMMIT)] {
        assert_eq!(offline(cache.path(), "org/name", revision).unwrap().folder, snapshot, "{revision:?}");
    }
    for (id, revision) in [("org/name", "v2"), ("org/other", "main"), ("org/name", "evil/ref")] {
        let refusal = offline(cache.path(), id, Some(revision)).unwrap_err().to_string();
        assert_eq!(refusal, format!("{id} at {revision} is not in the cache, and HF_HUB_OFFLINE is set"));
    }
}

/// A hub with one model, that counts what it is asked for.
struct FakeHub {
    endpoint: String,
    asked: Arc<Mutex<Vec<String>>>,
}

fn fake_hub(files: &[(&'static str, &'static str)]) -> FakeHub {
    let files: Arc<BTreeMap<&str, &str>> = Arc::new(files.iter().copied().collect());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&asked);
    // The thread ends with the test's process.
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (files, log) = (Arc::clone(&files), Arc::clone(&log));
            thread::spawn(move || answer(stream, &files, &log));
        }
    });
    FakeHub { endpoint, asked }
}

/// Answers one request and closes the connection.
fn answer(mut stream: TcpStream, files: &BTreeMap<&str, &str>, log: &Mutex<Vec<String>>) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut first_byte = 0;
    for line in lines.map_while(io::Result::ok).take_while(|line| !line.is_empty()) {
        if let Some(range) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            first_byte = range.split('-').next()?.parse().ok()?;
        }
    }
    log.lock().ok()?.push(path.clone());
    let reply = |status: &str, headers: &str, body: &str| {
        let length = body.len();
        format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {length}\r\n{headers}\r\n{body}")
    };
    let list = |name: &&str| format!(r#"{{"rfilename": "{name}"}}"#);
    let resolve = format!("/org/name/resolve/{COMMIT}/");
    let text = if path == "/api/models/org/name/revision/main" {
        let siblings = files.keys().map(list).collect::<Vec<_>>().join(", ");
        reply("200 OK", "", &format!(r#"{{"sha": "{COMMIT}", "siblings": [{siblings}]}}"#))
    } else if let Some(contents) = path.strip_prefix(&resolve).and_then(|name| files.get(name)) {
        let size = contents.len();
        let name = path.rsplit('/').next()?;
        let headers = format!(
            "etag: \"etag-{name}\"\r\nx-repo-commit: {COMMIT}\r\ncontent-range: bytes {first_byte}-{}/{size}\r\n",
            size - 1
        );
        reply("206 Partial Content", &headers, &contents[first_byte..])
    } else {
        reply("404 Not Found", "", "")
    };
    stream.write_all(text.as_bytes()).ok()
}

#[test]
fn a_model_is_downloaded_once_and_then_found_offline() {
    let remote = fake_hub(&[
        ("config.json", "{\"a\": 1}"),
        ("model.safetensors", "weights"),
        ("consolidated.safetensors", "a second copy"),
        ("pytorch_model.bin", "a third"),
        ("README.md", "words"),
        ("tokenizer.json", "{}"),
        ("original/config.json", "{}"),
        ("../escape.json", "{}"),
    ]);
    let cache = TempDir::new().unwrap();
    let online = ModelSource {
        endpoint: Some(format!("{}/", remote.endpoint)),
        offline: false,
        ..source(cache.path(), "org/name", None)
    };
    let mut finished = Vec::new();
    let mut watch = |download: Download<'_>| {
        if download.done_bytes == download.file_bytes {
            finished.push((download.file.to_owned(), download.n_files));
        }
    };
    let found = locate(&online, &mut watch).unwrap();
    assert_eq!(found.notice, None);
    let mut names: Vec<_> = fs::read_dir(&found.folder)
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read_to_string(found.folder.join("model.safetensors")).unwrap(), "weights");
    finished.dedup();
    assert_eq!(
        finished,
        ["config.json", "model.safetensors", "tokenizer.json"].map(|name| (name.to_owned(), 3))
    );
    // A second time only the list is asked for, and offline nothing.
    let asked_before = remote.asked.lock().unwrap().len();
    assert_eq!(locate(&online, &mut |_| ()).unwrap(), found);
    assert_eq!(remote.asked.lock().unwrap().len(), asked_before + 1);
    assert_eq!(offline(cache.path(), "org/name", Some("main")).unwrap(), found);
}

#[test]
fn without_safetensors_the_files_of_torch_are_downloaded() {
    let remote = fake_hub(&[
        ("config.json", "{}"),
        ("pytorch_model-00001-of-00001.bin", "weights"),
        ("pytorch_model.bin.index.json", r#"{"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}"#),
        ("training_args.bin", "a pickle"),
        ("tokenizer.model", "pieces"),
        ("qwen.tiktoken", "ranks"),
    ]);
    let cache = TempDir::new().unwrap();
    let endpoint = Some(remote.endpoint.clone());
    let online = ModelSource { endpoint, offline: false, ..source(cache.path(), "org/name", None) };
    let folder = locate(&online, &mut |_| ()).unwrap().folder;
    let has = |name: &str| folder.join(name).exists();
    assert!(has("pytorch_model-00001-of-00001.bin") && has("tokenizer.model") && has("qwen.tiktoken"));
    assert!(!has("training_args.bin"));
    // What was converted meanwhile stays, and is enough.
    write(&folder, &[("model.safetensors", "")]);
    assert_eq!(locate(&online, &mut |_| ()).unwrap().folder, folder);
}

#[test]
fn a_hub_that_fails_is_reported_or_replaced_by_the_cache() {
    let remote = fake_hub(&[("config.json", "{}"), ("tf_model.h5", "weights")]);
    let cache = TempDir::new().unwrap();
    let locate = |name| {
        let endpoint = Some(remote.endpoint.clone());
        locate(&ModelSource { endpoint, offline: false, ..source(cache.path(), name, None) }, &mut |_| ())
    };
    assert!(locate("org/name").unwrap_err().to_string().contains("the model has neither"));
    let refusal = locate("org/unknown").unwrap_err().to_string();
    assert!(refusal.starts_with("the list of files of org/unknown at main could not be had"), "{refusal}");
    let root = cache.path().join("models--org--unknown");
    write(&root.join("snapshots").join(COMMIT), &[("config.json", "{}"), ("model.safetensors", "")]);
    write(&root.join("refs"), &[("main", COMMIT)]);
    let found = locate("org/unknown").unwrap();
    assert!(found.notice.unwrap().ends_with("taking what the cache holds"));
}

#[test]
fn weights_may_lie_elsewhere() {
    let remote = fake_hub(&[("config.json", "{}"), ("model.safetensors", "weights")]);
    let cache = TempDir::new().unwrap();
    let elsewhere = cache.path().join("elsewhere");
    let source = ModelSource {
        endpoint: Some(remote.endpoint.clone()),
        offline: false,
        weights: WeightFiles::In(elsewhere.clone()),
        ..source(cache.path(), "org/name", None)
    };
    write(&elsewhere, &[]);
    assert!(locate(&source, &mut |_| ()).unwrap_err().to_string().contains("neither model.safetensors"));
    write(&elsewhere, &[("model.safetensors", "own")]);
    let found = locate(&source, &mut |_| ()).unwrap();
    assert_eq!(found.weights, elsewhere);
    let source = ModelSource { weights: WeightFiles::NotNeeded, ..source };
    let found = locate(&source, &mut |_| ()).expect("random weights need no files");
    assert!(!found.folder.join("model.safetensors").exists());
}
