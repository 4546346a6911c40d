//! The thread that serves the rings of a device.
//!
//! [`serve`] runs it, whatever the device is; a [`Logic`] does what the device does with its [`Queues`]. [`disk`] is
//! the logic of block devices, which asks a [`Disk`] about each request.
//!
//! One io_uring carries everything the thread waits for: kicks, commands of the control side and disk I/O. The
//! control side ([`Worker`]) talks to it by commands and waits for the answer, so that a queue that was stopped is
//! at rest and a mapping that was removed is unused when the call returns.

mod disk;
mod queue;
mod queues;
mod serve;
mod view;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use vdpa_core::Errno;
use vdpa_core::parent::QueueStats;
use vdpa_core::types::{Asid, QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::uring::{OwnedBuf, Registrar, Ring};

use disk::Requests;
pub(crate) use disk::{After, Disk, Verdict};
pub(crate) use queue::Queue;
pub(crate) use queues::Queues;
pub(crate) use view::{Pin, View};

/// Entries of the submission queue: requests started between two visits to the kernel.
const RING_ENTRIES: u32 = 256;

/// What a device does with its queues. Called from the worker's thread only.
pub(crate) trait Logic: Send + 'static {
    /// Whether a changed translation is a reason to look at the rings again, without a kick.
    const MAP_WAKES: bool;

    /// Serves the queues that have something to do, each for a bounded time, and leaves `pending` set on those that
    /// want another turn before anything else happens. Must not block.
    fn serve(&mut self, queues: &mut Queues);

    /// An operation submitted as `slot` has completed. A logic that submits none is never called.
    fn complete(
        &mut self,
        _queues: &mut Queues,
        _slot: u32,
        _result: Result<u32>,
        _buffer: Option<OwnedBuf>,
    ) {
    }

    /// What the device does with its requests cannot be done any more: each is to be answered with an error. Nothing is
    /// in flight.
    fn fail(&mut self) {}
}

/// How much of everything a device has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Virtqueues.
    pub(crate) queues: u16,
    /// Address spaces, at least 1.
    pub(crate) address_spaces: usize,
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

type Reply<T> = SyncSender<T>;

/// What the control side asks of the thread.
enum Command {
    Start { index: QueueIndex, setup: QueueSetup<LinuxHost>, state: QueueState, reply: Reply<Result<()>> },
    Stop { index: QueueIndex, reply: Reply<Result<Option<QueueState>>> },
    SetView { asid: Asid, view: Arc<View>, drain: bool, reply: Reply<()> },
    Forget,
    Fail { reply: Reply<()> },
    Exit,
}

/// The control side of a worker. Dropping it ends the thread, after what is in flight.
pub(crate) struct Worker {
    commands: Sender<Command>,
    wake: EventFd,
    registrar: Registrar,
    thread: Option<JoinHandle<()>>,
    counters: Arc<[Counters]>,
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("queues", &self.counters.len()).finish_non_exhaustive()
    }
}

impl Worker {
    /// Starts the thread of the block device `name` with `queues` queues, all stopped.
    ///
    /// # Errors
    /// Those of io_uring, of eventfd and of thread creation.
    pub(crate) fn spawn(name: &str, queues: u16, disk: impl Disk) -> Result<Self> {
        Self::spawn_logic(name, Size { queues, address_spaces: 1 }, Requests::new(disk))
    }

    /// Starts the thread of the device `name` with all queues stopped and nothing mapped.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn).
    pub(crate) fn spawn_logic(name: &str, size: Size, logic: impl Logic) -> Result<Self> {
        let (commands, receiver) = channel();
        let (ready, started) = sync_channel(1);
        let wake = EventFd::new()?;
        let counters: Arc<[Counters]> = (0..size.queues).map(|_| Counters::default()).collect();
        let label = name.to_owned();
        let (thread_wake, thread_counters) = (wake.clone(), Arc::clone(&counters));
        let run = move || {
            let queues = move |uring| Queues::new(label, uring, size, thread_counters);
            run(&receiver, &thread_wake, queues, logic, &ready);
        };
        // The kernel cuts thread names at 15 bytes.
        let builder = std::thread::Builder::new().name(format!("vq-{name}").chars().take(15).collect());
        let thread = builder
            .stack_size(256 << 10)
            .spawn(run)
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))?;
        let registrar = started.recv().map_err(|_| Errno::IO)??;
        Ok(Self { commands, wake, registrar, thread: Some(thread), counters })
    }

    /// Registers buffers with the ring that carries the disk I/O.
    pub(crate) const fn registrar(&self) -> &Registrar {
        &self.registrar
    }

    /// What one queue has done.
    pub(crate) fn stats(&self, index: QueueIndex) -> QueueStats {
        self.counters.get(usize::from(index.0)).map_or_else(QueueStats::default, Counters::read)
    }

    /// See [`Parent::start_queue`](vdpa_core::parent::Parent::start_queue).
    pub(crate) fn start(
        &self,
        index: QueueIndex,
        setup: &QueueSetup<LinuxHost>,
        state: QueueState,
    ) -> Result<()> {
        self.ask(|reply| Command::Start { index, setup: setup.clone(), state, reply })?
    }

    /// See [`Parent::stop_queue`](vdpa_core::parent::Parent::stop_queue).
    pub(crate) fn stop(&self, index: QueueIndex) -> Result<Option<QueueState>> {
        self.ask(|reply| Command::Stop { index, reply })?
    }

    /// Replaces the translation of one address space. With `drain`, returns when no request uses the previous one
    /// any more, and every ring in it is looked up again.
    pub(crate) fn set_view(&self, asid: Asid, view: Arc<View>, drain: bool) -> Result<()> {
        self.ask(|reply| Command::SetView { asid, view, drain, reply })
    }

    /// The device is reset: a queue that is started again owes nothing for requests it took before.
    pub(crate) fn reset(&self) {
        // A thread that is gone has forgotten everything.
        let _ = self.commands.send(Command::Forget);
    }

    /// See [`Parent::fail`](vdpa_core::parent::Parent::fail).
    pub(crate) fn fail(&self) -> Result<()> {
        self.ask(|reply| Command::Fail { reply })
    }

    /// Sends a command and waits for its answer; `EIO` when the thread is gone.
    fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let (reply, answer) = sync_channel(1);
        self.commands.send(command(reply)).map_err(|_| Errno::IO)?;
        self.wake.signal();
        answer.recv().map_err(|_| Errno::IO)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.commands.send(Command::Exit).is_ok() {
            self.wake.signal();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a worker thread had panicked");
        }
    }
}

fn run(
    commands: &Receiver<Command>,
    wake: &EventFd,
    queues: impl FnOnce(Ring) -> Queues,
    logic: impl Logic,
    ready: &SyncSender<Result<Registrar>>,
) {
    let ring = match Ring::new(RING_ENTRIES) {
        Ok(ring) => ring,
        Err(error) => {
            // Nobody listens only if the spawner is gone, which needs no answer.
            let _ = ready.send(Err(error));
            return;
        }
    };
    let registrar = ring.registrar();
    let mut server = serve::Server::new(queues(ring), logic);
    let _ = ready.send(server.watch(wake).map(|()| registrar));
    server.run(commands);
}
