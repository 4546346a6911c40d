//! [`WorkerPool`]: the worker threads, and the placement of devices on them.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::thread::{CpuSet, sched_setaffinity};
use vdpa_core::Errno;
use vdpa_core::ring::inflight::LogMemory as _;
use vdpa_core::types::{QueueIndex, Result};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::shared_words::SharedWords;
use vdpa_sys::uring::{Registrar, Ring};

use super::event_loop::{EventLoop, Message, Registration};
use super::log_words;
use super::{
    Buffers, COUNTERS, Command, Counters, IOWQ_WORKERS_MAX, QueueControl, QueueHandler, Shared, Size,
};
use crate::persist::{DeviceNotes, NOTES, OWN_NOTES};

/// Entries of a submission queue: operations that are submitted with one `io_uring_enter(2)`.
const RING_ENTRIES: u32 = 512;

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
    Vec<usize>,
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

/// Entries of the largest ring (virtio 1.2 section 2.7).
const LARGEST_RING: u16 = 32768;

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
}

/// Memory for the in-flight logs of one device, which a successor of this process continues from.
#[derive(Clone, Debug)]
pub struct QueueLogs {
    memory: SharedWords,
    recover: bool,
}

impl QueueLogs {
    /// Words for the log of each queue: enough for the largest ring there is. What is not used takes no memory. Behind all logs
    /// are the counters of each queue, then the device's notes.
    fn stride() -> usize {
        log_words(LARGEST_RING)
    }

    /// Memory for `queues` logs, which are empty.
    ///
    /// # Errors
    /// `EINVAL` without queues; of memfd_create(2) and mmap(2).
    pub fn create(queues: u16) -> Result<(OwnedFd, Self)> {
        let words = (Self::stride() + COUNTERS) * usize::from(queues) + NOTES;
        let (fd, memory) = SharedWords::create(c"vdpa-in-flight", words)?;
        Ok((fd, Self { memory, recover: false }))
    }

    /// For how many queues there are counters behind the logs; `None` for the memory of a program that had none.
    fn queues(&self) -> Option<usize> {
        let words = self.memory.words().checked_sub(NOTES)?;
        words.is_multiple_of(Self::stride() + COUNTERS).then_some(words / (Self::stride() + COUNTERS))
    }

    /// The counters of `queues` queues. Those of a program that had none end with this process.
    fn counters(&self, queues: u16) -> Option<SharedWords> {
        let all = self.queues().filter(|&all| all >= usize::from(queues))?;
        self.memory.slice(all * Self::stride(), usize::from(queues) * COUNTERS)
    }

    /// The notes of the device; `None` for the memory of a program that had none.
    #[must_use]
    pub fn notes(&self) -> Option<DeviceNotes> {
        let at = self.queues()? * (Self::stride() + COUNTERS);
        self.memory.slice(at, NOTES).and_then(DeviceNotes::new)
    }

    /// The logs of a process that has died.
    ///
    /// # Errors
    /// As [`SharedWords::map`].
    pub fn reopen(fd: impl AsFd) -> Result<Self> {
        Ok(Self { memory: SharedWords::map(fd)?, recover: true })
    }

    /// The queue did not run when the process died: it starts at the position that it is given, and not from its log.
    pub fn forget(&self, index: QueueIndex) {
        if let Some(log) = self.log(index.0) {
            log.store(0, 0);
        }
    }

    fn log(&self, index: u16) -> Option<SharedWords> {
        self.memory.slice(usize::from(index) * Self::stride(), Self::stride())
    }

    /// One for each of `queues` queues.
    fn split(&self, queues: u16) -> Result<Vec<SharedWords>> {
        (0..queues).map(|index| self.log(index).ok_or(Errno::INVAL)).collect()
    }
}

#[derive(Debug, Default)]
struct Threads {
    /// For devices with the default placement. Kept when they have no device.
    shared: Vec<Arc<WorkerThread>>,
    /// For devices with a list of processors. The devices own them.
    pinned: Vec<(CpuList, Weak<WorkerThread>)>,
}

impl WorkerPool {
    /// A pool with at most `workers` threads (0 counts as 1) for devices with the default placement. It starts no thread yet.
    /// `poll` is how long a thread may busy-poll its rings before it sleeps; it does so only while that pays. 0 is never.
    pub fn new(workers: usize, poll: Duration) -> Self {
        Self { workers: workers.max(1), poll, threads: Arc::default(), logs: Mutex::default() }
    }

    /// 32 words for what the next device counts itself, which outlive this process: a device that is made again finds what it has
    /// counted. `None` when its [logs](Self::with_logs) do not outlive this process, or are those of a program without such words.
    #[must_use]
    pub fn own_counters(&self) -> Option<SharedWords> {
        let logs = self.logs.lock();
        let logs = logs.as_ref()?;
        let at = logs.queues()? * (QueueLogs::stride() + COUNTERS) + OWN_NOTES.start;
        logs.memory.slice(at, OWN_NOTES.len())
    }

    /// The same threads, for one device that keeps its in-flight logs in `logs`.
    #[must_use]
    pub fn with_logs(&self, logs: QueueLogs) -> Self {
        let threads = Arc::clone(&self.threads);
        Self { workers: self.workers, poll: self.poll, threads, logs: Mutex::new(Some(logs)) }
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
        let thread = self.thread(name, placement)?;
        let counters = self.logs.lock().as_ref().and_then(|logs| logs.counters(size.queues));
        let counters = counters.map_or_else(|| Counters::own(size.queues), Counters::Shared);
        let shared = Arc::new(Shared::new(size.queues, counters));
        let (reply, receiver) = sync_channel(1);
        let registration = Registration {
            name: name.to_owned(),
            size,
            handler: Box::new(handler),
            shared: Arc::clone(&shared),
            reply,
        };
        let added = thread.send_message(Message::Add(registration)).and_then(|()| {
            thread.wake.signal();
            receiver.recv().map_err(|_| Errno::IO)?
        });
        let control = match added {
            Ok(device) => QueueControl { thread, device, shared },
            Err(error) => {
                thread.device_removed();
                return Err(error);
            }
        };
        if let Some(logs) = self.logs.lock().take() {
            control.set_logs(logs.split(size.queues)?, logs.recover)?;
        }
        Ok(control)
    }

    /// The thread for one more device, which it counts.
    fn thread(&self, device: &str, placement: &Placement) -> Result<Arc<WorkerThread>> {
        let mut threads = self.threads.lock();
        let thread = match placement {
            Placement { cpus, dedicated: true } => {
                Arc::new(WorkerThread::start(&format!("vq-{device}"), cpus.as_ref(), self.poll)?)
            }
            Placement { cpus: Some(cpus), .. } => threads.for_cpus(cpus, self.poll)?,
            Placement { cpus: None, .. } => threads.least_loaded(self.workers, self.poll)?,
        };
        thread.devices.fetch_add(1, Ordering::Relaxed);
        Ok(thread)
    }
}

impl Threads {
    /// The shared thread with the fewest devices; a new one while there are fewer than `workers` and all have devices.
    fn least_loaded(&mut self, workers: usize, poll: Duration) -> Result<Arc<WorkerThread>> {
        // A thread whose io_uring failed has ended and is replaced.
        self.shared.retain(|thread| !thread.has_ended());
        let least = self.shared.iter().min_by_key(|thread| thread.devices()).cloned();
        match least {
            Some(thread) if self.shared.len() >= workers || thread.devices() == 0 => Ok(thread),
            _ => {
                let thread = Arc::new(WorkerThread::start(&format!("vq-{}", self.shared.len()), None, poll)?);
                self.shared.push(Arc::clone(&thread));
                Ok(thread)
            }
        }
    }

    /// The thread for devices with this list of processors.
    fn for_cpus(&mut self, cpus: &CpuList, poll: Duration) -> Result<Arc<WorkerThread>> {
        self.pinned.retain(|(_, thread)| thread.upgrade().is_some_and(|thread| !thread.has_ended()));
        let known = self.pinned.iter().find(|(known, _)| known == cpus);
        if let Some(thread) = known.and_then(|(_, thread)| thread.upgrade()) {
            return Ok(thread);
        }
        let thread = Arc::new(WorkerThread::start(&format!("vq-cpu{cpus}"), Some(cpus), poll)?);
        self.pinned.push((cpus.clone(), Arc::downgrade(&thread)));
        Ok(thread)
    }
}

/// The control side of a worker thread. Dropping it ends the thread and waits for its end.
pub(super) struct WorkerThread {
    name: String,
    messages: Sender<Message>,
    pub(super) wake: EventFd,
    buffers: Buffers,
    handle: Option<JoinHandle<()>>,
    /// Number of devices on the thread.
    devices: AtomicUsize,
}

impl fmt::Debug for WorkerThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerThread").field("name", &self.name).field("devices", &self.devices()).finish()
    }
}

impl WorkerThread {
    fn start(name: &str, cpus: Option<&CpuList>, poll: Duration) -> Result<Self> {
        let (messages, receiver) = channel();
        let (ready, started) = sync_channel(1);
        let wake = EventFd::new()?;
        let wake_fd = wake.as_fd().try_clone_to_owned();
        let wake_fd = wake_fd.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
        let cpus = cpus.cloned();
        // The kernel cuts thread names at 15 bytes.
        let builder = std::thread::Builder::new().name(name.chars().take(15).collect());
        let handle = builder
            .stack_size(256 << 10)
            .spawn(move || {
                if let Some(mut event_loop) = new_event_loop(cpus.as_ref(), wake_fd, poll, &ready) {
                    event_loop.run(&receiver);
                }
            })
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
        let buffers = Buffers::new(started.recv().map_err(|_| Errno::IO)??);
        let devices = AtomicUsize::new(0);
        Ok(Self { name: name.to_owned(), messages, wake, buffers, handle: Some(handle), devices })
    }

    fn devices(&self) -> usize {
        self.devices.load(Ordering::Relaxed)
    }

    fn has_ended(&self) -> bool {
        self.handle.as_ref().is_none_or(JoinHandle::is_finished)
    }

    pub(super) const fn buffers(&self) -> &Buffers {
        &self.buffers
    }

    /// Counts a device less.
    pub(super) fn device_removed(&self) {
        self.devices.fetch_sub(1, Ordering::Relaxed);
    }

    fn send_message(&self, message: Message) -> Result<()> {
        self.messages.send(message).map_err(|_| Errno::IO)
    }

    /// Sends a command without waking the thread, which receives it at its next wake-up.
    pub(super) fn send(&self, device: u16, command: Command) -> Result<()> {
        self.send_message(Message::Command(device, command))
    }

    /// Sends a command and wakes the thread.
    pub(super) fn send_and_wake(&self, device: u16, command: Command) -> Result<()> {
        self.send(device, command)?;
        self.wake.signal();
        Ok(())
    }
}

impl Drop for WorkerThread {
    fn drop(&mut self) {
        if self.send_message(Message::Exit).is_ok() {
            self.wake.signal();
        }
        if let Some(thread) = self.handle.take()
            && thread.join().is_err()
        {
            tracing::error!(thread = self.name, "a worker thread had panicked");
        }
    }
}

/// Makes the event loop, on its own thread, and sends the outcome to `ready`; `None` when it failed.
fn new_event_loop(
    cpus: Option<&CpuList>,
    wake: OwnedFd,
    poll: Duration,
    ready: &SyncSender<Result<Registrar>>,
) -> Option<EventLoop> {
    let make = || -> Result<(EventLoop, Registrar)> {
        if let Some(cpus) = cpus {
            let mut set = CpuSet::new();
            cpus.0.iter().for_each(|cpu| set.set(*cpu));
            sched_setaffinity(None, &set).map_err(|error| Errno::from_raw(error.raw_os_error()))?;
        }
        let ring = Ring::new(RING_ENTRIES)?;
        if let Err(error) = ring.allow_kernel_threads(IOWQ_WORKERS_MAX) {
            tracing::debug!("a device whose operations hang may delay others: {error}");
        }
        let registrar = ring.registrar();
        Ok((EventLoop::new(ring, Arc::new(wake), poll)?, registrar))
    };
    // The send fails only when the starter does not wait any more.
    match make() {
        Ok((event_loop, registrar)) => ready.send(Ok(registrar)).is_ok().then_some(event_loop),
        Err(error) => {
            let _ = ready.send(Err(error));
            None
        }
    }
}

#[cfg(test)]
mod tests;
