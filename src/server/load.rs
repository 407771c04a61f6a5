//! From a configuration to a loaded model behind an engine.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;

use super::intake::Intake;
use super::memory::available_bytes;
use crate::config::{Compute, Dtype, LoadFormat, ModelSource, RopeOverride, RopeScalingKind, ShardConfig};
use crate::engine::{EngineConfig, EngineHandle, check_sizes};
use crate::error::{Error, Result};
use crate::hub::{self, Located};
use crate::model::checkpoint::{Checkpoint, DType};
use crate::model::executor::{Executor, ModelInfo};
use crate::model::families::{self, Resolved};
use crate::model::inject::Injector;
use crate::model::plan::{MemoryPlan, PlanOptions};
use crate::model::rank::HEADROOM_BYTES;
use crate::model::spec::{Positions, RopeScaling};
use crate::model::weights::Weights;
use crate::model::{self, Device, Options, PoolSize};
use crate::sampling::Limits;
use crate::telemetry::Progress;
use crate::text::Tokenizer;

/// A batch on own slots that nobody asked for in this time is dropped.
const ABANDONED_AFTER: Duration = Duration::from_secs(600);
/// When own slots run short, such a batch goes if nobody asked for it in this time; whoever is there asks each step.
const RECLAIMABLE_AFTER: Duration = Duration::from_secs(10);
/// Of random weights: the same model every time.
const DUMMY_SEED: u64 = 1;

/// What is known of a model before its weights are read.
pub struct LoadPlan {
    /// Where its files are.
    pub located: Located,
    /// What its decoder is.
    pub model: Resolved,
    /// Slots of the pool; on a GPU an estimate, unless the operator asked for so many.
    pub n_slots: u32,
    /// Where it computes.
    pub device: Device,
    /// What it takes.
    pub memory: MemoryPlan,
    weights: Weights,
}

/// A loaded model, ready to be served.
pub struct Loaded {
    /// The way to it.
    pub engine: EngineHandle,
    /// What requests are checked against.
    pub intake: Intake,
}

/// Finds a model's files and reads its configuration. Blocks; asks the network where the model is not local.
///
/// # Errors
/// [`Error::Checkpoint`] and [`Error::Unsupported`] for the model.
pub fn describe(config: &ShardConfig) -> Result<(Located, Resolved)> {
    let located = locate(&config.source)?;
    let model = read_model(&located.folder, config)?;
    Ok((located, model))
}

/// Checks a described model's weights, without reading them, and sizes the pool.
///
/// # Errors
/// [`Error::Checkpoint`] for the weights, [`Error::Exhausted`] for the pool.
pub fn plan(config: &ShardConfig, (located, model): (Located, Resolved)) -> Result<LoadPlan> {
    // Stored weights stay as they are; only random ones can be made in another dtype.
    let dtype = config.dtype.map(stored).or(model.dtype).unwrap_or(DType::F32);
    let (spec, names) = (&model.spec, &model.names);
    let checkpoint = match config.load_format {
        LoadFormat::Auto => Checkpoint::open(&located.weights)?,
        // A plan needs their shapes only.
        LoadFormat::Dummy => Checkpoint::dummy_unmade(spec, names, dtype, DUMMY_SEED),
    };
    let weights = Weights::open(&checkpoint, &model.spec, &model.names)?;
    let mut options = PlanOptions {
        world: config.world_size,
        n_slots: 0,
        // One more than requests may take: a probe's.
        n_lanes: u64::from(config.max_lanes) + 1,
        max_step_tokens: u64::from(config.max_step_tokens),
        weight_dtype: dtype,
        ..PlanOptions::default()
    };
    let device = device_of(&config.compute, dtype);
    if let Device::Cuda { dtype } = device {
        (options.activation_dtype, options.kv_dtype) = (dtype, dtype);
        (options.lane_counts, options.headroom_bytes) = (true, HEADROOM_BYTES);
    }
    let without_pool = MemoryPlan::new(&model, Some(&weights), &options)?;
    let available = available_bytes(&config.compute, config.world_size);
    let n_slots = match (&config.compute, config.pool_tokens, available) {
        (Compute::Cuda { .. }, None, Some(available)) => {
            let fit = slots_that_fit(&without_pool, config.world_size, available)?;
            let useful = options.n_lanes.saturating_mul(model.spec.max_positions as u64);
            fit.min(u32::try_from(useful).unwrap_or(u32::MAX))
        }
        _ => config.pool_slots(without_pool.kv_bytes_per_slot, available).map_err(Error::Exhausted)?,
    };
    check_sizes(
        n_slots,
        config.own_slots_of(n_slots),
        config.max_lanes.saturating_add(1),
        config.max_step_tokens,
    )?;
    options.n_slots = u64::from(n_slots);
    let memory = MemoryPlan::new(&model, Some(&weights), &options)?;
    match config.compute {
        Compute::Cpu { .. } => check_memory(&memory, config.world_size, available)?,
        // What is there counts once the weights are; a plan that cannot work is refused before.
        Compute::Cuda { .. } => check_gpu_memory(&memory, available)?,
    }
    Ok(LoadPlan { located, model, n_slots, device, memory, weights })
}

/// What is computed in: on a GPU the 16-bit dtype that was asked for, or in which weights are stored.
fn device_of(compute: &Compute, dtype: DType) -> Device {
    match compute {
        Compute::Cpu { .. } => Device::Cpu,
        Compute::Cuda { .. } if dtype == DType::F16 => Device::Cuda { dtype },
        Compute::Cuda { .. } => Device::Cuda { dtype: DType::BF16 },
    }
}

/// Slots for which a GPU of `available` bytes has room beside everything else.
fn slots_that_fit(plan: &MemoryPlan, world: usize, available: u64) -> Result<u32> {
    let spare = available.saturating_sub(plan.rank_total_bytes);
    let rank_slot = (plan.kv_bytes_per_slot / world.max(1) as u64).max(1);
    let n_slots = spare / rank_slot;
    if n_slots < 2 {
        check_gpu_memory(plan, Some(available))?;
        return Err(Error::Exhausted(format!(
            "no memory for a KV pool: one token takes {} KiB",
            rank_slot >> 10
        )));
    }
    Ok(u32::try_from(n_slots).unwrap_or(u32::MAX))
}

/// Whether a rank's part fits into its GPU.
fn check_gpu_memory(plan: &MemoryPlan, available: Option<u64>) -> Result<()> {
    let mebibytes = |bytes: u64| bytes >> 20;
    match available {
        Some(available) if plan.rank_total_bytes > available => Err(Error::Exhausted(format!(
            "a rank needs {} MiB of GPU memory (weights {}, intermediates {}, logits {}, lanes {}, pool {}, left free {}) \
             and may use {}: lower --max-lanes, --max-batch-prefill-tokens or --pool-tokens",
            mebibytes(plan.rank_total_bytes),
            mebibytes(plan.rank_weight_bytes),
            mebibytes(plan.activation_bytes),
            mebibytes(plan.logit_bytes),
            mebibytes(plan.lane_bytes),
            mebibytes(plan.rank_kv_bytes),
            mebibytes(plan.headroom_bytes),
            mebibytes(available),
        ))),
        _ => Ok(()),
    }
}

/// Loads tokenizer and weights, and starts the engine. Blocks until that is done.
///
/// # Errors
/// As [`describe`] and [`plan`], and whatever is wrong with the weights.
pub fn load(config: &ShardConfig) -> Result<Loaded> {
    let fault = config.fault;
    if let Some(fault) = fault {
        tracing::warn!("a fault is ordered: {fault}");
    }
    load_around(config, move |executor| match fault {
        Some(fault) => Box::new(Injector::new(executor, fault)),
        None => executor,
    })
}

/// As [`load`], with the model's executor put into another one on the engine's thread; an ordered fault is ignored.
///
/// # Errors
/// As [`load`].
pub fn load_around(
    config: &ShardConfig,
    around: impl FnOnce(Box<dyn Executor>) -> Box<dyn Executor> + Send + 'static,
) -> Result<Loaded> {
    let mut plan = plan(config, describe(config)?)?;
    if config.load_format == LoadFormat::Dummy && plan.device == Device::Cpu {
        // A GPU makes them itself.
        let (Resolved { spec, names, .. }, dtype) = (&plan.model, plan.weights.dtype());
        let made = Checkpoint::dummy(spec, names, dtype, DUMMY_SEED)?;
        plan.weights = Weights::open(&made, spec, names)?;
    }
    let folder = plan.located.folder.clone();
    let tokenizer = Arc::new(tokenizer(config.load_format, &folder, plan.model.spec.vocab)?);
    let eos = end_of_text_ids(&folder, tokenizer.eos())?;
    tell(&plan, config);
    let engine_config = EngineConfig {
        own_slots: config.own_slots,
        max_prefill_tokens: config.max_prefill_tokens,
        eos: eos.clone(),
        abandoned_after: ABANDONED_AFTER,
        reclaimable_after: RECLAIMABLE_AFTER,
        run_ahead: config.run_ahead,
    };
    let options = Options {
        device: plan.device,
        n_ranks: config.world_size,
        pool: pool_size(config, plan.n_slots),
        graphs: config.graphs,
        fault: config.fault,
        n_lanes: config.max_lanes as usize + 1,
        max_step_tokens: config.max_step_tokens as usize,
    };
    let build = move || {
        let progress = Progress::new("loading weights");
        let LoadPlan { model, weights, .. } = plan;
        let parts = move |role, shard| weights.part(role, shard);
        let report = |done, total| progress.report(done, total);
        let executor = model::load(model.spec, parts, options, &report);
        progress.finish();
        executor.map(around)
    };
    let engine = EngineHandle::start(engine_config, tokenizer.clone(), build)?;
    tell_taken(engine.model());
    let limits = Limits { vocab: engine.model().vocab, watermark: config.watermark };
    let intake = Intake {
        tokenizer,
        eos,
        limits,
        prompt_logprobs: config.prompt_logprobs,
        model_names: model_names(&config.source, &folder),
        adapter_warning: Mutex::new(None),
    };
    Ok(Loaded { engine, intake })
}

fn stored(dtype: Dtype) -> DType {
    match dtype {
        Dtype::Float32 => DType::F32,
        Dtype::Float16 => DType::F16,
        Dtype::Bfloat16 => DType::BF16,
    }
}

/// Whether what is made beside the mapped weights fits into memory.
fn check_memory(memory: &MemoryPlan, world: usize, available: Option<u64>) -> Result<()> {
    let beside_weights = memory.rank_total_bytes.saturating_sub(memory.rank_weight_bytes);
    let needed = beside_weights.saturating_mul(world as u64);
    match available {
        Some(available) if needed > available => Err(Error::Exhausted(format!(
            "beside the weights {} MiB are needed, {} MiB are free: lower --pool-tokens, --max-batch-prefill-tokens \
             or --max-lanes",
            needed >> 20,
            available >> 20
        ))),
        _ => Ok(()),
    }
}

/// On a GPU the pool takes what is left once all else is there.
fn pool_size(config: &ShardConfig, n_slots: u32) -> PoolSize {
    match (&config.compute, config.pool_tokens) {
        (Compute::Cuda { memory_fraction }, None) => {
            let total =
                available_bytes(&Compute::Cuda { memory_fraction: 1.0 }, config.world_size).unwrap_or(0);
            PoolSize::Rest { unused_bytes: (total as f64 * f64::from(1.0 - memory_fraction)) as u64 }
        }
        _ => PoolSize::Slots(n_slots as usize),
    }
}

/// What an operator wants to know once everything has its place.
fn tell_taken(model: &ModelInfo) {
    if model.device == "cpu" {
        return;
    }
    model.links.iter().for_each(|links| tracing::info!("{links}"));
    tracing::info!(
        "on the GPU, in {}: weights {} MiB, a pool of {} slots {} MiB, graphs {} MiB",
        model.dtype,
        model.weight_bytes >> 20,
        model.n_slots,
        model.kv_bytes >> 20,
        model.graph_bytes >> 20,
    );
}

/// What an operator wants to know before the weights are read.
fn tell(plan: &LoadPlan, config: &ShardConfig) {
    if let Compute::Cpu { why: Some(why) } = &config.compute {
        tracing::info!("computing on the CPU: {why}");
    }
    let own_slots = config.own_slots_of(plan.n_slots);
    plan.model.notes.iter().for_each(|note| tracing::info!("{note}"));
    tracing::info!(
        "{}: {:.1} M parameters in {}, a pool of {} slots ({} MiB), {own_slots} of them for requests without slots",
        plan.model.spec.family,
        plan.memory.n_parameters as f64 / 1e6,
        plan.weights.dtype().name(),
        plan.n_slots,
        plan.memory.rank_kv_bytes >> 20,
    );
}

/// A local directory or a hub id → the folders of its files.
///
/// # Errors
/// As [`hub::locate`].
pub fn locate(source: &ModelSource) -> Result<Located> {
    let progress = Progress::new("downloading");
    let located =
        hub::locate(source, &mut |download| progress.report(download.done_bytes, download.file_bytes));
    progress.finish();
    if let Some(notice) = located.as_ref().ok().and_then(|located| located.notice.as_deref()) {
        tracing::warn!("{notice}");
    }
    located
}

/// What a model folder's decoder is; the operator's rotary scaling goes before the checkpoint's.
fn read_model(folder: &Path, config: &ShardConfig) -> Result<Resolved> {
    let mut model = families::resolve(&families::read_config(folder)?)?;
    if let Some(RopeOverride { kind, factor }) = config.rope {
        let Positions::Rope(ropes) = &mut model.spec.positions else {
            let text = format!("a {} decoder has no rotary embedding to scale", model.spec.family);
            return Err(Error::Unsupported(text));
        };
        let factor = f64::from(factor);
        let original = u32::try_from(model.spec.max_positions).unwrap_or(u32::MAX);
        for rope in ropes {
            rope.scaling = match kind {
                RopeScalingKind::Linear => RopeScaling::Linear { factor },
                RopeScalingKind::Dynamic => RopeScaling::Dynamic { factor, original },
            };
        }
        model.spec.max_positions = (f64::from(original) * factor).min(f64::from(u32::MAX)) as usize;
        model.spec.check()?;
    }
    Ok(model)
}

/// The ids that end a text, sorted: the tokenizer's, and all that `generation_config.json` and `config.json` name.
fn end_of_text_ids(folder: &Path, of_tokenizer: Option<u32>) -> Result<Arc<[u32]>> {
    let mut ids: Vec<u32> = of_tokenizer.into_iter().collect();
    ids.extend(named_ids(folder, "generation_config.json", "eos_token_id")?);
    ids.extend(named_ids(folder, "config.json", "eos_token_id")?);
    ids.sort_unstable();
    ids.dedup();
    if ids.is_empty() {
        tracing::warn!(
            "the model's files name no end of text: requests end by length and stop sequences only"
        );
    }
    Ok(ids.into())
}

/// The folder's tokenizer; beside random weights, one that is made where the folder has none.
fn tokenizer(format: LoadFormat, folder: &Path, vocab: usize) -> Result<Tokenizer> {
    if format == LoadFormat::Auto || Tokenizer::is_in(folder) {
        return Tokenizer::load(folder);
    }
    tracing::info!("the model has no tokenizer: one is made, as the weights are");
    let named = |key| named_ids(folder, "config.json", key);
    let n_ids = u32::try_from(vocab).unwrap_or(u32::MAX);
    Tokenizer::generated(n_ids, named("bos_token_id")?.first().copied(), &named("eos_token_id")?)
}

/// The ids of a file's key, one or several.
fn named_ids(folder: &Path, file: &str, key: &str) -> Result<Vec<u32>> {
    let Ok(text) = fs::read(folder.join(file)) else { return Ok(Vec::new()) };
    let wrong = |why: String| Error::Checkpoint(format!("{file}: {why}"));
    let config: Value = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| wrong(format!("{key} has {value}, which is no token")))
    };
    match config.get(key) {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(values)) => values.iter().map(id).collect(),
        Some(value) => Ok(vec![id(value)?]),
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
    fn whatever_names_an_end_of_text_counts() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |file: &str, text: &str| fs::write(folder.path().join(file), text).expect("written");
        let ids = |of_tokenizer| end_of_text_ids(folder.path(), of_tokenizer).map(|ids| ids.to_vec());
        assert_eq!(ids(None), Ok(vec![]));
        assert_eq!(ids(Some(2)), Ok(vec![2]));
        write("config.json", r#"{"eos_token_id": 9}"#);
        assert_eq!(ids(Some(2)), Ok(vec![2, 9]));
        write("generation_config.json", r#"{"eos_token_id": [7, 3, 7]}"#);
        assert_eq!(ids(Some(2)), Ok(vec![2, 3, 7, 9]));
        write("generation_config.json", r#"{"eos_token_id": null}"#);
        assert_eq!(ids(None), Ok(vec![9]));
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
