//! The loop of a thread: messages, completions, and a turn for each device that has something to do.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use vdpa_core::Errno;
use vdpa_core::types::Result;
use vdpa_sys::uring::{Completion, Op, Ring};

use super::device::LocalDevice;
use super::poll::{Poller, STOLEN};
use super::queues::{Queues, Token};
use super::{Command, QueueHandler, Reply, Shared, Size};

/// What a thread is told.
pub(super) enum Message {
    /// A device comes.
    Add(Registration),
    /// A command for a device. One for a device that is gone is dropped, and with it the way to answer it.
    Command(u16, Command),
    /// The thread is to end.
    Exit,
}

/// A device that comes to a thread, with all queues stopped.
pub(super) struct Registration {
    pub(super) name: String,
    pub(super) size: Size,
    pub(super) handler: Box<dyn QueueHandler>,
    pub(super) shared: Arc<Shared>,
    /// Hears which of the thread's devices it is.
    pub(super) reply: Reply<Result<u16>>,
}

/// What a thread has.
pub(super) struct EventLoop {
    uring: Rc<RefCell<Ring>>,
    wake: Arc<OwnedFd>,
    /// There may be messages.
    woken: bool,
    /// By number; `None` for numbers that are free.
    devices: Vec<Option<LocalDevice>>,
    /// Numbers of the devices that have something to do, in the order in which they have their turn.
    turns: VecDeque<u16>,
    generation: Rc<Cell<u32>>,
    poller: Poller,
    /// Queues that have nothing to do need not ask for a kick.
    polls: Rc<Cell<bool>>,
    /// Numbers of the devices that have such queues.
    watched: Vec<u16>,
}

impl EventLoop {
    /// Watches the event that announces messages.
    pub(super) fn new(mut uring: Ring, wake: Arc<OwnedFd>, poll: Duration) -> Result<Self> {
        watch(&mut uring, &wake)?;
        Ok(Self {
            uring: Rc::new(RefCell::new(uring)),
            wake,
            woken: false,
            devices: Vec::new(),
            turns: VecDeque::new(),
            generation: Rc::default(),
            poller: Poller::new(poll),
            polls: Rc::default(),
            watched: Vec::new(),
        })
    }

    pub(super) fn run(&mut self, messages: &Receiver<Message>) {
        loop {
            if !self.receive_messages(messages) {
                return;
            }
            self.take_turns();
            if let Err(error) = self.wait() {
                // Nothing can be local without the ring: stop rather than spin. Clients get EIO from now on.
                tracing::error!("io_uring failed, the devices of a worker stop: {error}");
                return;
            }
        }
    }

    /// Starts what is to be started, and waits until there is something to do.
    fn wait(&mut self) -> Result<()> {
        if self.is_idle() && !self.watched.is_empty() {
            self.enter(false)?;
            if self.is_idle() {
                self.poll()?;
            }
            if self.is_idle() {
                self.ask_for_kicks();
            }
        }
        self.polls.set(self.poller.wants());
        let idle = self.is_idle();
        let begin = (idle && !self.poller.budget().is_zero()).then(Instant::now);
        self.enter(idle)?;
        if let Some(begin) = begin {
            self.poller.slept(begin.elapsed());
        }
        Ok(())
    }

    /// Whether there is nothing to do, as far as is known.
    fn is_idle(&self) -> bool {
        self.turns.is_empty() && !self.woken
    }

    /// Visits the kernel, and hands out what has completed.
    fn enter(&mut self, wait: bool) -> Result<()> {
        self.uring.borrow_mut().submit_and_wait(wait.into(), None)?;
        self.reap();
        Ok(())
    }

    /// Looks for something to do until there is something, or it does not pay any more.
    fn poll(&mut self) -> Result<()> {
        let begin = Instant::now();
        let mut last = begin;
        loop {
            if self.uring.borrow_mut().has_completions() {
                self.enter(false)?;
            }
            let found = self.look() || !self.is_idle();
            let now = Instant::now();
            let stolen = now - last > STOLEN;
            if found && !stolen {
                self.poller.hit(now - begin);
                return Ok(());
            }
            if found || stolen || now - begin >= self.poller.budget() {
                self.poller.lose(now - begin);
                return Ok(());
            }
            last = now;
            std::hint::spin_loop();
        }
    }

    /// Looks at the rings for which no kick is asked; whether one of them has requests.
    fn look(&mut self) -> bool {
        let watched = std::mem::take(&mut self.watched);
        let mut found = false;
        for &device in &watched {
            if self.device(device).is_some_and(|local| local.look(false)) {
                self.list(device);
                found = true;
            }
        }
        self.watched = watched;
        found
    }

    /// Asks for kicks again, on all rings for which none were asked.
    fn ask_for_kicks(&mut self) {
        for device in std::mem::take(&mut self.watched) {
            let Some(local) = self.device(device) else { continue };
            local.watched = false;
            if local.look(true) {
                self.list(device);
            }
        }
    }

    /// Takes the messages that have arrived; `false` when it is time to go.
    fn receive_messages(&mut self, messages: &Receiver<Message>) -> bool {
        self.woken = false;
        loop {
            match messages.try_recv() {
                Ok(Message::Add(registration)) => self.add(registration),
                Ok(Message::Command(device, command)) => {
                    if let Some(local) = self.device(device) {
                        local.run_command(command);
                        self.list(device);
                    }
                }
                Ok(Message::Exit) | Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn add(&mut self, registration: Registration) {
        let Registration { name, size, handler, shared, reply } = registration;
        let place = self.devices.iter().position(Option::is_none).unwrap_or(self.devices.len());
        let Ok(device) = u16::try_from(place) else {
            let _ = reply.send(Err(Errno::NOSPC));
            return;
        };
        if place == self.devices.len() {
            self.devices.push(None);
        }
        let uring = Rc::clone(&self.uring);
        let queues = Queues::new(
            name,
            device,
            uring,
            Rc::clone(&self.generation),
            Rc::clone(&self.polls),
            size,
            shared,
        );
        // Nobody would ever remove a device of which nobody has heard.
        if reply.send(Ok(device)).is_ok()
            && let Some(place) = self.devices.get_mut(place)
        {
            *place = Some(LocalDevice::new(queues, handler));
        }
    }

    fn device(&mut self, device: u16) -> Option<&mut LocalDevice> {
        self.devices.get_mut(usize::from(device)).and_then(Option::as_mut)
    }

    /// Gives a device a turn, once.
    fn list(&mut self, device: u16) {
        if let Some(local) = self.device(device)
            && !std::mem::replace(&mut local.listed, true)
        {
            self.turns.push_back(device);
        }
    }

    /// One turn for each device that waits for one. Those that want more have it after what the kernel has to say.
    fn take_turns(&mut self) {
        // However busy others are.
        self.look();
        for _ in 0..self.turns.len() {
            let Some(device) = self.turns.pop_front() else { return };
            let Some(local) = self.device(device) else { continue };
            local.listed = false;
            let more = local.turn();
            if local.is_gone() {
                let gone = self.devices.get_mut(usize::from(device)).and_then(Option::take);
                gone.into_iter().for_each(LocalDevice::leave);
                continue;
            }
            if local.is_polled() && !std::mem::replace(&mut local.watched, true) {
                self.watched.push(device);
            }
            if more {
                self.list(device);
            }
        }
    }

    /// Hands out the completions that have arrived.
    fn reap(&mut self) {
        loop {
            let completion = self.uring.borrow_mut().next_completion();
            let Some(completion) = completion else { return };
            self.complete(completion);
        }
    }

    fn complete(&mut self, completion: Completion) {
        let Completion { token, result, more, buffer } = completion;
        let device = match Token::unpack(token) {
            Some(Token::Wake) => {
                self.woken = true;
                if !more && let Err(error) = watch(&mut self.uring.borrow_mut(), &self.wake) {
                    tracing::error!("commands are not seen any more: {error}");
                }
                return;
            }
            Some(Token::Kick { device, queue, generation }) => {
                if let Some(local) = self.device(device) {
                    local.kicked(queue, generation, more);
                }
                device
            }
            Some(Token::Io { device, slot }) => {
                if let Some(local) = self.device(device) {
                    local.complete(slot, result, buffer);
                }
                device
            }
            None => {
                tracing::error!(token, "unknown completion");
                return;
            }
        };
        self.list(device);
    }
}

/// Watches the event that announces messages.
fn watch(uring: &mut Ring, wake: &Arc<OwnedFd>) -> Result<()> {
    let poll = Op::PollMultishot { fd: Arc::clone(wake) };
    uring.submit(poll, Token::Wake.pack()).map_err(|error| error.errno())
}
