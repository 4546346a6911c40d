//! [`WorkerPool`]: the worker threads, and the placement of devices on them.

use std::fmt;
use std::str::FromStr;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::thread::CpuSet;
use vdpa_core::Errno;
use vdpa_core::types::Result;
use vdpa_sys::dirty::DirtyMemory;
use vdpa_sys::shared_words::SharedWords;

use super::dirty::DirtyLog;
use super::event_loop::{Message, Registration};
use super::kept::KeptRings;
use super::thread::{Start, WorkerThread, io_uring_is_withheld};
use super::{Counters, QueueControl, QueueHandler, QueueLogs, Shared, Size};
use crate::persist::{Held, Store};

/// A set of processors, by kernel number, below [`CpuSet::MAX_CPU`] (1024). Written and parsed as `0,2-5`.
///
/// ```
/// let cpus: vdpa_backend::worker::CpuList = "5,0,2-4".parse()?;
/// assert_eq!(cpus.to_string(), "0,2-5");
/// # Ok::<(), vdpa_backend::worker::InvalidCpuList>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(
    /// In ascending order, each once.
    pub(super) Vec<usize>,
);

/// The text is not a list of processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("numbers and ranges of processors below {} are right, for example 0,2-5", CpuSet::MAX_CPU)]
pub struct InvalidCpuList;

impl FromStr for CpuList {
    type Err = InvalidCpuList;

    fn from_str(text: &str) -> std::result::Result<Self, InvalidCpuList> {
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number =
                |text: &str| text.parse().ok().filter(|cpu| *cpu < CpuSet::MAX_CPU).ok_or(InvalidCpuList);
            let (first, last): (usize, usize) = (number(first)?, number(last)?);
            if first > last {
                return Err(InvalidCpuList);
            }
            cpus.extend(first..=last);
        }
        cpus.sort_unstable();
        cpus.dedup();
        Ok(Self(cpus))
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.0.chunk_by(|a, b| a + 1 == *b).map(|run| match run {
            [first, .., last] => format!("{first}-{last}"),
            _ => run.first().map(ToString::to_string).unwrap_or_default(),
        });
        f.write_str(&parts.collect::<Vec<_>>().join(","))
    }
}

/// On which thread a device is served. The default is a thread that it shares with other devices, on any processor: the
/// one that has the fewest devices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// Processors that the thread may run on; `None` for all. Devices with the same list share a thread.
    pub cpus: Option<CpuList>,
    /// Whether the device has a thread of its own.
    pub dedicated: bool,
}

/// The worker threads of a program, which normally has one pool.
///
/// Any thread but a worker may call it. A thread starts when a device needs it; without a [`Placement`] it then runs for as
/// long as the pool, with one it ends with its last device. A device keeps its thread when the pool is dropped.
#[derive(Debug)]
pub struct WorkerPool {
    /// Maximum number of threads for devices with the default placement.
    workers: usize,
    /// Busy-poll budget.
    poll: Duration,
    threads: Arc<Mutex<Threads>>,
    /// For the next device.
    logs: Mutex<Option<QueueLogs>>,
    /// `None` if rings end with this process.
    kept: Option<Arc<KeptRings>>,
}

/// Whether a predecessor still serves the devices of a [`WorkerPool`].
#[derive(Clone, Debug)]
pub struct Parked(Option<Arc<KeptRings>>);

impl Parked {
    /// As [`WorkerPool::is_parked`].
    #[must_use]
    pub fn is_parked(&self) -> bool {
        self.0.as_ref().is_some_and(|kept| kept.is_foreign())
    }
}

#[derive(Debug, Default)]
struct Threads {
    /// For devices with the default placement. Kept when they have no device.
    shared: Vec<Arc<WorkerThread>>,
    /// For devices with a list of processors. The devices own them.
    pinned: Vec<(CpuList, Weak<WorkerThread>)>,
    /// Each for one device, which owns it.
    dedicated: Vec<Weak<WorkerThread>>,
}

impl WorkerPool {
    /// A pool with at most `workers` threads (0 counts as 1) for devices with the default placement. It starts no thread yet.
    /// `poll` is how long a thread may busy-poll its rings before it sleeps; it does so only while that pays. 0 is never.
    pub fn new(workers: usize, poll: Duration) -> Self {
        let (threads, logs) = (Arc::default(), Mutex::default());
        Self { workers: workers.max(1), poll, threads, logs, kept: None }
    }

    /// As [`new`](Self::new), with threads whose rings outlive this process together with the memory that is pinned in them:
    /// `store` holds them. `left` are the items from [`RINGS`](crate::persist::RINGS) on that a predecessor has had held: its
    /// devices, added with their [logs](Self::with_logs), get its rings. With `parked` the predecessor still uses these, and no
    /// thread of this pool touches anything of it before [`take_over`](Self::take_over).
    #[must_use]
    pub fn keeping(self, store: Arc<dyn Store>, left: Vec<Held>, parked: bool) -> Self {
        Self { kept: Some(Arc::new(KeptRings::new(store, left, parked))), ..self }
    }

    /// 32 words for what the next device counts itself, which outlive this process: a device that is made again finds what it has
    /// counted. `None` when its [logs](Self::with_logs) do not outlive this process, or are those of a program without such words.
    #[must_use]
    pub fn own_counters(&self) -> Option<SharedWords> {
        self.logs.lock().as_ref()?.own_counters()
    }

    /// The same threads, for one device that keeps its in-flight logs in `logs`.
    #[must_use]
    pub fn with_logs(&self, logs: QueueLogs) -> Self {
        let (threads, kept) = (Arc::clone(&self.threads), self.kept.clone());
        Self { workers: self.workers, poll: self.poll, threads, logs: Mutex::new(Some(logs)), kept }
    }

    /// Waits until none of the requests of a dead predecessor is in flight in the ring that the device of `logs` was served with. To
    /// be called before its files are opened: requests keep them open, and locked. Does nothing if the predecessor lives.
    ///
    /// Returns whether none is in flight for certain. `false`: the ring is not there, or cannot be taken over; the kernel may still
    /// carry them out, and only their locks on files tell.
    pub fn settle(&self, logs: &QueueLogs) -> bool {
        match self.kept.as_ref().filter(|kept| !kept.is_foreign()) {
            None => true,
            // Threads that serve in place of a ring ended with their process.
            Some(kept) => logs.ring().map_or_else(io_uring_is_withheld, |number| kept.prepare(number)),
        }
    }

    /// Whether a predecessor still serves the devices that are added.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        self.parked().is_parked()
    }

    /// [`is_parked`](Self::is_parked), for a device that has no thread of the pool and outlives this process by itself.
    #[must_use]
    pub fn parked(&self) -> Parked {
        Parked(self.kept.clone())
    }

    /// Stops all threads: no request is taken any more, those in flight are completed, and after that nothing of this process
    /// uses rings, logs and memory of clients. Whoever has taken them over can do so; otherwise [`unpark`](Self::unpark) goes on.
    /// Waits at most `timeout`.
    ///
    /// # Errors
    /// `ETIMEDOUT` when requests are still in flight then, `EIO` when a thread has ended; the threads go on.
    pub fn park(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let threads = self.threads.lock().all();
        let replies: Vec<_> = threads.iter().map(|thread| thread.ask(Message::Park)).collect();
        let wait = |reply: Result<std::sync::mpsc::Receiver<Result<()>>>| {
            let left = deadline.saturating_duration_since(Instant::now());
            match reply?.recv_timeout(left) {
                Ok(result) => result,
                Err(RecvTimeoutError::Timeout) => Err(Errno::TIMEDOUT),
                Err(RecvTimeoutError::Disconnected) => Err(Errno::IO),
            }
        };
        let parked: Result<Vec<()>> = replies.into_iter().map(wait).collect();
        if parked.is_err() {
            self.unpark()?;
        }
        parked.map(drop)
    }

    /// Has parked threads go on.
    ///
    /// # Errors
    /// `EIO` when a thread has ended; its devices are not served.
    pub fn unpark(&self) -> Result<()> {
        let threads = self.threads.lock().all();
        let replies: Vec<_> = threads.iter().map(|thread| thread.ask(Message::Unpark)).collect();
        let wait =
            |reply: Result<std::sync::mpsc::Receiver<Result<()>>>| reply?.recv().map_err(|_| Errno::IO)?;
        // Each one, whatever became of the others.
        let results: Vec<Result<()>> = replies.into_iter().map(wait).collect();
        results.into_iter().collect()
    }

    /// The predecessor does not use its rings any more: the threads of a pool that was made parked serve their devices.
    ///
    /// # Errors
    /// As [`unpark`](Self::unpark).
    pub fn take_over(&self) -> Result<()> {
        let Some(kept) = self.kept.as_ref().filter(|kept| kept.is_foreign()) else { return Ok(()) };
        kept.take_over();
        self.unpark()
    }

    /// Unpins what a predecessor has pinned and no device has mapped, and gives up its rings that no device uses: every device is
    /// restored. Blocks while the kernel unpins pages.
    pub fn release_unclaimed(&self) {
        let Some(kept) = &self.kept else { return };
        kept.release_left();
        let threads = self.threads.lock().all();
        let released: usize = threads.iter().map(|thread| thread.buffers().release_unclaimed()).sum();
        if released > 0 {
            tracing::info!(released, "buffers of the earlier process are unpinned");
        }
    }

    /// Adds a device: `handler` is called on a thread that `placement` selects. All queues are stopped and nothing is mapped.
    /// `name` appears in the log and, for a dedicated thread, in the thread's name. Blocks until the thread has replied,
    /// which includes its start.
    ///
    /// # Errors
    /// `EINVAL` when none of the processors exists and may be used (`sched_setaffinity(2)`), `ENOSPC` on a thread that has
    /// 65536 devices, `EIO` when the thread has ended; those of io_uring (`ENOSYS` or `EPERM` where the kernel does not allow
    /// it, `ENOMEM`), of `eventfd(2)` (`EMFILE`) and of thread creation (`EAGAIN`).
    pub fn add(
        &self,
        name: &str,
        size: Size,
        placement: &Placement,
        handler: impl QueueHandler,
    ) -> Result<QueueControl> {
        let logs = self.logs.lock().take();
        let thread = self.thread(name, placement, logs.as_ref())?;
        let counters = logs.as_ref().and_then(|logs| logs.counters(size.queues));
        let counters = counters.map_or_else(|| Counters::own(size.queues), Counters::Shared);
        let dirty = match logs.as_ref().and_then(QueueLogs::dirty) {
            Some(dirty) => dirty,
            None => Arc::new(DirtyMemory::create()?),
        };
        let shared = Arc::new(Shared::new(size.queues, counters, Arc::clone(&dirty)));
        let (reply, receiver) = sync_channel(1);
        let registration = Registration {
            name: name.to_owned(),
            size,
            handler: Box::new(handler),
            shared: Arc::clone(&shared),
            reply,
        };
        let added = thread
            .send_and_wake_message(Message::Add(registration))
            .and_then(|()| receiver.recv().map_err(|_| Errno::IO)?);
        let control = match added {
            Ok(device) => {
                let dirty = Arc::new(DirtyLog::new(dirty, &thread, device));
                QueueControl { thread, device, shared, dirty }
            }
            Err(error) => {
                thread.device_removed();
                return Err(error);
            }
        };
        if let Some(logs) = logs {
            if !self.is_parked() {
                logs.set_ring(control.thread.ring());
            }
            control.set_noted_logs(&logs, size.queues)?;
        }
        Ok(control)
    }

    /// The thread for one more device, which it counts. A device that has logs stays with the ring that has its memory.
    fn thread(
        &self,
        device: &str,
        placement: &Placement,
        logs: Option<&QueueLogs>,
    ) -> Result<Arc<WorkerThread>> {
        let kept = self.kept.as_ref();
        let number = logs.filter(|logs| logs.recover).and_then(QueueLogs::ring);
        let number = number.filter(|_| kept.is_some());
        // Not with the lock: it may wait for a disk.
        let ring = kept.zip(number).and_then(|(kept, number)| kept.take(number));
        let start = Start { cpus: placement.cpus.as_ref(), poll: self.poll, kept, number, ring };
        let mut threads = self.threads.lock();
        let thread = match placement {
            Placement { dedicated: true, .. } => threads.dedicated(&format!("vq-{device}"), start)?,
            Placement { cpus: Some(cpus), .. } => threads.for_cpus(cpus, start)?,
            Placement { cpus: None, .. } => threads.least_loaded(self.workers, start)?,
        };
        thread.device_added();
        Ok(thread)
    }
}

impl Threads {
    /// All threads that there are.
    fn all(&self) -> Vec<Arc<WorkerThread>> {
        let owned = self.pinned.iter().map(|(_, thread)| thread).chain(&self.dedicated);
        self.shared.iter().cloned().chain(owned.filter_map(Weak::upgrade)).collect()
    }

    /// The shared thread with the fewest devices; a new one while there are fewer than `workers` and all have devices. The one
    /// that has the ring, if that is given.
    fn least_loaded(&mut self, workers: usize, start: Start<'_>) -> Result<Arc<WorkerThread>> {
        // A thread whose io_uring failed has ended and is replaced.
        self.shared.retain(|thread| !thread.has_ended());
        let same = self.shared.iter().find(|thread| start.number.is_some() && thread.ring() == start.number);
        if let Some(thread) = same {
            return Ok(Arc::clone(thread));
        }
        let least = self.shared.iter().min_by_key(|thread| thread.devices()).cloned();
        match least {
            Some(thread)
                if start.ring.is_none() && (self.shared.len() >= workers || thread.devices() == 0) =>
            {
                Ok(thread)
            }
            _ => {
                let thread = Arc::new(WorkerThread::start(&format!("vq-{}", self.shared.len()), start)?);
                self.shared.push(Arc::clone(&thread));
                Ok(thread)
            }
        }
    }

    /// The thread for devices with this list of processors.
    fn for_cpus(&mut self, cpus: &CpuList, start: Start<'_>) -> Result<Arc<WorkerThread>> {
        self.pinned.retain(|(_, thread)| thread.upgrade().is_some_and(|thread| !thread.has_ended()));
        let known = self.pinned.iter().find(|(known, _)| known == cpus);
        if let Some(thread) = known.and_then(|(_, thread)| thread.upgrade()) {
            return Ok(thread);
        }
        let thread = Arc::new(WorkerThread::start(&format!("vq-cpu{cpus}"), start)?);
        self.pinned.push((cpus.clone(), Arc::downgrade(&thread)));
        Ok(thread)
    }

    /// A thread for one device.
    fn dedicated(&mut self, name: &str, start: Start<'_>) -> Result<Arc<WorkerThread>> {
        self.dedicated.retain(|thread| thread.strong_count() > 0);
        let thread = Arc::new(WorkerThread::start(name, start)?);
        self.dedicated.push(Arc::downgrade(&thread));
        Ok(thread)
    }
}

#[cfg(test)]
mod tests;
