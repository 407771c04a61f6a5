//! Ranks of one process, a thread and a GPU each: how the threads wait for each other, and how the GPUs meet.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::device::{self, Device, Pinned};
use super::ffi;
use super::nccl::{self, Communicator};
use super::peers::Peers;
use super::tensor::Tensor;
use crate::backend::barrier::Barrier;
use crate::error::{Error, Result};
use crate::model::checkpoint::DType;

/// What the ranks share.
pub struct World {
    barrier: Barrier,
    /// By rank: what it brings to an exchange.
    brought: Vec<AtomicU64>,
    /// By rank: not 0 once one of them has failed, for kernels that wait.
    aborted: Vec<Mutex<Option<Pinned<u32>>>>,
    route: Route,
}

/// How GPUs reach each other.
enum Route {
    /// There is one.
    Alone,
    /// Each reads and writes the others' memory.
    Peers,
    /// By NCCL, and why.
    Nccl { id: nccl::UniqueId, why: String },
}

/// Numbers of ranks that our kernels are made for.
const OWN_WORLDS: [usize; 3] = [2, 4, 8];

/// Addresses of what every rank has its own of, by rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Joint(pub [u64; ffi::KV_MAX_RANKS]);

/// What carries numbers from GPU to GPU.
enum Links {
    Alone,
    Peers(Box<Peers>),
    Nccl(Communicator),
}

/// One rank's end.
pub struct Member {
    rank: usize,
    world: Arc<World>,
    links: Links,
    /// Whether the ranks have met for the first time.
    has_met: Cell<bool>,
}

impl World {
    /// A world of the first GPUs.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there are fewer, or where they cannot reach each other.
    pub fn new(n_ranks: usize) -> Result<Arc<World>> {
        World::by(n_ranks, device::lacking_peer_access(n_ranks)?)
    }

    /// As [`World::new`], but by NCCL also where the GPUs see each other's memory: to compare.
    pub fn by_nccl(n_ranks: usize) -> Result<Arc<World>> {
        World::by(n_ranks, Some("it was asked for".into()))
    }

    /// Over peer memory, unless something is in its way.
    fn by(n_ranks: usize, obstacle: Option<String>) -> Result<Arc<World>> {
        if n_ranks > ffi::KV_MAX_RANKS {
            return Err(Error::Unsupported(format!(
                "{n_ranks} ranks: at most {} GPUs compute together",
                ffi::KV_MAX_RANKS
            )));
        }
        let made_for = OWN_WORLDS.contains(&n_ranks);
        let obstacle = obstacle
            .or_else(|| (!made_for).then(|| format!("our kernels sum over 2, 4 or 8 ranks, not {n_ranks}")));
        let route = match obstacle {
            _ if n_ranks == 1 => Route::Alone,
            None => Route::Peers,
            Some(why) => {
                let id =
                    nccl::unique_id().map_err(|error| Error::Unsupported(format!("{why}, and {error}")))?;
                Route::Nccl { id, why }
            }
        };
        Ok(Arc::new(World {
            barrier: Barrier::new(n_ranks),
            brought: (0..n_ranks).map(|_| AtomicU64::new(0)).collect(),
            aborted: (0..n_ranks).map(|_| Mutex::default()).collect(),
            route,
        }))
    }

    fn n_ranks(&self) -> usize {
        self.brought.len()
    }

    /// Ends every wait for another rank, on the host and on the GPUs. The first reason stays.
    pub fn abort(&self, reason: &str) {
        self.barrier.abort(reason);
        for word in &self.aborted {
            if let Some(word) = word.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
                word.write(0, 1);
            }
        }
    }
}

impl Member {
    /// Rank `rank`, which has yet to open its links.
    pub fn new(world: Arc<World>, rank: usize) -> Member {
        Member { rank, world, links: Links::Alone, has_met: Cell::new(false) }
    }

    /// Opens the links to the other ranks, on the rank's thread. All ranks do so at once.
    pub fn open(&mut self, device: &Device, dtype: DType) -> Result<()> {
        let word = device.pinned(1)?;
        let aborted: *const u32 = word.ptr();
        *self.world.aborted[self.rank].lock().unwrap_or_else(PoisonError::into_inner) = Some(word);
        // From now on an abort reaches this rank's kernels; one before has reached the barrier.
        self.links = match &self.world.route {
            Route::Alone => Links::Alone,
            Route::Peers => Links::Peers(Box::new(Peers::open(self, device, dtype, aborted)?)),
            Route::Nccl { id, .. } => {
                Links::Nccl(Communicator::open(device, dtype, *id, self.rank, self.n_ranks())?)
            }
        };
        Ok(())
    }

    /// Ranks of the world.
    pub fn n_ranks(&self) -> usize {
        self.world.n_ranks()
    }

    /// From 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How the GPUs meet.
    pub fn describe(&self) -> Option<String> {
        match &self.world.route {
            Route::Alone => None,
            Route::Peers => Some(format!("{} GPUs meet in each other's memory", self.n_ranks())),
            Route::Nccl { why, .. } => Some(format!("{} GPUs meet by NCCL: {why}", self.n_ranks())),
        }
    }

    /// Every rank's number, in the order of ranks.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason once the world is aborted.
    pub fn exchange(&self, number: u64) -> Result<Vec<u64>> {
        self.world.brought[self.rank].store(number, Ordering::Relaxed);
        self.world.barrier.wait()?;
        let numbers = self.world.brought.iter().map(|number| number.load(Ordering::Relaxed)).collect();
        // Nobody brings the next number before all have this one.
        self.world.barrier.wait()?;
        Ok(numbers)
    }

    /// The addresses of what every rank brings its own of.
    pub fn joint(&self, address: u64) -> Result<Joint> {
        let mut joint = Joint([0; ffi::KV_MAX_RANKS]);
        for (entry, address) in joint.0.iter_mut().zip(self.exchange(address)?) {
            *entry = address;
        }
        Ok(joint)
    }

    /// Waits for all ranks, whose GPUs have done all that was queued; the least of their numbers.
    pub fn meet(&self, device: &Device, number: u64) -> Result<u64> {
        device.synchronize()?;
        let least = self.exchange(number)?.into_iter().min().unwrap_or(number);
        self.has_met.set(true);
        Ok(least)
    }

    /// Whether sums over the ranks run over two tensors: see [`Member::add_all`].
    pub fn is_alone(&self) -> bool {
        self.n_ranks() == 1
    }

    /// Whether this rank's part of a sum has to hold what the sum is added to.
    pub fn adds_first(&self) -> bool {
        match self.links {
            Links::Alone => true,
            Links::Peers(_) => false,
            // One pass over the numbers fewer.
            Links::Nccl(_) => self.rank == 0,
        }
    }

    /// `sums += Σ parts` over the ranks; where this rank [adds first](Member::adds_first), `sums` already holds its part.
    pub fn add_all(&self, rows: usize, parts: &Tensor, sums: &Tensor) -> Result<()> {
        match &self.links {
            _ if !self.has_met.get() => Ok(()),
            Links::Alone => Ok(()),
            Links::Peers(peers) => peers.all_reduce(parts.joint()?, sums.joint()?, rows * sums.stride, true),
            Links::Nccl(nccl) if self.rank == 0 => nccl.all_reduce(sums, sums, rows * sums.stride),
            Links::Nccl(nccl) => nccl.all_reduce(parts, sums, rows * sums.stride),
        }
    }

    /// `x = Σ x` over the ranks.
    pub fn all_reduce(&self, rows: usize, x: &Tensor) -> Result<()> {
        match &self.links {
            _ if !self.has_met.get() => Ok(()),
            Links::Alone => Ok(()),
            Links::Peers(peers) => peers.all_reduce(x.joint()?, x.joint()?, rows * x.stride, false),
            Links::Nccl(nccl) => nccl.all_reduce(x, x, rows * x.stride),
        }
    }

    /// On rank 0, `out` gets the ranks' columns side by side.
    pub fn gather(&self, rows: usize, part: &Tensor, out: &Tensor) -> Result<()> {
        match &self.links {
            _ if !self.has_met.get() => Ok(()),
            Links::Alone => Err(Error::Bug("one rank has nothing to gather".into())),
            Links::Peers(peers) => peers.gather(rows, part, out),
            Links::Nccl(nccl) => nccl.gather(rows, part, out),
        }
    }

    /// What rank 0's lanes sampled last becomes what the other ranks' did, for the lanes of some drafts at least.
    pub fn share_tokens(&self, drafts: *const ffi::Draft, n_drafts: usize, last: &LaneTokens) -> Result<()> {
        match &self.links {
            _ if !self.has_met.get() || n_drafts == 0 => Ok(()),
            Links::Alone => Ok(()),
            Links::Peers(peers) => peers.share_tokens(drafts, n_drafts, last.joint),
            Links::Nccl(nccl) => nccl.broadcast(last.joint.0[self.rank], last.n_lanes),
        }
    }

    /// Whether no rank has failed.
    ///
    /// # Errors
    /// [`Error::Device`] with the reason.
    pub fn check(&self) -> Result<()> {
        self.world.barrier.aborted().map_or(Ok(()), |reason| Err(Error::Device(reason)))
    }

    /// Tells the other ranks that this one has failed.
    pub fn abort(&self, reason: &str) {
        self.world.abort(reason);
    }
}

/// What the lanes of every rank sampled last: `[lanes]` of u32.
#[derive(Debug, Clone, Copy)]
pub struct LaneTokens {
    /// By rank.
    pub joint: Joint,
    /// Lanes.
    pub n_lanes: usize,
}

/// The columns that a rank brings to a gathered row of `width`: the first, and how many the first rank has.
pub fn columns_of(rank: usize, n_ranks: usize, width: usize) -> (usize, usize) {
    let share = width.div_ceil(n_ranks);
    ((rank * share).min(width), share)
}
