//! Worker threads: they serve the virtqueues of devices.
//!
//! A [`WorkerPool`] owns the threads. Each thread runs an event loop over one io_uring, which reports everything that its
//! devices wait for: kicks, commands of the control side, and completions of the devices' own I/O. A device implements
//! [`QueueHandler`]; the thread calls it with the device's [`Queues`]. The devices of a thread are served round-robin, each
//! with a bounded budget.
//!
//! The control side of a device calls [`QueueControl`], which sends a command to the thread and waits for the reply. When
//! [`stop`](QueueControl::stop) returns, no request of the queue is in flight; when [`set_view`](QueueControl::set_view)
//! returns, nothing uses the memory that was removed. A command waits for requests of its own device only.
//!
//! | Type | Used by | On which thread |
//! |---|---|---|
//! | [`WorkerPool`], [`Placement`] | the program, to create devices | any |
//! | [`QueueControl`], [`ClientMemory`] | the device's `Parent` implementation | the one that holds the device's lock |
//! | [`QueueHandler`], [`Queues`], [`Queue`], [`DeviceRing`] | the device, to serve requests | its worker thread |
//! | [`MemoryView`] | both sides | any: it is immutable |

mod buffers;
mod counters;
mod device;
mod dirty;
mod event_loop;
mod kept;
mod logs;
mod memory;
mod pins;
mod poll;
mod pool;
mod queue;
mod queues;
mod ring;
mod slots;
mod thread;
mod view;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use parking_lot::Mutex;
use vdpa_core::Errno;
use vdpa_core::dirty::DirtyTracking;
use vdpa_core::iotlb::Removed;
use vdpa_core::parent::QueueStats;
use vdpa_core::types::{Asid, QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::dirty::DirtyMemory;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::shared_words::SharedWords;
use vdpa_sys::uring::OwnedBuf;

use buffers::Buffers;
pub use counters::OWN_COUNTERS;
use counters::{COUNTERS, Counters, OWN, POISON};
use dirty::DirtyLog;
pub use logs::QueueLogs;
pub use memory::ClientMemory;
pub use pool::{CpuList, InvalidCpuList, Parked, Placement, WorkerPool};
pub use queue::Queue;
pub use queues::Queues;
pub use ring::{DeviceRing, Popped, log_words};
use thread::WorkerThread;
pub use view::MemoryView;

/// Upper limit of the io-wq workers of one io_uring (`IORING_REGISTER_IOWQ_MAX_WORKERS`): the kernel threads that run
/// operations that may block. The kernel creates them when they are needed. A device should limit the operations that it has
/// in flight, so that one whose storage hangs leaves workers to the other devices of its thread.
pub const IOWQ_WORKERS_MAX: u32 = 2048;

/// How long [`QueueControl::fail`] waits for requests in flight. After that the device still fails, once they are done.
const FAIL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long [`QueueControl::remove`] waits for requests in flight. After that the device stays on its thread until they
/// are done.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(30);

/// The data path of a device: takes requests from its virtqueues and completes them.
///
/// The worker thread that the device was [added](WorkerPool::add) to calls all methods, one at a time, so the handler's data
/// needs no lock. No method may block or compute for long: the other devices of the thread wait meanwhile. A handler that has
/// to wait for something [submits](Queues::submit) it to the thread's io_uring and goes on in [`complete`](Self::complete).
/// A panic ends the thread, and with it all devices on it.
///
/// ```
/// use vdpa_backend::worker::{Popped, Queue, QueueHandler, Queues};
/// use vdpa_core::ring::{Chain, RingError};
///
/// /// Completes each request at once, without data.
/// struct Discard {
///     chain: Chain,
/// }
///
/// impl Discard {
///     /// Serves one queue up to a budget; whether it may have more requests.
///     fn serve_queue(&mut self, queues: &Queues, index: u16, queue: &mut Queue) -> Result<bool, RingError> {
///         let view = queues.view(queue);
///         for _ in 0..64 {
///             // One that is poison is discarded as well, which cannot do any harm.
///             if queue.ring(&view)?.pop(view.snapshot(), &mut self.chain)? == Popped::None {
///                 queues.publish(queue)?;
///                 return queues.wait_for_kick(queue, &view);
///             }
///             queue.ring(&view)?.push_used(self.chain.head, 0)?;
///             queues.count_request(index, 0, false);
///         }
///         queues.publish(queue)?;
///         Ok(true)
///     }
/// }
///
/// impl QueueHandler for Discard {
///     fn retry_on_map_change(&self) -> bool {
///         true
///     }
///
///     fn serve(&mut self, queues: &mut Queues) {
///         queues.serve_each(|queues, index, queue| self.serve_queue(queues, index, queue));
///     }
/// }
/// ```
pub trait QueueHandler: Send + 'static {
    /// Whether queues are served again, without a kick, after the translation of their address space has changed. `true`
    /// for a device that leaves a request in the ring when memory that it names is not mapped.
    fn retry_on_map_change(&self) -> bool;

    /// Serves the queues that [have work](Queue::has_work), each up to a budget, and [sets](Queue::set_pending) on each
    /// whether it may have more requests. Called after a kick, a command or a completion, and again while a queue has work
    /// and the handler [has room](Self::has_room). Each queue that it [takes](Queues::take) must be back when it returns.
    fn serve(&mut self, queues: &mut Queues);

    /// The operation that was submitted as `slot` has completed: with `result`, its non-negative result or its errno, and
    /// with the buffer that was handed to the kernel, if it owned one. A handler that submits no operations need not
    /// implement it.
    fn complete(
        &mut self,
        _queues: &mut Queues,
        _slot: u32,
        _result: Result<u32>,
        _buffer: Option<OwnedBuf>,
    ) {
    }

    /// Whether it can take more requests now. When `false`, the thread does not call [`serve`](Self::serve) again before
    /// an event, such as a completion, and does not busy-poll its rings.
    fn has_room(&self) -> bool {
        true
    }

    /// Whether a request in flight in [`Invalidation::asid`] uses memory that is in [`Invalidation::removed`]. A request
    /// that began with the new translation does not, whatever its addresses are. Called again after each event of the
    /// device until it returns `false`; the client's UPDATE or INVALIDATE is answered then.
    fn uses(&self, _queues: &Queues, _invalidation: &Invalidation) -> bool {
        false
    }

    /// Replaces the view that requests in flight in address space `asid` hold by `view`, which has everything that they
    /// use. Older views keep removed memory mapped in this process. Called when no [`Invalidation`] waits any more.
    fn replace_views(&mut self, _queues: &Queues, _asid: Asid, _view: &Arc<MemoryView>) {}

    /// The driver has reset the device: what was kept of earlier requests is to be forgotten. All queues are stopped.
    fn reset(&mut self) {}

    /// The thread is parked, no request is in flight, and another process may serve the device from now on: what only one of them
    /// may have is released. Followed by [`take_over`](Self::take_over) if this process goes on after all.
    fn hand_over(&mut self) {}

    /// The thread is not parked any more: this process serves the device, also if another one has served it before. What
    /// [`hand_over`](Self::hand_over) has released, or the other process has, is taken.
    ///
    /// # Errors
    /// The errno of what cannot be had: every request is completed with an error from now on.
    fn take_over(&mut self) -> Result<()> {
        Ok(())
    }

    /// Whether none of the operations that it has submitted is in flight. A handler with operations that belong to no request, such as
    /// polls, must implement it: its number of the device is given to another one when it was removed. They are cancelled
    /// before, and after [`fail`](Self::fail).
    fn is_at_rest(&self) -> bool {
        true
    }

    /// The device is deleted while a client has it open: every later request is to be completed with an error, and what
    /// the device holds (files, for example) is to be released. No request is in flight. See
    /// [`Parent::fail`](vdpa_core::parent::Parent::fail).
    fn fail(&mut self) {}
}

/// A change of the translation of one address space: the new translation, and what was removed by it.
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

    /// The ranges that the old translation had and the new one has not, or has elsewhere.
    #[must_use]
    pub const fn removed(&self) -> &Removed {
        &self.removed
    }
}

/// How many queues and address spaces a device has.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Number of virtqueues.
    pub queues: u16,
    /// Number of address spaces (asids), at least 1.
    pub address_spaces: usize,
}

/// State that the control side of a device shares with its worker thread.
#[derive(Debug)]
struct Shared {
    counters: Counters,
    queues: u16,
    /// The driver has broken the protocol of a ring (`DEVICE_NEEDS_RESET`). Cleared by a reset.
    needs_reset: AtomicBool,
    /// Signalled when `needs_reset` is set.
    config_call: Mutex<Option<EventFd>>,
    dirty: Arc<DirtyMemory>,
}

impl Shared {
    fn new(queues: u16, counters: Counters, dirty: Arc<DirtyMemory>) -> Self {
        let (needs_reset, config_call) = (AtomicBool::new(false), Mutex::new(None));
        Self { counters, queues, needs_reset, config_call, dirty }
    }

    /// Sets `DEVICE_NEEDS_RESET` and signals a change of the configuration (virtio 1.2 section 2.1.2).
    fn set_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.signal_config();
    }

    fn signal_config(&self) {
        if let Some(event) = &*self.config_call.lock() {
            event.signal();
        }
    }
}

/// Signals changes of the configuration space of a device ([`QueueControl::config_signal`]).
#[derive(Clone, Debug)]
pub struct ConfigSignal(Arc<Shared>);

impl ConfigSignal {
    /// Signals a change, if the driver has asked for that. Does not block; any thread may call it.
    pub fn signal(&self) {
        self.0.signal_config();
    }
}

type Reply<T> = SyncSender<T>;

/// A command of the control side to a device on its worker thread. `reply` carries the result; dropping it unused tells the
/// sender that the device or its thread is gone.
enum Command {
    Start { index: QueueIndex, setup: QueueSetup<LinuxHost>, state: QueueState, reply: Reply<Result<()>> },
    SetLogs { logs: Vec<SharedWords>, recover: bool, notes: Option<SharedWords>, reply: Reply<Result<()>> },
    Stop { index: QueueIndex, reply: Reply<Result<Option<QueueState>>> },
    SetView { invalidation: Invalidation, reply: Reply<()> },
    SetTracking { on: bool, reply: Reply<()> },
    SyncDirty { reply: Reply<()> },
    Reset,
    Fail { reply: Reply<()> },
    Remove { reply: Reply<()> },
}

/// The control side of a device that a worker thread serves, as [`WorkerPool::add`] returns it.
///
/// A [`Parent`](vdpa_core::parent::Parent) implementation owns it, inside a [`ClientMemory`] or by itself, and calls it
/// under the device's lock from any thread but a worker. Methods that return a `Result` send a command to the worker thread
/// and block until it has replied; they return `EIO` when that thread has ended because its io_uring failed. Dropping it is
/// [`remove`](Self::remove).
pub struct QueueControl {
    thread: Arc<WorkerThread>,
    /// Number of the device on its thread.
    device: u16,
    shared: Arc<Shared>,
    dirty: Arc<DirtyLog>,
}

impl fmt::Debug for QueueControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueControl")
            .field("queues", &self.shared.queues)
            .field("thread", &self.thread)
            .finish_non_exhaustive()
    }
}

impl QueueControl {
    /// The registered buffers of the thread's io_uring.
    fn buffers(&self) -> &Buffers {
        self.thread.buffers()
    }

    /// The counters of a queue since the device was added; zeros for a queue that the device does not have. Does not block.
    #[must_use]
    pub fn stats(&self, index: QueueIndex) -> QueueStats {
        if index.0 < self.shared.queues { self.shared.counters.read(index.0) } else { QueueStats::default() }
    }

    /// What tracks the pages that the device writes, for [`SetMap::dirty_tracking`](vdpa_core::parent::SetMap::dirty_tracking)
    /// and [`DmaMap::dirty_tracking`](vdpa_core::parent::DmaMap::dirty_tracking). Requests of the device are tracked without its
    /// doing: it writes nothing but buffers of requests.
    #[must_use]
    pub fn dirty_tracking(&self) -> Arc<dyn DirtyTracking> {
        Arc::clone(&self.dirty) as _
    }

    /// Starts a queue at `state`; does nothing when it runs already. The ring's memory may be mapped later. For
    /// [`Parent::start_queue`](vdpa_core::parent::Parent::start_queue). Does not wait for requests.
    ///
    /// # Errors
    /// `EINVAL` for a queue or address space that the device does not have, or for a split `state` of a packed ring and vice
    /// versa; `EIO`; those of duplicating the kick eventfd (`EMFILE`) and of submitting its poll.
    pub fn start(&self, index: QueueIndex, setup: &QueueSetup<LinuxHost>, state: QueueState) -> Result<()> {
        self.call(|reply| Command::Start { index, setup: setup.clone(), state, reply })?
    }

    /// Has the worker thread keep an in-flight log of each queue in `logs`, in the order of the queues and of at least
    /// [`log_words`] each, from which a successor of this process can continue. Called once, before any queue is started;
    /// without it the device keeps no logs. Does not wait for requests.
    ///
    /// With `recover`, `logs` are those of a process that has died. The first [`start`](Self::start) of each queue continues
    /// from its log, whatever position is given, and does its requests in flight again; if there is no log (the first word
    /// is 0) it starts at that position. Queues that did not run need not be continued: clear the first word of theirs. A log
    /// that is damaged or of a ring with another size or format breaks the queue: [`needs_reset`](Self::needs_reset).
    /// A [`reset`](Self::reset) ends all logs.
    ///
    /// # Errors
    /// `EINVAL` for another number of logs than queues; `EBUSY` when the device has logs already or a queue runs; `EIO`.
    pub fn set_logs(&self, logs: Vec<SharedWords>, recover: bool) -> Result<()> {
        self.call(|reply| Command::SetLogs { logs, recover, notes: None, reply })?
    }

    /// As [`set_logs`](Self::set_logs), of a device with `queues` queues whose logs tell in which request a queue was started.
    fn set_noted_logs(&self, logs: &QueueLogs, queues: u16) -> Result<()> {
        let (all, recover, notes) = (logs.split(queues)?, logs.recover, logs.request());
        self.call(|reply| Command::SetLogs { logs: all, recover, notes, reply })?
    }

    /// Stops a queue and returns its position; `None` when it does not run. Blocks until its requests in flight are
    /// complete and the driver can see them. For [`Parent::stop_queue`](vdpa_core::parent::Parent::stop_queue).
    ///
    /// # Errors
    /// `EBUSY` when another call is stopping the queue; `EIO`.
    pub fn stop(&self, index: QueueIndex) -> Result<Option<QueueState>> {
        self.call(|reply| Command::Stop { index, reply })?
    }

    /// Replaces the translation of an address space by `view`, which does not have `removed` any more. Blocks until no
    /// request of this device uses `removed`; requests that use other memory are served meanwhile. A queue whose ring is in
    /// `removed` stops taking requests, completes those in flight, and resolves its ring through `view` afterwards. An asid
    /// that the device does not have is ignored.
    ///
    /// # Errors
    /// `EIO`.
    pub fn set_view(&self, asid: Asid, view: Arc<MemoryView>, removed: Removed) -> Result<()> {
        self.call(|reply| Command::SetView { invalidation: Invalidation { asid, view, removed }, reply })
    }

    /// Resets the device, whose queues are all stopped: clears [`needs_reset`](Self::needs_reset), forgets requests that were
    /// never completed, and has the worker call [`QueueHandler::reset`]. Does not block: commands are run in order, so the
    /// reset precedes the next start.
    pub fn reset(&self) {
        self.shared.needs_reset.store(false, Ordering::Release);
        // A thread that has ended has no state to reset.
        let _ = self.thread.send(self.device, Command::Reset);
    }

    /// Stops taking requests, waits at most 5 s for those in flight, and has the worker call [`QueueHandler::fail`]; then
    /// requests are taken again. For [`Parent::fail`](vdpa_core::parent::Parent::fail).
    ///
    /// # Errors
    /// `ETIMEDOUT` when requests are still in flight: the handler fails once they are complete. `EIO`.
    pub fn fail(&self) -> Result<()> {
        let (reply, receiver) = sync_channel(1);
        self.thread.send_and_wake(self.device, Command::Fail { reply })?;
        receiver.recv_timeout(FAIL_TIMEOUT).map_err(|error| match error {
            RecvTimeoutError::Timeout => Errno::TIMEDOUT,
            RecvTimeoutError::Disconnected => Errno::IO,
        })
    }

    /// Whether the driver has broken the protocol of a ring since the last reset. For
    /// [`Parent::needs_reset`](vdpa_core::parent::Parent::needs_reset). Does not block.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.shared.needs_reset.load(Ordering::Acquire)
    }

    /// The counters of a queue that the device [counts itself](Queues::count_own); zeros for a queue that it does not have. Does not
    /// block.
    #[must_use]
    pub fn own_stats(&self, index: QueueIndex) -> [u64; OWN_COUNTERS] {
        let exists = index.0 < self.shared.queues;
        std::array::from_fn(
            |counter| if exists { self.shared.counters.get(index.0, OWN + counter) } else { 0 },
        )
    }

    /// What signals a change of configuration space without the device being at hand.
    #[must_use]
    pub fn config_signal(&self) -> ConfigSignal {
        ConfigSignal(Arc::clone(&self.shared))
    }

    /// Signals a change of configuration space. Does not block.
    pub fn signal_config(&self) {
        self.shared.signal_config();
    }

    /// Sets the eventfd that is signalled when [`needs_reset`](Self::needs_reset) becomes `true`; `None` for none. For
    /// [`Parent::set_config_call`](vdpa_core::parent::Parent::set_config_call). Does not block.
    pub fn set_config_call(&self, event: Option<&EventFd>) {
        *self.shared.config_call.lock() = event.cloned();
    }

    /// Removes the device from its thread, which takes no further requests from its rings. Blocks until the requests in
    /// flight are complete, at most 30 s; `false` when some still are in flight. Idempotent.
    pub fn remove(&self) -> bool {
        let (reply, receiver) = sync_channel(1);
        // Nothing is in flight of a device that was removed before, or whose thread has ended.
        self.thread.send_and_wake(self.device, Command::Remove { reply }).is_err()
            || receiver.recv_timeout(REMOVE_TIMEOUT) != Err(RecvTimeoutError::Timeout)
    }

    /// Sends a command and blocks until its reply; `EIO` when the thread has ended.
    fn call<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let (reply, receiver) = sync_channel(1);
        self.thread.send_and_wake(self.device, command(reply))?;
        receiver.recv().map_err(|_| Errno::IO)
    }
}

impl Drop for QueueControl {
    fn drop(&mut self) {
        if !self.remove() {
            tracing::error!(thread = ?self.thread, "requests of a removed device are still in flight");
        }
        self.thread.device_removed();
    }
}
