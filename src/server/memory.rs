//! Memory that a new pool may count on.

use std::fs;

use crate::config::Compute;

/// Bytes that each of `n_ranks` may use: of the smallest of their GPUs the share that the operator allows; of the host what can be had without swapping,
/// by the kernel's estimate, less where a control group allows less.
pub(super) fn available_bytes(compute: &Compute, n_ranks: usize) -> Option<u64> {
    match compute {
        Compute::Cpu { .. } => host_bytes(),
        Compute::Cuda { memory_fraction } => {
            gpu_bytes(n_ranks).map(|bytes| (bytes as f64 * f64::from(*memory_fraction)) as u64)
        }
    }
}

#[cfg(feature = "cuda")]
fn gpu_bytes(n_ranks: usize) -> Option<u64> {
    (0..n_ranks).filter_map(crate::backend::cuda::total_bytes).min()
}

#[cfg(not(feature = "cuda"))]
fn gpu_bytes(_n_ranks: usize) -> Option<u64> {
    None
}

fn host_bytes() -> Option<u64> {
    let system = fs::read_to_string("/proc/meminfo").ok().as_deref().and_then(available_in);
    let group = || {
        let limit = read_number("/sys/fs/cgroup/memory.max")?;
        Some(limit.saturating_sub(read_number("/sys/fs/cgroup/memory.current")?))
    };
    match (system, group()) {
        (Some(system), Some(group)) => Some(system.min(group)),
        (system, group) => system.or(group),
    }
}

fn read_number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn available_in(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::available_in;

    #[test]
    fn the_kernels_estimate_is_read() {
        let text = "MemTotal:       16384 kB\nMemFree: 1 kB\nMemAvailable:   2048 kB\n";
        assert_eq!(available_in(text), Some(2 << 20));
        for text in ["", "MemAvailable: x kB", "MemAvailable: 5", "MemAvailable: 99999999999999999999 kB"] {
            assert_eq!(available_in(text), None, "{text}");
        }
    }
}
