//! One device of a thread: its commands, kicks and completions.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::types::{Asid, QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::uring::OwnedBuf;

use super::queue::Queue;
use super::queues::Queues;
use super::{Command, Invalidation, QueueHandler, Reply};

pub(super) struct LocalDevice {
    queues: Queues,
    handler: Box<dyn QueueHandler>,
    /// It is in the list of those that have a turn.
    pub(super) listed: bool,
    /// It is in the list of those at whose rings the thread looks.
    pub(super) watched: bool,
    /// Answers owed when nothing uses what was removed any more.
    draining: Vec<(Invalidation, Reply<()>)>,
    /// Answers owed when nothing is in flight any more and the handler has been told to fail.
    failing: Vec<Reply<()>>,
    /// Answer owed when nothing is in flight any more and the device is gone.
    removing: Option<Reply<()>>,
    /// Where stopped queues were, and how many requests each had taken and will never answer. As long as the device
    /// is not reset, a queue that goes on at the same place goes on without them.
    abandoned: Vec<Option<(QueueState, u16)>>,
}

impl LocalDevice {
    pub(super) fn new(queues: Queues, handler: Box<dyn QueueHandler>) -> Self {
        let abandoned = vec![None; queues.count().into()];
        Self {
            queues,
            handler,
            listed: false,
            watched: false,
            draining: Vec::new(),
            failing: Vec::new(),
            removing: None,
            abandoned,
        }
    }

    pub(super) fn run_command(&mut self, command: Command) {
        match command {
            Command::Start { index, setup, state, reply } => {
                let result = self.start(index, setup, state);
                answer(&reply, result);
            }
            Command::Stop { index, reply } => self.stop(index, reply),
            Command::SetView { invalidation, reply } => {
                self.queues.set_view(&invalidation);
                // Answered in the next turn at the latest, if nothing uses what was removed.
                self.draining.push((invalidation, reply));
            }
            Command::Fail { reply } => self.failing.push(reply),
            Command::Reset => {
                self.abandoned.fill(None);
                self.handler.reset();
            }
            Command::Remove { reply } => {
                self.queues.cancel_requests();
                self.removing = Some(reply);
            }
        }
    }

    fn start(&mut self, index: QueueIndex, setup: QueueSetup<LinuxHost>, state: QueueState) -> Result<()> {
        let place = self.abandoned.get(usize::from(index.0)).ok_or(Errno::INVAL)?;
        if self.queues.get_mut(index.0).is_some() {
            return Ok(());
        }
        if !self.queues.has_view(setup.asid) {
            return Err(Errno::INVAL);
        }
        let generation = self.queues.next_generation();
        let mut queue = Queue::new(setup, state, generation)?;
        queue.abandoned = place.filter(|(before, _)| *before == state).map_or(0, |(_, count)| count);
        if let Some(kick) = &queue.setup.kick {
            self.queues.poll(duplicate(kick)?, index.0, generation)?;
        }
        self.queues.put(index.0, queue);
        Ok(())
    }

    fn stop(&mut self, index: QueueIndex, reply: Reply<Result<Option<QueueState>>>) {
        match self.queues.get_mut(index.0) {
            Some(queue) if queue.stopping.is_none() => queue.stopping = Some(reply),
            Some(_) => answer(&reply, Err(Errno::BUSY)),
            None => answer(&reply, Ok(None)),
        }
    }

    /// A poll of a kick has reported; `more` if it goes on.
    pub(super) fn kicked(&mut self, index: u16, generation: u32, more: bool) {
        let running = self.queues.get_mut(index).filter(|running| running.generation == generation);
        let Some(running) = running else { return };
        running.pending = true;
        if more {
            return;
        }
        // The kernel ends a poll when completions overflow, for example.
        let kick = running.setup.kick.clone().ok_or(Errno::BADF);
        let armed = kick.and_then(|kick| self.queues.poll(duplicate(&kick)?, index, generation));
        if let Err(error) = armed {
            tracing::error!(device = %self.queues.name(), index, "kicks are not seen any more: {error}");
        }
    }

    /// An operation of the handler has completed.
    pub(super) fn complete(&mut self, slot: u32, result: Result<u32>, buffer: Option<OwnedBuf>) {
        self.handler.complete(&mut self.queues, slot, result, buffer);
    }

    /// Shows what was answered, answers commands that waited for it, and serves the queues that have something to do;
    /// whether they have more to do.
    pub(super) fn turn(&mut self) -> bool {
        self.queues.publish_all();
        self.finish_commands();
        if !self.takes_requests() {
            return false;
        }
        self.handler.serve(&mut self.queues);
        // Requests that were answered without I/O are no reason to wait.
        self.finish_commands();
        self.takes_requests() && self.handler.has_room() && self.queues.has_work()
    }

    /// Whether a queue waits for requests without a kick.
    pub(super) fn is_polled(&self) -> bool {
        self.queues.is_polled()
    }

    /// Looks at the rings that wait without a kick, or asks for kicks again with `end`; whether there is something to do.
    pub(super) fn look(&mut self, end: bool) -> bool {
        (end || self.takes_requests() && self.handler.has_room()) && self.queues.look(end)
    }

    /// Whether it was removed and nothing of it is left.
    pub(super) fn is_gone(&self) -> bool {
        self.removing.is_some() && !self.queues.in_flight()
    }

    /// Nothing of a removed device is in flight: its polls end, and whoever removed it hears of that.
    pub(super) fn leave(mut self) {
        for index in 0..self.queues.count() {
            if let Some(queue) = self.queues.take(index) {
                self.queues.cancel_poll(index, &queue);
            }
        }
        let removing = self.removing.take();
        drop(self);
        if let Some(reply) = removing {
            answer(&reply, ());
        }
    }

    /// Answers STOP, SET_VIEW and FAIL once what they wait for is done. What was answered has been shown.
    fn finish_commands(&mut self) {
        for index in 0..self.queues.count() {
            let Some(mut queue) = self.queues.take_stopped(index) else { continue };
            self.queues.cancel_poll(index, &queue);
            // The driver kicks from here on, and whoever serves the ring next looks at it first.
            if let Err(error) = queue.end_polling() {
                self.queues.log_error(index, &error);
            }
            // Whatever was answered is seen by the driver before STOP returns.
            if let Err(error) = self.queues.publish(&mut queue) {
                self.queues.log_error(index, &error);
            }
            if let Some(place) = self.abandoned.get_mut(usize::from(index)) {
                *place = Some((queue.state(), queue.abandoned()));
            }
            if let Some(reply) = queue.stopping.take() {
                answer(&reply, Ok(Some(queue.state())));
            }
        }
        if !self.draining.is_empty() {
            self.finish_invalidations();
        }
        if !self.failing.is_empty() && !self.queues.in_flight() {
            self.handler.fail();
            self.failing.drain(..).for_each(|reply| answer(&reply, ()));
        }
    }

    /// Answers SET_VIEW where nothing uses what was removed any more.
    fn finish_invalidations(&mut self) {
        let (waiting, done): (Vec<_>, _) =
            std::mem::take(&mut self.draining).into_iter().partition(|(invalidation, _)| {
                let rings_left = self.queues.leave_rings(invalidation.asid);
                !rings_left || self.handler.uses(&self.queues, invalidation)
            });
        self.draining = waiting;
        for (invalidation, reply) in done {
            if self.draining.is_empty() {
                // Nothing that is in flight needs older translations, which keep mapped what was removed.
                self.handler.replace_views(&self.queues, invalidation.asid, &invalidation.view);
            }
            self.map_changed(invalidation.asid);
            answer(&reply, ());
        }
    }

    /// What could not be reached before may be reachable now.
    fn map_changed(&mut self, asid: Asid) {
        if self.handler.retry_on_map_change() {
            let concerned =
                self.queues.iter_mut().filter(|queue| queue.setup.asid == asid && queue.setup.kick.is_some());
            concerned.for_each(|queue| queue.pending = true);
        }
    }

    /// Whether requests are taken from the rings, rather than waited for until none is in flight.
    fn takes_requests(&self) -> bool {
        self.failing.is_empty() && self.removing.is_none()
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
