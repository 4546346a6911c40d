//! Worker threads, which serve the rings of devices.
//!
//! A [`WorkerPool`] has the threads. Each runs an event loop over one io_uring, which carries everything that its devices
//! wait for: kicks, commands of the control side, and their own I/O. A [`QueueHandler`] is what a device does with its
//! [`Queues`]; all its methods are called on the device's thread.
//!
//! The control side of a device ([`QueueControl`]) sends commands to that thread and waits for the reply: a queue that was
//! stopped is at rest, and a mapping that was removed is unused, when the call returns. A command waits for requests of its
//! own device only. The devices of a thread are served round-robin, each with a bounded budget.

mod buffers;
mod device;
mod event_loop;
mod memory;
mod pins;
mod poll;
mod pool;
mod queue;
mod queues;
mod view;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use parking_lot::Mutex;
use vdpa_core::Errno;
use vdpa_core::iotlb::Removed;
use vdpa_core::parent::QueueStats;
use vdpa_core::types::{Asid, QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::uring::OwnedBuf;

use buffers::Buffers;
pub use memory::ClientMemory;
use pool::WorkerThread;
pub use pool::{CpuList, InvalidCpuList, Placement, WorkerPool};
pub use queue::Queue;
pub use queues::Queues;
pub use view::MemoryView;

/// Kernel threads that run operations of one ring that may block, at most; they are made when needed.
pub const IOWQ_WORKERS_MAX: u32 = 2048;

/// How long a device that is taken away waits for its requests. It is taken away once they are done.
const FAIL_PATIENCE: Duration = Duration::from_secs(5);

/// How long a device that is removed waits for its requests. What is in flight then stays with the thread.
const REMOVE_PATIENCE: Duration = Duration::from_secs(30);

/// What a device does with its queues. Called from its thread only.
pub trait QueueHandler: Send + 'static {
    /// Whether a changed translation is a reason to look at the rings again, without a kick.
    fn retry_on_map_change(&self) -> bool;

    /// Serves the queues that have something to do, each for a bounded time, and leaves `pending` set on those that
    /// want another turn. Must not block: the other devices of the thread wait.
    fn serve(&mut self, queues: &mut Queues);

    /// An operation submitted as `slot` has completed. A handler that submits none is never called.
    fn complete(
        &mut self,
        _queues: &mut Queues,
        _slot: u32,
        _result: Result<u32>,
        _buffer: Option<OwnedBuf>,
    ) {
    }

    /// Whether it can take more requests before one of those in flight completes.
    fn has_room(&self) -> bool {
        true
    }

    /// Whether a request in flight in that address space uses memory that was removed. One that began with the new
    /// translation does not, whatever its addresses.
    fn uses(&self, _queues: &Queues, _removal: &Invalidation) -> bool {
        false
    }

    /// Requests in flight in that address space are to keep nothing of older translations than the one that is given:
    /// it has everything they use.
    fn replace_views(&mut self, _queues: &Queues, _asid: Asid, _view: &Arc<MemoryView>) {}

    /// The driver has reset the device, all of whose queues are stopped.
    fn reset(&mut self) {}

    /// What the device does with its requests cannot be done any more: each is to be answered with an error. Nothing is
    /// in flight.
    fn fail(&mut self) {}
}

/// A translation that has taken the place of another one, and what it does not have any more.
#[derive(Debug)]
pub struct Invalidation {
    asid: Asid,
    view: Arc<MemoryView>,
    removed: Removed,
}

impl Invalidation {
    /// The address space whose translation was replaced.
    #[must_use]
    pub const fn asid(&self) -> Asid {
        self.asid
    }

    /// The new translation.
    #[must_use]
    pub const fn view(&self) -> &Arc<MemoryView> {
        &self.view
    }

    /// What the new translation does not have any more.
    #[must_use]
    pub const fn removed(&self) -> &Removed {
        &self.removed
    }
}

/// How much of everything a device has.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Virtqueues.
    pub queues: u16,
    /// Address spaces, at least 1.
    pub address_spaces: usize,
}

/// Counters of one queue; they live as long as the device.
#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

impl Counters {
    fn count(&self, bytes: u64, failed: bool) {
        // The queue's thread alone writes them: a load and a store do, where an addition would lock the bus.
        let add = |counter: &AtomicU64, more: u64| {
            counter.store(counter.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
        };
        add(&self.requests, 1);
        add(&self.bytes, bytes);
        if failed {
            add(&self.errors, 1);
        }
    }

    fn read(&self) -> QueueStats {
        QueueStats {
            requests: self.requests.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
        }
    }
}

/// What the two sides of a device share.
#[derive(Debug)]
struct Shared {
    counters: Vec<Counters>,
    /// A ring is broken, until the next reset.
    needs_reset: AtomicBool,
    /// Signalled when that becomes so.
    config_call: Mutex<Option<EventFd>>,
}

impl Shared {
    fn new(queues: u16) -> Self {
        Self {
            counters: (0..queues).map(|_| Counters::default()).collect(),
            needs_reset: AtomicBool::new(false),
            config_call: Mutex::new(None),
        }
    }

    /// The driver has to reset the device, and is told so (virtio 1.2 section 2.1.2).
    fn break_down(&self) {
        self.needs_reset.store(true, Ordering::Release);
        if let Some(event) = &*self.config_call.lock() {
            event.signal();
        }
    }
}

type Reply<T> = SyncSender<T>;

/// What the control side asks of a device's thread.
enum Command {
    Start { index: QueueIndex, setup: QueueSetup<LinuxHost>, state: QueueState, reply: Reply<Result<()>> },
    Stop { index: QueueIndex, reply: Reply<Result<Option<QueueState>>> },
    SetView { invalidation: Invalidation, reply: Reply<()> },
    Reset,
    Fail { reply: Reply<()> },
    Remove { reply: Reply<()> },
}

/// The control side of a device on a thread of the pool. Dropping it removes the device, after what is in flight.
pub struct QueueControl {
    thread: Arc<WorkerThread>,
    /// Which of the thread's devices.
    device: u16,
    shared: Arc<Shared>,
}

impl fmt::Debug for QueueControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueControl")
            .field("queues", &self.shared.counters.len())
            .field("thread", &self.thread)
            .finish_non_exhaustive()
    }
}

impl QueueControl {
    /// The registered buffers of the ring that carries the disk I/O.
    fn buffers(&self) -> &Buffers {
        self.thread.buffers()
    }

    /// What one queue has done.
    pub fn stats(&self, index: QueueIndex) -> QueueStats {
        let counters = self.shared.counters.get(usize::from(index.0));
        counters.map_or_else(QueueStats::default, Counters::read)
    }

    /// See [`Parent::start_queue`](vdpa_core::parent::Parent::start_queue).
    pub fn start(&self, index: QueueIndex, setup: &QueueSetup<LinuxHost>, state: QueueState) -> Result<()> {
        self.ask(|reply| Command::Start { index, setup: setup.clone(), state, reply })?
    }

    /// See [`Parent::stop_queue`](vdpa_core::parent::Parent::stop_queue).
    pub fn stop(&self, index: QueueIndex) -> Result<Option<QueueState>> {
        self.ask(|reply| Command::Stop { index, reply })?
    }

    /// Replaces the translation of one address space by `view`, which does not have `removed` any more. Returns when no
    /// request of this device uses what was removed; rings that are there are looked up again. Requests that use other
    /// memory go on meanwhile.
    pub fn set_view(&self, asid: Asid, view: Arc<MemoryView>, removed: Removed) -> Result<()> {
        self.ask(|reply| Command::SetView { invalidation: Invalidation { asid, view, removed }, reply })
    }

    /// The device is reset: a queue that is started again owes nothing for requests it took before.
    pub fn reset(&self) {
        self.shared.needs_reset.store(false, Ordering::Release);
        // A thread that is gone has forgotten everything.
        let _ = self.thread.send(self.device, Command::Reset);
    }

    /// See [`Parent::fail`](vdpa_core::parent::Parent::fail).
    pub fn fail(&self) -> Result<()> {
        let (reply, answer) = sync_channel(1);
        self.thread.tell(self.device, Command::Fail { reply })?;
        answer.recv_timeout(FAIL_PATIENCE).map_err(|error| match error {
            RecvTimeoutError::Timeout => Errno::TIMEDOUT,
            RecvTimeoutError::Disconnected => Errno::IO,
        })
    }

    /// See [`Parent::needs_reset`](vdpa_core::parent::Parent::needs_reset).
    pub fn needs_reset(&self) -> bool {
        self.shared.needs_reset.load(Ordering::Acquire)
    }

    /// See [`Parent::set_config_call`](vdpa_core::parent::Parent::set_config_call).
    pub fn set_config_call(&self, event: Option<&EventFd>) {
        *self.shared.config_call.lock() = event.cloned();
    }

    /// Takes the device from its thread; its rings are not looked at any more when this returns. Waits for its requests
    /// in flight; whether they came to an end.
    pub fn remove(&self) -> bool {
        let (reply, answer) = sync_channel(1);
        // A device that is gone already, or whose thread is, has nothing in flight.
        self.thread.tell(self.device, Command::Remove { reply }).is_err()
            || answer.recv_timeout(REMOVE_PATIENCE) != Err(RecvTimeoutError::Timeout)
    }

    /// Sends a command and waits for its answer; `EIO` when the thread is gone.
    fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let (reply, answer) = sync_channel(1);
        self.thread.tell(self.device, command(reply))?;
        answer.recv().map_err(|_| Errno::IO)
    }
}

impl Drop for QueueControl {
    fn drop(&mut self) {
        if !self.remove() {
            tracing::error!(thread = ?self.thread, "requests of a removed device are still in flight");
        }
        self.thread.leave();
    }
}
