//! MODEL on the command line → a local directory with config, tokenizer and weights.
//!
//! A directory is taken as it is. Anything else is the id of a model on the Hugging Face hub, kept in the cache that
//! its Python client uses too: `models--org--name/{refs/<revision>, snapshots/<commit>/…, blobs/…}`.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use hf_hub::api::Progress as HubProgress;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;

use crate::config::{ModelSource, WeightFiles};
use crate::error::{Error, Result};

const CONFIG_FILE: &str = "config.json";
/// A checkpoint in one piece and the list of one in several files, safetensors before what `torch.save` writes.
const CHECKPOINTS: [(&str, &str); 2] = [
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
];
/// The branch that is meant where none is named.
const DEFAULT_REVISION: &str = "main";

/// Whether a file is weights, by its name.
type IsWeights = fn(&str) -> bool;

/// How far a download is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Download<'a> {
    /// The file that is being fetched.
    pub file: &'a str,
    /// Its number, from 0.
    pub n_files_done: usize,
    /// Files to fetch.
    pub n_files: usize,
    /// Bytes of the file so far.
    pub done_bytes: u64,
    /// Bytes of the file.
    pub file_bytes: u64,
}

/// A model that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// The directory of config and tokenizer.
    pub folder: PathBuf,
    /// The directory of the weights: the same, unless the operator keeps weights elsewhere.
    pub weights: PathBuf,
    /// What is worth telling an operator.
    pub notice: Option<String>,
}

/// The directory of a model, downloaded if need be. Without a network what the cache holds is taken.
///
/// # Errors
/// [`Error::Invalid`] for what is neither a directory nor an id, [`Error::Checkpoint`] when the model cannot be had or
/// has no weights.
pub fn locate(source: &ModelSource, progress: &mut dyn FnMut(Download<'_>)) -> Result<Located> {
    let (folder, notice) = if Path::new(&source.name).is_dir() {
        (PathBuf::from(&source.name), None)
    } else {
        check_id(&source.name)?;
        let revision = source.revision.as_deref().unwrap_or(DEFAULT_REVISION);
        check_revision(revision)?;
        Hub::new(source)?.locate(&source.name, revision, progress)?
    };
    let weights = match &source.weights {
        WeightFiles::In(elsewhere) => elsewhere.clone(),
        WeightFiles::Beside | WeightFiles::NotNeeded => folder.clone(),
    };
    check_config(&folder)?;
    if source.weights != WeightFiles::NotNeeded {
        check_weights(&weights)?;
    }
    Ok(Located { folder, weights, notice })
}

/// The hub, and where its files are kept.
struct Hub {
    cache: PathBuf,
    token: Option<String>,
    endpoint: Option<String>,
    /// The network must not be asked.
    offline: bool,
    /// Weights lie elsewhere, or are not needed, so none are fetched.
    without_weights: bool,
}

impl Hub {
    fn new(source: &ModelSource) -> Result<Hub> {
        let usual = || std::env::home_dir().map(|home| home.join(".cache/huggingface/hub"));
        let cache = source.cache.clone().or_else(usual).ok_or_else(|| {
            Error::Invalid("there is no home directory to keep the hub's files in; set HF_HOME".to_owned())
        })?;
        let endpoint = source.endpoint.as_ref().map(|endpoint| endpoint.trim_end_matches('/').to_owned());
        let (token, without_weights) = (source.token.clone(), source.weights != WeightFiles::Beside);
        Ok(Hub { cache, token, endpoint, offline: source.offline, without_weights })
    }

    /// A revision's snapshot, and what is worth telling.
    fn locate(
        &self,
        model: &str,
        revision: &str,
        progress: &mut dyn FnMut(Download<'_>),
    ) -> Result<(PathBuf, Option<String>)> {
        let cached = self.cached(model, revision);
        if self.offline {
            let missing = || format!("{model} at {revision} is not in the cache, and HF_HUB_OFFLINE is set");
            return cached.map(|folder| (folder, None)).ok_or_else(|| Error::Checkpoint(missing()));
        }
        let complete = |folder: &PathBuf| {
            check_config(folder).is_ok() && (self.without_weights || check_weights(folder).is_ok())
        };
        match (self.download(model, revision, progress), cached) {
            (Ok(folder), _) => Ok((folder, None)),
            (Err(error), Some(folder)) if complete(&folder) => {
                Ok((folder, Some(format!("{error}; taking what the cache holds"))))
            }
            (Err(error), _) => Err(error),
        }
    }

    /// The snapshot of a revision in the cache.
    fn cached(&self, model: &str, revision: &str) -> Option<PathBuf> {
        let root = self.cache.join(repo(model, revision).folder_name());
        let commit = fs::read_to_string(root.join("refs").join(revision)).ok();
        let commit = commit.as_deref().map_or(revision, str::trim);
        let snapshot = root.join("snapshots").join(commit);
        (is_plain(commit) && snapshot.is_dir()).then_some(snapshot)
    }

    /// Fetches what is missing of a revision and points its ref to it.
    fn download(
        &self,
        model: &str,
        revision: &str,
        progress: &mut dyn FnMut(Download<'_>),
    ) -> Result<PathBuf> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            Error::Checkpoint(format!(
                "{what} of {model} at {revision} could not be had from the hub: {error}"
            ))
        };
        let cache = Cache::new(self.cache.clone());
        let mut builder = ApiBuilder::from_cache(cache.clone())
            .with_progress(false)
            .with_retries(3)
            .with_user_agent("kvshard", env!("CARGO_PKG_VERSION"));
        // Otherwise the one that the Python client's login keeps beside the cache.
        if self.token.is_some() {
            builder = builder.with_token(self.token.clone());
        }
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint.clone());
        }
        let api = builder.build().map_err(|error| failed("the list of files", &error))?;
        let info =
            api.repo(repo(model, revision)).info().map_err(|error| failed("the list of files", &error))?;
        if !is_plain(&info.sha) {
            return Err(failed("the commit", &"its name is none"));
        }
        // All files of one commit, whatever happens to the branch meanwhile.
        let pinned = repo(model, &info.sha);
        let cached = cache.repo(pinned.clone());
        let names: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
        let folder = cached.pointer_path(&info.sha);
        let weights = self.weight_files(&names)?;
        let is_missing = |name: &&String| {
            (is_small(name) || weights.is_some_and(|is_weight_file| is_weight_file(name)))
                && is_plain(name)
                && !folder.join(name).exists()
        };
        let missing: Vec<&String> = names.iter().filter(is_missing).collect();
        let remote = api.repo(pinned);
        for (number, name) in missing.iter().enumerate() {
            let report =
                Report { name, number, n_files: missing.len(), done: 0, size: 0, sink: &mut *progress };
            fetch(&remote, name, report).map_err(|error| failed(name, &error))?;
        }
        let pointed = cache.repo(repo(model, revision)).create_ref(&info.sha);
        pointed.map_err(|error| failed("the cache entry", &error))?;
        Ok(folder)
    }

    /// What tells the weight files of a repository from its others, where they are needed: those of `torch.save` are
    /// if there are no safetensors.
    fn weight_files(&self, names: &[String]) -> Result<Option<IsWeights>> {
        if self.without_weights {
            return Ok(None);
        }
        let kinds: [IsWeights; 2] = [is_safetensors, is_torch_file];
        let kind = kinds.into_iter().find(|is_weight_file| names.iter().any(|name| is_weight_file(name)));
        kind.map(Some).ok_or_else(no_weights)
    }
}

/// Whether a file is a config or a tokenizer's.
fn is_small(name: &str) -> bool {
    [".json", ".model", ".tiktoken", ".jinja", ".txt"].iter().any(|end| name.ends_with(end))
}

fn check_config(folder: &Path) -> Result<()> {
    if folder.join(CONFIG_FILE).is_file() {
        return Ok(());
    }
    Err(Error::Checkpoint(format!("the model's folder has no {CONFIG_FILE}")))
}

/// Checks that a directory holds every file of weights.
fn check_weights(folder: &Path) -> Result<()> {
    for (single, index) in CHECKPOINTS {
        if folder.join(single).is_file() {
            return Ok(());
        }
        if folder.join(index).is_file() {
            return check_listed(folder, index);
        }
    }
    Err(no_weights())
}

/// Checks that a directory holds every file that its index lists.
fn check_listed(folder: &Path, index_file: &str) -> Result<()> {
    let unreadable = |error: io::Error| Error::Checkpoint(format!("{index_file} cannot be read: {error}"));
    let index = fs::read(folder.join(index_file)).map_err(unreadable)?;
    let index: Value = serde_json::from_slice(&index).map_err(|error| unreadable(error.into()))?;
    let files = index.get("weight_map").and_then(Value::as_object).into_iter().flat_map(|map| map.values());
    let missing =
        files.filter_map(Value::as_str).find(|file| !is_plain(file) || !folder.join(file).is_file());
    match missing {
        Some(file) => Err(Error::Checkpoint(format!("{index_file} lists {file:.100}, which is not there"))),
        None => Ok(()),
    }
}

fn no_weights() -> Error {
    let names = CHECKPOINTS.map(|(single, index)| format!("{single} nor {index}"));
    Error::Checkpoint(format!("the model has neither {}", names.join(", nor ")))
}

/// Whether a file is safetensors of ours. Some repositories hold a second copy in the authors' own layout.
fn is_safetensors(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.starts_with("consolidated") && !name.starts_with("adapter")
}

/// Whether a file is weights as `torch.save` writes them.
fn is_torch_file(name: &str) -> bool {
    name.starts_with("pytorch_model") && name.ends_with(".bin")
}

/// Whether a name stays in its directory.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
}

/// Ids are `name` or `organisation/name` in the hub's alphabet.
fn check_id(model: &str) -> Result<()> {
    let is_part = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && part.len() <= 96 && part.chars().all(allowed) && !part.starts_with(['.', '-'])
    };
    let parts: Vec<&str> = model.split('/').collect();
    if parts.len() <= 2 && parts.iter().all(|part| is_part(part)) && !model.contains("..") {
        return Ok(());
    }
    Err(Error::Invalid(format!("{model:?} is neither a directory nor the id of a model on the hub")))
}

/// Revisions become paths in the cache.
fn check_revision(revision: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | '+');
    let plain = revision.split('/').all(is_plain);
    if plain && revision.chars().all(allowed) {
        return Ok(());
    }
    Err(Error::Invalid(format!("{revision:?} is not the name of a revision")))
}

fn repo(model: &str, revision: &str) -> Repo {
    Repo::with_revision(model.to_owned(), RepoType::Model, revision.to_owned())
}

fn fetch(remote: &ApiRepo, name: &str, report: Report<'_>) -> io::Result<()> {
    remote.download_with_progress(name, report).map(drop).map_err(io::Error::other)
}

/// Passes a download's progress on.
struct Report<'a> {
    name: &'a str,
    number: usize,
    n_files: usize,
    done: u64,
    size: u64,
    sink: &'a mut dyn FnMut(Download<'_>),
}

impl Report<'_> {
    fn tell(&mut self) {
        let Report { name, number, n_files, done, size, .. } = *self;
        (self.sink)(Download {
            file: name,
            n_files_done: number,
            n_files,
            done_bytes: done,
            file_bytes: size,
        });
    }
}

impl HubProgress for Report<'_> {
    fn init(&mut self, size: usize, _: &str) {
        (self.done, self.size) = (0, size as u64);
        self.tell();
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        self.tell();
    }

    fn finish(&mut self) {
        self.tell();
    }
}

#[cfg(test)]
mod tests;
