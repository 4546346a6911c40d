//! Serving a block device: every queue for itself, each request through a [`Disk`].

use std::sync::Arc;

use vdpa_core::blk::{BlkRequest, ShapeError, Status, kind};
use vdpa_core::ring::{Buffer, Chain, Memory, RingError};
use vdpa_core::types::Result;
use vdpa_sys::uring::{Op, OwnedBuf, Registrar};

use super::queue::Queue;
use super::queues::{Queues, to_u16};
use super::{Logic, View};

/// Requests taken from one queue before the others have their turn.
const BUDGET: usize = 64;

/// Requests for which a turn is not divided: a signal costs as much as one or two of them.
const UNDIVIDED: usize = 16;

/// Bytes of requests after which a turn ends: what is in the page cache, or has to be copied, is moved by this thread.
const BUDGET_BYTES: u64 = 1 << 20;

/// Operations in flight of one device. The kernel gives an operation that may block a thread, of which a worker's ring has
/// [`KERNEL_THREADS`](super::KERNEL_THREADS): a disk that hangs must leave some to its neighbours.
const IN_FLIGHT_MAX: usize = 256;

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
    /// Before the first request: what is to be registered with the ring of the thread that serves the disk.
    fn register(&mut self, _registrar: &Registrar) {}

    /// The disk goes while some of its operations have not ended: nobody else may get what they use by its number.
    fn abandon(&mut self) {}

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

/// A request whose I/O is in flight.
struct Pending {
    queue: u16,
    head: u16,
    /// Address of the status byte.
    status: u64,
    /// Bytes of data that the driver wants written.
    data_out: u64,
    view: Arc<View>,
}

/// What an operation is for.
enum InFlight {
    One(Pending, After),
    /// A flush, for all of these.
    Flush(Vec<(Pending, After)>),
}

/// The answer to a request for a disk that is gone.
const GONE: Verdict = Verdict::Done { status: Status::IoErr, written: 0 };

/// The logic of a block device.
pub(super) struct Requests<D: Disk> {
    /// `None` once it was taken away.
    disk: Option<D>,
    registered: bool,
    pending: Vec<Option<InFlight>>,
    free: Vec<u32>,
    /// A flush of the disk is in flight.
    flushing: bool,
    /// Requests that wait for the next one: what was written before the present one began is all that it is sure to
    /// cover.
    waiting: Vec<(Pending, After)>,
    /// It.
    next_flush: Option<Op>,
    chain: Chain,
}

impl<D: Disk> Logic for Requests<D> {
    fn map_wakes(&self) -> bool {
        // A request that was put back because its memory was out of reach may be in reach now.
        true
    }

    fn serve(&mut self, queues: &mut Queues) {
        if !std::mem::replace(&mut self.registered, true)
            && let Some(disk) = &mut self.disk
        {
            disk.register(&queues.registrar());
        }
        for index in 0..queues.count() {
            let index = to_u16(index);
            let Some(mut queue) = queues.take(index) else { continue };
            if queue.has_work() {
                queue.pending = match self.serve_queue(queues, index, &mut queue) {
                    Ok(more) => more,
                    Err(error) => {
                        // What was answered before is to be seen; a ring that is not to be had any more has nothing.
                        let _ = queues.publish(&mut queue);
                        queues.rest(index, &mut queue, error)
                    }
                };
            }
            queues.put(index, queue);
        }
    }

    fn complete(&mut self, queues: &mut Queues, slot: u32, result: Result<u32>, buffer: Option<OwnedBuf>) {
        let Some(ended) = self.pending.get_mut(slot as usize).and_then(Option::take) else { return };
        self.free.push(slot);
        match ended {
            InFlight::One(pending, after) => self.go_on(queues, pending, after, result, buffer),
            InFlight::Flush(all) => {
                self.flushing = false;
                for (pending, after) in all {
                    self.go_on(queues, pending, after, result, None);
                }
                if let Some(op) = self.next_flush.take_if(|_| !self.flushing) {
                    let all = std::mem::take(&mut self.waiting);
                    self.flush(queues, None, op, all);
                }
            }
        }
    }

    fn has_room(&self) -> bool {
        self.in_flight() < IN_FLIGHT_MAX
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

    pub(super) fn new(disk: D) -> Self {
        Self {
            disk: Some(disk),
            registered: false,
            pending: Vec::new(),
            free: Vec::new(),
            flushing: false,
            waiting: Vec::new(),
            next_flush: None,
            chain: Chain::new(),
        }
    }

    /// Takes requests of one queue up to the budget; whether there may be more.
    fn serve_queue(&mut self, queues: &mut Queues, index: u16, queue: &mut Queue) -> Result<bool, RingError> {
        let view = queues.view(queue);
        queue.ring(&view)?.disable_kick()?;
        let waiting = queue.ring(&view)?.waiting()?;
        let mut bytes = 0;
        for _ in 0..share(waiting) {
            if !self.has_room() {
                break;
            }
            let mut chain = std::mem::take(&mut self.chain);
            let found = queue.ring(&view)?.pop(view.snapshot(), &mut chain);
            let going = match found {
                Ok(true) => {
                    bytes += chain.readable().len() + chain.writable().len();
                    self.begin(queues, index, queue, &view, &chain)
                }
                Ok(false) => {
                    self.chain = chain;
                    queues.publish(queue)?;
                    return queues.wait_for_kick(queue, &view);
                }
                Err(error) => Err(error),
            };
            self.chain = chain;
            if !going? {
                queues.publish(queue)?;
                return Ok(false);
            }
            if bytes >= BUDGET_BYTES {
                break;
            }
        }
        queues.publish(queue)?;
        Ok(true)
    }

    /// Starts one request; `false` when the queue is to rest until the next kick.
    fn begin(
        &mut self,
        queues: &mut Queues,
        index: u16,
        queue: &mut Queue,
        view: &Arc<View>,
        chain: &Chain,
    ) -> Result<bool, RingError> {
        let request = match BlkRequest::parse(view.snapshot(), chain) {
            Ok(request) => request,
            Err(error) => {
                let verdict = match (&mut self.disk, &error) {
                    (Some(disk), _) => disk.misshapen(&error),
                    (None, ShapeError::Fault(_)) => Verdict::Unreachable,
                    (None, _) => Verdict::Misshapen { notify: true },
                };
                queues.complain(index, &error);
                return unusual(queue, view, chain, &verdict);
            }
        };
        let verdict = match &mut self.disk {
            Some(disk) => disk.begin(&request, view, queue.write_back()),
            None => GONE,
        };
        if matches!(verdict, Verdict::Unreachable | Verdict::Misshapen { .. }) {
            return unusual(queue, view, chain, &verdict);
        }
        queue.in_flight += 1;
        let pending = Pending {
            queue: index,
            head: chain.head,
            status: request.status,
            data_out: if request.header.kind == kind::OUT { request.data_out.len() } else { 0 },
            view: Arc::clone(view),
        };
        self.carry_out(queues, Some(queue), pending, verdict);
        Ok(true)
    }

    /// Follows a verdict: answers the request or starts its next I/O. `queue` is given while it is out of its
    /// place.
    fn carry_out(
        &mut self,
        queues: &mut Queues,
        queue: Option<&mut Queue>,
        pending: Pending,
        verdict: Verdict,
    ) {
        let (status, written) = match verdict {
            Verdict::Io { op: op @ Op::Fsync { .. }, after } => {
                if self.flushing {
                    self.waiting.push((pending, after));
                    self.next_flush = Some(op);
                } else {
                    self.flush(queues, queue, op, vec![(pending, after)]);
                }
                return;
            }
            Verdict::Io { op, after } => match self.submit(queues, op, InFlight::One(pending, after)) {
                Some(InFlight::One(back, _)) => {
                    return answer_request(queues, queue, &back, Status::IoErr, 0);
                }
                _ => return,
            },
            Verdict::Done { status, written } => (status, written),
            Verdict::Unreachable | Verdict::Misshapen { .. } => (Status::IoErr, 0),
        };
        answer_request(queues, queue, &pending, status, written);
    }

    /// Goes on with a request whose I/O has ended.
    fn go_on(
        &mut self,
        queues: &mut Queues,
        pending: Pending,
        after: After,
        result: Result<u32>,
        buffer: Option<OwnedBuf>,
    ) {
        if let Err(error) = result {
            queues.complain(pending.queue, &error);
        }
        let verdict = match &mut self.disk {
            Some(disk) => disk.proceed(after, result, buffer, &pending.view),
            None => GONE,
        };
        self.carry_out(queues, None, pending, verdict);
    }

    /// Starts a flush for all of these.
    fn flush(
        &mut self,
        queues: &mut Queues,
        mut queue: Option<&mut Queue>,
        op: Op,
        all: Vec<(Pending, After)>,
    ) {
        self.flushing = true;
        if let Some(InFlight::Flush(all)) = self.submit(queues, op, InFlight::Flush(all)) {
            self.flushing = false;
            for (pending, _) in all {
                answer_request(queues, queue.as_deref_mut(), &pending, Status::IoErr, 0);
            }
        }
    }

    /// Hands an operation to the ring; gives back what it is for when it is not taken.
    fn submit(&mut self, queues: &mut Queues, op: Op, what: InFlight) -> Option<InFlight> {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.pending.push(None);
            u32::try_from(self.pending.len() - 1).unwrap_or(u32::MAX)
        });
        if let Err(error) = queues.submit(op, slot) {
            self.free.push(slot);
            let queue = match &what {
                InFlight::One(pending, _) => pending.queue,
                InFlight::Flush(all) => all.first().map_or(0, |(pending, _)| pending.queue),
            };
            queues.complain(queue, &error);
            return Some(what);
        }
        if let Some(place) = self.pending.get_mut(slot as usize) {
            *place = Some(what);
        }
        None
    }
}

/// How many of the requests that wait are done in a turn: half of them, so that the driver sees answers, and makes new
/// requests of them, while the other half is done. All at once, driver and device would wait for each other in turn.
fn share(waiting: Option<u16>) -> usize {
    waiting.map_or(BUDGET, |waiting| usize::from(waiting).div_ceil(2).clamp(UNDIVIDED, BUDGET))
}

/// A chain that is not served as a request.
fn unusual(queue: &mut Queue, view: &Arc<View>, chain: &Chain, verdict: &Verdict) -> Result<bool, RingError> {
    let call = queue.setup.call.clone();
    let ring = queue.ring(view)?;
    let Verdict::Misshapen { notify } = verdict else {
        ring.abandon(chain)?;
        // The driver must kick again once its memory is back.
        ring.enable_kick()?;
        return Ok(false);
    };
    ring.push_used(chain.head, 0)?;
    let wanted = ring.publish()?;
    if *notify
        && wanted
        && let Some(call) = call
    {
        call.signal();
    }
    Ok(*notify)
}

/// Writes the status and the used element of a request. The driver sees them with the next publication.
fn answer_request(
    queues: &mut Queues,
    queue: Option<&mut Queue>,
    pending: &Pending,
    status: Status,
    written: u32,
) {
    let data_out = if status == Status::Ok { pending.data_out } else { 0 };
    queues.count_request(pending.queue, data_out + u64::from(written), status != Status::Ok);
    let told = pending.view.snapshot().write(pending.status, &[status.byte()]);
    let queue = match queue {
        Some(queue) => Some(queue),
        None => queues.get_mut(pending.queue),
    };
    let Some(queue) = queue else { return };
    queue.in_flight -= 1;
    let len = if told.is_ok() { written.saturating_add(1) } else { 0 };
    let pushed = match queue.resolved() {
        Some(ring) => ring.push_used(pending.head, len),
        None => Ok(()),
    };
    if let Err(error) = pushed {
        queues.complain(pending.queue, &error);
    }
}
