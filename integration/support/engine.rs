//! An engine over a fixture, without sockets.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kvshard::engine::{EngineConfig, EngineHandle};
use kvshard::error::Result;
use kvshard::model::checkpoint::Checkpoint;
use kvshard::model::executor::Executor;
use kvshard::model::families;
use kvshard::model::weights::Weights;
use kvshard::model::{self, Device, Options, PoolSize};
use kvshard::text::Tokenizer;

/// Sizes of an engine.
#[derive(Debug, Clone, Copy)]
pub struct EngineOptions {
    pub n_ranks: usize,
    pub n_slots: u32,
    pub own_slots: u32,
    pub n_lanes: u32,
    pub max_prefill_tokens: u32,
    pub max_step_tokens: u32,
    pub run_ahead: bool,
}

/// How long batches on own slots that nobody asks for are kept.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    pub abandoned_after: Duration,
    pub reclaimable_after: Duration,
}

impl Patience {
    /// Longer than any test.
    pub const EVER: Patience =
        Patience { abandoned_after: Duration::from_secs(600), reclaimable_after: Duration::from_secs(600) };
}

/// Loads a fixture.
pub fn start_engine(folder: &Path, options: EngineOptions) -> EngineHandle {
    start_patient_engine(folder, options, Patience::EVER)
}

/// Loads a fixture behind an engine that keeps batches this long.
pub fn start_patient_engine(folder: &Path, options: EngineOptions, patience: Patience) -> EngineHandle {
    start_engine_around(folder, options, patience, |executor| executor)
}

/// With the model's executor put into another one.
pub fn start_engine_around(
    folder: &Path,
    options: EngineOptions,
    patience: Patience,
    around: impl FnOnce(Box<dyn Executor>) -> Box<dyn Executor> + Send + 'static,
) -> EngineHandle {
    let model = families::resolve(&families::read_config(folder).unwrap()).unwrap();
    let weights = Weights::open(&Checkpoint::open(folder).unwrap(), &model.spec, &model.names).unwrap();
    let sizes = Options {
        n_ranks: options.n_ranks,
        device: Device::Cpu,
        pool: PoolSize::Slots(options.n_slots as usize),
        graphs: false,
        fault: None,
        n_lanes: options.n_lanes as usize,
        max_step_tokens: options.max_step_tokens as usize,
    };
    let parts = move |role, shard| weights.part(role, shard);
    let build = move || model::load(model.spec, parts, sizes, &|_, _| ()).map(around);
    start_engine_over(folder, options, patience, build)
}

/// With an executor of the caller's, which has been loaded from the folder with these sizes.
pub fn start_engine_over(
    folder: &Path,
    options: EngineOptions,
    patience: Patience,
    build: impl FnOnce() -> Result<Box<dyn Executor>> + Send + 'static,
) -> EngineHandle {
    let config = EngineConfig {
        own_slots: Some(options.own_slots),
        max_prefill_tokens: options.max_prefill_tokens,
        eos: Arc::new([]),
        abandoned_after: patience.abandoned_after,
        reclaimable_after: patience.reclaimable_after,
        run_ahead: options.run_ahead,
    };
    EngineHandle::start(config, Arc::new(Tokenizer::load(folder).unwrap()), build).unwrap()
}
