//! The thread that answers the kernel.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use vdpa_core::Errno;
use vdpa_core::features::{Features, Status};
use vdpa_core::types::{Asid, GroupIndex, QueueIndex, Result, VringAddr};
use vdpa_core::vq::QueueState;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::process::ThisProcess;
use vdpa_sys::uapi::vduse::{DevRequest, DevResponse, VqInfo, request};
use vdpa_sys::vduse::{Interrupt, VduseDevice};

use super::shape::Shape;
use super::state::KeptState;
use super::{Locked, memory};
use crate::front::vhost::SharedDevice;

/// `result` of an answer.
const FAILED: u32 = 1;

/// What the thread knows.
#[derive(Debug)]
pub(super) struct Server {
    name: String,
    vduse: Arc<VduseDevice>,
    version: u64,
    device: SharedDevice,
    caller: ThisProcess,
    state: KeptState,
    /// Signalled when the configuration changes.
    config: EventFd,
    queues: Vec<Queue>,
    shape: Shape,
    /// The device runs, and queues wait for the first kick: the kernel's driver has no buffers mapped yet.
    waiting: bool,
}

#[derive(Debug)]
struct Queue {
    kick: EventFd,
    /// By a message, which is newer than what the kernel says of the queue.
    ready: Option<bool>,
    /// The device serves it.
    enabled: bool,
}

impl Server {
    pub(super) fn new(
        name: &str,
        vduse: VduseDevice,
        version: u64,
        device: &SharedDevice,
        shape: Shape,
        state: KeptState,
    ) -> Result<Self> {
        let queue = |_| Ok(Queue { kick: EventFd::new()?, ready: None, enabled: false });
        Ok(Self {
            name: name.into(),
            vduse: Arc::new(vduse),
            version,
            device: Arc::clone(device),
            caller: ThisProcess::default(),
            state,
            config: EventFd::new()?,
            queues: (0..shape.queues).map(queue).collect::<Result<_>>()?,
            shape,
            waiting: false,
        })
    }

    /// Becomes the device's client. A device that a driver has is brought to where it was; its queues go on from their logs.
    pub(super) fn take_up(&mut self, fresh: bool) -> Result<()> {
        let shared = Arc::clone(&self.device);
        let mut device = shared.lock();
        if fresh {
            device.open_unreset()?;
        }
        if device.owner().is_none() {
            device.set_owner(&self.caller)?;
        }
        device.set_config_call(Some(self.config.clone()));
        let status = self.state.status();
        if status == Status::RESET {
            return Ok(());
        }
        if fresh {
            self.set_asids(&mut device);
            if status.contains(Status::FEATURES_OK) {
                self.negotiate(&mut device)?;
            }
        }
        if !status.contains(Status::DRIVER_OK) {
            return if fresh { device.set_status(status) } else { Ok(()) };
        }
        if fresh {
            self.set_rings(&mut device)?;
        } else {
            self.set_events(&mut device)?;
        }
        self.start(&mut device, status);
        if self.state.is_suspended() { device.suspend() } else { Ok(()) }
    }

    /// Answers until `end` is signalled, or until the device is broken. The open file is closed then.
    pub(super) fn run(mut self, end: &EventFd) {
        loop {
            let kicks = self.queues.iter().filter(|queue| !queue.enabled);
            let mut fds = vec![
                PollFd::new(&*self.vduse, PollFlags::IN),
                PollFd::from_borrowed_fd(end.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.config.as_fd(), PollFlags::IN),
            ];
            fds.extend(kicks.map(|queue| PollFd::from_borrowed_fd(queue.kick.as_fd(), PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => {
                    tracing::error!(device = %self.name, "the kernel's messages are not answered any more: poll: {errno}");
                    return;
                }
            }
            let events: Vec<_> = fds.iter().map(PollFd::revents).collect();
            let [messages, ended, config, kicks @ ..] = &*events else { return };
            if !ended.is_empty() {
                return;
            }
            if messages.contains(PollFlags::ERR) {
                tracing::error!(device = %self.name, "the kernel has given the device up: a message was not answered in time");
                return;
            }
            let (message, config) = (!messages.is_empty(), !config.is_empty());
            let kicked = kicks.iter().any(|events| !events.is_empty());
            if message && let Ok(request) = self.vduse.read() {
                self.handle(&request);
            }
            if config {
                self.change_config();
            }
            if kicked {
                self.kicked();
            }
        }
    }

    /// Answers one message.
    fn handle(&mut self, request: &DevRequest) {
        let mut answer = request.done();
        let shared = Arc::clone(&self.device);
        let mut device = shared.lock();
        let done = self.carry_out(&mut device, request, &mut answer);
        tracing::debug!(device = %self.name, kind = request.kind, id = request.request_id, ?done, "message of the kernel");
        if let Err(errno) = done {
            tracing::warn!(device = %self.name, kind = request.kind, "a message of the kernel is refused: {errno}");
            answer.result = FAILED;
        }
        if let Err(errno) = self.vduse.answer(&answer) {
            tracing::warn!(device = %self.name, kind = request.kind, "the kernel did not wait for an answer: {errno}");
        }
        if done.is_err() {
            return;
        }
        // What the kernel need not wait for, and what it must know the answer for.
        let [_, second, ..] = request.payload;
        match request.kind {
            request::SET_STATUS if device.status() != self.state.status() => {
                let status = self.state.status();
                self.start(&mut device, status);
            }
            request::UPDATE_IOTLB => self.read_memory_if_it_runs(&mut device),
            request::SET_VQ_READY if second != 0 => self.enable_ready(&mut device),
            _ => {}
        }
    }

    fn carry_out(
        &mut self,
        device: &mut Locked<'_>,
        request: &DevRequest,
        answer: &mut DevResponse,
    ) -> Result<()> {
        let [first, second, ..] = request.payload;
        match request.kind {
            request::GET_VQ_STATE => self.position(device, first, answer),
            request::SET_STATUS => self.set_status(device, Status(first.to_le_bytes()[0])),
            request::UPDATE_IOTLB => {
                let asid = if self.version == 0 { 0 } else { request.payload.get(4).copied().unwrap_or(0) };
                self.forget(device, asid)
            }
            request::SET_VQ_GROUP_ASID => {
                device.set_group_asid(&self.caller, GroupIndex(first), Asid(second))?;
                let group = usize::try_from(first).map_err(|_| Errno::INVAL)?;
                self.state.set_asid(group, u8::try_from(second).map_err(|_| Errno::INVAL)?);
                Ok(())
            }
            request::SET_VQ_READY => self.set_ready(device, first, second != 0),
            request::SUSPEND => {
                device.suspend()?;
                self.state.set_suspended();
                Ok(())
            }
            _ => Err(Errno::NOTTY),
        }
    }

    /// `GET_VQ_STATE`: split rings have the index, packed ones two positions with their wrap counters.
    fn position(&self, device: &mut Locked<'_>, index: u32, answer: &mut DevResponse) -> Result<()> {
        let features = device.negotiated_features().unwrap_or(Features::NONE);
        let base = device.vring_base(&self.caller, queue_index(index)?)?;
        let words: [u16; 4] = match QueueState::decode(base, features).ok_or(Errno::IO)? {
            QueueState::Split { avail_index } => [avail_index, 0, 0, 0],
            QueueState::Packed { last_avail_idx, last_avail_wrap, last_used_idx, last_used_wrap } => {
                [last_avail_wrap.into(), last_avail_idx, last_used_wrap.into(), last_used_idx]
            }
        };
        let [a, b, c, d] = words.map(u16::to_ne_bytes);
        let [to_index, first, second, ..] = &mut answer.payload;
        *to_index = index;
        *first = u32::from_ne_bytes([a[0], a[1], b[0], b[1]]);
        *second = u32::from_ne_bytes([c[0], c[1], d[0], d[1]]);
        Ok(())
    }

    /// `SET_STATUS`. A device that gets DRIVER_OK is set up, and is started when the kernel has the answer.
    fn set_status(&mut self, device: &mut Locked<'_>, status: Status) -> Result<()> {
        if status == Status::RESET {
            device.set_status(status)?;
            for asid in 0..self.shape.address_spaces {
                self.forget(device, asid)?;
            }
            self.set_asids(device);
            self.waiting = false;
            self.queues.iter_mut().for_each(|queue| (queue.ready, queue.enabled) = (None, false));
            self.state.set_status(status);
            return Ok(());
        }
        let before = self.state.status();
        if status.contains(Status::FEATURES_OK) && !before.contains(Status::FEATURES_OK) {
            self.negotiate(device)?;
        }
        if !status.contains(Status::DRIVER_OK) || before.contains(Status::DRIVER_OK) {
            device.set_status(status)?;
        } else {
            if device.negotiated_features().is_none() {
                self.negotiate(device)?;
            }
            self.set_rings(device)?;
        }
        self.state.set_status(status);
        Ok(())
    }

    /// Takes the features that the driver has accepted. One that has accepted none may have asked for none: it is a legacy driver, or a
    /// program that tries statuses, which the kernel lets it.
    fn negotiate(&self, device: &mut Locked<'_>) -> Result<()> {
        match self.vduse.driver_features()? {
            0 => Ok(()),
            features => device.set_features(Features(features)),
        }
    }

    /// `SET_VQ_READY`. One that is enabled is started when the kernel has the answer.
    fn set_ready(&mut self, device: &mut Locked<'_>, index: u32, ready: bool) -> Result<()> {
        let at = queue_index(index)?;
        let queue = self.queues.get_mut(usize::from(at.0)).ok_or(Errno::INVAL)?;
        queue.ready = Some(ready);
        if !ready && std::mem::take(&mut queue.enabled) {
            device.set_vring_enable(&self.caller, at, false)?;
        }
        Ok(())
    }

    /// The address spaces of the groups, which the kernel keeps over a reset.
    fn set_asids(&self, device: &mut Locked<'_>) {
        for (group, asid) in (0..self.shape.groups).zip(self.state.asids()) {
            if let Err(errno) = device.set_group_asid(&self.caller, GroupIndex(group), Asid(asid.into())) {
                tracing::error!(device = %self.name, group, asid, "the address space of a group is lost: {errno}");
            }
        }
    }

    fn queue(&self, index: u16) -> Result<VqInfo> {
        self.vduse.queue(index.into())
    }

    /// Tells the device the rings of the driver, and the kernel how the device hears of kicks. Before the device has DRIVER_OK.
    fn set_rings(&self, device: &mut Locked<'_>) -> Result<()> {
        let features = device.negotiated_features().unwrap_or(Features::NONE);
        for index in (0..).take(self.queues.len()) {
            let (info, at) = (self.queue(index)?, QueueIndex(index));
            if info.num == 0 {
                continue;
            }
            device.set_vring_num(&self.caller, at, info.num)?;
            let VqInfo { desc_addr: desc, driver_addr: avail, device_addr: used, .. } = info;
            device.set_vring_addr(&self.caller, at, &VringAddr { flags: 0, desc, used, avail, log: 0 })?;
            device.set_vring_base(&self.caller, at, base(info.state, features))?;
        }
        self.set_events(device)
    }

    /// Gives kernel and device the events of each other, which the kernel forgets in a reset.
    fn set_events(&self, device: &mut Locked<'_>) -> Result<()> {
        for (index, queue) in (0..).zip(&self.queues) {
            let at = QueueIndex(index);
            self.vduse.set_kick(index.into(), Some(queue.kick.as_fd()))?;
            device.set_vring_kick(&self.caller, at, Some(queue.kick.clone()))?;
            let interrupt = Interrupt::new(&self.vduse, index.into());
            device.set_vring_call(&self.caller, at, Some(EventFd::interrupt(interrupt)?))?;
        }
        Ok(())
    }

    /// Lets the device run. An error leaves it as a device that is not served, which the kernel cannot be told.
    fn start(&mut self, device: &mut Locked<'_>, status: Status) {
        self.waiting = self.read_memory(device);
        if let Err(errno) = device.set_status(status) {
            tracing::error!(device = %self.name, "the device does not start: {errno}");
            return;
        }
        self.enable_ready(device);
    }

    /// Starts the queues that the driver has enabled.
    fn enable_ready(&mut self, device: &mut Locked<'_>) {
        if self.waiting || !device.status().contains(Status::DRIVER_OK) {
            return;
        }
        for (index, queue) in (0_u16..).zip(&mut self.queues).filter(|(_, queue)| !queue.enabled) {
            let ready =
                queue.ready.map_or_else(|| self.vduse.queue(index.into()).map(|info| info.ready == 1), Ok);
            let enabled = ready.and_then(|ready| {
                queue.enabled = ready;
                if ready { device.set_vring_enable(&self.caller, QueueIndex(index), true) } else { Ok(()) }
            });
            if let Err(errno) = enabled {
                tracing::error!(device = %self.name, queue = index, "the queue is not started: {errno}");
            }
        }
    }

    /// A queue that is not served was kicked: the driver has mapped its buffers, or enabled the queue.
    fn kicked(&mut self) {
        let shared = Arc::clone(&self.device);
        let mut device = shared.lock();
        for queue in self.queues.iter().filter(|queue| !queue.enabled) {
            // The queue looks at its ring when it starts.
            let _ = queue.kick.drain();
        }
        if !device.status().contains(Status::DRIVER_OK) {
            return;
        }
        if self.waiting {
            self.waiting = self.read_memory(&mut device);
        }
        self.enable_ready(&mut device);
    }

    fn read_memory_if_it_runs(&mut self, device: &mut Locked<'_>) {
        if device.status().contains(Status::DRIVER_OK) {
            self.waiting = self.read_memory(device);
            self.enable_ready(device);
        }
    }

    /// Reads all tables. Returns whether the buffers of the kernel's driver are missing.
    fn read_memory(&self, device: &mut Locked<'_>) -> bool {
        let mut without_buffers = false;
        for asid in 0..if self.version == 0 { 1 } else { self.shape.address_spaces } {
            let replaced = memory::read(&self.name, &self.vduse, self.version, asid).and_then(|memory| {
                without_buffers |= memory.without_buffers;
                let replaced = device.replace_mappings(&self.caller, Asid(asid), memory.mappings);
                replaced.map_err(|error| {
                    tracing::warn!(device = %self.name, asid, "the driver's memory is not mapped: {error}");
                    error.errno()
                })
            });
            if let Err(errno) = replaced {
                tracing::error!(device = %self.name, asid, "nothing is mapped: {errno}");
            }
        }
        without_buffers
    }

    fn forget(&self, device: &mut Locked<'_>, asid: u32) -> Result<()> {
        device.replace_mappings(&self.caller, Asid(asid), Vec::new()).map_err(|error| error.errno())
    }

    /// Tells the kernel the configuration space of the device, and its driver that it has changed.
    fn change_config(&self) {
        let _ = self.config.drain();
        let device = self.device.lock();
        let mut space = vec![0; device.profile().config_size as usize];
        let changed = device.peek_config(0, &mut space).and_then(|()| self.vduse.set_config(0, &space));
        let runs = device.status().contains(Status::DRIVER_OK) && !device.suspended();
        let told = changed.and_then(|()| if runs { self.vduse.config_interrupt() } else { Ok(()) });
        if let Err(errno) = told {
            tracing::warn!(device = %self.name, "the driver does not hear of a change: {errno}");
        }
    }
}

fn queue_index(index: u32) -> Result<QueueIndex> {
    u16::try_from(index).map(QueueIndex).map_err(|_| Errno::INVAL)
}

/// The position that a driver has set, as `VHOST_SET_VRING_BASE` has it.
fn base([first, second, third, fourth]: [u16; 4], features: Features) -> u32 {
    if !features.has(Features::RING_PACKED) {
        return first.into();
    }
    let (last_avail_wrap, last_used_wrap) = (first & 1 == 1, third & 1 == 1);
    let (last_avail_idx, last_used_idx) = (second & 0x7fff, fourth & 0x7fff);
    QueueState::Packed { last_avail_idx, last_avail_wrap, last_used_idx, last_used_wrap }.encode()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_of_both_kinds_of_rings_are_those_of_vhost() {
        assert_eq!(base([7, 1, 2, 3], Features::NONE), 7);
        let packed = Features::NONE.with(Features::RING_PACKED);
        assert_eq!(base([1, 5, 0, 6], packed), 5 | 1 << 15 | 6 << 16);
        assert_eq!(base([0, 0x8005, 1, 0x8006], packed), 5 | 6 << 16 | 1 << 31);
    }
}
