//! NVIDIA's collectives, for GPUs that cannot see each other's memory. The library is opened when it is needed.

use std::ffi::{c_char, c_int, c_void};
use std::ptr;
use std::sync::OnceLock;

use cudarc::driver::sys::CUstream;
use libloading::Library;

use super::device::Device;
use super::tensor::{Numbers, Tensor};
use super::world::columns_of;
use crate::error::{Error, Result};
use crate::model::checkpoint::DType;

const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

// Of `nccl.h`.
const UINT32: c_int = 3;
const FLOAT16: c_int = 6;
const FLOAT32: c_int = 7;
const BFLOAT16: c_int = 9;
const SUM: c_int = 0;

type Comm = *mut c_void;

/// What the ranks of a world find each other by.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId([c_char; 128]);

/// The functions that are used.
struct Api {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int,
    all_reduce:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
    broadcast: unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
    recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
}

impl Api {
    fn open() -> Result<Api, String> {
        // SAFETY: the library's initialisers are NVIDIA's.
        let library = NAMES.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
        let library = library.ok_or_else(|| {
            format!("{} is not found: install NCCL, or name its folder in LD_LIBRARY_PATH", NAMES[0])
        })?;
        // Never closed: its functions are kept.
        let library: &'static Library = Box::leak(Box::new(library));
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: declared as in `nccl.h`.
                *unsafe { library.get($name) }.map_err(|error| format!("{}: {error}", NAMES[0]))?
            };
        }
        Ok(Api {
            get_unique_id: function!(b"ncclGetUniqueId\0"),
            comm_init_rank: function!(b"ncclCommInitRank\0"),
            all_reduce: function!(b"ncclAllReduce\0"),
            broadcast: function!(b"ncclBroadcast\0"),
            send: function!(b"ncclSend\0"),
            recv: function!(b"ncclRecv\0"),
            group_start: function!(b"ncclGroupStart\0"),
            group_end: function!(b"ncclGroupEnd\0"),
        })
    }

    fn get() -> Result<&'static Api, String> {
        static API: OnceLock<Result<Api, String>> = OnceLock::new();
        API.get_or_init(Api::open).as_ref().map_err(Clone::clone)
    }
}

/// For a new world.
///
/// # Errors
/// A sentence where there is no NCCL.
pub fn unique_id() -> Result<UniqueId, String> {
    let mut id = UniqueId([0; 128]);
    // SAFETY: the library writes an identifier.
    match unsafe { (Api::get()?.get_unique_id)(&mut id) } {
        0 => Ok(id),
        error => Err(format!("NCCL answers error {error}")),
    }
}

/// One rank's end of NCCL. It is never closed: NCCL would wait for every recorded graph that holds it, and for ranks that
/// may be gone. A world lives as long as its process.
pub struct Communicator {
    api: &'static Api,
    comm: Comm,
    device: Device,
    numbers: c_int,
    rank: usize,
    n_ranks: usize,
}

fn done(what: &str, status: c_int) -> Result<()> {
    match status {
        0 => Ok(()),
        error => Err(Error::DeviceLost(format!("NCCL: {what} failed with error {error}"))),
    }
}

impl Communicator {
    /// Meets the other ranks, which do so at once, and runs what is used once, so that nothing is set up later.
    pub fn open(
        device: &Device,
        dtype: DType,
        id: UniqueId,
        rank: usize,
        n_ranks: usize,
    ) -> Result<Communicator> {
        let api = Api::get().map_err(Error::Unsupported)?;
        let mut comm = ptr::null_mut();
        // SAFETY: the GPU is bound to the thread; the identifier is the world's.
        let status = unsafe { (api.comm_init_rank)(&mut comm, n_ranks as c_int, id, rank as c_int) };
        done("meeting the other ranks", status)?;
        let numbers = if dtype == DType::F16 { FLOAT16 } else { BFLOAT16 };
        let nccl = Communicator { api, comm, device: device.clone(), numbers, rank, n_ranks };
        let some = device.alloc(1 << 20)?;
        nccl.sum(some.ptr(), some.ptr(), 8)?;
        nccl.sum(some.ptr(), some.ptr(), some.n_bytes() / 2)?;
        nccl.broadcast(some.address(), 1)?;
        let part = Tensor::new(device.alloc(32)?, 1, 8, Numbers::Single);
        let all = Tensor::new(device.alloc(32 * n_ranks)?, 1, 8 * n_ranks, Numbers::Single);
        nccl.gather(1, &part, &all)?;
        device.synchronize()?;
        Ok(nccl)
    }

    fn sum(&self, from: *const c_void, to: *mut c_void, n: usize) -> Result<()> {
        let Communicator { api, comm, numbers, .. } = *self;
        // SAFETY: both sides have so many numbers.
        let status = unsafe { (api.all_reduce)(from, to, n, numbers, SUM, comm, self.device.stream()) };
        done("a sum", status)
    }

    /// `sums = Σ parts` over `n` numbers.
    pub fn all_reduce(&self, parts: &Tensor, sums: &Tensor, n: usize) -> Result<()> {
        self.sum(parts.ptr(), sums.ptr(), n)
    }

    /// Rank 0's `n` words at an address, in place.
    pub fn broadcast(&self, address: u64, n: usize) -> Result<()> {
        let Communicator { api, comm, .. } = *self;
        let (from, to) = (address as *const c_void, address as *mut c_void);
        // SAFETY: every rank has so many words there.
        let status = unsafe { (api.broadcast)(from, to, n, UINT32, 0, comm, self.device.stream()) };
        done("a broadcast", status)
    }

    /// On rank 0, `out` gets the ranks' columns side by side.
    pub fn gather(&self, rows: usize, part: &Tensor, out: &Tensor) -> Result<()> {
        // NCCL takes so many messages at once.
        const ROWS_AT_ONCE: usize = 256;
        for first in (0..rows).step_by(ROWS_AT_ONCE) {
            self.gather_some(first..(first + ROWS_AT_ONCE).min(rows), part, out)?;
        }
        if self.rank == 0 {
            let row =
                |tensor: &Tensor, row: usize| tensor.buffer().address() + (row * tensor.stride * 4) as u64;
            for at in 0..rows {
                self.device.copy(row(part, at), row(out, at), part.width * 4)?;
            }
        }
        Ok(())
    }

    fn gather_some(&self, rows: std::ops::Range<usize>, part: &Tensor, out: &Tensor) -> Result<()> {
        let Communicator { api, comm, rank, n_ranks, .. } = *self;
        let stream = self.device.stream();
        // SAFETY: opens a group, which is closed below.
        done("a group", unsafe { (api.group_start)() })?;
        let mut status = 0;
        for row in rows {
            if rank > 0 && part.width > 0 {
                let from = part.ptr::<f32>().wrapping_add(row * part.stride);
                // SAFETY: the row is inside the tensor.
                status |= unsafe { (api.send)(from.cast(), part.width, FLOAT32, 0, comm, stream) };
            }
            for peer in (1..n_ranks).filter(|_| rank == 0) {
                let (first, share) = columns_of(peer, n_ranks, out.width);
                let width = share.min(out.width - first);
                let to = out.ptr::<f32>().wrapping_add(row * out.stride + first);
                if width > 0 {
                    // SAFETY: as above.
                    status |= unsafe { (api.recv)(to.cast(), width, FLOAT32, peer as c_int, comm, stream) };
                }
            }
        }
        // SAFETY: opened above.
        let ended = unsafe { (api.group_end)() };
        done("gathering", status)?;
        done("gathering", ended)
    }
}
