//! [`WorkerPool`]: threads that serve devices, and which device goes where.

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
use vdpa_core::types::Result;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::uring::{Registrar, Ring};

use super::event_loop::{EventLoop, Message, Registration};
use super::{Buffers, Command, IOWQ_WORKERS_MAX, QueueControl, QueueHandler, Shared, Size};

/// Entries of the submission queue: requests started between two visits to the kernel.
const RING_ENTRIES: u32 = 512;

/// Processors, in ascending order and each once: `0,2-5`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuList(Vec<usize>);

/// A text that is no list of processors.
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

/// Where a device is to be served: by default with others, on the thread that has the fewest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// On a thread that runs on these processors only.
    pub cpus: Option<CpuList>,
    /// On a thread that has no other device.
    pub dedicated: bool,
}

/// The threads of a daemon.
#[derive(Debug)]
pub struct WorkerPool {
    /// Threads for devices without a place of their own, at most.
    workers: usize,
    poll: Duration,
    threads: Mutex<Threads>,
}

#[derive(Debug, Default)]
struct Threads {
    /// Made when they are needed, and kept.
    shared: Vec<Arc<WorkerThread>>,
    /// As long as they have a device.
    pinned: Vec<(CpuList, Weak<WorkerThread>)>,
}

impl WorkerPool {
    /// A pool with at most `workers` threads (at least 1) for devices that ask for no processors; none is started yet.
    /// `poll` is how long a thread may look at its rings before it sleeps, if that pays; 0 is never.
    pub fn new(workers: usize, poll: Duration) -> Self {
        Self { workers: workers.max(1), poll, threads: Mutex::default() }
    }

    /// Puts the device `name` on a thread, with all queues stopped and nothing mapped.
    ///
    /// # Errors
    /// `EINVAL` for processors that do not exist or may not be used, `ENOSPC` on a thread that has 65536 devices; those of
    /// io_uring, of eventfd and of thread creation.
    pub fn add(
        &self,
        name: &str,
        size: Size,
        placement: &Placement,
        handler: impl QueueHandler,
    ) -> Result<QueueControl> {
        let thread = self.thread(name, placement)?;
        let shared = Arc::new(Shared::new(size.queues));
        let (reply, answer) = sync_channel(1);
        let registration = Registration {
            name: name.to_owned(),
            size,
            handler: Box::new(handler),
            shared: Arc::clone(&shared),
            reply,
        };
        let added = thread.send_message(Message::Add(registration)).and_then(|()| {
            thread.wake.signal();
            answer.recv().map_err(|_| Errno::IO)?
        });
        match added {
            Ok(device) => Ok(QueueControl { thread, device, shared }),
            Err(error) => {
                thread.leave();
                Err(error)
            }
        }
    }

    /// A thread for one more device, which is counted.
    fn thread(&self, device: &str, placement: &Placement) -> Result<Arc<WorkerThread>> {
        let mut threads = self.threads.lock();
        let thread = match placement {
            Placement { cpus, dedicated: true } => {
                Arc::new(WorkerThread::start(&format!("vq-{device}"), cpus.as_ref(), self.poll)?)
            }
            Placement { cpus: Some(cpus), .. } => threads.on(cpus, self.poll)?,
            Placement { cpus: None, .. } => threads.least_loaded(self.workers, self.poll)?,
        };
        thread.devices.fetch_add(1, Ordering::Relaxed);
        Ok(thread)
    }
}

impl Threads {
    fn least_loaded(&mut self, workers: usize, poll: Duration) -> Result<Arc<WorkerThread>> {
        // One that has ended, because its io_uring failed, is replaced.
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

    fn on(&mut self, cpus: &CpuList, poll: Duration) -> Result<Arc<WorkerThread>> {
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

/// The control side of a thread. Dropping it ends the thread.
pub(super) struct WorkerThread {
    name: String,
    messages: Sender<Message>,
    pub(super) wake: EventFd,
    buffers: Buffers,
    handle: Option<JoinHandle<()>>,
    /// Devices it has.
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
        let watched = wake.as_fd().try_clone_to_owned();
        let watched = watched.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
        let cpus = cpus.cloned();
        // The kernel cuts thread names at 15 bytes.
        let builder = std::thread::Builder::new().name(name.chars().take(15).collect());
        let handle = builder
            .stack_size(256 << 10)
            .spawn(move || {
                if let Some(mut server) = set_up(cpus.as_ref(), watched, poll, &ready) {
                    server.run(&receiver);
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

    /// A device is gone.
    pub(super) fn leave(&self) {
        self.devices.fetch_sub(1, Ordering::Relaxed);
    }

    fn send_message(&self, message: Message) -> Result<()> {
        self.messages.send(message).map_err(|_| Errno::IO)
    }

    /// Leaves a command, to be seen when the thread wakes for another reason.
    pub(super) fn send(&self, device: u16, command: Command) -> Result<()> {
        self.send_message(Message::Command(device, command))
    }

    /// Gives a command.
    pub(super) fn tell(&self, device: u16, command: Command) -> Result<()> {
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

/// What the thread itself begins with; `None` when that failed, and whoever started it knows.
fn set_up(
    cpus: Option<&CpuList>,
    wake: OwnedFd,
    poll: Duration,
    ready: &SyncSender<Result<Registrar>>,
) -> Option<EventLoop> {
    let server = || -> Result<(EventLoop, Registrar)> {
        if let Some(cpus) = cpus {
            let mut set = CpuSet::new();
            cpus.0.iter().for_each(|cpu| set.set(*cpu));
            sched_setaffinity(None, &set).map_err(|error| Errno::from_raw(error.raw_os_error()))?;
        }
        let ring = Ring::new(RING_ENTRIES)?;
        if let Err(error) = ring.allow_kernel_threads(IOWQ_WORKERS_MAX) {
            tracing::debug!("disks that hang may delay others: {error}");
        }
        let registrar = ring.registrar();
        Ok((EventLoop::new(ring, Arc::new(wake), poll)?, registrar))
    };
    // Nobody listens only if the starter is gone, which needs no answer.
    match server() {
        Ok((server, registrar)) => ready.send(Ok(registrar)).is_ok().then_some(server),
        Err(error) => {
            let _ = ready.send(Err(error));
            None
        }
    }
}

#[cfg(test)]
mod tests;
