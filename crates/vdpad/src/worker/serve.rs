//! The worker's loop.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};

use vdpa_core::Errno;
use vdpa_core::blk::{BlkRequest, Status, kind};
use vdpa_core::iotlb::Table;
use vdpa_core::ring::{Chain, Memory, RingError};
use vdpa_core::types::{QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::uring::{Completion, Op, OwnedBuf, Ring, SubmitError};

use super::queue::Queue;
use super::{After, Command, Counters, Disk, Reply, Verdict, View};
use crate::rate::RateLimit;

/// Requests taken from one queue before the others have their turn.
const BUDGET: usize = 64;

/// What a completion belongs to, packed into the ring's token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Wake,
    Kick { queue: u16, generation: u32 },
    Io { slot: u32 },
}

impl Token {
    const fn pack(self) -> u64 {
        match self {
            Self::Wake => 0,
            Self::Kick { queue, generation } => 1 << 60 | (queue as u64) << 32 | generation as u64,
            Self::Io { slot } => 2 << 60 | slot as u64,
        }
    }

    const fn unpack(token: u64) -> Option<Self> {
        #[expect(clippy::cast_possible_truncation, reason = "the fields of a packed token")]
        let (low, middle) = (token as u32, (token >> 32) as u16);
        match token >> 60 {
            0 => Some(Self::Wake),
            1 => Some(Self::Kick { queue: middle, generation: low }),
            2 => Some(Self::Io { slot: low }),
            _ => None,
        }
    }
}

/// A request whose I/O is in flight.
struct Pending {
    queue: u16,
    head: u16,
    /// Address of the status byte.
    status: u64,
    after: After,
    /// Bytes of data that the driver wants written.
    data_out: u64,
    view: Arc<View>,
}

pub(super) struct Server<D> {
    name: String,
    ring: Ring,
    wake: Option<Arc<OwnedFd>>,
    disk: D,
    view: Arc<View>,
    queues: Vec<Option<Queue>>,
    counters: Arc<[Counters]>,
    pending: Vec<Option<Pending>>,
    free: Vec<u32>,
    generation: u32,
    /// Answers owed when nothing is in flight any more.
    draining: Vec<Reply<()>>,
    chain: Chain,
    complaints: RateLimit,
}

impl<D: Disk> Server<D> {
    pub(super) fn new(name: String, ring: Ring, counters: Arc<[Counters]>, disk: D) -> Self {
        Self {
            name,
            ring,
            wake: None,
            disk,
            view: Arc::new(View::new(&Table::default(), Vec::new())),
            queues: counters.iter().map(|_| None).collect(),
            counters,
            pending: Vec::new(),
            free: Vec::new(),
            generation: 0,
            draining: Vec::new(),
            chain: Chain::new(),
            complaints: RateLimit::per_second(5),
        }
    }

    /// Watches the event that announces commands.
    pub(super) fn watch(&mut self, wake: &EventFd) -> Result<()> {
        let fd = duplicate(wake)?;
        self.wake = Some(Arc::clone(&fd));
        self.poll(fd, Token::Wake)
    }

    pub(super) fn run(&mut self, commands: &Receiver<Command>) {
        loop {
            match self.obey(commands) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => tracing::error!(device = %self.name, "worker: {error}"),
            }
            self.serve_all();
            self.settle();
            let want = usize::from(!self.has_work());
            if let Err(error) = self.ring.submit_and_wait(want, None) {
                // Nothing can be served without the ring: stop rather than spin. Clients get EIO from now on.
                tracing::error!(device = %self.name, "io_uring failed, the device stops: {error}");
                return;
            }
            while let Some(completion) = self.ring.next_completion() {
                self.complete(completion);
            }
            self.publish_all();
            self.settle();
        }
    }

    /// Takes the commands that have arrived; `false` when it is time to go.
    fn obey(&mut self, commands: &Receiver<Command>) -> Result<bool> {
        loop {
            match commands.try_recv() {
                Ok(Command::Start { index, setup, state, reply }) => {
                    let result = self.start(index, setup, state);
                    answer(&reply, result);
                }
                Ok(Command::Stop { index, reply }) => self.stop(index, reply),
                Ok(Command::SetView { view, drain, reply }) => {
                    self.view = view;
                    if drain {
                        self.draining.push(reply);
                    } else {
                        self.queues.iter_mut().flatten().for_each(|queue| queue.pending = true);
                        answer(&reply, ());
                    }
                }
                Ok(Command::Exit) | Err(TryRecvError::Disconnected) => return Ok(false),
                Err(TryRecvError::Empty) => return Ok(true),
            }
        }
    }

    fn start(&mut self, index: QueueIndex, setup: QueueSetup<LinuxHost>, state: QueueState) -> Result<()> {
        let place = self.queues.get(usize::from(index.0)).ok_or(Errno::INVAL)?;
        if place.is_some() {
            return Ok(());
        }
        self.generation = self.generation.wrapping_add(1);
        let queue = Queue::new(setup, state, self.generation)?;
        if let Some(kick) = &queue.setup.kick {
            let fd = duplicate(kick)?;
            self.poll(fd, Token::Kick { queue: index.0, generation: self.generation })?;
        }
        if let Some(place) = self.queues.get_mut(usize::from(index.0)) {
            *place = Some(queue);
        }
        Ok(())
    }

    fn stop(&mut self, index: QueueIndex, reply: Reply<Result<Option<QueueState>>>) {
        match self.queues.get_mut(usize::from(index.0)).and_then(Option::as_mut) {
            Some(queue) if queue.stopping.is_none() => queue.stopping = Some(reply),
            Some(_) => answer(&reply, Err(Errno::BUSY)),
            None => answer(&reply, Ok(None)),
        }
    }

    /// Answers STOP and SET_VIEW once what they wait for is done.
    fn settle(&mut self) {
        for index in 0..self.queues.len() {
            let done = |queue: &mut Queue| queue.stopping.is_some() && queue.in_flight == 0;
            let Some(mut queue) = self.queues.get_mut(index).and_then(|queue| queue.take_if(done)) else {
                continue;
            };
            let token = Token::Kick { queue: to_u16(index), generation: queue.generation };
            if queue.setup.kick.is_some()
                && let Err(error) = self.ring.cancel(token.pack())
            {
                // The poll stays behind; its generation tells its completions apart.
                tracing::debug!(device = %self.name, "kick poll not cancelled: {error}");
            }
            // Whatever was answered is seen by the driver before STOP returns.
            if let Err(error) = self.publish(&mut queue) {
                self.complain(to_u16(index), &error);
            }
            if let Some(reply) = queue.stopping.take() {
                answer(&reply, Ok(Some(queue.state())));
            }
        }
        if !self.draining.is_empty() && self.in_flight() == 0 {
            self.queues.iter_mut().flatten().for_each(Queue::unresolve);
            self.draining.drain(..).for_each(|reply| answer(&reply, ()));
        }
    }

    fn in_flight(&self) -> usize {
        self.pending.len() - self.free.len()
    }

    /// Whether a queue can be served without waiting for anything.
    fn has_work(&self) -> bool {
        self.draining.is_empty() && self.queues.iter().flatten().any(Queue::has_work)
    }

    /// Gives every queue that has something to do its turn.
    fn serve_all(&mut self) {
        if !self.draining.is_empty() {
            return;
        }
        for index in 0..self.queues.len() {
            let Some(mut queue) = self.queues.get_mut(index).and_then(Option::take) else { continue };
            if queue.has_work() {
                queue.pending = match self.serve(to_u16(index), &mut queue) {
                    Ok(more) => more,
                    Err(error) => self.rest(index, &mut queue, error),
                };
            }
            if let Some(place) = self.queues.get_mut(index) {
                *place = Some(queue);
            }
        }
    }

    /// Takes requests of one queue up to the budget; whether there may be more.
    fn serve(&mut self, index: u16, queue: &mut Queue) -> Result<bool, RingError> {
        let view = Arc::clone(&self.view);
        queue.ring(&view)?.disable_kick()?;
        for _ in 0..BUDGET {
            let mut chain = std::mem::take(&mut self.chain);
            let found = queue.ring(&view)?.pop(view.snapshot(), &mut chain);
            let going = match found {
                Ok(true) => self.begin(index, queue, &view, &chain),
                Ok(false) => {
                    self.chain = chain;
                    self.publish(queue)?;
                    return queue.ring(&view)?.enable_kick();
                }
                Err(error) => Err(error),
            };
            self.chain = chain;
            if !going? {
                self.publish(queue)?;
                return Ok(false);
            }
        }
        self.publish(queue)?;
        Ok(true)
    }

    /// Starts one request; `false` when the queue is to rest until the next kick.
    fn begin(
        &mut self,
        index: u16,
        queue: &mut Queue,
        view: &Arc<View>,
        chain: &Chain,
    ) -> Result<bool, RingError> {
        let request = match BlkRequest::parse(view.snapshot(), chain) {
            Ok(request) => request,
            Err(error) => {
                let verdict = self.disk.misshapen(&error);
                self.complain(index, &error);
                return self.unusual(queue, view, chain, &verdict);
            }
        };
        let verdict = self.disk.begin(&request, view, queue.write_back());
        if matches!(verdict, Verdict::Unreachable | Verdict::Misshapen { .. }) {
            return self.unusual(queue, view, chain, &verdict);
        }
        queue.in_flight += 1;
        let pending = Pending {
            queue: index,
            head: chain.head,
            status: request.status,
            after: After::Hint,
            data_out: if request.header.kind == kind::OUT { request.data_out.len() } else { 0 },
            view: Arc::clone(view),
        };
        self.carry_out(Some(queue), pending, verdict);
        Ok(true)
    }

    /// A chain that is not served as a request.
    fn unusual(
        &mut self,
        queue: &mut Queue,
        view: &Arc<View>,
        chain: &Chain,
        verdict: &Verdict,
    ) -> Result<bool, RingError> {
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

    /// Follows a verdict: answers the request or starts its next I/O. `queue` is given while it is out of its
    /// place.
    fn carry_out(&mut self, queue: Option<&mut Queue>, mut pending: Pending, verdict: Verdict) {
        let (status, written) = match verdict {
            Verdict::Io { op, after } => {
                pending.after = after;
                match self.submit(op, pending) {
                    Ok(()) => return,
                    Err((error, back)) => {
                        self.complain(back.queue, &error);
                        pending = back;
                        (Status::IoErr, 0)
                    }
                }
            }
            Verdict::Done { status, written } => (status, written),
            Verdict::Unreachable | Verdict::Misshapen { .. } => (Status::IoErr, 0),
        };
        self.answer_request(queue, &pending, status, written);
    }

    /// Hands an operation to the ring; gives the request back when it is not taken.
    fn submit(&mut self, op: Op, pending: Pending) -> Result<(), (SubmitError, Pending)> {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.pending.push(None);
            u32::try_from(self.pending.len() - 1).unwrap_or(u32::MAX)
        });
        if let Err(error) = self.ring.submit(op, Token::Io { slot }.pack()) {
            self.free.push(slot);
            return Err((error, pending));
        }
        if let Some(place) = self.pending.get_mut(slot as usize) {
            *place = Some(pending);
        }
        Ok(())
    }

    /// Writes the status and the used element of a request. The driver sees them with the next publication.
    fn answer_request(&mut self, queue: Option<&mut Queue>, pending: &Pending, status: Status, written: u32) {
        let index = usize::from(pending.queue);
        if let Some(counters) = self.counters.get(index) {
            let data_out = if status == Status::Ok { pending.data_out } else { 0 };
            counters.count(data_out + u64::from(written), status);
        }
        let told = pending.view.snapshot().write(pending.status, &[status.byte()]);
        let queue = match queue {
            Some(queue) => Some(queue),
            None => self.queues.get_mut(index).and_then(Option::as_mut),
        };
        let Some(queue) = queue else { return };
        queue.in_flight -= 1;
        let len = if told.is_ok() { written.saturating_add(1) } else { 0 };
        let pushed = match queue.resolved() {
            Some(ring) => ring.push_used(pending.head, len),
            None => Ok(()),
        };
        if let Err(error) = pushed {
            self.complain(pending.queue, &error);
        }
    }

    fn complete(&mut self, completion: Completion) {
        match Token::unpack(completion.token) {
            Some(Token::Wake) => self.rearm(&completion, self.wake.clone(), Token::Wake),
            Some(token @ Token::Kick { queue, generation }) => {
                let running = self.queues.get_mut(usize::from(queue)).and_then(Option::as_mut);
                let Some(running) = running.filter(|running| running.generation == generation) else {
                    return;
                };
                running.pending = true;
                let kick = running.setup.kick.clone();
                if !completion.more {
                    let fd = kick.and_then(|kick| duplicate(&kick).ok());
                    self.rearm(&completion, fd, token);
                }
            }
            Some(Token::Io { slot }) => self.proceed(slot, completion.result, completion.buffer),
            None => tracing::error!(device = %self.name, token = completion.token, "unknown completion"),
        }
    }

    fn proceed(&mut self, slot: u32, result: Result<u32>, buffer: Option<OwnedBuf>) {
        let Some(mut pending) = self.pending.get_mut(slot as usize).and_then(Option::take) else { return };
        self.free.push(slot);
        let after = std::mem::replace(&mut pending.after, After::Hint);
        if let Err(error) = result {
            self.complain(pending.queue, &error);
        }
        let view = Arc::clone(&pending.view);
        let verdict = self.disk.proceed(after, result, buffer, &view);
        self.carry_out(None, pending, verdict);
    }

    /// Asks again for a poll the kernel has ended, as it may when completions overflow.
    fn rearm(&mut self, completion: &Completion, fd: Option<Arc<OwnedFd>>, token: Token) {
        if completion.more {
            return;
        }
        let armed = fd.ok_or(Errno::BADF).and_then(|fd| self.poll(fd, token));
        if let Err(error) = armed {
            tracing::error!(device = %self.name, ?token, "kicks are not seen any more: {error}");
        }
    }

    fn poll(&mut self, fd: Arc<OwnedFd>, token: Token) -> Result<()> {
        self.ring.submit(Op::PollMultishot { fd }, token.pack()).map_err(|error| error.errno())
    }

    fn publish_all(&mut self) {
        for index in 0..self.queues.len() {
            let Some(mut queue) = self.queues.get_mut(index).and_then(Option::take) else { continue };
            if let Err(error) = self.publish(&mut queue) {
                self.rest(index, &mut queue, error);
            }
            if let Some(place) = self.queues.get_mut(index) {
                *place = Some(queue);
            }
        }
    }

    /// Shows the driver what was answered and signals it if it wants that.
    fn publish(&self, queue: &mut Queue) -> Result<(), RingError> {
        let Some(ring) = queue.resolved() else { return Ok(()) };
        if ring.publish()?
            && let Some(call) = &queue.setup.call
        {
            call.signal();
        }
        Ok(())
    }

    /// A queue that cannot go on rests until the next kick; one whose driver broke the protocol is retired.
    fn rest(&self, index: usize, queue: &mut Queue, error: RingError) -> bool {
        if !error.is_fault() {
            queue.retired = true;
        }
        self.complain(to_u16(index), &error);
        false
    }

    fn complain(&self, queue: u16, error: &dyn std::fmt::Display) {
        if let Some(suppressed) = self.complaints.pass() {
            tracing::warn!(device = %self.name, queue, suppressed, "{error}");
        }
    }
}

/// A descriptor of its own for a poll, so that the event may go while the poll is being cancelled.
fn duplicate(event: &EventFd) -> Result<Arc<OwnedFd>> {
    let fd = event.as_fd().try_clone_to_owned();
    fd.map(Arc::new).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
}

/// Answers a command; whoever asked may have gone, which changes nothing here.
fn answer<T>(reply: &Reply<T>, value: T) {
    let _ = reply.send(value);
}

/// Queue indexes come from a `u16` count.
fn to_u16(index: usize) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_packing() {
        for token in [
            Token::Wake,
            Token::Kick { queue: u16::MAX, generation: u32::MAX },
            Token::Kick { queue: 0, generation: 1 },
            Token::Io { slot: u32::MAX },
        ] {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
        assert_eq!(Token::unpack(u64::MAX), None);
    }
}
