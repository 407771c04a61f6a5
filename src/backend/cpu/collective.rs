//! Ranks as threads: collectives over shared memory.
//!
//! Every rank writes its contribution to a buffer of its own, meets the others at a barrier, and reads theirs. The
//! buffers are double: a rank may write for the next collective while another still reads for this one, but to
//! write for the one after next it has to pass the barrier that the reader reaches only when it has finished.

use std::cell::Cell;
use std::sync::{Arc, PoisonError, RwLock};

use crate::backend::barrier::Barrier;
use crate::error::{Error, Result};

/// What a rank contributes.
#[derive(Default)]
struct Contribution {
    numbers: Vec<f32>,
    ids: Vec<u32>,
}

struct World {
    barrier: Barrier,
    /// `[2][ranks]`, by the parity of the collective.
    contributions: [Vec<RwLock<Contribution>>; 2],
}

/// One rank's end of the world's collectives. Dropped during a panic, it aborts the world.
pub struct Member {
    rank: usize,
    world: Arc<World>,
    /// Collectives so far; the same on every rank, as every rank runs the same steps.
    n_met: Cell<usize>,
}

impl Member {
    /// Rank 0 of a world of one.
    pub fn alone() -> Member {
        Member::of(0, Arc::new(World::new(1)))
    }

    /// All ranks of a world.
    pub fn world(n_ranks: usize) -> Vec<Member> {
        let world = Arc::new(World::new(n_ranks));
        (0..n_ranks).map(|rank| Member::of(rank, Arc::clone(&world))).collect()
    }

    fn of(rank: usize, world: Arc<World>) -> Member {
        Member { rank, world, n_met: Cell::new(0) }
    }

    /// Ranks of the world.
    pub fn n_ranks(&self) -> usize {
        self.world.contributions[0].len()
    }

    /// Sums over the ranks, in their order.
    pub fn all_reduce(&self, x: &mut [f32]) -> Result<()> {
        if self.n_ranks() == 1 {
            return Ok(());
        }
        let peers = self.exchange(|mine| mine.numbers.extend_from_slice(x))?;
        x.fill(0.0);
        for peer in peers {
            let peer = peer.read().unwrap_or_else(PoisonError::into_inner);
            if peer.numbers.len() != x.len() {
                return Err(mismatch(peer.numbers.len(), x.len()));
            }
            x.iter_mut().zip(&peer.numbers).for_each(|(sum, number)| *sum += number);
        }
        Ok(())
    }

    /// On rank 0, fills `out`, `[rows, width]`, with the ranks' columns side by side.
    pub fn gather(&self, rows: usize, part: &[f32], out: &mut [f32], width: usize) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let peers = self.exchange(|mine| mine.numbers.extend_from_slice(part))?;
        if self.rank != 0 {
            return Ok(());
        }
        let mut offset = 0;
        for peer in peers {
            let peer = peer.read().unwrap_or_else(PoisonError::into_inner);
            let columns = peer.numbers.len() / rows;
            if offset + columns > width {
                return Err(mismatch(offset + columns, width));
            }
            if columns > 0 {
                for (out, part) in out.chunks_exact_mut(width).zip(peer.numbers.chunks_exact(columns)) {
                    out[offset..offset + columns].copy_from_slice(part);
                }
            }
            offset += columns;
        }
        if offset == width { Ok(()) } else { Err(mismatch(offset, width)) }
    }

    /// Rank 0's ids, on every rank. What the others bring is ignored.
    pub fn broadcast(&self, ids: Vec<u32>) -> Result<Vec<u32>> {
        if self.n_ranks() == 1 {
            return Ok(ids);
        }
        let peers = self.exchange(|mine| mine.ids = ids)?;
        Ok(peers[0].read().unwrap_or_else(PoisonError::into_inner).ids.clone())
    }

    /// The least of the numbers that the ranks bring.
    pub fn least(&self, number: u64) -> Result<u64> {
        let halves = [(number >> 32) as u32, number as u32];
        let peers = self.exchange(|mine| mine.ids.extend(halves))?;
        let brought = peers.iter().map(|peer| {
            let halves = &peer.read().unwrap_or_else(PoisonError::into_inner).ids;
            halves.iter().fold(0u64, |number, &half| number << 32 | u64::from(half))
        });
        Ok(brought.min().unwrap_or(number))
    }

    /// Who waits at the barrier, or comes to it later, gets an error with this reason. The first reason stays.
    pub fn abort(&self, reason: &str) {
        self.world.barrier.abort(reason);
    }

    /// Leaves a contribution, waits until every rank has, and returns all of them.
    fn exchange(&self, write: impl FnOnce(&mut Contribution)) -> Result<&[RwLock<Contribution>]> {
        let contributions = &self.world.contributions[self.n_met.get() % 2];
        self.n_met.set(self.n_met.get() + 1);
        {
            let mut mine = contributions[self.rank].write().unwrap_or_else(PoisonError::into_inner);
            mine.numbers.clear();
            mine.ids.clear();
            write(&mut mine);
        }
        self.world.barrier.wait()?;
        Ok(contributions)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort(&format!("rank {} panicked", self.rank));
        }
    }
}

fn mismatch(got: usize, expected: usize) -> Error {
    Error::Bug(format!("ranks disagree: {got} numbers where {expected} were expected"))
}

impl World {
    fn new(n_ranks: usize) -> World {
        let buffers = || (0..n_ranks).map(|_| RwLock::default()).collect();
        World { barrier: Barrier::new(n_ranks), contributions: [buffers(), buffers()] }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn run<T: Send>(n_ranks: usize, each: impl Fn(Member) -> T + Sync) -> Vec<T> {
        thread::scope(|scope| {
            let each = &each;
            let threads: Vec<_> =
                Member::world(n_ranks).into_iter().map(|member| scope.spawn(move || each(member))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn sums_have_the_same_bits_on_every_rank() {
        let sums = run(4, |member| {
            let mut sums = Vec::new();
            for round in 0..200 {
                let mut x = [0.1 * (member.rank * member.rank + round) as f32, 1e8 * member.rank as f32];
                member.all_reduce(&mut x).unwrap();
                sums.push(x);
            }
            sums
        });
        assert!(sums.iter().all(|other| *other == sums[0]));
        let round = 7;
        let expected = (0..4).fold(0f32, |sum, rank| sum + 0.1 * (rank * rank + round) as f32);
        assert_eq!(sums[0][round][0], expected);
    }

    #[test]
    fn gathers_uneven_columns() {
        let outs = run(3, |member| {
            let columns = member.rank; // Rank 0 brings none.
            let part: Vec<f32> = (0..2 * columns).map(|i| (member.rank * 10 + i) as f32).collect();
            let mut out = [0f32; 6];
            member.gather(2, &part, &mut out, 3).unwrap();
            out
        });
        assert_eq!(outs[0], [10.0, 20.0, 21.0, 11.0, 22.0, 23.0]);
    }

    #[test]
    fn broadcasts_what_rank_0_brings() {
        let ids = run(3, |member| member.broadcast(vec![member.rank as u32 + 5; 2]).unwrap());
        assert_eq!(ids, vec![vec![5, 5]; 3]);
    }

    #[test]
    fn the_least_number_is_found() {
        let least = run(3, |member| member.least((7 - member.rank as u64) << 33).unwrap());
        assert_eq!(least, [5 << 33; 3]);
    }

    #[test]
    fn an_abort_frees_who_waits_and_who_comes_later() {
        let outcomes = run(3, |member| {
            if member.rank == 1 {
                member.abort("rank 1: out of paper");
            }
            (member.all_reduce(&mut [1.0]), member.all_reduce(&mut [1.0]))
        });
        let error = || Err(Error::Device("rank 1: out of paper".into()));
        assert_eq!(outcomes[0], (error(), error()));
        assert_eq!(outcomes[2], (error(), error()));
    }

    #[test]
    fn a_panic_frees_the_others() {
        let mut world = Member::world(2);
        let (second, first) = (world.pop().unwrap(), world.pop().unwrap());
        let dies = thread::spawn(move || {
            let _member = second;
            panic!("on purpose");
        });
        assert_eq!(first.all_reduce(&mut [1.0]), Err(Error::Device("rank 1 panicked".into())));
        assert!(dies.join().is_err());
    }
}
