//! Our own collectives: kernels that read and write the other GPUs' memory.

use super::device::{Buffer, Device, launched};
use super::tensor::Tensor;
use super::world::{Joint, Member, columns_of};
use super::{dtype_code, ffi};
use crate::error::Result;
use crate::model::checkpoint::DType;

/// Sums of up to so many bytes are made in one shot: what is sent grows with the number of ranks, and from here on the
/// second shot costs less. Measured among two H100s (4.2 MB: 17.6 µs in one shot, 19.5 in two; at most 2.6 µs up to
/// 64 KiB, where NCCL takes 7); among more, the bounds of vLLM's kernel of this kind.
fn one_shot_bytes(n_ranks: usize) -> usize {
    match n_ranks {
        2 => 4 << 20,
        3 | 4 => 512 << 10,
        _ => 256 << 10,
    }
}

/// One rank's end of what the ranks' kernels share.
pub struct Peers {
    device: Device,
    world: ffi::World,
    dtype: DType,
    /// Kept for the kernels of all ranks.
    _buffers: [Buffer; 4],
}

impl Peers {
    /// Lets the kernels of all ranks see each other's memory. All ranks do so at once.
    pub fn open(member: &Member, device: &Device, dtype: DType, aborted: *const u32) -> Result<Peers> {
        let n_ranks = member.n_ranks();
        for (rank, context) in member.exchange(device.context_address())?.into_iter().enumerate() {
            if rank != member.rank() {
                device.see(context)?;
            }
        }
        // SAFETY: asks the driver to load kernels.
        launched("load_collectives", unsafe { ffi::kv_load_collectives(n_ranks as i32, dtype_code(dtype)) })?;
        let inbox_bytes = one_shot_bytes(n_ranks);
        let flags = device.alloc(ffi::KV_MEETING_BLOCKS * ffi::KV_MAX_RANKS * size_of::<u32>())?;
        let inboxes = device.alloc(2 * n_ranks * inbox_bytes)?;
        device.fill(&inboxes, 0xff)?;
        let meetings = device.alloc(ffi::KV_MEETING_BLOCKS * size_of::<u32>())?;
        let turns = device.alloc(size_of::<u32>())?;
        // Peers may write as soon as they know the addresses.
        device.synchronize()?;
        let (all_flags, all_inboxes) = (member.joint(flags.address())?, member.joint(inboxes.address())?);
        let world = ffi::World {
            rank: member.rank() as i32,
            n_ranks: n_ranks as i32,
            flags: all_flags.0.map(|address| address as *mut u32),
            inboxes: all_inboxes.0.map(|address| address as *mut _),
            inbox_bytes: inbox_bytes as i64,
            meetings: meetings.ptr(),
            turns: turns.ptr(),
            aborted,
        };
        Ok(Peers { device: device.clone(), world, dtype, _buffers: [flags, inboxes, meetings, turns] })
    }

    /// `sums = Σ parts` over `n` numbers, or `sums += Σ parts`.
    pub fn all_reduce(&self, parts: Joint, sums: Joint, n: usize, add: bool) -> Result<()> {
        let is_small = n * self.dtype.size_bytes() <= one_shot_bytes(self.world.n_ranks as usize);
        let params = ffi::AllReduce {
            world: self.world,
            parts: parts.0.map(|address| address as *const _),
            sums: sums.0.map(|address| address as *mut _),
            n: n as i64,
            add: i32::from(add),
            way: if is_small { ffi::KV_ONE_SHOT } else { ffi::KV_TWO_SHOT },
            dtype: dtype_code(self.dtype),
        };
        // SAFETY: every rank's tensors have so many numbers, in whole rows of multiples of eight.
        launched("all_reduce", unsafe { ffi::kv_all_reduce(&params, self.device.stream()) })
    }

    /// On rank 0, `out` gets the ranks' columns side by side.
    pub fn gather(&self, rows: usize, part: &Tensor, out: &Tensor) -> Result<()> {
        let (first, share) = columns_of(self.world.rank as usize, self.world.n_ranks as usize, out.width);
        let params = ffi::Gather {
            world: self.world,
            part: part.ptr(),
            part_stride: part.stride as i64,
            out: out.joint()?.0[0] as *mut f32,
            out_stride: out.stride as i64,
            rows: rows as i32,
            first: first as i32,
            width: part.width as i32,
            all_width: share as i32,
        };
        // SAFETY: rank 0's tensor has so many rows, and as many columns as the ranks together.
        launched("gather", unsafe { ffi::kv_gather(&params, self.device.stream()) })
    }

    /// The drafts' lanes take rank 0's tokens.
    pub fn share_tokens(&self, drafts: *const ffi::Draft, n_drafts: usize, last: Joint) -> Result<()> {
        let params = ffi::ShareTokens {
            world: self.world,
            drafts,
            n_drafts: n_drafts as i32,
            lane_last: last.0.map(|address| address as *mut u32),
        };
        // SAFETY: every rank has the same lanes, and drafts name some of them.
        launched("share_tokens", unsafe { ffi::kv_share_tokens(&params, self.device.stream()) })
    }
}
