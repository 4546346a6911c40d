//! CPU affinity and CPU time of threads.

use std::fs;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

use crate::client::Result;

/// The process whose CPU time is measured: all of its threads, including the io_uring workers of the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ServerProcess(pub(crate) u32);

impl ServerProcess {
    /// CPU time so far, in ns, without threads that have ended.
    pub(crate) fn ns(self) -> Result<u64> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.0))?.flatten();
        let times = threads.map(|thread| {
            let text = fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
            text.split(' ').next().and_then(|field| field.parse().ok()).unwrap_or(0_u64)
        });
        Ok(times.sum())
    }
}

/// CPU time of this thread in ns.
pub(crate) fn this_thread_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// The CPUs of server and client.
#[derive(Clone, Copy)]
pub(crate) struct CpuPlacement {
    pub(crate) server: usize,
    pub(crate) client: usize,
}

impl CpuPlacement {
    /// The chosen ones, server first; without a choice the last and the first that this process may use.
    pub(crate) fn new(chosen: &[usize]) -> Result<Self> {
        let allowed = allowed()?;
        match (chosen, &allowed[..]) {
            ([server, client], _) => Ok(Self { server: *server, client: *client }),
            (_, [first, .., last]) => Ok(Self { server: *last, client: *first }),
            (_, [only]) => Ok(Self { server: *only, client: *only }),
            (_, []) => Err("no CPU is allowed".into()),
        }
    }
}

/// The CPUs this process may use.
pub(crate) fn allowed() -> Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect())
}

/// Restricts this thread, and the threads and processes that it starts later, to these CPUs.
pub(crate) fn pin(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|&cpu| set.set(cpu));
    Ok(sched_setaffinity(None, &set)?)
}
