//! The engine's thread: commands, loop, handle.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use tokio::sync::{mpsc, oneshot};

use super::{Capacity, Engine, EngineConfig, EngineStats, PrefillCall, Pulse, StepAnswer, WarmupCall};
use crate::batch::CachedBatch;
use crate::error::{Error, Result};
use crate::ids::{BatchId, Protocol, RequestId};
use crate::model::executor::{Executor, ModelInfo};
use crate::text::Tokenizer;

/// Calls that may wait for the engine before callers wait for a place.
const QUEUED_CALLS: usize = 64;

/// What the thread is asked. A caller that has gone away is no fault: its reply is dropped, the work is done.
enum Command {
    Warmup(WarmupCall, Reply<Capacity>),
    Prefill(PrefillCall, Reply<StepAnswer>),
    Decode(Vec<BatchId>, Reply<StepAnswer>),
    Filter(BatchId, Vec<RequestId>, Reply<CachedBatch>),
    Clear(Protocol, Option<u64>, Reply<()>),
    CheckIntegrity(Reply<EngineStats>),
    Stop(Reply<()>),
}

type Reply<T> = oneshot::Sender<Result<T>>;

/// The way to the engine; cheap to clone. Calls are served one after the other, in order of arrival.
#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    model: Arc<ModelInfo>,
    capacity: Arc<Mutex<Capacity>>,
    pulse: Arc<Pulse>,
}

impl EngineHandle {
    /// Starts the thread, which builds its executor there; returns when the model is loaded.
    ///
    /// # Errors
    /// What `build` returned, or [`Error::Bug`] if it panicked.
    pub fn start(
        config: EngineConfig,
        tokenizer: Arc<Tokenizer>,
        build: impl FnOnce() -> Result<Box<dyn Executor>> + Send + 'static,
    ) -> Result<EngineHandle> {
        let (commands, inbox) = mpsc::channel(QUEUED_CALLS);
        let (ready, loaded) = std::sync::mpsc::channel();
        let pulse = Arc::new(Pulse::default());
        let handle_pulse = pulse.clone();
        let body = move || {
            let built = catch_unwind(AssertUnwindSafe(build)).unwrap_or_else(|panic| {
                Err(Error::Bug(format!("loading the model panicked: {}", panic_message(&*panic))))
            });
            let engine = built.and_then(|executor| Engine::new(config, tokenizer, pulse.clone(), executor));
            let engine = match engine {
                Ok(engine) => engine,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let model = Arc::new(engine.executor.info().clone());
            if ready.send(Ok((model, engine.capacity.clone()))).is_err() {
                return;
            }
            // An engine that panicked has lost its books: nothing but a new process repairs that.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| serve(engine, inbox))) {
                pulse.die(died_of(&*panic));
            }
        };
        let spawned = thread::Builder::new().name("engine".into()).spawn(body);
        spawned.map_err(|error| Error::Bug(format!("the engine's thread did not start: {error}")))?;
        let (model, capacity) = loaded
            .recv()
            .map_err(|_| Error::Bug("the engine's thread ended before it was ready".into()))??;
        Ok(EngineHandle { commands, model, capacity, pulse: handle_pulse })
    }

    /// The model.
    pub fn model(&self) -> &ModelInfo {
        &self.model
    }

    /// The limits of the last Warmup, or those before one.
    pub fn capacity(&self) -> Capacity {
        *self.capacity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How the engine is, without asking it.
    pub fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// Drops every batch, sets the limits, and runs the largest step once.
    pub async fn warmup(&self, call: WarmupCall) -> Result<Capacity> {
        self.ask(|reply| Command::Warmup(call, reply)).await
    }

    /// Starts requests, and steps the batch they are merged with.
    pub async fn prefill(&self, call: PrefillCall) -> Result<StepAnswer> {
        self.ask(|reply| Command::Prefill(call, reply)).await
    }

    /// Runs the next step of batches, concatenated in this order.
    pub async fn decode(&self, batches: Vec<BatchId>) -> Result<StepAnswer> {
        self.ask(|reply| Command::Decode(batches, reply)).await
    }

    /// Keeps the listed requests of a batch, in this order.
    pub async fn filter(&self, batch: BatchId, keep: Vec<RequestId>) -> Result<CachedBatch> {
        self.ask(|reply| Command::Filter(batch, keep, reply)).await
    }

    /// Drops a batch; unknown ones are no error. `None`: every batch of every protocol, and what the pool
    /// remembers of prefixes.
    pub async fn clear(&self, protocol: Protocol, number: Option<u64>) -> Result<()> {
        self.ask(|reply| Command::Clear(protocol, number, reply)).await
    }

    /// Checks pool and lanes (free + held = total) and tells what is held.
    ///
    /// # Errors
    /// [`Error::Bug`] when something leaked.
    pub async fn check_integrity(&self) -> Result<EngineStats> {
        self.ask(Command::CheckIntegrity).await
    }

    /// Finishes what is queued, refuses what comes later, and returns when the thread is done.
    pub async fn stop(&self) {
        // An engine that is gone already needs no stopping.
        let _ = self.ask(Command::Stop).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| self.gone())?;
        answer.await.map_err(|_| self.gone())?
    }

    fn gone(&self) -> Error {
        match self.pulse.condition() {
            super::Condition::Dead(reason) => reason,
            _ => Error::ShuttingDown,
        }
    }
}

/// Serves commands until told to stop, or until every handle is gone.
fn serve(mut engine: Engine, mut inbox: mpsc::Receiver<Command>) {
    let mut stopping = Vec::new();
    let pulse = engine.pulse.clone();
    while let Some(command) = inbox.blocking_recv() {
        engine.drop_abandoned();
        match command {
            Command::Warmup(call, reply) => answer(&pulse, reply, || engine.warmup(call)),
            Command::Prefill(call, reply) => answer(&pulse, reply, || engine.prefill(call)),
            Command::Decode(ids, reply) => answer(&pulse, reply, || engine.decode(&ids)),
            Command::Filter(id, keep, reply) => answer(&pulse, reply, || engine.filter(id, &keep)),
            Command::Clear(protocol, number, reply) => {
                answer(&pulse, reply, || {
                    engine.clear(protocol, number);
                    Ok(())
                });
            }
            Command::CheckIntegrity(reply) => answer(&pulse, reply, || engine.check_integrity()),
            Command::Stop(reply) => {
                // What was queued before the doors closed is still served; then the loop ends by itself.
                inbox.close();
                stopping.push(reply);
            }
        }
        pulse.lease(engine.pool.n_leased());
        #[cfg(debug_assertions)]
        if let Err(error) = engine.check_integrity() {
            panic!("{error}");
        }
    }
    drop(engine);
    stopping.into_iter().for_each(|reply| answer(&pulse, reply, || Ok(())));
}

/// Answers with the outcome of `work`. If it panics, the pulse tells so before the caller misses its answer.
fn answer<T>(pulse: &Pulse, reply: Reply<T>, work: impl FnOnce() -> Result<T>) {
    match catch_unwind(AssertUnwindSafe(work)) {
        // The caller may have gone away.
        Ok(result) => drop(reply.send(result)),
        Err(panic) => {
            pulse.die(died_of(&*panic));
            drop(reply);
            resume_unwind(panic);
        }
    }
}

fn died_of(panic: &(dyn Any + Send)) -> Error {
    Error::Bug(format!("the engine panicked: {}", panic_message(panic)))
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}
