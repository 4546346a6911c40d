//! The thread that serves the rings of a block device.
//!
//! One io_uring carries everything the thread waits for: kicks, commands of the control side and disk I/O. The
//! control side ([`Worker`]) talks to it by commands and waits for the answer, so that a queue that was stopped is
//! at rest and a mapping that was removed is unused when the call returns.

mod queue;
mod serve;
mod view;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use vdpa_core::Errno;
use vdpa_core::blk::{BlkRequest, ShapeError, Status};
use vdpa_core::parent::QueueStats;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::uring::{Op, OwnedBuf, Registrar, Ring};

pub(crate) use view::{Pin, View};

/// Entries of the submission queue: requests started between two visits to the kernel.
const RING_ENTRIES: u32 = 256;

/// What a request comes to.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// Answered: `written` bytes of data are in the client's buffers.
    Done {
        /// The status byte.
        status: Status,
        /// Bytes.
        written: u32,
    },
    /// The kernel is to do this first.
    Io {
        /// What.
        op: Op,
        /// What then.
        after: After,
    },
    /// Client memory is out of reach: the request goes back, and the queue rests until the next kick.
    Unreachable,
    /// No request at all: completed with length 0 and no status.
    Misshapen {
        /// Whether the client is told.
        notify: bool,
    },
}

/// What follows a completed I/O.
#[derive(Debug)]
pub(crate) enum After {
    /// `len` bytes must have been moved; `written` of them into the client's memory.
    Transfer {
        /// Expected.
        len: u32,
        /// For the used element.
        written: u32,
        /// Make them stable before answering (write-through).
        sync: bool,
    },
    /// The bytes go from a bounce buffer to the client.
    CopyOut {
        /// Destination.
        to: Vec<Buffer>,
        /// Bytes.
        len: u32,
    },
    /// Nothing more than success counts.
    Success {
        /// Make it stable before answering.
        sync: bool,
    },
    /// A discard is a hint: a file system that cannot do it is no error.
    Hint,
    /// Zero a range; where the file system cannot, by writing zeros from `at` to `end`.
    Zero {
        /// First byte not yet zero.
        at: u64,
        /// End, in bytes.
        end: u64,
        /// Whether zeros are being written already.
        writing: bool,
        /// Make it stable before answering.
        sync: bool,
    },
}

/// A disk as the worker uses it. Called from the worker's thread only.
pub(crate) trait Disk: Send + 'static {
    /// Looks at a request and starts it. `write_back`: the driver has a flush command and uses it.
    fn begin(&mut self, request: &BlkRequest<'_>, view: &Arc<View>, write_back: bool) -> Verdict;

    /// A chain that is no request.
    fn misshapen(&mut self, error: &ShapeError) -> Verdict;

    /// An I/O of a request has completed. Disks that never answer [`Verdict::Io`] are never called.
    fn proceed(
        &mut self,
        after: After,
        result: Result<u32>,
        buffer: Option<OwnedBuf>,
        view: &Arc<View>,
    ) -> Verdict;
}

/// Counters of one queue; they live as long as the device.
#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
}

impl Counters {
    fn count(&self, bytes: u64, status: Status) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        if status != Status::Ok {
            self.errors.fetch_add(1, Ordering::Relaxed);
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
    SetView { view: Arc<View>, drain: bool, reply: Reply<()> },
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
    /// Starts the thread of the device `name` with `queues` queues, all stopped.
    ///
    /// # Errors
    /// Those of io_uring, of eventfd and of thread creation.
    pub(crate) fn spawn(name: &str, queues: u16, disk: impl Disk) -> Result<Self> {
        let (commands, receiver) = channel();
        let (ready, started) = sync_channel(1);
        let wake = EventFd::new()?;
        let counters: Arc<[Counters]> = (0..queues).map(|_| Counters::default()).collect();
        let label = name.to_owned();
        let (thread_wake, thread_counters) = (wake.clone(), Arc::clone(&counters));
        let run = move || run(label, &receiver, &thread_wake, thread_counters, disk, &ready);
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

    /// Replaces the translation. With `drain`, returns when no request uses the previous one any more.
    pub(crate) fn set_view(&self, view: Arc<View>, drain: bool) -> Result<()> {
        self.ask(|reply| Command::SetView { view, drain, reply })
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
    name: String,
    commands: &Receiver<Command>,
    wake: &EventFd,
    counters: Arc<[Counters]>,
    disk: impl Disk,
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
    let mut server = serve::Server::new(name, ring, counters, disk);
    let _ = ready.send(server.watch(wake).map(|()| registrar));
    server.run(commands);
}
