//! The architecture's rules, read off the sources: a rule that is not checked is a wish.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What each top-level module may import, beside itself, `ids`, `error` and `config`.
const MAY_IMPORT: [(&str, &[&str]); 17] = [
    ("ids", &[]),
    ("error", &[]),
    ("backend", &["model"]),
    ("model", &["backend"]),
    ("pool", &[]),
    ("sampling", &["backend"]),
    ("text", &[]),
    ("batch", &["pool", "sampling", "text", "backend", "model"]),
    ("engine", &["batch", "pool", "sampling", "text", "backend", "model"]),
    ("pb", &[]),
    ("server", &["engine", "batch", "sampling", "text", "backend", "model", "pb", "hub", "telemetry"]),
    ("client", &["pb"]),
    ("config", &["backend", "cli", "hub", "model", "client"]),
    ("cli", &[]),
    ("hub", &[]),
    ("telemetry", &["pb"]),
    ("commands", &["cli", "client", "engine", "hub", "model", "server", "telemetry", "text"]),
];

/// Modules that are values in, values out.
const CORE: [&str; 7] = ["pool", "batch", "sampling", "text", "model", "backend", "ids"];

/// Where `unsafe` may stand.
const UNSAFE: [&str; 3] = ["src/backend/cpu/matmul", "src/backend/cuda/", "src/model/checkpoint"];

/// The only place of `tonic::Status`.
const STATUS: [&str; 4] = ["src/server/status", "src/server/v2", "src/server/v3", "src/server/telemetry"];

/// Every source file below a folder of the repository: its path from there, and its lines without comments.
fn sources(folder: &str) -> Vec<(String, Vec<String>)> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    collect(&root.join(folder), &mut files);
    files.sort();
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        let lines =
            text.lines().map(|line| if line.trim_start().starts_with("//") { "" } else { line }.into());
        (path.strip_prefix(&root).unwrap().to_string_lossy().into_owned(), lines.collect())
    };
    files.into_iter().map(read).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

/// The top-level module that a file of `src/` belongs to.
fn module(path: &str) -> &str {
    let rest = path.strip_prefix("src/").unwrap();
    rest.split('/').next().unwrap().trim_end_matches(".rs")
}

/// Whether a file holds tests only.
fn is_test(path: &str) -> bool {
    path.ends_with("tests.rs") || path.contains("/tests/")
}

/// The lines of a file before its inline tests.
fn without_tests(lines: &[String]) -> &[String] {
    let end = lines.iter().position(|line| line.trim() == "mod tests {").unwrap_or(lines.len());
    &lines[..end]
}

fn check(rule: impl Fn(&str, &[String]) -> Vec<String>) {
    let broken: Vec<String> = sources("src").iter().flat_map(|(path, lines)| rule(path, lines)).collect();
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

/// Lines that hold one of `words`, as complaints.
fn holding(path: &str, lines: &[String], words: &[&str], why: &str) -> Vec<String> {
    let found = lines.iter().enumerate().filter(|(_, line)| words.iter().any(|word| line.contains(word)));
    found.map(|(index, line)| format!("{path}:{}: {why}: {}", index + 1, line.trim())).collect()
}

#[test]
fn imports_follow_the_arrows() {
    let allowed: BTreeMap<&str, &[&str]> = MAY_IMPORT.into_iter().collect();
    check(|path, lines| {
        let module = module(path);
        if is_test(path) || ["main", "lib", "bin"].contains(&module) {
            return Vec::new();
        }
        let Some(may) = allowed.get(module) else {
            return vec![format!("{path}: module {module} has no rule")];
        };
        let mut broken = Vec::new();
        for (index, line) in without_tests(lines).iter().enumerate() {
            for imported in line.split("crate::").skip(1) {
                let end = imported.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(imported.len());
                let imported = &imported[..end];
                let free = ["", "ids", "error", "config", module].contains(&imported);
                if !free && !may.contains(&imported) {
                    broken.push(format!("{path}:{}: {module} imports {imported}", index + 1));
                }
            }
        }
        broken
    });
}

#[test]
fn unsafe_code_stands_where_the_design_puts_it() {
    check(|path, lines| {
        if UNSAFE.iter().any(|allowed| path.starts_with(allowed)) {
            return Vec::new();
        }
        holding(path, lines, &["unsafe ", "allow(unsafe_code)"], "unsafe code")
    });
}

#[test]
fn the_core_has_no_clock_wire_environment_or_log() {
    check(|path, lines| {
        if !CORE.contains(&module(path)) || is_test(path) {
            return Vec::new();
        }
        let words = [
            "tokio::",
            "tonic",
            "prost",
            "tracing::",
            "std::env",
            "Instant::now",
            "SystemTime",
            "println!",
            "async ",
        ];
        holding(path, without_tests(lines), &words, "no business of the core")
    });
}

#[test]
fn only_the_command_line_reads_the_environment() {
    check(|path, lines| {
        if module(path) == "cli" || is_test(path) {
            return Vec::new();
        }
        holding(path, without_tests(lines), &["env::var", "env::vars"], "reads the environment")
    });
}

#[test]
fn wire_types_and_statuses_stay_at_the_edge() {
    check(|path, lines| {
        let mut broken = Vec::new();
        if !["server", "client", "pb"].contains(&module(path)) {
            broken.extend(holding(path, without_tests(lines), &["crate::pb", "tonic::"], "a wire type"));
        }
        if module(path) == "server" && !STATUS.iter().any(|allowed| path.starts_with(allowed)) {
            broken.extend(holding(
                path,
                without_tests(lines),
                &[" Status::", "(Status::", "tonic::Code"],
                "builds a status",
            ));
        }
        broken
    });
}

#[test]
fn families_are_named_in_their_files_only() {
    check(|path, lines| {
        if path.starts_with("src/model/families") || is_test(path) {
            return Vec::new();
        }
        holding(path, without_tests(lines), &["family ==", "family !="], "asks for the family")
    });
}

#[test]
fn no_file_attracts_what_has_no_place() {
    let attractors = ["utils", "util", "common", "helpers", "helper", "misc", "manager"];
    for (path, _) in sources("src").iter().chain(&sources("integration")) {
        let name = Path::new(path).file_stem().unwrap().to_string_lossy().into_owned();
        assert!(!attractors.contains(&name.as_str()), "{path}");
    }
}

#[test]
fn tests_are_neither_ignored_nor_unfinished() {
    for (path, lines) in sources("src").iter().chain(&sources("integration")) {
        if path.ends_with("tidy.rs") {
            continue;
        }
        let broken = holding(path, lines, &["#[ignore", "todo!(", "unimplemented!(", "dbg!("], "unfinished");
        assert!(broken.is_empty(), "\n{}", broken.join("\n"));
    }
}
