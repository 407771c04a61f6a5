//! MODEL on the command line → a local directory with config, tokenizer and safetensors.
//!
//! A directory is taken as it is. Anything else is the id of a model on the Hugging Face hub, kept in the cache that
//! its Python client uses too: `models--org--name/{refs/<revision>, snapshots/<commit>/…, blobs/…}`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hf_hub::api::Progress as HubProgress;
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::checkpoint::{INDEX_FILE, SINGLE_FILE, read_limited};
use crate::model::families::CONFIG_FILE;

/// The branch that is meant where none is named.
const DEFAULT_REVISION: &str = "main";
/// Longest index, as for a checkpoint's.
const MAX_INDEX_BYTES: u64 = 100_000_000;

/// Values of the environment variables that the hub's clients share, as found.
#[derive(Debug, Clone, Default)]
pub struct HubVariables {
    /// `HF_HOME`: cache and token lie below it.
    pub hf_home: Option<String>,
    /// `HF_HUB_CACHE`: the cache itself.
    pub hf_hub_cache: Option<String>,
    /// `HUGGINGFACE_HUB_CACHE`: the older name of `HF_HUB_CACHE`, which TGI's images set.
    pub huggingface_hub_cache: Option<String>,
    /// `XDG_CACHE_HOME`.
    pub xdg_cache_home: Option<String>,
    /// `HOME`.
    pub home: Option<String>,
    /// `HF_HUB_OFFLINE`: 1, on, yes or true for no network.
    pub hf_hub_offline: Option<String>,
    /// `HF_TOKEN`: for private and gated models.
    pub hf_token: Option<String>,
    /// `HF_ENDPOINT`: a mirror.
    pub hf_endpoint: Option<String>,
}

/// Where models come from.
#[derive(Clone)]
pub struct Hub {
    cache: PathBuf,
    token: Option<String>,
    endpoint: Option<String>,
    network: Network,
}

/// Whether the hub may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Network {
    Allowed,
    Forbidden,
}

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
    /// Its directory.
    pub folder: PathBuf,
    /// What is worth telling an operator.
    pub notice: Option<String>,
}

impl Hub {
    /// The hub as the environment describes it; the first of `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME`,
    /// `XDG_CACHE_HOME` and `HOME` decides where the cache is, as in `huggingface_hub`.
    pub fn new(variables: HubVariables) -> Hub {
        let path = |value: Option<String>| value.filter(|value| !value.is_empty()).map(PathBuf::from);
        let user_cache =
            path(variables.xdg_cache_home).or(path(variables.home).map(|home| home.join(".cache")));
        let user_cache = user_cache.unwrap_or_else(|| PathBuf::from(".cache"));
        let home = path(variables.hf_home).unwrap_or_else(|| user_cache.join("huggingface"));
        let cache = path(variables.hf_hub_cache)
            .or(path(variables.huggingface_hub_cache))
            .unwrap_or_else(|| home.join("hub"));
        let token = variables.hf_token.or_else(|| fs::read_to_string(home.join("token")).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let offline = variables.hf_hub_offline.unwrap_or_default().to_ascii_lowercase();
        let network = match offline.as_str() {
            "1" | "on" | "yes" | "true" => Network::Forbidden,
            _ => Network::Allowed,
        };
        let endpoint = variables.hf_endpoint.map(|endpoint| endpoint.trim_end_matches('/').to_owned());
        Hub { cache, token, endpoint: endpoint.filter(|endpoint| !endpoint.is_empty()), network }
    }

    /// The directory of a model, downloaded if need be; `revision` is a branch, a tag or a commit. Without a network
    /// what the cache holds is taken.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is neither a directory nor an id, [`Error::Checkpoint`] when the model cannot be had
    /// or has no safetensors.
    pub fn locate(
        &self,
        model: &str,
        revision: Option<&str>,
        progress: &mut dyn FnMut(Download<'_>),
    ) -> Result<Located> {
        let folder = Path::new(model);
        if folder.is_dir() {
            check_files(folder)?;
            return Ok(Located { folder: folder.to_owned(), notice: None });
        }
        check_id(model)?;
        let revision = revision.filter(|revision| !revision.is_empty()).unwrap_or(DEFAULT_REVISION);
        check_revision(revision)?;
        let cached = self.cached(model, revision);
        if self.network == Network::Forbidden {
            let folder = cached.ok_or_else(|| {
                Error::Checkpoint(format!(
                    "{model} at {revision} is not in the cache, and HF_HUB_OFFLINE is set"
                ))
            })?;
            check_files(&folder)?;
            return Ok(Located { folder, notice: None });
        }
        match (self.download(model, revision, progress), cached) {
            (Ok(folder), _) => {
                check_files(&folder)?;
                Ok(Located { folder, notice: None })
            }
            (Err(error), Some(folder)) if check_files(&folder).is_ok() => {
                Ok(Located { folder, notice: Some(format!("{error}; taking what the cache holds")) })
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
            .with_token(self.token.clone())
            .with_user_agent("kvshard", env!("CARGO_PKG_VERSION"));
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
        let missing: Vec<String> =
            wanted(&names).into_iter().filter(|name| !folder.join(name).exists()).collect();
        if !names.iter().any(|name| is_weight_file(name)) {
            return Err(no_safetensors(&names));
        }
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
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let token = if self.token.is_some() { "with a token" } else { "without a token" };
        write!(f, "Hub({:?}, {:?}, {token})", self.cache, self.network)
    }
}

/// Checks that a directory holds what serving needs: a config, and every safetensors file.
///
/// # Errors
/// [`Error::Checkpoint`] with the first file that is missing.
pub fn check_files(folder: &Path) -> Result<()> {
    if !folder.join(CONFIG_FILE).is_file() {
        return Err(Error::Checkpoint(format!("the model's folder has no {CONFIG_FILE}")));
    }
    if folder.join(SINGLE_FILE).is_file() {
        return Ok(());
    }
    if !folder.join(INDEX_FILE).is_file() {
        let files = fs::read_dir(folder).into_iter().flatten().flatten();
        let names: Vec<String> = files.map(|file| file.file_name().to_string_lossy().into_owned()).collect();
        return Err(no_safetensors(&names));
    }
    let index = read_limited(&folder.join(INDEX_FILE), INDEX_FILE, MAX_INDEX_BYTES)?;
    let index: Value = serde_json::from_slice(&index)
        .map_err(|error| Error::Checkpoint(format!("{INDEX_FILE} cannot be read: {error}")))?;
    let files = index.get("weight_map").and_then(Value::as_object).into_iter().flat_map(|map| map.values());
    let missing =
        files.filter_map(Value::as_str).find(|file| !is_plain(file) || !folder.join(file).is_file());
    match missing {
        Some(file) => Err(Error::Checkpoint(format!("{INDEX_FILE} lists {file:.100}, which is not there"))),
        None => Ok(()),
    }
}

fn no_safetensors(names: &[String]) -> Error {
    let pickled = names.iter().any(|name| name.starts_with("pytorch_model") && name.ends_with(".bin"));
    Error::Checkpoint(if pickled {
        "the model has its weights as pytorch_model*.bin only, which cannot be read yet; convert them to safetensors"
            .to_owned()
    } else {
        format!("the model has neither {SINGLE_FILE} nor {INDEX_FILE}")
    })
}

/// The files of a repository that serving needs: configs, tokenizers and weights at its top.
fn wanted(names: &[String]) -> Vec<String> {
    let is_small = |name: &str| {
        let ends = [".json", ".model", ".tiktoken", ".jinja", ".txt"];
        ends.iter().any(|end| name.ends_with(end))
    };
    let wanted = names.iter().filter(|name| is_plain(name) && (is_small(name) || is_weight_file(name)));
    wanted.cloned().collect()
}

/// Whether a file is weights in our format. Some repositories hold a second copy in the authors' own layout.
fn is_weight_file(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.starts_with("consolidated") && !name.starts_with("adapter")
}

/// Whether a name stays in its directory.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(_)), None))
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
