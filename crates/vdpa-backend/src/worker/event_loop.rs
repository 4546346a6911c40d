//! [`EventLoop`]: the loop of a worker thread. It receives messages, services the devices that are ready, submits their
//! operations to io_uring, and dispatches completions.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::types::Result;
use vdpa_holder::progress;
use vdpa_sys::uring::{Completion, Op, Ring};

use super::device::LocalDevice;
use super::poll::{PREEMPTED_AFTER, Poller};
use super::queues::{Queues, Thread, Token, to_u16};
use super::{Buffers, Command, QueueHandler, Reply, Shared, Size};

/// How long the requests of another process may be in flight when it has handed the ring over: there are none.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(1);

/// A message to a worker thread.
pub(super) enum Message {
    /// Adds a device.
    Add(Registration),
    /// A command for the device with this number. It is dropped when that device was removed, which closes its reply channel.
    Command(u16, Command),
    /// Stops the devices: answered when nothing of this process uses rings, logs and client memory any more. From then on the
    /// thread blocks until the next message.
    Park(Reply<Result<()>>),
    /// Goes on, after a [`Park`](Self::Park) that may not have been answered; or begins to use the ring of another process.
    Unpark(Reply<Result<()>>),
    /// Ends the thread.
    Exit,
}

/// A request to add a device to a thread, with all queues stopped.
pub(super) struct Registration {
    pub(super) name: String,
    pub(super) size: Size,
    pub(super) handler: Box<dyn QueueHandler>,
    pub(super) shared: Arc<Shared>,
    /// Receives the number that the thread gave to the device; `ENOSPC` when there is none left.
    pub(super) reply: Reply<Result<u16>>,
}

/// The state of a worker thread.
pub(super) struct EventLoop {
    uring: Rc<RefCell<Ring>>,
    /// The registered buffers of the ring.
    buffers: Arc<Buffers>,
    /// The eventfd that senders of messages write to.
    wake: Arc<OwnedFd>,
    /// `wake` was signalled: the channel may have messages.
    woken: bool,
    /// By device number; `None` for numbers that are free.
    devices: Vec<Option<LocalDevice>>,
    /// The ready queue: numbers of the devices that have work, in the order in which they are serviced.
    ready: VecDeque<u16>,
    thread: Thread,
    poller: Poller,
    /// Numbers of the devices that have queues with kicks disabled, whose rings are to be polled.
    busy_polled: Vec<u16>,
    /// A PARK message, answered when nothing is in flight any more.
    parking: Option<Reply<Result<()>>>,
}

impl EventLoop {
    /// Arms the poll of `wake`, which announces messages. `poll` is the busy-poll budget. With `parked` another process uses the
    /// ring, and nothing is done with it before [`Message::Unpark`].
    pub(super) fn new(
        mut uring: Ring,
        wake: Arc<OwnedFd>,
        poll: Duration,
        buffers: Arc<Buffers>,
        parked: bool,
    ) -> Result<Self> {
        if !parked {
            watch(&mut uring, &wake)?;
        }
        let uring = Rc::new(RefCell::new(uring));
        let thread = Thread {
            uring: Rc::clone(&uring),
            generation: Rc::default(),
            busy_poll: Rc::default(),
            parked: Rc::new(Cell::new(parked)),
        };
        Ok(Self {
            uring,
            buffers,
            wake,
            woken: false,
            devices: Vec::new(),
            ready: VecDeque::new(),
            thread,
            poller: Poller::new(poll),
            busy_polled: Vec::new(),
            parking: None,
        })
    }

    /// Runs until [`Message::Exit`], or until io_uring fails.
    pub(super) fn run(&mut self, messages: &Receiver<Message>) {
        let _watched = progress::watch();
        loop {
            if self.thread.parked.get() {
                if !self.run_parked(messages) {
                    return;
                }
                continue;
            }
            if !self.receive_messages(messages) {
                return;
            }
            self.run_ready_devices();
            if self.try_park() {
                continue;
            }
            if let Err(error) = self.wait() {
                // Without io_uring no device can be served: end rather than spin. Commands get EIO from now on.
                tracing::error!("io_uring failed, the devices of a worker stop: {error}");
                return;
            }
        }
    }

    /// Submits operations, and blocks until a device is ready or a message has arrived. Busy-polls before it blocks where
    /// that pays.
    fn wait(&mut self) -> Result<()> {
        if self.is_idle() && !self.busy_polled.is_empty() {
            self.submit_and_reap(false)?;
            if self.is_idle() {
                self.poll()?;
            }
            if self.is_idle() {
                self.enable_kicks();
            }
        }
        self.thread.busy_poll.set(self.poller.should_poll());
        let idle = self.is_idle();
        let begin = (idle && !self.poller.budget().is_zero()).then(Instant::now);
        self.submit_and_reap(idle)?;
        if let Some(begin) = begin {
            self.poller.record_sleep(begin.elapsed());
        }
        Ok(())
    }

    /// Whether no device is ready and no message is known to wait.
    fn is_idle(&self) -> bool {
        self.ready.is_empty() && !self.woken
    }

    /// Submits operations to the kernel, with `wait` blocks until there is a completion, and dispatches all completions.
    fn submit_and_reap(&mut self, wait: bool) -> Result<()> {
        reach(CrashPoint::SubmitBegun);
        // Only the wait: what is submitted must not block, whatever a disk does.
        if wait {
            progress::idle();
        }
        self.uring.borrow_mut().submit_and_wait(wait.into(), None)?;
        progress::busy();
        reach(CrashPoint::Submitted);
        self.reap();
        Ok(())
    }

    /// Busy-polls the completion queue and the rings until there is work or the budget is used up.
    fn poll(&mut self) -> Result<()> {
        let begin = Instant::now();
        let mut last = begin;
        loop {
            if self.uring.borrow_mut().has_completions() {
                self.submit_and_reap(false)?;
            }
            let found = self.check_polled_rings() || !self.is_idle();
            let now = Instant::now();
            let preempted = now - last > PREEMPTED_AFTER;
            if found && !preempted {
                self.poller.record_hit(now - begin);
                return Ok(());
            }
            if found || preempted || now - begin >= self.poller.budget() {
                self.poller.record_loss(now - begin);
                return Ok(());
            }
            last = now;
            std::hint::spin_loop();
        }
    }

    /// Checks the rings whose kicks are disabled and schedules their devices; whether one of them has requests.
    fn check_polled_rings(&mut self) -> bool {
        let busy_polled = std::mem::take(&mut self.busy_polled);
        let mut found = false;
        for &device in &busy_polled {
            if self.device(device).is_some_and(|local| local.check_polled_rings()) {
                self.schedule(device);
                found = true;
            }
        }
        self.busy_polled = busy_polled;
        found
    }

    /// Enables kicks on all rings whose kicks are disabled, and schedules devices that got requests meanwhile.
    fn enable_kicks(&mut self) {
        for device in std::mem::take(&mut self.busy_polled) {
            let Some(local) = self.device(device) else { continue };
            local.busy_polled = false;
            if local.enable_kicks() {
                self.schedule(device);
            }
        }
    }

    /// Processes the messages that have arrived; `false` when the thread is to end.
    fn receive_messages(&mut self, messages: &Receiver<Message>) -> bool {
        self.woken = false;
        loop {
            match messages.try_recv() {
                Ok(message) => {
                    if !self.receive(message) {
                        return false;
                    }
                }
                Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    /// Processes a message; `false` when the thread is to end.
    fn receive(&mut self, message: Message) -> bool {
        match message {
            Message::Add(registration) => self.add(registration),
            Message::Command(device, command) => {
                if let Some(local) = self.device(device) {
                    local.run_command(command);
                    self.schedule(device);
                }
            }
            Message::Park(reply) => {
                self.devices.iter_mut().flatten().for_each(LocalDevice::park);
                (0..self.devices.len()).map(to_u16).for_each(|device| self.schedule(device));
                self.parking = Some(reply);
            }
            Message::Unpark(reply) => {
                let _ = reply.send(self.unpark());
            }
            Message::Exit => return false,
        }
        true
    }

    /// Blocks until a message arrives and processes it, without the ring; `false` when the thread is to end.
    fn run_parked(&mut self, messages: &Receiver<Message>) -> bool {
        progress::idle();
        let message = messages.recv();
        progress::busy();
        if !message.is_ok_and(|message| self.receive(message)) {
            return false;
        }
        for place in 0..self.devices.len() {
            let Some(local) = self.devices.get_mut(place).and_then(Option::as_mut) else { continue };
            local.service_parked();
            if local.is_removed() {
                let removed = self.devices.get_mut(place).and_then(Option::take);
                removed.into_iter().for_each(LocalDevice::finish_removal);
            }
        }
        true
    }

    /// Parks the thread if that is asked for and nothing is in flight; whether it is parked.
    fn try_park(&mut self) -> bool {
        if self.parking.is_none() || !self.devices.iter().flatten().all(LocalDevice::is_at_rest) {
            return false;
        }
        // Nothing remains in the ring, which another process can go on with.
        let result = self.cancel_polls();
        self.buffers.hand_over();
        self.thread.parked.set(true);
        self.busy_polled.clear();
        self.devices.iter_mut().flatten().for_each(LocalDevice::hand_over);
        if let Some(reply) = self.parking.take() {
            let _ = reply.send(result);
        }
        true
    }

    /// Cancels the polls, which are all that is in flight, and waits for their ends.
    fn cancel_polls(&mut self) -> Result<()> {
        let mut uring = self.uring.borrow_mut();
        uring.cancel(|_| true).map_err(|error| error.errno())?;
        while uring.in_flight() > 0 {
            uring.submit_and_wait(1, None)?;
            // The rings of all queues are checked before the thread sleeps again, whoever has kicked.
            while uring.next_completion().is_some() {}
        }
        Ok(())
    }

    /// Goes on, or begins to serve what another process has served.
    fn unpark(&mut self) -> Result<()> {
        self.parking = None;
        let armed = !self.thread.parked.get();
        if !armed {
            let mut uring = self.uring.borrow_mut();
            if uring.is_settled() {
                self.buffers.go_on();
            } else {
                uring.settle(SETTLE_TIMEOUT).map_err(|error| {
                    tracing::error!("the ring of the other process cannot be taken over: {error}");
                    Errno::IO
                })?;
                self.buffers.take_over();
            }
            drop(uring);
            watch(&mut self.uring.borrow_mut(), &self.wake)?;
            self.thread.parked.set(false);
        }
        for device in (0..self.devices.len()).map(to_u16) {
            let Some(local) = self.device(device) else { continue };
            if let Err(errno) = local.unpark(armed) {
                tracing::error!(device = local.name(), %errno, "every request of the device fails");
                local.fail();
            }
            self.schedule(device);
        }
        Ok(())
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
        let queues = Queues::new(name, device, self.thread.clone(), size, shared);
        let parked = self.thread.parked.get() || self.parking.is_some();
        // A caller that does not get the number could never remove the device.
        if reply.send(Ok(device)).is_ok()
            && let Some(place) = self.devices.get_mut(place)
        {
            *place = Some(LocalDevice::new(queues, handler, parked));
        }
    }

    fn device(&mut self, device: u16) -> Option<&mut LocalDevice> {
        self.devices.get_mut(usize::from(device)).and_then(Option::as_mut)
    }

    /// Appends a device to the ready queue, unless it is in it.
    fn schedule(&mut self, device: u16) {
        if let Some(local) = self.device(device)
            && !std::mem::replace(&mut local.scheduled, true)
        {
            self.ready.push_back(device);
        }
    }

    /// Services each device of the ready queue once. A device that has more work is scheduled again, behind the completions
    /// that arrive meanwhile.
    fn run_ready_devices(&mut self) {
        // Rings with kicks disabled must be checked even when other devices keep the thread busy.
        self.check_polled_rings();
        for _ in 0..self.ready.len() {
            let Some(device) = self.ready.pop_front() else { return };
            let Some(local) = self.device(device) else { continue };
            local.scheduled = false;
            let more = local.service();
            if local.is_removed() {
                let removed = self.devices.get_mut(usize::from(device)).and_then(Option::take);
                removed.into_iter().for_each(LocalDevice::finish_removal);
                continue;
            }
            if local.is_busy_polled() && !std::mem::replace(&mut local.busy_polled, true) {
                self.busy_polled.push(device);
            }
            if more {
                self.schedule(device);
            }
        }
    }

    /// Dispatches the completions that have arrived.
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
                    tracing::error!("the thread receives no commands any more: {error}");
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
                reach(CrashPoint::CompletionTaken);
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
        self.schedule(device);
    }
}

/// Arms a multishot poll of the eventfd that announces messages.
fn watch(uring: &mut Ring, wake: &Arc<OwnedFd>) -> Result<()> {
    let poll = Op::PollMultishot { fd: Arc::clone(wake) };
    uring.submit(poll, Token::Wake.pack()).map_err(|error| error.errno())
}
