//! [`WorkerThread`]: the control side of a worker thread.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::thread::{CpuSet, sched_setaffinity};
use vdpa_core::Errno;
use vdpa_core::types::Result;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::uring::Ring;

use super::event_loop::{EventLoop, Message};
use super::kept::{KeptRings, ThreadRing};
use super::{Buffers, Command, CpuList, IOWQ_WORKERS_MAX, Reply};

/// Entries of a submission queue: operations that are submitted with one `io_uring_enter(2)`.
const RING_ENTRIES: u32 = 512;

/// How a thread is started.
pub(super) struct Start<'a> {
    /// Processors that it may run on; `None` for all.
    pub(super) cpus: Option<&'a CpuList>,
    /// Busy-poll budget.
    pub(super) poll: Duration,
    /// Where its ring is kept.
    pub(super) kept: Option<&'a Arc<KeptRings>>,
    /// The number of the ring that a predecessor has served the device with.
    pub(super) number: Option<u32>,
    /// That ring, if no thread has it.
    pub(super) ring: Option<ThreadRing>,
}

/// The control side of a worker thread. Dropping it ends the thread and waits for its end.
pub(super) struct WorkerThread {
    name: String,
    messages: Sender<Message>,
    wake: EventFd,
    buffers: Arc<Buffers>,
    handle: Option<JoinHandle<()>>,
    /// Number of devices on the thread.
    devices: AtomicUsize,
    /// Where its ring is kept, and under which number.
    kept: Option<(Arc<KeptRings>, u32)>,
}

impl fmt::Debug for WorkerThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerThread").field("name", &self.name).field("devices", &self.devices()).finish()
    }
}

/// What a thread that has started tells.
struct Started {
    buffers: Arc<Buffers>,
    /// Number of its ring.
    ring: Option<u32>,
}

impl WorkerThread {
    /// Starts a thread. Blocks until its ring is there.
    pub(super) fn start(name: &str, start: Start<'_>) -> Result<Self> {
        let (messages, receiver) = channel();
        let (ready, started) = sync_channel(1);
        let wake = EventFd::new()?;
        let wake_fd = wake.as_fd().try_clone_to_owned();
        let wake_fd = wake_fd.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
        let Start { cpus, poll, kept, ring, .. } = start;
        let (cpus, store) = (cpus.cloned(), kept.cloned());
        // The kernel cuts thread names at 15 bytes.
        let builder = std::thread::Builder::new().name(name.chars().take(15).collect());
        let handle = builder
            .stack_size(256 << 10)
            .spawn(move || {
                let make = || new_event_loop(cpus.as_ref(), store.as_deref(), ring, wake_fd, poll);
                if let Some(mut event_loop) = announce(make(), &ready) {
                    event_loop.run(&receiver);
                }
            })
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
        let Started { buffers, ring } = started.recv().map_err(|_| Errno::IO)??;
        let (devices, handle, kept) = (AtomicUsize::new(0), Some(handle), kept.cloned().zip(ring));
        Ok(Self { name: name.to_owned(), messages, wake, buffers, handle, devices, kept })
    }

    pub(super) fn devices(&self) -> usize {
        self.devices.load(Ordering::Relaxed)
    }

    /// The number under which its ring is kept.
    pub(super) fn ring(&self) -> Option<u32> {
        self.kept.as_ref().map(|(_, number)| *number)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.handle.as_ref().is_none_or(JoinHandle::is_finished)
    }

    pub(super) fn buffers(&self) -> &Buffers {
        &self.buffers
    }

    /// Counts one more device.
    pub(super) fn device_added(&self) {
        self.devices.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a device less.
    pub(super) fn device_removed(&self) {
        self.devices.fetch_sub(1, Ordering::Relaxed);
    }

    fn send_message(&self, message: Message) -> Result<()> {
        self.messages.send(message).map_err(|_| Errno::IO)
    }

    /// Sends a message and wakes the thread.
    pub(super) fn send_and_wake_message(&self, message: Message) -> Result<()> {
        self.send_message(message)?;
        self.wake.signal();
        Ok(())
    }

    /// Sends a message with the means to reply to it.
    pub(super) fn ask<T>(&self, message: impl FnOnce(Reply<T>) -> Message) -> Result<Receiver<T>> {
        let (reply, receiver) = sync_channel(1);
        self.send_and_wake_message(message(reply))?;
        Ok(receiver)
    }

    /// Sends a command without waking the thread, which receives it at its next wake-up.
    pub(super) fn send(&self, device: u16, command: Command) -> Result<()> {
        self.send_message(Message::Command(device, command))
    }

    /// Sends a command and wakes the thread.
    pub(super) fn send_and_wake(&self, device: u16, command: Command) -> Result<()> {
        self.send_and_wake_message(Message::Command(device, command))
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
        if let Some((kept, number)) = &self.kept {
            kept.release(*number);
        }
    }
}

/// Makes the event loop of a thread, on that thread.
fn new_event_loop(
    cpus: Option<&CpuList>,
    kept: Option<&KeptRings>,
    ring: Option<ThreadRing>,
    wake: OwnedFd,
    poll: Duration,
) -> Result<(EventLoop, Started)> {
    if let Some(cpus) = cpus {
        let mut set = CpuSet::new();
        cpus.0.iter().for_each(|cpu| set.set(*cpu));
        sched_setaffinity(None, &set).map_err(|error| Errno::from_raw(error.raw_os_error()))?;
    }
    let ThreadRing { ring, buffers, number } = match (kept, ring) {
        (_, Some(ring)) => ring,
        // What it needs of the predecessor is not there: such a device is restored when the predecessor has ended.
        (Some(kept), None) if kept.is_foreign() => return Err(Errno::AGAIN),
        (kept, None) => {
            let ring = new_ring()?;
            match kept.filter(|_| !ring.is_on_threads()) {
                Some(kept) => kept.keep(ring),
                None => ThreadRing { buffers: Buffers::new(ring.registrar(), None), ring, number: None },
            }
        }
    };
    if let Err(error) = ring.allow_kernel_threads(IOWQ_WORKERS_MAX) {
        tracing::debug!("a device whose operations hang may delay others: {error}");
    }
    let buffers = Arc::new(buffers);
    let parked = kept.is_some_and(KeptRings::is_foreign);
    let event_loop = EventLoop::new(ring, Arc::new(wake), poll, Arc::clone(&buffers), parked)?;
    Ok((event_loop, Started { buffers, ring: number }))
}

/// A ring, of threads where the kernel allows no io_uring.
fn new_ring() -> Result<Ring> {
    match Ring::new(RING_ENTRIES) {
        Err(Errno::PERM | Errno::NOSYS) => Ring::on_threads(),
        made => made,
    }
}

/// Whether the kernel allows this process no io_uring, and so none of its predecessors, which had the same rights.
pub(super) fn io_uring_is_withheld() -> bool {
    matches!(Ring::new(RING_ENTRIES), Err(Errno::PERM | Errno::NOSYS))
}

/// Tells the starter whether there is an event loop; `None` when there is none.
fn announce(made: Result<(EventLoop, Started)>, ready: &SyncSender<Result<Started>>) -> Option<EventLoop> {
    // The send fails only when the starter does not wait any more.
    match made {
        Ok((event_loop, started)) => ready.send(Ok(started)).is_ok().then_some(event_loop),
        Err(error) => {
            let _ = ready.send(Err(error));
            None
        }
    }
}
