//! A GPU: context, the one compute stream, memory that is freed when dropped.

use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdeviceptr, CUstream};
use cudarc::driver::{CudaContext, CudaStream, DriverError, result};

use crate::error::{Error, Result};

/// A GPU with its compute stream; cheap to clone. Used by one thread.
#[derive(Clone)]
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

/// Whether there is a GPU that this build can use, and why not.
///
/// # Errors
/// A sentence.
pub fn probe() -> Result<(), String> {
    // SAFETY: opens a library by its usual names. Asked first, since cudarc panics where it is missing.
    if !unsafe { sys::is_culib_present() } {
        return Err("there is no NVIDIA driver".to_owned());
    }
    match CudaContext::device_count() {
        Ok(n) if n > 0 => Ok(()),
        Ok(_) => Err("there is no NVIDIA GPU".to_owned()),
        Err(error) => Err(format!("the NVIDIA driver answers {error}")),
    }
}

/// GPUs that there are.
pub fn count() -> usize {
    probe().ok().and_then(|()| CudaContext::device_count().ok()).map_or(0, |n| n as usize)
}

/// Memory of a GPU in bytes, without opening it.
pub fn total_bytes(ordinal: usize) -> Option<u64> {
    probe().ok()?;
    let device = result::device::get(ordinal as i32).ok()?;
    // SAFETY: the device was named by the driver.
    unsafe { result::device::total_mem(device) }.ok().map(|bytes| bytes as u64)
}

/// Why some of the first GPUs cannot read and write each other's memory; nothing if all can.
///
/// # Errors
/// [`Error::Unsupported`] where there are fewer.
pub fn lacking_peer_access(n: usize) -> Result<Option<String>> {
    probe().map_err(Error::Unsupported)?;
    let there = count();
    if n > there {
        return Err(Error::Unsupported(format!("{n} ranks need as many GPUs, and there are {there}")));
    }
    let gpus: Vec<_> =
        (0..n as i32).map(result::device::get).collect::<Result<_, _>>().map_err(failed("naming a GPU"))?;
    for (i, &from) in gpus.iter().enumerate() {
        for (j, &to) in gpus.iter().enumerate().filter(|&(j, _)| j != i) {
            let mut can = 0;
            // SAFETY: a question about two GPUs that the driver has named.
            let status = unsafe { sys::cuDeviceCanAccessPeer(&mut can, from, to) };
            if status != sys::CUresult::CUDA_SUCCESS || can == 0 {
                return Ok(Some(format!("GPU {i} has no access to the memory of GPU {j}")));
            }
        }
    }
    Ok(None)
}

/// Ends the process at once, as a process has to whose GPU may be waiting for ever: an ordinary exit has the driver wait
/// for it.
pub fn exit_now(code: u8) -> ! {
    unsafe extern "C" {
        fn _exit(code: c_int) -> !;
    }
    // SAFETY: ends the process; nothing of it is left to be unsound.
    unsafe { _exit(c_int::from(code)) }
}

impl Device {
    /// Opens a GPU.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where there is none.
    pub fn open(ordinal: usize) -> Result<Device> {
        probe().map_err(Error::Unsupported)?;
        let context = CudaContext::new(ordinal).map_err(failed("opening the GPU"))?;
        // SAFETY: one stream does all the work, in order; nothing relies on cudarc's events, which break capture.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(failed("making a stream"))?;
        Ok(Device { context, stream })
    }

    /// Makes the calling thread the one that uses the GPU.
    pub fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(failed("binding the GPU to a thread"))
    }

    /// The compute stream.
    pub fn stream(&self) -> CUstream {
        self.stream.cu_stream()
    }

    /// The compute stream as cudarc has it.
    pub fn cuda_stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Its name, for logs and caches.
    pub fn name(&self) -> String {
        self.context.name().unwrap_or_else(|_| "GPU".to_owned())
    }

    /// Bytes free, and bytes in all.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let (free, total) = self.context.mem_get_info().map_err(failed("asking for free memory"))?;
        Ok((free as u64, total as u64))
    }

    /// The context's address, by which another rank's thread lets its GPU [see](Device::see) this one's memory.
    pub fn context_address(&self) -> u64 {
        self.context.cu_ctx() as u64
    }

    /// Lets this GPU read and write the memory of another, named by its context.
    pub fn see(&self, context: u64) -> Result<()> {
        // SAFETY: the context is that of another rank, which lives as long as the world.
        let status = unsafe { sys::cuCtxEnablePeerAccess(context as sys::CUcontext, 0) };
        match status {
            sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
            error => Err(failed("reaching another GPU's memory")(DriverError(error))),
        }
    }

    /// Queues that a buffer is filled with a byte.
    pub fn fill(&self, buffer: &Buffer, byte: u8) -> Result<()> {
        // SAFETY: the buffer's own range.
        unsafe { result::memset_d8_async(buffer.pointer, byte, buffer.n_bytes, self.stream()) }
            .map_err(failed("filling memory"))
    }

    /// Queues a copy from one address of this GPU to another.
    pub fn copy(&self, from: CUdeviceptr, to: CUdeviceptr, n_bytes: usize) -> Result<()> {
        // SAFETY: both are rows of tensors of at least so many bytes.
        unsafe { result::memcpy_dtod_async(to, from, n_bytes, self.stream()) }.map_err(failed("copying"))
    }

    /// Zeroed memory.
    ///
    /// # Errors
    /// [`Error::Exhausted`] with the numbers.
    pub fn alloc(&self, n_bytes: usize) -> Result<Buffer> {
        // Never none: a pointer to nothing has no place in a kernel's parameters. Vector loads may touch the last 16 bytes.
        let n_bytes = n_bytes.max(1).next_multiple_of(256);
        // SAFETY: the context is bound; the memory is freed once, by `Buffer`.
        let pointer = unsafe { result::malloc_sync(n_bytes) }.map_err(|error| {
            let free = self.memory().map_or(0, |(free, _)| free);
            Error::Exhausted(format!(
                "{} MiB of GPU memory are asked for, {} MiB are free ({error}): lower --pool-tokens, \
                 --max-batch-prefill-tokens or --max-lanes",
                n_bytes >> 20,
                free >> 20
            ))
        })?;
        let buffer = Buffer { pointer, n_bytes, _device: self.clone() };
        // SAFETY: the range was allocated above.
        unsafe { result::memset_d8_async(pointer, 0, n_bytes, self.stream()) }
            .map_err(failed("clearing memory"))?;
        Ok(buffer)
    }

    /// Host memory that the GPU reads and writes directly, zeroed.
    pub fn pinned<T: bytemuck::Zeroable>(&self, len: usize) -> Result<Pinned<T>> {
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let n_bytes = (len.max(1)) * size_of::<T>();
        // SAFETY: freed once, by `Pinned`.
        let pointer = unsafe { result::malloc_host(n_bytes, flags) }.map_err(|error| {
            Error::Exhausted(format!("{} MiB of pinned host memory: {error}", n_bytes >> 20))
        })?;
        // SAFETY: the allocation has so many bytes.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, n_bytes) };
        Ok(Pinned { pointer: pointer.cast(), len, _device: self.clone(), numbers: PhantomData })
    }

    /// Queues a copy to the device. The source must stay as it is until the stream has passed it.
    pub fn upload<T>(&self, from: &[T], to: CUdeviceptr) -> Result<()> {
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's `to` has room for `from`, as every buffer of a step is sized for the largest step.
        unsafe { result::memcpy_htod_async(to, from, self.stream()) }.map_err(failed("copying to the GPU"))
    }

    /// Waits until the stream has done all that was queued.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(failed("waiting for the GPU"))
    }

    /// Whether the stream has failed; cheap.
    pub fn check(&self) -> Result<()> {
        // SAFETY: the stream lives.
        let status = unsafe { sys::cuStreamQuery(self.stream()) };
        match status {
            sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_NOT_READY => Ok(()),
            error => Err(failed("a step")(DriverError(error))),
        }
    }
}

/// What a driver's error means: nothing that ran on the GPU can be relied on any more.
pub fn failed(what: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |error| Error::DeviceLost(format!("{what} failed: {error}"))
}

/// What a launcher returned.
pub fn launched(op: &str, status: c_int) -> Result<()> {
    if status == 0 {
        return Ok(());
    }
    Err(Error::DeviceLost(format!("the kernel {op} could not be started: CUDA error {status}")))
}

/// Memory of the GPU.
pub struct Buffer {
    pointer: CUdeviceptr,
    n_bytes: usize,
    _device: Device,
}

impl Buffer {
    /// The address.
    pub fn address(&self) -> CUdeviceptr {
        self.pointer
    }

    /// The address as a kernel's parameter takes it.
    pub fn ptr<T>(&self) -> *mut T {
        self.pointer as *mut T
    }

    /// The address of a byte.
    pub fn at<T>(&self, byte: usize) -> *mut T {
        debug_assert!(byte <= self.n_bytes);
        (self.pointer + byte as u64) as *mut T
    }

    /// Bytes allocated.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `Device::alloc`, freed here only. An error has nobody to go to: the device is lost then.
        let _ = unsafe { result::free_sync(self.pointer) };
    }
}

/// Pinned host memory, mapped into the GPU's addresses (which are the host's own).
pub struct Pinned<T> {
    pointer: *mut T,
    len: usize,
    _device: Device,
    numbers: PhantomData<T>,
}

impl<T: Copy> Pinned<T> {
    /// The address, for the device and the host.
    pub fn ptr(&self) -> *mut T {
        self.pointer
    }

    /// The address of a number.
    pub fn at(&self, at: usize) -> *mut T {
        debug_assert!(at < self.len);
        // Not dereferenced here; kernels write there.
        self.pointer.wrapping_add(at)
    }

    /// Reads a number that the device may be writing.
    pub fn read(&self, at: usize) -> T {
        assert!(at < self.len);
        // SAFETY: inside the allocation, which was zeroed; any bits are a `T` that kernels write.
        unsafe { self.pointer.add(at).read_volatile() }
    }

    /// Writes a number that the device may be reading.
    pub fn write(&mut self, at: usize, number: T) {
        assert!(at < self.len);
        // SAFETY: inside the allocation.
        unsafe { self.pointer.add(at).write_volatile(number) }
    }

    /// The numbers as the host writes them; the device must not be reading them.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: the allocation has `len` numbers, zeroed at first, and is borrowed for as long.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // SAFETY: allocated by `Device::pinned`, freed here only.
        let _ = unsafe { result::free_host(self.pointer.cast::<c_void>()) };
    }
}

// SAFETY: the memory is owned; one thread at a time uses it.
unsafe impl<T: Send> Send for Pinned<T> {}
