//! N rank threads as one executor.
//!
//! Every rank gets the same steps in the same order, through a channel of its own; rank 0 samples. A rank that
//! fails aborts the world's collectives, so that no other waits for it; the executor then reports that rank's
//! error for this step and for all after it.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use super::checkpoint::DType;
use super::executor::{Executor, ModelInfo, PositionRegime, Progress};
use super::guard::Guard;
use super::partition::Shard;
use super::rank::{Rank, Taken};
use super::spec::DecoderSpec;
use super::upload::total_bytes;
use super::{Options, Parts, PoolSize};
use crate::backend::Backend;
use crate::backend::step::{StepInput, StepOutput};
use crate::error::{Error, Result};

/// Steps that may be submitted before the first is waited for.
pub(super) const MAX_UNDER_WAY: usize = 2;

/// Rank threads, and the channels to them.
pub struct Ranks {
    info: ModelInfo,
    guard: Guard,
    ranks: Vec<RankThread>,
    n_under_way: usize,
}

struct RankThread {
    /// `None` once the thread is to end.
    steps: Option<SyncSender<Arc<StepInput>>>,
    outcomes: Receiver<Result<StepOutput>>,
    thread: Option<JoinHandle<()>>,
}

/// What a rank says while it loads.
pub(super) enum News {
    /// So many bytes more.
    Loaded { bytes: u64 },
    /// It waits for steps.
    Ready(Taken),
    /// It has ended.
    Failed(Error),
}

/// What a rank thread starts with.
struct Load<B> {
    backend: B,
    shard: Shard,
    spec: Arc<DecoderSpec>,
    parts: Arc<Parts>,
    options: Options,
    progress: Progress,
}

impl Ranks {
    /// Starts a thread for each backend and waits until all have loaded their parts.
    ///
    /// # Errors
    /// The first rank's that failed; no thread is left then.
    pub fn start<B: Backend + Send + 'static>(
        backends: Vec<B>,
        spec: DecoderSpec,
        parts: Box<Parts>,
        options: Options,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Ranks> {
        let dtype = backends.first().map_or(DType::F32, Backend::dtype);
        let (world, spec, parts) = (backends.len(), Arc::new(spec), Arc::<Parts>::from(parts));
        check_options(&options, world)?;
        check_world(&spec, world)?;
        let shards = (0..world).map(|rank| Shard { rank, world });
        let total = shards.map(|shard| total_bytes(&*parts, &spec, shard)).sum::<Result<u64>>()?;
        let steps = Progress::new(world);
        let (news, heard) = channel();
        let mut ranks = Vec::new();
        for (rank, backend) in backends.into_iter().enumerate() {
            let shard = Shard { rank, world };
            let (spec, parts, progress) = (Arc::clone(&spec), Arc::clone(&parts), steps.clone());
            let load = Load { backend, shard, spec, parts, options, progress };
            ranks.push(RankThread::spawn(load, news.clone())?);
        }
        drop(news);
        let done = std::cell::Cell::new(0);
        let taken = await_ready(&heard, world, &|bytes| {
            done.set(done.get() + bytes);
            progress(done.get(), total);
        })?;
        let info = info::<B>(&spec, &options, dtype, &taken, steps)?;
        Ok(Ranks { guard: Guard::new(&info), info, ranks, n_under_way: 0 })
    }
}

/// Sizes that the records can count.
pub(super) fn check_options(options: &Options, world: usize) -> Result<()> {
    let Options { n_lanes, max_step_tokens, pool, .. } = *options;
    let n_slots = if let PoolSize::Slots(n) = pool { n } else { 1 };
    let countable = |n: usize| n > 0 && u32::try_from(n).is_ok();
    if ![n_slots, n_lanes, max_step_tokens, world].into_iter().all(countable) {
        return Err(Error::Invalid(format!(
            "{world} ranks, {n_slots} slots, {n_lanes} lanes and steps of {max_step_tokens} tokens: each has to be \
             at least 1 and below 2³²"
        )));
    }
    Ok(())
}

/// Whether every rank gets as many whole heads as the others, and the KV heads that these read.
pub(super) fn check_world(spec: &DecoderSpec, world: usize) -> Result<()> {
    let (heads, kv_heads) = (spec.attention.heads(), spec.attention.kv_heads());
    let fits = kv_heads > 0
        && heads.is_multiple_of(world)
        && heads.is_multiple_of(kv_heads)
        && (kv_heads.is_multiple_of(world) || world.is_multiple_of(kv_heads));
    if fits {
        return Ok(());
    }
    Err(Error::Unsupported(format!(
        "{heads} heads that share {kv_heads} KV heads cannot be cut into {world} ranks"
    )))
}

/// Hears `n` ranks out; the first failure is the answer. `loaded` hears of bytes.
pub(super) fn await_ready(news: &Receiver<News>, n: usize, loaded: &dyn Fn(u64)) -> Result<Vec<Taken>> {
    let mut taken = Vec::new();
    while taken.len() < n {
        match news.recv() {
            Ok(News::Loaded { bytes }) => loaded(bytes),
            Ok(News::Ready(of_rank)) => taken.push(of_rank),
            Ok(News::Failed(error)) => return Err(error),
            Err(_) => return Err(Error::Device("a rank ended while it loaded".into())),
        }
    }
    Ok(taken)
}

/// What the engine is told of ranks that have taken their part. The smallest pool counts for all.
pub(super) fn info<B: Backend>(
    spec: &DecoderSpec,
    options: &Options,
    dtype: DType,
    taken: &[Taken],
    progress: Progress,
) -> Result<ModelInfo> {
    let count = |n: usize| u32::try_from(n).map_err(|_| Error::Checkpoint(format!("{n} is beyond 2³²")));
    // Where ranks outnumber the KV heads, each keeps a copy.
    let kv_heads = spec.attention.kv_heads();
    let copies = kv_heads.max(options.n_ranks) / kv_heads.max(1);
    let kv_numbers = spec.kv_elements_per_token() as usize * copies;
    Ok(ModelInfo {
        family: spec.family,
        vocab: count(spec.vocab)?,
        max_positions: count(spec.max_positions)?,
        n_slots: count(taken.iter().map(|taken| taken.n_slots).min().unwrap_or(0))?,
        n_lanes: count(options.n_lanes)?,
        max_step_tokens: count(options.max_step_tokens)?,
        regime: PositionRegime::of(&spec.positions),
        dtype: dtype.name(),
        device: B::DEVICE,
        kv_bytes_per_slot: (kv_numbers * dtype.size_bytes()) as u64,
        weight_bytes: taken.iter().map(|taken| taken.weight_bytes).sum(),
        kv_bytes: taken.iter().map(|taken| taken.kv_bytes).sum(),
        graph_bytes: taken.iter().map(|taken| taken.graph_bytes).sum(),
        links: None,
        progress,
    })
}

impl RankThread {
    fn spawn<B: Backend + Send + 'static>(load: Load<B>, news: Sender<News>) -> Result<RankThread> {
        // Room for every step that may be under way, so that neither side waits to put one in.
        let (steps, to_run) = sync_channel(MAX_UNDER_WAY);
        let (done, outcomes) = sync_channel(MAX_UNDER_WAY);
        let thread = thread::Builder::new()
            .name(format!("rank-{}", load.shard.rank))
            .spawn(move || serve(load, news, &to_run, &done))
            .map_err(|error| Error::Exhausted(format!("no thread for a rank: {error}")))?;
        Ok(RankThread { steps: Some(steps), outcomes, thread: Some(thread) })
    }

    fn submit(&self, step: Arc<StepInput>) -> Result<()> {
        let sent = self.steps.as_ref().map(|steps| steps.send(step));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(Error::DeviceLost("a rank's thread has ended".into())),
        }
    }

    fn wait(&self) -> Result<StepOutput> {
        self.outcomes.recv().unwrap_or_else(|_| Err(Error::DeviceLost("a rank's thread has ended".into())))
    }
}

/// A rank thread's life: load, then run what comes until nobody sends any more.
fn serve<B: Backend>(
    load: Load<B>,
    news: Sender<News>,
    to_run: &Receiver<Arc<StepInput>>,
    done: &SyncSender<Result<StepOutput>>,
) {
    let Load { backend, shard, spec, parts, options, progress } = load;
    // Nobody listens any more once another rank has failed; then the channel of steps is closed too.
    let report = |bytes| drop(news.send(News::Loaded { bytes }));
    let mut rank = match Rank::load(backend, shard, &spec, &*parts, &options, &report, &progress) {
        Ok((rank, taken)) => {
            drop(news.send(News::Ready(taken)));
            rank
        }
        Err(error) => return drop(news.send(News::Failed(error))),
    };
    drop(news);
    drop(parts);
    let mut lost = None;
    for step in to_run {
        // Also a world of one, which has nobody to be aborted with: what a fault left half done is never read.
        let outcome = lost.clone().map_or_else(|| run_caught(&mut rank, shard.rank, &step), Err);
        lost = outcome.as_ref().err().cloned();
        if done.send(outcome).is_err() {
            return;
        }
    }
}

/// Runs a step; an error or a panic frees the ranks that wait for this one. The world is lost then: ranks that stopped
/// at different ops never meet again.
fn run_caught<B: Backend>(rank: &mut Rank<B>, number: usize, step: &StepInput) -> Result<StepOutput> {
    // What a panic leaves half done is never read: the world is aborted.
    let outcome = catch_unwind(AssertUnwindSafe(|| rank.submit(step).and_then(|()| rank.output())));
    let number_of_step = rank.n_submitted();
    let outcome = outcome.unwrap_or_else(|panic| Err(message_of(number, number_of_step, &*panic)));
    outcome.map_err(|error| {
        let reason = why_lost(number, number_of_step, error);
        rank.abort(&reason);
        Error::DeviceLost(reason)
    })
}

/// What a rank's panic says; steps are counted from 1 since the loading.
pub(super) fn message_of(rank: usize, step: u64, panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message");
    Error::Device(format!("rank {rank} panicked in step {step}: {text}"))
}

/// Why the world is lost: a rank's error, or what it was told of another's.
pub(super) fn why_lost(rank: usize, step: u64, error: Error) -> String {
    match error {
        // Already told, here or by the rank that failed first.
        Error::Device(text) => text,
        error => format!("rank {rank} failed in step {step}: {error}"),
    }
}

impl Executor for Ranks {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn submit(&mut self, step: StepInput) -> Result<()> {
        if self.n_under_way == MAX_UNDER_WAY {
            return Err(Error::Bug(format!("{MAX_UNDER_WAY} steps are under way already")));
        }
        self.guard.admit(&step)?;
        let step = Arc::new(step);
        for rank in &self.ranks {
            rank.submit(Arc::clone(&step))?;
        }
        self.n_under_way += 1;
        Ok(())
    }

    fn wait(&mut self) -> Result<StepOutput> {
        if self.n_under_way == 0 {
            return Err(Error::Bug("no step is under way".into()));
        }
        self.n_under_way -= 1;
        // Every rank is heard, so that the next outcome of each belongs to the next step.
        let outcomes: Vec<Result<StepOutput>> = self.ranks.iter().map(RankThread::wait).collect();
        let outputs: Vec<StepOutput> = outcomes.into_iter().collect::<Result<_>>()?;
        outputs.into_iter().next().ok_or_else(|| Error::Bug("a world without ranks".into()))
    }

    fn free_bytes(&self) -> Option<u64> {
        None
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        // All channels first: a rank finishes its steps together with the others.
        self.ranks.iter_mut().for_each(|rank| rank.steps = None);
        for rank in &mut self.ranks {
            if let Some(thread) = rank.thread.take() {
                // A panic was caught and told; there is nothing to add.
                drop(thread.join());
            }
        }
    }
}
