//! Rank 0 on the thread of whoever uses it, the others on threads of their own, as one executor.
//!
//! For devices that run steps by themselves: no thread has to be woken for rank 0's step to start or to be told. Every
//! rank gets the same steps in the same order. One that fails aborts the world, so that none waits for it; the executor
//! then reports that rank's error for this step and for all after it.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::thread::{self, JoinHandle};

use super::executor::{Executor, ModelInfo, Progress};
use super::guard::Guard;
use super::partition::Shard;
use super::rank::{Rank, Taken};
use super::ranks::{
    MAX_UNDER_WAY, News, await_ready, check_options, check_world, info, message_of, why_lost,
};
use super::spec::DecoderSpec;
use super::upload::total_bytes;
use super::{Options, Parts};
use crate::backend::Backend;
use crate::backend::step::{StepInput, StepOutput};
use crate::error::{Error, Result};

/// How often a rank looks for its next step before it sleeps: a few milliseconds. To be woken takes longer than the ranks'
/// steps should lie apart; while requests are decoded, the next step comes sooner.
const LOOKS: u32 = 1 << 15;

/// Opens a rank's device, on the rank's thread.
pub type Open<B> = Box<dyn FnOnce() -> Result<B> + Send>;

/// Rank 0, and the threads of the others.
pub struct Leader<B: Backend> {
    info: ModelInfo,
    guard: Guard,
    rank: Rank<B>,
    followers: Vec<Follower>,
    n_under_way: usize,
    /// Once a step has failed, what it left half done is never read.
    lost: Option<Error>,
}

/// The thread of a rank above 0.
struct Follower {
    /// `None` once the thread is to end.
    commands: Option<SyncSender<Command>>,
    /// Why the thread has ended.
    failure: Receiver<Error>,
    thread: Option<JoinHandle<()>>,
}

/// What a follower is told.
enum Command {
    /// Start this step.
    Start(Arc<StepInput>),
    /// Wait for the oldest step under way.
    Finish,
}

/// What ranks load from.
#[derive(Clone)]
struct Source {
    spec: Arc<DecoderSpec>,
    parts: Arc<Parts>,
    options: Options,
    progress: Progress,
}

impl Source {
    fn load<B: Backend>(
        &self,
        open: Open<B>,
        shard: Shard,
        report: &dyn Fn(u64),
    ) -> Result<(Rank<B>, Taken)> {
        let Source { spec, parts, options, progress } = self;
        Rank::load(open()?, shard, spec, &**parts, options, report, progress)
    }
}

impl<B: Backend + 'static> Leader<B> {
    /// Loads all ranks at once, rank 0 on the calling thread, which must make all later calls.
    ///
    /// # Errors
    /// As [`super::load`]; no thread is left then.
    pub fn load(
        opens: Vec<Open<B>>,
        spec: DecoderSpec,
        parts: Box<Parts>,
        options: Options,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Leader<B>> {
        let world = opens.len();
        check_options(&options, world)?;
        check_world(&spec, world)?;
        let steps = Progress::new(world);
        let source =
            Source { spec: Arc::new(spec), parts: Arc::from(parts), options, progress: steps.clone() };
        let shards = (0..world).map(|rank| Shard { rank, world });
        let total =
            shards.map(|shard| total_bytes(&*source.parts, &source.spec, shard)).sum::<Result<u64>>()?;
        let (news, heard) = channel();
        let mut followers = Vec::new();
        // None loads before all threads are there: one that is missing could not tell those that would wait for it. The gates
        // go before the followers, whose threads then end.
        let (mut gates, mut leads) = (Vec::new(), None);
        for (rank, open) in opens.into_iter().enumerate() {
            if rank == 0 {
                leads = Some(open);
                continue;
            }
            let (gate, opened) = channel();
            let shard = Shard { rank, world };
            followers.push(Follower::spawn(source.clone(), open, shard, news.clone(), opened)?);
            gates.push(gate);
        }
        drop(news);
        for gate in gates {
            // Its thread is there and listens.
            let _ = gate.send(());
        }
        let open = leads.ok_or_else(|| Error::Bug("a world without ranks".into()))?;
        let done = Cell::new(0);
        let told = |bytes| {
            done.set(done.get() + bytes);
            progress(done.get(), total);
        };
        let (rank, taken) = source.load(open, Shard { rank: 0, world }, &told)?;
        let mut all_taken = vec![taken];
        all_taken.extend(await_ready(&heard, world - 1, &told)?);
        let mut info = info::<B>(&source.spec, &options, rank.backend().dtype(), &all_taken, steps)?;
        info.links = rank.backend().links();
        Ok(Leader { guard: Guard::new(&info), info, rank, followers, n_under_way: 0, lost: None })
    }

    /// Takes note of a failure: the step's number is that of the loading, from 1.
    fn lose<T>(&mut self, result: Result<T>, step: u64) -> Result<T> {
        result.map_err(|error| {
            let reason = why_lost(0, step, error);
            self.rank.abort(&reason);
            self.lost.get_or_insert(Error::DeviceLost(reason)).clone()
        })
    }

    /// Tells every follower; one that has ended says why.
    fn tell(&self, command: impl Fn() -> Command) -> Result<()> {
        for follower in &self.followers {
            let sent = follower.commands.as_ref().map(|commands| commands.send(command()));
            if !matches!(sent, Some(Ok(()))) {
                let gone = || Error::Device("a rank's thread has ended".into());
                return Err(follower.failure.try_recv().unwrap_or_else(|_| gone()));
            }
        }
        Ok(())
    }
}

impl Follower {
    fn spawn<B: Backend + 'static>(
        source: Source,
        open: Open<B>,
        shard: Shard,
        news: Sender<News>,
        gate: Receiver<()>,
    ) -> Result<Follower> {
        // Room for all that may be told at once, so that the leader never waits to tell it.
        let (commands, told) = sync_channel(2 * MAX_UNDER_WAY);
        let (failed, failure) = sync_channel(1);
        let thread = thread::Builder::new()
            .name(format!("rank-{}", shard.rank))
            .spawn(move || {
                if gate.recv().is_ok() {
                    follow(&source, open, shard, news, &told, &failed);
                }
            })
            .map_err(|error| Error::Exhausted(format!("no thread for a rank: {error}")))?;
        Ok(Follower { commands: Some(commands), failure, thread: Some(thread) })
    }
}

/// A follower's life: load, then do as it is told until nobody tells any more, or until a step fails.
fn follow<B: Backend>(
    source: &Source,
    open: Open<B>,
    shard: Shard,
    news: Sender<News>,
    told: &Receiver<Command>,
    failed: &SyncSender<Error>,
) {
    // Nobody listens any more once another rank has failed; then the channel of commands is closed too.
    let report = |bytes| drop(news.send(News::Loaded { bytes }));
    let mut rank = match source.load(open, shard, &report) {
        Ok((rank, taken)) => {
            drop(news.send(News::Ready(taken)));
            rank
        }
        Err(error) => return drop(news.send(News::Failed(error))),
    };
    drop(news);
    let mut n_finished = 0;
    while let Some(command) = next(told) {
        let (step, done) = match command {
            Command::Start(step) => {
                let number = rank.n_submitted() + 1;
                (number, catch_unwind(AssertUnwindSafe(|| rank.submit(&step))))
            }
            Command::Finish => {
                n_finished += 1;
                (n_finished, catch_unwind(AssertUnwindSafe(|| rank.output().map(drop))))
            }
        };
        let done = done.unwrap_or_else(|panic| Err(message_of(shard.rank, step, &*panic)));
        if let Err(error) = done {
            let reason = why_lost(shard.rank, step, error);
            drop(failed.send(Error::Device(reason.clone())));
            rank.abort(&reason);
            return;
        }
    }
}

/// What a follower is told next.
fn next(told: &Receiver<Command>) -> Option<Command> {
    for _ in 0..LOOKS {
        match told.try_recv() {
            Ok(command) => return Some(command),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) => std::hint::spin_loop(),
        }
    }
    told.recv().ok()
}

impl<B: Backend + 'static> Executor for Leader<B> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn submit(&mut self, step: StepInput) -> Result<()> {
        if let Some(lost) = &self.lost {
            return Err(lost.clone());
        }
        if self.n_under_way == MAX_UNDER_WAY {
            return Err(Error::Bug(format!("{MAX_UNDER_WAY} steps are under way already")));
        }
        self.guard.admit(&step)?;
        let step = Arc::new(step);
        let told = self.tell(|| Command::Start(Arc::clone(&step)));
        let submitted = told.and_then(|()| self.rank.submit(&step));
        self.lose(submitted, self.rank.n_submitted())?;
        self.n_under_way += 1;
        Ok(())
    }

    fn wait(&mut self) -> Result<StepOutput> {
        if self.n_under_way == 0 {
            return Err(Error::Bug("no step is under way".into()));
        }
        let number = self.rank.n_submitted() + 1 - self.n_under_way as u64;
        self.n_under_way -= 1;
        if let Some(lost) = &self.lost {
            return Err(lost.clone());
        }
        let output = self.tell(|| Command::Finish).and_then(|()| self.rank.output());
        self.lose(output, number)
    }

    fn free_bytes(&self) -> Option<u64> {
        self.rank.backend().free_bytes()
    }
}

impl<B: Backend> Drop for Leader<B> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.rank.abort("rank 0 panicked");
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // A panic was caught and told; there is nothing to add.
            drop(thread.join());
        }
    }
}
