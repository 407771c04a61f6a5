//! From a configuration to a loaded model behind an engine.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;

use super::intake::Intake;
use super::memory::available_bytes;
use crate::config::{ModelSource, ShardConfig};
use crate::engine::{EngineConfig, EngineHandle};
use crate::error::{Error, Result};
use crate::model::executor::Executor;
use crate::model::spec::DecoderSpec;
use crate::sampling::Limits;
use crate::telemetry::Progress;
use crate::text::Tokenizer;

/// A batch on own slots that nobody asked for in this time is dropped.
const ABANDONED_AFTER: Duration = Duration::from_secs(600);
/// When own slots run short, such a batch goes if nobody asked for it in this time; whoever is there asks each step.
const RECLAIMABLE_AFTER: Duration = Duration::from_secs(10);

/// What is known of a model before its weights are read.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadPlan {
    /// Its folder.
    pub folder: PathBuf,
    /// What its decoder is.
    pub spec: DecoderSpec,
    /// Bytes of keys and values a slot, over all layers and ranks.
    pub kv_bytes_per_slot: u64,
    /// Slots of the pool.
    pub n_slots: u32,
    /// Bytes of the model's weight files.
    pub weight_bytes: u64,
}

/// A loaded model, ready to be served.
pub struct Loaded {
    /// The way to it.
    pub engine: EngineHandle,
    /// What requests are checked against.
    pub intake: Intake,
}

/// Finds a model's files, reads what they say of its shape, and sizes the pool. Blocks; asks the network where the
/// model is not local.
///
/// # Errors
/// [`Error::Checkpoint`] and [`Error::Unsupported`] for the model, [`Error::Exhausted`] for the pool.
pub fn plan(config: &ShardConfig) -> Result<LoadPlan> {
    let folder = resolve_folder(&config.source)?;
    let spec = read_spec(&folder, config)?;
    let kv_bytes_per_slot = kv_bytes_per_slot(&spec)
        .ok_or_else(|| Error::Checkpoint("the model's heads and layers are impossibly large".to_owned()))?;
    let n_slots = config.pool_slots(kv_bytes_per_slot, available_bytes()).map_err(Error::Exhausted)?;
    let weight_bytes = weight_bytes(&folder);
    Ok(LoadPlan { folder, spec, kv_bytes_per_slot, n_slots, weight_bytes })
}

/// Loads tokenizer and weights, and starts the engine. Blocks until that is done.
///
/// # Errors
/// As [`plan`], and whatever is wrong with the weights.
pub fn load(config: &ShardConfig) -> Result<Loaded> {
    let plan = plan(config)?;
    let tokenizer = Arc::new(Tokenizer::load(&plan.folder)?);
    let eos = end_of_text_ids(&plan.folder, tokenizer.eos())?;
    let own_slots = config.own_slots_of(plan.n_slots);
    let kv_mib = u64::from(plan.n_slots).saturating_mul(plan.kv_bytes_per_slot) >> 20;
    tracing::info!(
        "{}: a pool of {} slots ({kv_mib} MiB), {own_slots} of them for requests without slots",
        plan.spec.family,
        plan.n_slots
    );
    let engine_config = EngineConfig {
        own_slots,
        max_prefill_tokens: config.max_prefill_tokens,
        eos: eos.clone(),
        abandoned_after: ABANDONED_AFTER,
        reclaimable_after: RECLAIMABLE_AFTER,
    };
    let model_names = model_names(&config.source, &plan.folder);
    let (build_config, build_plan) = (config.clone(), plan);
    let build = move || {
        let progress = Progress::new("loading weights");
        let executor = build_executor(&build_config, &build_plan, &progress);
        progress.finish();
        executor
    };
    let engine = EngineHandle::start(engine_config, tokenizer.clone(), build)?;
    let limits = Limits { vocab: engine.model().vocab, watermark: config.watermark };
    let intake = Intake {
        tokenizer,
        eos,
        limits,
        prompt_logprobs: config.prompt_logprobs,
        model_names,
        adapter_warning: Mutex::new(None),
    };
    Ok(Loaded { engine, intake })
}

/// A local directory or a hub id → a local directory. LINK: hub ids, by `hub`.
///
/// # Errors
/// [`Error::Checkpoint`] when the model is neither here nor to be had.
pub fn resolve_folder(source: &ModelSource) -> Result<PathBuf> {
    let path = PathBuf::from(&source.name);
    if path.is_dir() {
        return Ok(path);
    }
    Err(Error::Checkpoint(format!("{} is not a local directory", source.name)))
}

/// LINK: a model folder → what its decoder is, by `model::families`; `config.rope` goes before the checkpoint's.
fn read_spec(_folder: &Path, _config: &ShardConfig) -> Result<DecoderSpec> {
    Err(Error::Unsupported("this build knows no model families".to_owned()))
}

/// LINK: reads the weights and makes the executor of `plan`; runs on the engine's thread. `progress` takes bytes.
fn build_executor(
    _config: &ShardConfig,
    _plan: &LoadPlan,
    _progress: &Progress,
) -> Result<Box<dyn Executor>> {
    Err(Error::Unsupported("this build knows no model families".to_owned()))
}

/// Bytes of the safetensors files in a folder.
fn weight_bytes(folder: &Path) -> u64 {
    let Ok(files) = fs::read_dir(folder) else { return 0 };
    let files = files.filter_map(|file| Some(file.ok()?.path()));
    let weights = files.filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    weights.filter_map(|path| Some(fs::metadata(path).ok()?.len())).sum()
}

/// Keys and values of all layers in f32, as the CPU keeps them. `None` when they overflow.
fn kv_bytes_per_slot(spec: &DecoderSpec) -> Option<u64> {
    let width = spec.attention.kv_heads.checked_mul(spec.attention.head_dim)?;
    let numbers = width.checked_mul(spec.masks.len())?.checked_mul(2)?;
    u64::try_from(numbers).ok()?.checked_mul(4)
}

/// The ids that end a text, sorted: `generation_config.json`'s where it lists several, else the tokenizer's, else
/// whatever single one the model's files name.
fn end_of_text_ids(folder: &Path, of_tokenizer: Option<u32>) -> Result<Arc<[u32]>> {
    let mut ids = match (named_eos(folder, "generation_config.json")?, of_tokenizer) {
        (Some(Eos::Several(ids)), _) => ids,
        (_, Some(id)) => vec![id],
        (Some(Eos::One(id)), None) => vec![id],
        (None, None) => match named_eos(folder, "config.json")? {
            Some(Eos::Several(ids)) => ids,
            Some(Eos::One(id)) => vec![id],
            None => Vec::new(),
        },
    };
    ids.sort_unstable();
    ids.dedup();
    if ids.is_empty() {
        tracing::warn!(
            "the model's files name no end of text: requests end by length and stop sequences only"
        );
    }
    Ok(ids.into())
}

/// `eos_token_id` as files have it.
enum Eos {
    One(u32),
    Several(Vec<u32>),
}

fn named_eos(folder: &Path, file: &str) -> Result<Option<Eos>> {
    let Ok(text) = fs::read(folder.join(file)) else { return Ok(None) };
    let wrong = |why: String| Error::Checkpoint(format!("{file}: {why}"));
    let config: Value = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| wrong(format!("eos_token_id has {value}, which is no token")))
    };
    match config.get("eos_token_id") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Array(values)) => Ok(Some(Eos::Several(values.iter().map(id).collect::<Result<_>>()?))),
        Some(value) => Ok(Some(Eos::One(id(value)?))),
    }
}

/// Names by which clients call the model: routers pass them on as adapters.
fn model_names(source: &ModelSource, folder: &Path) -> Vec<String> {
    let last = folder.file_name().map(|name| name.to_string_lossy().into_owned());
    [Some(source.name.clone()), Some(folder.to_string_lossy().into_owned()), last, Some("tgi".to_owned())]
        .into_iter()
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_in_the_generation_config_goes_before_the_tokenizer() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |file: &str, text: &str| fs::write(folder.path().join(file), text).expect("written");
        let ids = |of_tokenizer| end_of_text_ids(folder.path(), of_tokenizer).map(|ids| ids.to_vec());
        assert_eq!(ids(None), Ok(vec![]));
        assert_eq!(ids(Some(2)), Ok(vec![2]));
        write("config.json", r#"{"eos_token_id": 9}"#);
        assert_eq!(ids(None), Ok(vec![9]));
        assert_eq!(ids(Some(2)), Ok(vec![2]));
        write("generation_config.json", r#"{"eos_token_id": 5}"#);
        assert_eq!(ids(None), Ok(vec![5]));
        assert_eq!(ids(Some(2)), Ok(vec![2]));
        write("generation_config.json", r#"{"eos_token_id": [7, 3, 7]}"#);
        assert_eq!(ids(Some(2)), Ok(vec![3, 7]));
        write("generation_config.json", r#"{"eos_token_id": null}"#);
        assert_eq!(ids(Some(2)), Ok(vec![2]));
    }

    #[test]
    fn a_broken_file_is_the_checkpoints_fault() {
        let folder = tempfile::tempdir().expect("a folder");
        for text in
            ["{", r#"{"eos_token_id": -1}"#, r#"{"eos_token_id": [1, "a"]}"#, r#"{"eos_token_id": 5e9}"#]
        {
            fs::write(folder.path().join("generation_config.json"), text).expect("written");
            assert!(matches!(end_of_text_ids(folder.path(), Some(1)), Err(Error::Checkpoint(_))), "{text}");
        }
    }
}
