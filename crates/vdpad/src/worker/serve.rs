//! The worker's loop: commands, kicks and completions.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};

use vdpa_core::Errno;
use vdpa_core::types::{Asid, QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::uring::Completion;

use super::queue::Queue;
use super::queues::{Queues, Token, to_u16};
use super::{Command, Logic, Reply};

pub(super) struct Server<L> {
    queues: Queues,
    logic: L,
    wake: Option<Arc<OwnedFd>>,
    generation: u32,
    /// Answers owed when nothing is in flight any more, and the address spaces that have changed.
    draining: Vec<(Asid, Reply<()>)>,
    /// Answers owed when nothing is in flight any more and the logic has been told to fail.
    failing: Vec<Reply<()>>,
    /// Where stopped queues were, and how many requests each had taken and will never answer. As long as the device
    /// is not reset, a queue that goes on at the same place goes on without them.
    abandoned: Vec<Option<(QueueState, u16)>>,
}

impl<L: Logic> Server<L> {
    pub(super) fn new(queues: Queues, logic: L) -> Self {
        let abandoned = vec![None; queues.count()];
        Self {
            queues,
            logic,
            wake: None,
            generation: 0,
            draining: Vec::new(),
            failing: Vec::new(),
            abandoned,
        }
    }

    /// Watches the event that announces commands.
    pub(super) fn watch(&mut self, wake: &EventFd) -> Result<()> {
        let fd = duplicate(wake)?;
        self.wake = Some(Arc::clone(&fd));
        self.queues.poll(fd, Token::Wake)
    }

    pub(super) fn run(&mut self, commands: &Receiver<Command>) {
        loop {
            match self.obey(commands) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => tracing::error!(device = %self.queues.name(), "worker: {error}"),
            }
            if self.takes_requests() {
                self.logic.serve(&mut self.queues);
            }
            self.settle();
            let want = usize::from(!self.has_work());
            if let Err(error) = self.queues.uring.submit_and_wait(want, None) {
                // Nothing can be served without the ring: stop rather than spin. Clients get EIO from now on.
                tracing::error!(device = %self.queues.name(), "io_uring failed, the device stops: {error}");
                return;
            }
            while let Some(completion) = self.queues.uring.next_completion() {
                self.complete(completion);
            }
            self.queues.publish_all();
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
                Ok(Command::SetView { asid, view, drain, reply }) => {
                    self.queues.set_view(asid, view);
                    if drain {
                        self.draining.push((asid, reply));
                    } else {
                        self.map_changed(asid);
                        answer(&reply, ());
                    }
                }
                Ok(Command::Fail { reply }) => self.failing.push(reply),
                Ok(Command::Forget) => self.abandoned.fill(None),
                Ok(Command::Exit) | Err(TryRecvError::Disconnected) => return Ok(false),
                Err(TryRecvError::Empty) => return Ok(true),
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
        self.generation = self.generation.wrapping_add(1);
        let mut queue = Queue::new(setup, state, self.generation)?;
        queue.abandoned = place.filter(|(before, _)| *before == state).map_or(0, |(_, count)| count);
        if let Some(kick) = &queue.setup.kick {
            let fd = duplicate(kick)?;
            self.queues.poll(fd, Token::Kick { queue: index.0, generation: self.generation })?;
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

    /// Answers STOP and SET_VIEW once what they wait for is done.
    fn settle(&mut self) {
        for index in 0..self.queues.count() {
            let Some(mut queue) = self.queues.take_stopped(to_u16(index)) else { continue };
            let token = Token::Kick { queue: to_u16(index), generation: queue.generation };
            if queue.setup.kick.is_some()
                && let Err(error) = self.queues.uring.cancel(token.pack())
            {
                // The poll stays behind; its generation tells its completions apart.
                tracing::debug!(device = %self.queues.name(), "kick poll not cancelled: {error}");
            }
            // Whatever was answered is seen by the driver before STOP returns.
            if let Err(error) = self.queues.publish(&mut queue) {
                self.queues.complain(to_u16(index), &error);
            }
            if let Some(place) = self.abandoned.get_mut(index) {
                *place = Some((queue.state(), queue.abandoned()));
            }
            if let Some(reply) = queue.stopping.take() {
                answer(&reply, Ok(Some(queue.state())));
            }
        }
        if !self.queues.in_flight() {
            if !self.failing.is_empty() {
                self.logic.fail();
            }
            self.failing.drain(..).for_each(|reply| answer(&reply, ()));
            for (asid, reply) in std::mem::take(&mut self.draining) {
                let concerned = self
                    .queues
                    .iter_mut()
                    .filter(|queue| queue.setup.asid == asid && queue.setup.kick.is_some());
                concerned.for_each(Queue::unresolve);
                self.map_changed(asid);
                answer(&reply, ());
            }
        }
    }

    /// What could not be reached before may be reachable now.
    fn map_changed(&mut self, asid: Asid) {
        if L::MAP_WAKES {
            let concerned =
                self.queues.iter_mut().filter(|queue| queue.setup.asid == asid && queue.setup.kick.is_some());
            concerned.for_each(|queue| queue.pending = true);
        }
    }

    /// Whether requests are taken from the rings, rather than waited for until none is in flight.
    fn takes_requests(&self) -> bool {
        self.draining.is_empty() && self.failing.is_empty()
    }

    fn has_work(&self) -> bool {
        self.takes_requests() && self.queues.has_work()
    }

    fn complete(&mut self, completion: Completion) {
        match Token::unpack(completion.token) {
            Some(Token::Wake) => self.rearm(&completion, self.wake.clone(), Token::Wake),
            Some(token @ Token::Kick { queue, generation }) => {
                let running = self.queues.get_mut(queue);
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
            Some(Token::Io { slot }) => {
                self.logic.complete(&mut self.queues, slot, completion.result, completion.buffer);
            }
            None => {
                tracing::error!(device = %self.queues.name(), token = completion.token, "unknown completion")
            }
        }
    }

    /// Asks again for a poll the kernel has ended, as it may when completions overflow.
    fn rearm(&mut self, completion: &Completion, fd: Option<Arc<OwnedFd>>, token: Token) {
        if completion.more {
            return;
        }
        let armed = fd.ok_or(Errno::BADF).and_then(|fd| self.queues.poll(fd, token));
        if let Err(error) = armed {
            tracing::error!(device = %self.queues.name(), ?token, "kicks are not seen any more: {error}");
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
