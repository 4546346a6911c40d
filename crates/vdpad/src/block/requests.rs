//! [`Requests`]: the queue handler of a block device. Queues are served independently, each request by a [`Disk`].

mod batch;
mod throttle;

use std::sync::Arc;

use vdpa_backend::worker::{Invalidation, MemoryView, Queue, QueueHandler, Queues};
use vdpa_core::blk::{BlkRequest, FramingError, Status, kind};
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::faults::{self, Fault};
use vdpa_core::ring::{Chain, Memory};
use vdpa_core::types::{Asid, Result};
use vdpa_sys::uring::{Op, OwnedBuf};

use super::cache::WriteCache;
use super::disk::{Continuation, Disk, FixedRead, LockedIo, RequestContext, Step};
use super::limit::{Limiter, SharedLimits};
use super::pending::{DataBuffers, Pending};
use super::range_lock::{RangeLock, RangeLocks};

/// Operations in flight of one device at most. The kernel runs operations that may block on threads, of which the ring of a
/// worker has [`IOWQ_WORKERS_MAX`](vdpa_backend::worker::IOWQ_WORKERS_MAX): a disk that hangs must leave some to the other devices.
const IN_FLIGHT_MAX: usize = 256;

/// Bytes of bounce buffers of one device from which on it takes no further requests. A request may need as many as the largest
/// transfer has, and a client can make every request need them.
const BOUNCED_MAX: usize = 64 << 20;

/// The requests that an operation in flight belongs to.
enum InFlight {
    Single((Pending, Continuation)),
    /// A flush, which several requests share.
    Flush(Vec<(Pending, Continuation)>),
    /// The wait for the limits of the device, which belongs to none.
    Limits,
}

impl InFlight {
    fn requests(&self) -> &[(Pending, Continuation)] {
        match self {
            Self::Single(one) => std::slice::from_ref(one),
            Self::Flush(all) => all,
            Self::Limits => &[],
        }
    }
}

/// A request with its next operation, which is not submitted yet.
struct Ready {
    pending: Pending,
    op: Op,
    then: Continuation,
}

/// The answer to a request whose disk was removed ([`QueueHandler::fail`]).
const DISK_REMOVED: Step = Step::Complete { status: Status::IoErr, written: 0 };

/// The queue handler of a block device.
pub(crate) struct Requests<D: Disk> {
    /// `None` once the disk was removed.
    disk: Option<D>,
    cache: Arc<WriteCache>,
    registered: bool,
    pending: Vec<Option<InFlight>>,
    free: Vec<u32>,
    /// A flush of the disk is in flight.
    flushing: bool,
    /// Requests that wait for the next flush: the one in flight covers only what was written before it was submitted.
    waiting: Vec<(Pending, Continuation)>,
    /// The operation of the next flush, if requests wait for one.
    next_flush: Option<Op>,
    /// Locks on bytes of the disk, and the requests that wait for one.
    locks: RangeLocks<Ready>,
    /// Requests that have waited for a lock and hold it now.
    ready: Vec<Ready>,
    /// Bytes of bounce buffers that all requests hold.
    bounced: usize,
    /// Where chains are popped to; kept to reuse their memory.
    chains: [Chain; 2],
    limiter: Limiter,
    /// The queue with which a pass begins: the next one in turn after limits have ended a pass.
    first: u16,
}

impl<D: Disk> QueueHandler for Requests<D> {
    fn retry_on_map_change(&self) -> bool {
        // A request that was put back because its memory was not mapped may succeed now.
        true
    }

    fn serve(&mut self, queues: &mut Queues) {
        if !std::mem::replace(&mut self.registered, true)
            && let Some(disk) = &mut self.disk
        {
            disk.register(&queues.registrar());
        }
        if let Some(disk) = &mut self.disk {
            disk.begin_pass();
        }
        self.limiter.begin_pass();
        queues.serve_from(self.first, |queues, index, queue| self.serve_queue(queues, index, queue));
        self.start_ready(queues);
    }

    fn hand_over(&mut self) {
        if let Some(disk) = &mut self.disk {
            disk.hand_over();
        }
    }

    fn take_over(&mut self) -> Result<()> {
        self.disk.as_mut().map_or(Ok(()), Disk::take_over)
    }

    fn complete(&mut self, queues: &mut Queues, slot: u32, result: Result<u32>, buffer: Option<OwnedBuf>) {
        let Some(entry) = self.pending.get_mut(slot as usize) else { return };
        if let Some(InFlight::Single((pending, then))) = entry
            && let Some(written) = then.completes(result)
            && pending.holds_no_resources()
            && self.disk.is_some()
        {
            // Completed in its slot, because moving the request out of it costs as much as the rest of this path.
            complete_request(queues, None, pending, Status::Ok, written);
            *entry = None;
            self.free.push(slot);
            return;
        }
        let Some(ended) = entry.take() else { return };
        self.free.push(slot);
        match ended {
            InFlight::Single((pending, then)) => self.continue_request(queues, pending, then, result, buffer),
            InFlight::Limits => self.limiter.end(),
            InFlight::Flush(all) => {
                self.flushing = false;
                for (pending, then) in all {
                    self.continue_request(queues, pending, then, result, None);
                }
                if let Some(op) = self.next_flush.take_if(|_| !self.flushing) {
                    let all = std::mem::take(&mut self.waiting);
                    self.flush(queues, None, op, all);
                }
            }
        }
        self.start_ready(queues);
    }

    fn has_room(&self) -> bool {
        !self.limiter.waits()
            && self.bounced < BOUNCED_MAX
            && self.in_flight() + self.locks.waiting_len() + self.ready.len() < IN_FLIGHT_MAX
    }

    fn uses(&self, queues: &Queues, invalidation: &Invalidation) -> bool {
        let in_flight = self.pending.iter().flatten().flat_map(InFlight::requests);
        let not_started = self.locks.waiting().chain(&self.ready).map(|ready| (&ready.pending, &ready.then));
        let started = in_flight.chain(&self.waiting).map(|(pending, then)| (pending, then));
        started.chain(not_started).any(|(pending, then)| {
            queues.asid(pending.queue) == Some(invalidation.asid())
                && !Arc::ptr_eq(&pending.view, invalidation.view())
                && pending.uses(then, invalidation.removed())
        })
    }

    fn replace_views(&mut self, queues: &Queues, asid: Asid, view: &Arc<MemoryView>) {
        let in_flight = self.pending.iter_mut().flatten().flat_map(|in_flight| match in_flight {
            InFlight::Single(one) => std::slice::from_mut(one),
            InFlight::Flush(all) => all,
            InFlight::Limits => &mut [],
        });
        let not_started = self.locks.waiting_mut().chain(&mut self.ready).map(|ready| &mut ready.pending);
        in_flight
            .chain(&mut self.waiting)
            .map(|(pending, _)| pending)
            .chain(not_started)
            .filter(|pending| queues.asid(pending.queue) == Some(asid))
            .for_each(|pending| pending.view = Arc::clone(view));
    }

    fn fail(&mut self) {
        self.disk = None;
    }
}

impl<D: Disk> Drop for Requests<D> {
    fn drop(&mut self) {
        if self.in_flight() > 0
            && let Some(disk) = &mut self.disk
        {
            disk.abandon();
        }
    }
}

impl<D: Disk> Requests<D> {
    /// Operations in flight.
    fn in_flight(&self) -> usize {
        self.pending.len() - self.free.len()
    }

    /// `cache` is shared with the configuration space of the device, `limits` with whoever changes them.
    pub(crate) fn new(disk: D, cache: Arc<WriteCache>, limits: Arc<SharedLimits>) -> Self {
        Self {
            disk: Some(disk),
            cache,
            registered: false,
            pending: Vec::new(),
            free: Vec::new(),
            flushing: false,
            waiting: Vec::new(),
            next_flush: None,
            locks: RangeLocks::default(),
            ready: Vec::new(),
            bounced: 0,
            chains: Default::default(),
            limiter: Limiter::new(limits),
            first: 0,
        }
    }

    /// Starts one request; `alone` if no other one is waiting. Returns [`Step::Unreachable`] or [`Step::Malformed`] for a
    /// chain that cannot be started and that the caller must return.
    fn start_request(
        &mut self,
        queues: &mut Queues,
        index: u16,
        queue: &mut Queue,
        view: &Arc<MemoryView>,
        chain: &Chain,
        alone: bool,
    ) -> Option<Step> {
        let request = match BlkRequest::parse(view.snapshot(), chain) {
            Ok(request) => request,
            Err(error) => return Some(self.malformed(queues, index, &error)),
        };
        if faults::is(Fault::DeadlyWrite) && (request.header.kind, request.header.sector) == (kind::OUT, 4096)
        {
            std::process::abort();
        }
        let context = RequestContext { write_back: self.cache.is_write_back(queue.setup().features), alone };
        if let Some(read) = self.disk.as_ref().and_then(|disk| disk.fixed_read(&request, view, context)) {
            let data = DataBuffers::of(&request);
            let pending = Pending::new(index, chain.head, &request, data, view);
            self.submit_fixed_read(queues, queue, pending, read);
            return None;
        }
        let step = match &mut self.disk {
            Some(disk) => disk.start(&request, view, context),
            None => DISK_REMOVED,
        };
        if matches!(step, Step::Unreachable | Step::Malformed { .. }) {
            return Some(step);
        }
        queue.request_started();
        let data = match step {
            Step::Submit { .. } | Step::SubmitLocked(_) => DataBuffers::of(&request),
            _ => DataBuffers::default(),
        };
        let mut pending = Pending::new(index, chain.head, &request, data, view);
        pending.bounced = step.bounced();
        self.bounced += pending.bounced as usize;
        self.run_step(queues, Some(queue), pending, step);
        None
    }

    /// Answers a request that the earlier processes did not survive with an error, without doing anything of it. Returns what
    /// [`start_request`](Self::start_request) does.
    #[cold]
    fn refuse_request(
        &mut self,
        queues: &mut Queues,
        index: u16,
        queue: &mut Queue,
        view: &Arc<MemoryView>,
        chain: &Chain,
    ) -> Option<Step> {
        let request = match BlkRequest::parse(view.snapshot(), chain) {
            Ok(request) => request,
            Err(error) => return Some(self.malformed(queues, index, &error)),
        };
        let (kind, sector) = (request.header.kind, request.header.sector);
        let bytes = request.data_in.len() + request.data_out.len();
        queues.log_error(
            index,
            &format_args!(
                "three processes have died with the request of type {kind}, sector {sector}, {bytes} bytes: it is answered \
                 with an I/O error and not tried again"
            ),
        );
        queue.request_started();
        queues.count_poison(index);
        let pending = Pending::new(index, chain.head, &request, DataBuffers::default(), view);
        complete_request(queues, Some(queue), &pending, Status::IoErr, 0);
        None
    }

    /// What to do with a chain that is no request of this device type.
    #[cold]
    fn malformed(&mut self, queues: &Queues, index: u16, error: &FramingError) -> Step {
        let step = match (&mut self.disk, error) {
            (Some(disk), _) => disk.malformed(error),
            (None, FramingError::Fault(_)) => Step::Unreachable,
            (None, _) => Step::Malformed { notify: true },
        };
        queues.log_error(index, error);
        step
    }

    /// Carries out a step: answers the request or submits its next I/O. `queue` is the request's queue if the caller has
    /// taken it out of `queues`.
    fn run_step(&mut self, queues: &mut Queues, queue: Option<&mut Queue>, mut pending: Pending, step: Step) {
        let (status, written) = match step {
            Step::Submit { op: op @ Op::Fsync { .. }, then } => {
                // The bytes are changed and only have to become stable, which needs no lock.
                self.release(&mut pending);
                if self.flushing {
                    self.waiting.push((pending, then));
                    self.next_flush = Some(op);
                } else {
                    self.flush(queues, queue, op, vec![(pending, then)]);
                }
                return;
            }
            Step::Submit { op, then } => return self.submit_io(queues, queue, Ready { pending, op, then }),
            Step::SubmitLocked(io) => {
                let LockedIo { lock, op, then } = *io;
                if let Some(ready) = self.lock(lock, Ready { pending, op, then }) {
                    self.submit_io(queues, queue, ready);
                }
                return;
            }
            Step::Complete { status, written } => (status, written),
            Step::Unreachable | Step::Malformed { .. } => (Status::IoErr, 0),
        };
        self.release(&mut pending);
        complete_request(queues, queue, &pending, status, written);
    }

    /// Submits the next operation of a request.
    #[inline]
    fn submit_io(&mut self, queues: &mut Queues, queue: Option<&mut Queue>, ready: Ready) {
        let Ready { pending, op, then } = ready;
        if let Some(InFlight::Single((mut back, _))) =
            self.submit(queues, op, InFlight::Single((pending, then)))
        {
            self.release(&mut back);
            complete_request(queues, queue, &back, Status::IoErr, 0);
        }
    }

    /// Submits the operations of requests that have waited for a lock. All queues must be in `queues`.
    fn start_ready(&mut self, queues: &mut Queues) {
        while let Some(ready) = self.ready.pop() {
            self.submit_io(queues, None, ready);
        }
    }

    /// Locks the bytes of the disk that a request is going to change; `None` if the request has to wait for them.
    fn lock(&mut self, lock: RangeLock, ready: Ready) -> Option<Ready> {
        let (id, mut ready) = self.locks.acquire(lock, ready)?;
        ready.pending.lock = Some(id);
        Some(ready)
    }

    /// Releases the bounce buffers and the lock of a request. Requests that have waited for the lock become ready. They are
    /// not started from here: one that fails at once would release its own lock, and so on, in unbounded recursion.
    fn release(&mut self, pending: &mut Pending) {
        self.bounced -= std::mem::take(&mut pending.bounced) as usize;
        let Some(id) = pending.lock.take() else { return };
        for (id, mut ready) in self.locks.release(id) {
            ready.pending.lock = Some(id);
            self.ready.push(ready);
        }
    }

    /// Continues a request whose I/O has completed.
    fn continue_request(
        &mut self,
        queues: &mut Queues,
        pending: Pending,
        then: Continuation,
        result: Result<u32>,
        buffer: Option<OwnedBuf>,
    ) {
        if let Err(error) = result {
            queues.log_error(pending.queue, &error);
        }
        let step = match &mut self.disk {
            Some(disk) => disk.io_completed(then, result, buffer, &pending.view),
            None => DISK_REMOVED,
        };
        self.run_step(queues, None, pending, step);
    }

    /// Submits one flush for all of these requests.
    fn flush(
        &mut self,
        queues: &mut Queues,
        mut queue: Option<&mut Queue>,
        op: Op,
        all: Vec<(Pending, Continuation)>,
    ) {
        self.flushing = true;
        if let Some(InFlight::Flush(all)) = self.submit(queues, op, InFlight::Flush(all)) {
            self.flushing = false;
            for (pending, _) in all {
                complete_request(queues, queue.as_deref_mut(), &pending, Status::IoErr, 0);
            }
        }
    }

    /// Allocates a slot for an operation.
    fn slot(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.pending.push(None);
            u32::try_from(self.pending.len() - 1).unwrap_or(u32::MAX)
        })
    }

    /// Submits a read for which nothing but the request itself must be kept.
    #[inline]
    fn submit_fixed_read(
        &mut self,
        queues: &mut Queues,
        queue: &mut Queue,
        pending: Pending,
        read: FixedRead,
    ) {
        queue.request_started();
        let slot = self.slot();
        if let Err(error) = queues.read_fixed(read.file, read.to, read.offset, slot) {
            self.free.push(slot);
            queues.log_error(pending.queue, &error);
            return complete_request(queues, Some(queue), &pending, Status::IoErr, 0);
        }
        let len = u32::try_from(read.to.iovec.len).unwrap_or(u32::MAX);
        if let Some(entry) = self.pending.get_mut(slot as usize) {
            *entry =
                Some(InFlight::Single((pending, Continuation::Transfer { len, written: len, sync: false })));
        }
    }

    /// Submits an operation to io_uring. Returns `owner`, the requests that it belongs to, if that fails.
    fn submit(&mut self, queues: &mut Queues, op: Op, owner: InFlight) -> Option<InFlight> {
        let slot = self.slot();
        if let Err(error) = queues.submit(op, slot) {
            self.free.push(slot);
            let queue = owner.requests().first().map_or(0, |(pending, _)| pending.queue);
            queues.log_error(queue, &error);
            return Some(owner);
        }
        if let Some(entry) = self.pending.get_mut(slot as usize) {
            *entry = Some(owner);
        }
        None
    }
}

/// Writes the status byte and the used element of a request. The driver sees them when the used index is published next.
fn complete_request(
    queues: &mut Queues,
    queue: Option<&mut Queue>,
    pending: &Pending,
    status: Status,
    written: u32,
) {
    let data_out = if status == Status::Ok { pending.data_out } else { 0 };
    queues.count_request(pending.queue, u64::from(data_out) + u64::from(written), status != Status::Ok);
    let status_written = pending.view.snapshot().write(pending.status, &[status.byte()]);
    reach(CrashPoint::StatusWritten);
    let queue = match queue {
        Some(queue) => Some(queue),
        None => queues.get_mut(pending.queue),
    };
    let Some(queue) = queue else { return };
    queue.request_ended();
    let len = if status_written.is_ok() { written.saturating_add(1) } else { 0 };
    let pushed = match queue.resolved() {
        Some(ring) => ring.push_used(pending.head, len),
        None => Ok(()),
    };
    if let Err(error) = pushed {
        queues.log_error(pending.queue, &error);
    }
}
