//! Serving a block device: every queue for itself, each request through a [`Disk`].

mod turn;

use std::sync::Arc;

use vdpa_backend::worker::{Invalidation, MemoryView, Queue, QueueHandler, Queues};
use vdpa_core::blk::{BlkRequest, FramingError, Status};
use vdpa_core::ring::{Chain, Memory};
use vdpa_core::types::{Asid, Result};
use vdpa_sys::uring::{Op, OwnedBuf};

use super::cache::WriteCache;
use super::claims::{Claim, Claims};
use super::disk::{After, Claimed, Direct, Disk, Moment, Verdict};
use super::pending::{Data, Pending};

/// Operations in flight of one device. The kernel gives an operation that may block a thread, of which a worker's ring has
/// [`KERNEL_THREADS`](vdpa_backend::worker::KERNEL_THREADS): a disk that hangs must leave some to its neighbours.
const IN_FLIGHT_MAX: usize = 256;

/// Bytes of bounce buffers of one device beyond which it takes no further requests. Each may need as many as a transfer has
/// at most, and a client may make all of its requests need them.
const BOUNCED_MAX: usize = 64 << 20;

/// What an operation is for.
enum InFlight {
    One((Pending, After)),
    /// A flush, for all of these.
    Flush(Vec<(Pending, After)>),
}

/// A request whose next operation is known, and is not to be started yet.
struct Ready {
    pending: Pending,
    op: Op,
    after: After,
}

/// The answer to a request for a disk that is gone.
const GONE: Verdict = Verdict::Done { status: Status::IoErr, written: 0 };

/// The logic of a block device.
pub(crate) struct Requests<D: Disk> {
    /// `None` once it was taken away.
    disk: Option<D>,
    cache: Arc<WriteCache>,
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
    /// Bytes of the disk that are being changed, and requests that wait for some.
    claims: Claims<Ready>,
    /// Requests that have waited for bytes of the disk and can go on.
    ready: Vec<Ready>,
    /// Bytes of the bounce buffers of all of these.
    bounced: usize,
    /// Where requests are taken to.
    chains: [Chain; 2],
}

impl<D: Disk> QueueHandler for Requests<D> {
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
            let Some(mut queue) = queues.take(index) else { continue };
            if queue.has_work() {
                let more = match self.serve_queue(queues, index, &mut queue) {
                    Ok(more) => more,
                    Err(error) => {
                        // What was answered before is to be seen; a ring that is not to be had any more has nothing.
                        let _ = queues.publish(&mut queue);
                        queues.ring_failed(index, &mut queue, error)
                    }
                };
                queue.set_pending(more);
            }
            queues.put(index, queue);
        }
        self.start_ready(queues);
    }

    fn complete(&mut self, queues: &mut Queues, slot: u32, result: Result<u32>, buffer: Option<OwnedBuf>) {
        let Some(place) = self.pending.get_mut(slot as usize) else { return };
        if let Some(InFlight::One((pending, after))) = place
            && let Some(written) = after.ends(result)
            && pending.has_nothing()
            && self.disk.is_some()
        {
            // Where it lies: moving it costs as much as the rest.
            answer_request(queues, None, pending, Status::Ok, written);
            *place = None;
            self.free.push(slot);
            return;
        }
        let Some(ended) = place.take() else { return };
        self.free.push(slot);
        match ended {
            InFlight::One((pending, after)) => self.go_on(queues, pending, after, result, buffer),
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
        self.start_ready(queues);
    }

    fn has_room(&self) -> bool {
        self.bounced < BOUNCED_MAX
            && self.in_flight() + self.claims.waiting_len() + self.ready.len() < IN_FLIGHT_MAX
    }

    fn uses(&self, queues: &Queues, invalidation: &Invalidation) -> bool {
        let in_flight = self.pending.iter().flatten().flat_map(|in_flight| match in_flight {
            InFlight::One(one) => std::slice::from_ref(one),
            InFlight::Flush(all) => all,
        });
        let not_started =
            self.claims.waiting().chain(&self.ready).map(|ready| (&ready.pending, &ready.after));
        let started = in_flight.chain(&self.waiting).map(|(pending, after)| (pending, after));
        started.chain(not_started).any(|(pending, after)| {
            queues.asid(pending.queue) == Some(invalidation.asid())
                && !Arc::ptr_eq(&pending.view, invalidation.view())
                && pending.uses(after, invalidation.removed())
        })
    }

    fn renew(&mut self, queues: &Queues, asid: Asid, view: &Arc<MemoryView>) {
        let in_flight = self.pending.iter_mut().flatten().flat_map(|in_flight| match in_flight {
            InFlight::One(one) => std::slice::from_mut(one),
            InFlight::Flush(all) => all,
        });
        let not_started = self.claims.waiting_mut().chain(&mut self.ready).map(|ready| &mut ready.pending);
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

    /// `cache` is what the device's configuration space says of its write cache.
    pub(crate) fn new(disk: D, cache: Arc<WriteCache>) -> Self {
        Self {
            disk: Some(disk),
            cache,
            registered: false,
            pending: Vec::new(),
            free: Vec::new(),
            flushing: false,
            waiting: Vec::new(),
            next_flush: None,
            claims: Claims::default(),
            ready: Vec::new(),
            bounced: 0,
            chains: Default::default(),
        }
    }

    /// Starts one request, `alone` if no other one waits. One that cannot be served as a request is left to the caller, with
    /// what is wrong with it.
    fn begin(
        &mut self,
        queues: &mut Queues,
        index: u16,
        queue: &mut Queue,
        view: &Arc<MemoryView>,
        chain: &Chain,
        alone: bool,
    ) -> Option<Verdict> {
        let request = match BlkRequest::parse(view.snapshot(), chain) {
            Ok(request) => request,
            Err(error) => {
                let verdict = match (&mut self.disk, &error) {
                    (Some(disk), _) => disk.misshapen(&error),
                    (None, FramingError::Fault(_)) => Verdict::Unreachable,
                    (None, _) => Verdict::Misshapen { notify: true },
                };
                queues.log_error(index, &error);
                return Some(verdict);
            }
        };
        let moment = Moment { write_back: self.cache.is_write_back(queue.setup().features), alone };
        if let Some(direct) = self.disk.as_ref().and_then(|disk| disk.direct(&request, view, moment)) {
            let pending = Pending::new(index, chain.head, &request, Data::of(&request), view);
            self.read(queues, queue, pending, direct);
            return None;
        }
        let verdict = match &mut self.disk {
            Some(disk) => disk.begin(&request, view, moment),
            None => GONE,
        };
        if matches!(verdict, Verdict::Unreachable | Verdict::Misshapen { .. }) {
            return Some(verdict);
        }
        queue.request_started();
        let data = match verdict {
            Verdict::Io { .. } | Verdict::Claimed(_) => Data::of(&request),
            _ => Data::default(),
        };
        let mut pending = Pending::new(index, chain.head, &request, data, view);
        pending.bounced = verdict.bounced();
        self.bounced += pending.bounced as usize;
        self.carry_out(queues, Some(queue), pending, verdict);
        None
    }

    /// Follows a verdict: answers the request or starts its next I/O. `queue` is given while it is out of its
    /// place.
    fn carry_out(
        &mut self,
        queues: &mut Queues,
        queue: Option<&mut Queue>,
        mut pending: Pending,
        verdict: Verdict,
    ) {
        let (status, written) = match verdict {
            Verdict::Io { op: op @ Op::Fsync { .. }, after } => {
                // The bytes are changed; they only have to become stable.
                self.release(&mut pending);
                if self.flushing {
                    self.waiting.push((pending, after));
                    self.next_flush = Some(op);
                } else {
                    self.flush(queues, queue, op, vec![(pending, after)]);
                }
                return;
            }
            Verdict::Io { op, after } => return self.start(queues, queue, Ready { pending, op, after }),
            Verdict::Claimed(claimed) => {
                let Claimed { claim, op, after } = *claimed;
                if let Some(ready) = self.claim(claim, Ready { pending, op, after }) {
                    self.start(queues, queue, ready);
                }
                return;
            }
            Verdict::Done { status, written } => (status, written),
            Verdict::Unreachable | Verdict::Misshapen { .. } => (Status::IoErr, 0),
        };
        self.release(&mut pending);
        answer_request(queues, queue, &pending, status, written);
    }

    /// Starts the next operation of a request.
    #[inline]
    fn start(&mut self, queues: &mut Queues, queue: Option<&mut Queue>, ready: Ready) {
        let Ready { pending, op, after } = ready;
        if let Some(InFlight::One((mut back, _))) = self.submit(queues, op, InFlight::One((pending, after))) {
            self.release(&mut back);
            answer_request(queues, queue, &back, Status::IoErr, 0);
        }
    }

    /// Starts what has waited for bytes of the disk and can go on. All queues are in their places.
    fn start_ready(&mut self, queues: &mut Queues) {
        while let Some(ready) = self.ready.pop() {
            self.start(queues, None, ready);
        }
    }

    /// Gives a request the bytes of the disk that it is going to change; `None` if it has to wait for them.
    fn claim(&mut self, claim: Claim, ready: Ready) -> Option<Ready> {
        let (id, mut ready) = self.claims.ask(claim, ready)?;
        ready.pending.claim = Some(id);
        Some(ready)
    }

    /// A request needs no bounce buffers and changes no bytes of the disk any more. What has waited for those is started
    /// later, not from here: that may go on in the same way for ever.
    fn release(&mut self, pending: &mut Pending) {
        self.bounced -= std::mem::take(&mut pending.bounced) as usize;
        let Some(id) = pending.claim.take() else { return };
        for (id, mut ready) in self.claims.release(id) {
            ready.pending.claim = Some(id);
            self.ready.push(ready);
        }
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
            queues.log_error(pending.queue, &error);
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

    /// A slot for an operation.
    fn slot(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.pending.push(None);
            u32::try_from(self.pending.len() - 1).unwrap_or(u32::MAX)
        })
    }

    /// Starts a read of which nothing else is to be kept.
    #[inline]
    fn read(&mut self, queues: &mut Queues, queue: &mut Queue, pending: Pending, direct: Direct) {
        queue.request_started();
        let slot = self.slot();
        if let Err(error) = queues.read_fixed(direct.file, direct.to, direct.offset, slot) {
            self.free.push(slot);
            queues.log_error(pending.queue, &error);
            return answer_request(queues, Some(queue), &pending, Status::IoErr, 0);
        }
        let len = u32::try_from(direct.to.iovec.len).unwrap_or(u32::MAX);
        if let Some(place) = self.pending.get_mut(slot as usize) {
            *place = Some(InFlight::One((pending, After::Transfer { len, written: len, sync: false })));
        }
    }

    /// Hands an operation to the ring; gives back what it is for when it is not taken.
    fn submit(&mut self, queues: &mut Queues, op: Op, what: InFlight) -> Option<InFlight> {
        let slot = self.slot();
        if let Err(error) = queues.submit(op, slot) {
            self.free.push(slot);
            let queue = match &what {
                InFlight::One((pending, _)) => pending.queue,
                InFlight::Flush(all) => all.first().map_or(0, |(pending, _)| pending.queue),
            };
            queues.log_error(queue, &error);
            return Some(what);
        }
        if let Some(place) = self.pending.get_mut(slot as usize) {
            *place = Some(what);
        }
        None
    }
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
    queues.count_request(pending.queue, u64::from(data_out) + u64::from(written), status != Status::Ok);
    let told = pending.view.snapshot().write(pending.status, &[status.byte()]);
    let queue = match queue {
        Some(queue) => Some(queue),
        None => queues.get_mut(pending.queue),
    };
    let Some(queue) = queue else { return };
    queue.request_ended();
    let len = if told.is_ok() { written.saturating_add(1) } else { 0 };
    let pushed = match queue.resolved() {
        Some(ring) => ring.push_used(pending.head, len),
        None => Ok(()),
    };
    if let Err(error) = pushed {
        queues.log_error(pending.queue, &error);
    }
}
