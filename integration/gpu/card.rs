//! The GPU: one test has it at a time, and a model that was loaded once serves several engines.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use kvshard::backend::cuda;
use kvshard::backend::step::{StepInput, StepOutput};
use kvshard::engine::EngineHandle;
use kvshard::error::{Error, Result};
use kvshard::model::checkpoint::{Checkpoint, DType};
use kvshard::model::executor::{Executor, ModelInfo};
use kvshard::model::weights::Weights;
use kvshard::model::{self, Device, Options, PoolSize, families};

use crate::support::engine::{Patience, start_engine_over};
use crate::support::{EngineOptions, fixture};

/// What GPUs compute in.
pub const DTYPES: [DType; 2] = [DType::BF16, DType::F16];

/// The GPU for one test: algorithms are chosen by their times, and memory is counted.
pub fn alone() -> MutexGuard<'static, ()> {
    static GPU: Mutex<()> = Mutex::new(());
    cuda::probe().unwrap_or_else(|why| panic!("this test needs a GPU: {why}"));
    GPU.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A fixture's folder, or that of the trained model for `demo`.
pub fn model_folder(name: &str) -> PathBuf {
    if name == "demo" { fixture("../demo") } else { fixture(name) }
}

/// Loads a model onto a device with these sizes.
pub fn load(folder: &Path, device: Device, sizes: EngineOptions) -> Result<Box<dyn Executor>> {
    let model = families::resolve(&families::read_config(folder)?)?;
    let weights = Weights::open(&Checkpoint::open(folder)?, &model.spec, &model.names)?;
    let options = Options {
        device,
        n_ranks: sizes.n_ranks,
        pool: PoolSize::Slots(sizes.n_slots as usize),
        n_lanes: sizes.n_lanes as usize,
        max_step_tokens: sizes.max_step_tokens as usize,
        graphs: device != Device::Cpu,
        fault: None,
    };
    model::load(model.spec, move |role, shard| weights.part(role, shard), options, &|_, _| ())
}

enum Call {
    Submit(Box<StepInput>, Sender<Result<()>>),
    Wait(Sender<Result<StepOutput>>),
    FreeBytes(Sender<Option<u64>>),
}

/// A model on the GPU, on a thread of its own, lent to one engine after another: two loads may choose different
/// algorithms, whose sums differ in their last bits.
#[derive(Clone)]
pub struct Card {
    folder: PathBuf,
    sizes: EngineOptions,
    info: ModelInfo,
    calls: Sender<Call>,
}

impl Card {
    pub fn load(name: &str, dtype: DType, sizes: EngineOptions) -> Card {
        let folder = model_folder(name);
        let (calls, inbox) = channel();
        let (ready, loaded) = channel();
        let from = folder.clone();
        thread::spawn(move || {
            let mut executor = match load(&from, Device::Cuda { dtype }, sizes) {
                Ok(executor) => executor,
                Err(error) => return ready.send(Err(error)).unwrap(),
            };
            ready.send(Ok(executor.info().clone())).unwrap();
            for call in inbox {
                // Whoever asked may be gone.
                let _ = match call {
                    Call::Submit(step, answer) => answer.send(executor.submit(*step)).ok(),
                    Call::Wait(answer) => answer.send(executor.wait()).ok(),
                    Call::FreeBytes(answer) => answer.send(executor.free_bytes()).ok(),
                };
            }
        });
        let info = loaded.recv().unwrap().unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        Card { folder, sizes, info, calls }
    }

    /// A new engine, to be used up before the next one.
    pub fn engine(&self, change: impl FnOnce(&mut EngineOptions)) -> EngineHandle {
        let mut options = self.sizes;
        change(&mut options);
        let card = self.clone();
        start_engine_over(&self.folder, options, Patience::EVER, move || Ok(Box::new(card)))
    }

    fn call<T>(&self, call: impl FnOnce(Sender<T>) -> Call) -> Option<T> {
        let (answer, answered) = channel();
        self.calls.send(call(answer)).ok()?;
        answered.recv().ok()
    }
}

fn gone() -> Error {
    Error::DeviceLost("the model's thread is gone".into())
}

impl Executor for Card {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn submit(&mut self, step: StepInput) -> Result<()> {
        self.call(|answer| Call::Submit(Box::new(step), answer)).ok_or_else(gone)?
    }

    fn wait(&mut self) -> Result<StepOutput> {
        self.call(Call::Wait).ok_or_else(gone)?
    }

    fn free_bytes(&self) -> Option<u64> {
        self.call(Call::FreeBytes)?
    }
}
