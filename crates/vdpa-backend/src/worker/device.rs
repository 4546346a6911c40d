//! [`LocalDevice`]: a device on its worker thread, with its commands, kicks and completions.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::features::Features;
use vdpa_core::ring::inflight::{FREE_WORD, LogMemory as _};
use vdpa_core::types::{Asid, QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::shared_words::SharedWords;
use vdpa_sys::uring::OwnedBuf;

use super::queue::Queue;
use super::queues::Queues;
use super::{Command, Invalidation, QueueHandler, Reply};
use crate::persist::DeviceNotes;

/// A device as its worker thread has it: the queues, the handler, and commands that wait for requests in flight.
pub(super) struct LocalDevice {
    queues: Queues,
    handler: Box<dyn QueueHandler>,
    /// The device is in the thread's ready queue.
    pub(super) scheduled: bool,
    /// The device is in the thread's list of devices to busy-poll.
    pub(super) busy_polled: bool,
    /// SET_VIEW commands, answered when nothing uses the removed memory any more.
    invalidations: Vec<(Invalidation, Reply<()>)>,
    /// FAIL commands, answered when nothing is in flight any more and the handler's `fail` was called.
    failing: Vec<Reply<()>>,
    /// SET_TRACKING commands, answered when it is known of every request in flight what it writes.
    tracking: Vec<Reply<()>>,
    /// The thread is being parked, or is parked: no request is taken.
    parked: bool,
    /// A REMOVE command, answered when nothing is in flight any more and the device was dropped.
    removing: Option<Reply<()>>,
    /// By queue: where it stopped. A queue that starts again at that position, without a reset in between, has the same
    /// requests missing, or to be repeated.
    stopped: Vec<Option<Stopped>>,
    /// By queue: memory of its in-flight log; empty for a device without logs.
    logs: Vec<SharedWords>,
    /// By queue: the first start continues from the log.
    recover: Vec<bool>,
    /// The words that tell the request in progress, if the logs have them.
    notes: Option<SharedWords>,
}

/// Where a queue stopped.
#[derive(Clone, Copy, Debug)]
struct Stopped {
    state: QueueState,
    /// Requests that it had popped and will never complete.
    unanswered: u16,
    /// Size of the ring, and what was negotiated: what its log looks like.
    shape: (u16, Features),
}

impl LocalDevice {
    pub(super) fn new(queues: Queues, handler: Box<dyn QueueHandler>, parked: bool) -> Self {
        let count = usize::from(queues.count());
        Self {
            queues,
            handler,
            scheduled: false,
            busy_polled: false,
            invalidations: Vec::new(),
            failing: Vec::new(),
            tracking: Vec::new(),
            parked,
            removing: None,
            stopped: vec![None; count],
            logs: Vec::new(),
            recover: vec![false; count],
            notes: None,
        }
    }

    /// Runs a command; a reply that has to wait for requests in flight is sent by
    /// [`finish_commands`](Self::finish_commands).
    pub(super) fn run_command(&mut self, command: Command) {
        match command {
            Command::Start { index, setup, state, reply } => {
                let result = self.start(index, setup, state);
                send_reply(&reply, result);
            }
            Command::SetLogs { logs, recover, notes, reply } => {
                self.notes = notes;
                send_reply(&reply, self.set_logs(logs, recover));
            }
            Command::Stop { index, reply } => self.stop(index, reply),
            Command::SetView { invalidation, reply } => {
                self.queues.set_view(&invalidation);
                // Answered in the next `service` at the latest, if nothing uses the removed memory.
                self.invalidations.push((invalidation, reply));
            }
            Command::SetTracking { on, reply } => {
                self.queues.set_tracking(on);
                self.tracking.push(reply);
            }
            // What this thread has written before is marked.
            Command::SyncDirty { reply } => send_reply(&reply, ()),
            Command::Fail { reply } => self.failing.push(reply),
            Command::Reset => {
                // What is in the logs stays until the queues start again: whether this process or the next one does the request is not
                // known yet.
                self.stopped.fill(None);
                self.recover.fill(false);
                self.handler.reset();
            }
            Command::Remove { reply } => {
                self.queues.cancel_requests();
                self.removing = Some(reply);
            }
        }
    }

    fn start(&mut self, index: QueueIndex, setup: QueueSetup<LinuxHost>, state: QueueState) -> Result<()> {
        let at = usize::from(index.0);
        let shape = (setup.size, setup.features);
        let stopped = self.stopped.get(at).ok_or(Errno::INVAL)?;
        let stopped = stopped.filter(|stopped| (stopped.state, stopped.shape) == (state, shape));
        if self.queues.get_mut(index.0).is_some() {
            return Ok(());
        }
        if !self.queues.has_view(setup.asid) {
            return Err(Errno::INVAL);
        }
        let generation = self.queues.next_generation();
        let (dirty, tracking) = self.queues.dirty();
        let mut queue = Queue::new(setup, state, generation, dirty, tracking)?;
        queue.unanswered = stopped.map_or(0, |stopped| stopped.unanswered);
        if let Some(kick) = &queue.setup.kick {
            self.queues.poll(duplicate(kick)?, index.0, generation)?;
        }
        if let Some(log) = self.logs.get(at) {
            let first = self.recover.get_mut(at).is_some_and(std::mem::take);
            let recover = first || stopped.is_some();
            // A log that is continued has no instant at which there is none: in the journal the queue may still be where it was
            // before it was stopped. One that is not is cleared first: the note makes the next process continue what is there.
            queue.set_log(log.clone(), recover);
            if let Some(notes) = &self.notes {
                log.store(FREE_WORD, DeviceNotes::request(notes));
            }
        }
        self.queues.put(index.0, queue);
        reach(CrashPoint::QueueStarted);
        Ok(())
    }

    fn set_logs(&mut self, logs: Vec<SharedWords>, recover: bool) -> Result<()> {
        if logs.len() != usize::from(self.queues.count()) {
            return Err(Errno::INVAL);
        }
        if !self.logs.is_empty() || self.queues.iter_mut().next().is_some() {
            return Err(Errno::BUSY);
        }
        self.logs = logs;
        self.recover.fill(recover);
        Ok(())
    }

    fn stop(&mut self, index: QueueIndex, reply: Reply<Result<Option<QueueState>>>) {
        match self.queues.get_mut(index.0) {
            Some(queue) if queue.stopping.is_none() => {
                queue.stopping = Some(reply);
                queue.stop_taking();
            }
            Some(_) => send_reply(&reply, Err(Errno::BUSY)),
            None => send_reply(&reply, Ok(None)),
        }
    }

    /// The poll of a kick eventfd has reported an event; `more` if the poll stays armed.
    pub(super) fn kicked(&mut self, index: u16, generation: u32, more: bool) {
        let running = self.queues.get_mut(index).filter(|running| running.generation == generation);
        let Some(running) = running else { return };
        running.pending = true;
        if more || self.parked {
            return;
        }
        // The kernel ends a multishot poll when the completion queue overflows, for example.
        let kick = running.setup.kick.clone().ok_or(Errno::BADF);
        let armed = kick.and_then(|kick| self.queues.poll(duplicate(&kick)?, index, generation));
        if let Err(error) = armed {
            tracing::error!(device = %self.queues.name(), index, "the queue receives no kicks any more: {error}");
        }
    }

    /// An operation that the handler submitted has completed.
    pub(super) fn complete(&mut self, slot: u32, result: Result<u32>, buffer: Option<OwnedBuf>) {
        self.handler.complete(&mut self.queues, slot, result, buffer);
    }

    /// Publishes used descriptors, answers commands that are done, and serves the queues that have work; whether they have
    /// more work.
    pub(super) fn service(&mut self) -> bool {
        self.queues.recover_rings();
        self.queues.publish_all();
        self.finish_commands();
        if !self.takes_requests() {
            return false;
        }
        self.handler.serve(&mut self.queues);
        // The handler may have completed requests at once, without I/O, that commands wait for.
        self.finish_commands();
        self.takes_requests() && self.handler.has_room() && self.queues.has_work()
    }

    /// Takes no request any more.
    pub(super) fn park(&mut self) {
        self.parked = true;
    }

    /// Whether nothing of this process uses rings, logs and client memory: to be called after [`service`](Self::service).
    pub(super) fn is_at_rest(&self) -> bool {
        !self.queues.in_flight()
    }

    /// The thread is parked: the polls of kicks have been cancelled, and whoever goes on may be another process.
    pub(super) fn hand_over(&mut self) {
        self.busy_polled = false;
        self.handler.hand_over();
    }

    /// While the thread is parked: answers commands that are done.
    pub(super) fn service_parked(&mut self) {
        self.finish_commands();
    }

    /// Takes requests again. With `armed`, the polls of kicks have not been cancelled. An error is of the handler.
    pub(super) fn unpark(&mut self, armed: bool) -> Result<()> {
        self.parked = false;
        self.queues.refresh_tracking();
        for index in (0..self.queues.count()).filter(|_| !armed) {
            let Some(queue) = self.queues.get_mut(index) else { continue };
            // The driver may have kicked meanwhile.
            queue.pending |= queue.setup.kick.is_some();
            let (kick, generation) = (queue.setup.kick.clone(), queue.generation);
            let poll = kick.map(|kick| duplicate(&kick)).transpose();
            let armed =
                poll.and_then(|kick| kick.map_or(Ok(()), |kick| self.queues.poll(kick, index, generation)));
            if let Err(error) = armed {
                tracing::error!(device = %self.queues.name(), index, "the queue receives no kicks: {error}");
            }
        }
        if armed { Ok(()) } else { self.handler.take_over() }
    }

    /// The name of the device.
    pub(super) fn name(&self) -> &str {
        self.queues.name()
    }

    /// Every later request is completed with an error.
    pub(super) fn fail(&mut self) {
        self.handler.fail();
    }

    /// Whether a queue has its kick disabled because the thread busy-polls its ring.
    pub(super) fn is_busy_polled(&self) -> bool {
        self.queues.is_busy_polled()
    }

    /// Checks the rings that are busy-polled; whether one has requests that the handler can take.
    pub(super) fn check_polled_rings(&mut self) -> bool {
        self.takes_requests() && self.handler.has_room() && self.queues.check_polled_rings()
    }

    /// Enables the kicks of the rings that are busy-polled; whether one has got requests meanwhile.
    pub(super) fn enable_kicks(&mut self) -> bool {
        self.queues.enable_kicks()
    }

    /// Whether the device is being removed and no request is in flight.
    pub(super) fn is_removed(&self) -> bool {
        self.removing.is_some() && !self.queues.in_flight() && self.handler.is_at_rest()
    }

    /// Ends a removal when no request is in flight: cancels the polls of kicks, drops the device and answers the command.
    pub(super) fn finish_removal(mut self) {
        for index in 0..self.queues.count() {
            if let Some(queue) = self.queues.take(index) {
                self.queues.cancel_poll(index, &queue);
            }
        }
        let removing = self.removing.take();
        drop(self);
        if let Some(reply) = removing {
            send_reply(&reply, ());
        }
    }

    /// Answers STOP, SET_VIEW and FAIL once what they wait for is done. Used descriptors are published.
    fn finish_commands(&mut self) {
        for index in 0..self.queues.count() {
            let now = !self.takes_requests();
            let Some(mut queue) = self.queues.take_stopped(index, now) else { continue };
            self.queues.cancel_poll(index, &queue);
            // With kicks enabled, the driver notifies whoever serves the ring next, which checks it for requests first.
            if let Err(error) = queue.enable_kick() {
                self.queues.log_error(index, &error);
            }
            // The driver must see all completed requests before STOP returns.
            if let Err(error) = self.queues.publish(&mut queue) {
                self.queues.log_error(index, &error);
            }
            queue.forget_in_flight();
            if let Some(place) = self.stopped.get_mut(usize::from(index)) {
                let shape = (queue.setup.size, queue.setup.features);
                *place = Some(Stopped { state: queue.state(), unanswered: queue.unanswered(), shape });
            }
            if let Some(reply) = queue.stopping.take() {
                send_reply(&reply, Ok(Some(queue.state())));
            }
        }
        if !self.invalidations.is_empty() {
            self.finish_invalidations();
        }
        if !self.tracking.is_empty() && !self.queues.has_unrecorded() {
            self.tracking.drain(..).for_each(|reply| send_reply(&reply, ()));
        }
        if !self.failing.is_empty() && !self.queues.in_flight() {
            self.handler.fail();
            self.queues.cancel_requests();
            self.failing.drain(..).for_each(|reply| send_reply(&reply, ()));
        }
    }

    /// Answers the SET_VIEW commands whose removed memory nothing uses any more.
    fn finish_invalidations(&mut self) {
        let (waiting, done): (Vec<_>, _) =
            std::mem::take(&mut self.invalidations).into_iter().partition(|(invalidation, _)| {
                let rings_released = self.queues.release_removed_rings(invalidation.asid);
                !rings_released || self.handler.uses(&self.queues, invalidation)
            });
        self.invalidations = waiting;
        for (invalidation, reply) in done {
            if self.invalidations.is_empty() {
                // No request in flight needs older translations, which keep the removed memory mapped.
                self.handler.replace_views(&self.queues, invalidation.asid, &invalidation.view);
            }
            self.map_changed(invalidation.asid);
            self.queues.recover_rings();
            send_reply(&reply, ());
        }
    }

    /// Requests that named unmapped memory are tried again, for a handler that asks for that.
    fn map_changed(&mut self, asid: Asid) {
        let concerned = self.queues.iter_mut().filter(|queue| queue.setup.asid == asid && queue.recovering);
        concerned.for_each(|queue| queue.pending = true);
        if self.handler.retry_on_map_change() {
            let concerned =
                self.queues.iter_mut().filter(|queue| queue.setup.asid == asid && queue.setup.kick.is_some());
            concerned.for_each(|queue| queue.pending = true);
        }
    }

    /// Whether requests are popped from the rings; `false` while the thread is parked, and while FAIL or REMOVE waits for those in
    /// flight.
    fn takes_requests(&self) -> bool {
        self.failing.is_empty() && self.removing.is_none() && !self.parked
    }
}

/// Duplicates an eventfd for a poll, so that the client's descriptor can be closed while the poll is being cancelled.
fn duplicate(event: &EventFd) -> Result<Arc<OwnedFd>> {
    let fd = event.as_fd().try_clone_to_owned();
    fd.map(Arc::new).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
}

/// Answers a command. The sender may have stopped waiting after a time-out, which is no error.
fn send_reply<T>(reply: &Reply<T>, value: T) {
    let _ = reply.send(value);
}
