//! Vring requests, and starting and stopping queues.

mod info;
mod log;
mod moving;
mod rules;

use crate::device::state::{Ring, StateSink, VringState};
use crate::device::{Device, EventOf};
use crate::errno::Errno;
use crate::faults::{self, Fault};
use crate::features::{Features, Status};
use crate::host::{Caller, Host};
use crate::parent::{Parent, Upstream};
use crate::types::{GroupIndex, QueueIndex, Result, VringAddr};
use crate::vq::{QueueSetup, QueueState};

pub use info::VringInfo;
pub(super) use rules::check_addr;
use rules::default_base;

/// The state of one queue. The first fields are vhost's copy and survive a reset; the last ones are the parent's and do not
/// (uapi-spec 4.5).
#[derive(Debug)]
pub(super) struct Vring<H: Host> {
    kick: Option<H::Event>,
    call: Option<H::Event>,
    err: Option<H::Event>,
    busyloop_timeout: u32,
    /// The ring size survives a reset in the kernel's simulator; no request could show it for other parents.
    num: u16,

    addr: Option<VringAddr>,
    state: Option<QueueState>,
    /// The call event was installed since the last reset.
    call_installed: bool,
    ready: bool,
    running: bool,
    /// It was stopped to give the device away, and runs again afterwards.
    resumes: bool,
    /// The ring with which it was started last. A client may have set another one since, for the next start.
    started: Option<Ring>,
}

impl<H: Host> Default for Vring<H> {
    fn default() -> Self {
        Self {
            kick: None,
            call: None,
            err: None,
            busyloop_timeout: 0,
            num: 0,
            addr: None,
            state: None,
            call_installed: false,
            ready: false,
            running: false,
            resumes: false,
            started: None,
        }
    }
}

impl<H: Host> Vring<H> {
    /// The event by which the client receives errors.
    pub(super) const fn err(&self) -> Option<&H::Event> {
        self.err.as_ref()
    }

    pub(super) fn reset(&mut self) {
        self.addr = None;
        self.state = None;
        self.call_installed = false;
        self.ready = false;
        self.resumes = false;
        self.started = None;
    }

    /// Clears the client's settings. A queue that could not be stopped stays marked as started, so that the reset of the next
    /// open stops it.
    pub(super) fn close(&mut self) {
        *self = Self { running: self.running, ..Self::default() };
    }

    pub(super) const fn resumes(&self) -> bool {
        self.resumes
    }

    pub(super) const fn set_resumes(&mut self, resumes: bool) {
        self.resumes = resumes;
    }

    /// Entries of the ring with which it goes on.
    pub(super) fn size(&self) -> u16 {
        self.started.map_or(self.num, |ring| ring.size)
    }

    /// Features with which it goes on; `set` are those of the next start.
    pub(super) fn features(&self, set: Features) -> Features {
        self.started.map_or(set, |ring| ring.features)
    }

    /// The ring of the next start by the client, if it is set up.
    fn ring(&self, features: Features) -> Option<Ring> {
        Some(Ring { size: self.num, addr: self.addr?, features })
    }

    /// Where the next start begins.
    pub(super) fn position(&self, features: Features) -> QueueState {
        self.state.unwrap_or_else(|| QueueState::initial(features))
    }

    pub(super) const fn set_state(&mut self, state: QueueState) {
        self.state = Some(state);
    }

    /// What is saved of queue `index`.
    pub(super) fn save(
        &self,
        index: QueueIndex,
        (group, features): (GroupIndex, Features),
        sink: &mut dyn StateSink<H>,
    ) -> Result<VringState> {
        let runs = self.running || self.resumes;
        let mut event = |event: &Option<H::Event>| event.as_ref().map(|event| sink.event(event)).transpose();
        Ok(VringState {
            index,
            group,
            num: self.num,
            addr: self.addr,
            state: self.state,
            busyloop_timeout: self.busyloop_timeout,
            enabled: self.ready,
            running: runs,
            started: self.started.filter(|ring| runs && Some(*ring) != self.ring(features)),
            call_installed: self.call_installed,
            kick: event(&self.kick)?,
            call: event(&self.call)?,
            err: event(&self.err)?,
        })
    }

    /// The queue that was saved, which was checked, stopped. It goes on with `ring`.
    pub(super) fn restore(saved: &VringState, events: [Option<H::Event>; 3], ring: Option<Ring>) -> Self {
        let [kick, call, err] = events;
        Self {
            kick,
            call,
            err,
            busyloop_timeout: saved.busyloop_timeout,
            num: saved.num,
            addr: saved.addr,
            state: saved.state,
            call_installed: saved.call_installed,
            ready: saved.enabled,
            running: false,
            resumes: ring.is_some(),
            started: ring,
        }
    }
}

impl<P: Parent> Device<P> {
    /// The checks at the beginning of every vring request: owner (`EPERM`), then index (`ENOBUFS`).
    fn vring(&mut self, caller: &dyn Caller<P::Host>, index: QueueIndex) -> Result<&mut Vring<P::Host>> {
        self.ownership.check(caller)?;
        self.touch(index);
        self.vrings.get_mut(usize::from(index.0)).ok_or(Errno::NOBUFS)
    }

    /// Whether ring addresses and bases must not change now: DRIVER_OK is set and the device is not suspended.
    fn live(&self) -> bool {
        self.status.contains(Status::DRIVER_OK) && !self.suspended
    }

    /// `VHOST_SET_VRING_NUM` (uapi-spec 1.6): legal in every state; takes effect at the next start.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EINVAL` unless a power of two from 1 to the maximum.
    pub fn set_vring_num(&mut self, caller: &dyn Caller<P::Host>, index: QueueIndex, num: u32) -> Result<()> {
        let max = self.num_max;
        self.vring(caller, index)?;
        let num = u16::try_from(num).map_err(|_| Errno::INVAL)?;
        if num > max || !num.is_power_of_two() && !faults::is(Fault::VringNumAny) {
            return Err(Errno::INVAL);
        }
        self.forward(|upstream| upstream.set_vring_num(index, num.into()))?;
        self.vring(caller, index)?.num = num;
        Ok(())
    }

    /// `VHOST_SET_VRING_ADDR` (uapi-spec 1.6). No mapping is required yet.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EOPNOTSUPP` for flags other than bit 0; `EINVAL` for alignment (avail 2, used and
    /// log 4 bytes), for a used ring that the log has no bits for, or while running. Of a device that offers vhost's log, flag and
    /// address of the log can be changed at any time: a queue that runs is stopped for a moment.
    pub fn set_vring_addr(
        &mut self,
        caller: &dyn Caller<P::Host>,
        index: QueueIndex,
        addr: &VringAddr,
    ) -> Result<()> {
        self.vring(caller, index)?;
        check_addr(addr)?;
        if self.set_ring_log(caller, index, addr)? {
            return Ok(());
        }
        let live = self.live();
        if live && !faults::is(Fault::VringAddrAnyTime) {
            return Err(Errno::INVAL);
        }
        self.forward(|upstream| upstream.set_vring_addr(index, addr))?;
        self.vring(caller, index)?.addr = Some(*addr);
        Ok(())
    }

    /// `VHOST_SET_VRING_BASE` (uapi-spec 1.6).
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EINVAL` for a split-ring index over 16 bits, or while running; `EIO` when the queue cannot be stopped.
    pub fn set_vring_base(
        &mut self,
        caller: &dyn Caller<P::Host>,
        index: QueueIndex,
        num: u32,
    ) -> Result<()> {
        let (live, features) = (self.live(), self.base_features);
        self.vring(caller, index)?;
        let state = QueueState::decode(num, features).ok_or(Errno::INVAL)?;
        if live {
            return Err(Errno::INVAL);
        }
        self.forward(|upstream| upstream.set_vring_base(index, num))?;
        // A queue of a suspended device runs after a SET_STATUS that has started it again (uapi-spec 8.7). It goes on from here, as
        // in the kernel's simulator, whose `set_vq_state` takes effect at once.
        self.change(index, |vring| vring.state = Some(state))
    }

    /// `VHOST_GET_VRING_BASE` (uapi-spec 1.6). A running queue is stopped and goes on, so that the value is exact. Blocks until its requests in flight are completed.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EIO` when the queue cannot be stopped.
    pub fn vring_base(&mut self, caller: &dyn Caller<P::Host>, index: QueueIndex) -> Result<u32> {
        let features = self.base_features;
        let running = self.vring(caller, index)?.running;
        if let Some(upstream) = self.parent.upstream() {
            return upstream.vring_base(index);
        }
        if running {
            self.stop(index)?;
        }
        let state = self.vring(caller, index)?.state.unwrap_or_else(|| default_base(features));
        if running {
            self.go_on(index);
        }
        Ok(state.encode())
    }

    /// `VHOST_VDPA_SET_VRING_ENABLE` (uapi-spec 1.6). Disabling blocks until requests in flight of the queue are
    /// completed. Enabling does not start a queue while the device is suspended.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EIO` when the queue cannot be stopped, and it stays enabled then.
    pub fn set_vring_enable(
        &mut self,
        caller: &dyn Caller<P::Host>,
        index: QueueIndex,
        enable: bool,
    ) -> Result<()> {
        self.vring(caller, index)?;
        self.forward(|upstream| upstream.set_vring_enable(index, enable))?;
        if !enable && !faults::is(Fault::DisableRunsOn) {
            self.stop(index)?;
        }
        self.vring(caller, index)?.ready = enable;
        if enable {
            self.paused &= !faults::is(Fault::EnableWhileSuspended);
            self.start(index);
        }
        Ok(())
    }

    /// `VHOST_SET_VRING_KICK`; `None` unbinds.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EIO` when a running queue cannot be stopped.
    pub fn set_vring_kick(
        &mut self,
        caller: &dyn Caller<P::Host>,
        index: QueueIndex,
        event: Option<EventOf<P>>,
    ) -> Result<()> {
        self.vring(caller, index)?;
        self.forward(|upstream| upstream.set_vring_kick(index, event.as_ref()))?;
        self.change(index, |vring| vring.kick = event)
    }

    /// `VHOST_SET_VRING_CALL`; `None` unbinds. Must be repeated after a reset.
    ///
    /// # Errors
    /// As [`set_vring_kick`](Self::set_vring_kick).
    pub fn set_vring_call(
        &mut self,
        caller: &dyn Caller<P::Host>,
        index: QueueIndex,
        event: Option<EventOf<P>>,
    ) -> Result<()> {
        self.vring(caller, index)?;
        self.forward(|upstream| upstream.set_vring_call(index, event.as_ref()))?;
        self.change(index, |vring| {
            vring.call_installed = event.is_some();
            vring.call = event;
        })
    }

    /// `VHOST_SET_VRING_ERR`: stored only.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`.
    pub fn set_vring_err(
        &mut self,
        caller: &dyn Caller<P::Host>,
        index: QueueIndex,
        event: Option<EventOf<P>>,
    ) -> Result<()> {
        self.vring(caller, index)?;
        self.forward(|upstream| upstream.set_vring_err(index, event.as_ref()))?;
        self.vring(caller, index)?.err = event;
        Ok(())
    }

    /// `VHOST_SET_VRING_BUSYLOOP_TIMEOUT`: stored only.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`.
    pub fn set_busyloop_timeout(
        &mut self,
        caller: &dyn Caller<P::Host>,
        index: QueueIndex,
        timeout: u32,
    ) -> Result<()> {
        self.vring(caller, index)?.busyloop_timeout = timeout;
        Ok(())
    }

    /// `VHOST_GET_VRING_BUSYLOOP_TIMEOUT`: what was stored.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`.
    pub fn busyloop_timeout(&mut self, caller: &dyn Caller<P::Host>, index: QueueIndex) -> Result<u32> {
        Ok(self.vring(caller, index)?.busyloop_timeout)
    }

    /// Passes a request to the [device behind](Parent::upstream), if there is one.
    fn forward(&mut self, request: impl FnOnce(Upstream<'_, P::Host>) -> Result<()>) -> Result<()> {
        self.parent.upstream().map_or(Ok(()), request)
    }

    /// Applies a change of a queue's events by a stop and a start, so that a parent receives events in `start_queue` only.
    fn change(&mut self, index: QueueIndex, apply: impl FnOnce(&mut Vring<P::Host>)) -> Result<()> {
        let was_running = self.stop(index)?;
        if let Some(vring) = self.vrings.get_mut(usize::from(index.0)) {
            apply(vring);
        }
        if was_running {
            self.go_on(index);
        }
        Ok(())
    }

    /// Starts every queue that is ready for it.
    pub(super) fn start_ready(&mut self) {
        for index in 0..self.profile().queues {
            self.start(QueueIndex(index));
        }
    }

    /// Starts a queue if the device runs and the queue is enabled and set up. Otherwise it does nothing, and a later transition
    /// tries again. Errors cannot be reported: the kernel's `set_vq_ready` and `set_status` return void.
    pub(super) fn start(&mut self, index: QueueIndex) {
        let features = self.features.unwrap_or(Features::NONE);
        if let Some(ring) = self.vrings.get(usize::from(index.0)).and_then(|vring| vring.ring(features)) {
            let _ = self.try_start(index, ring);
        }
    }

    /// Starts a queue that was stopped only for a moment: with what it ran with. What was set meanwhile takes effect when the
    /// client starts it.
    fn go_on(&mut self, index: QueueIndex) {
        let _ = self.try_go_on(index);
    }

    /// As [`go_on`](Self::go_on).
    ///
    /// # Errors
    /// What the parent reports.
    pub(super) fn try_go_on(&mut self, index: QueueIndex) -> Result<()> {
        let started = self.vrings.get(usize::from(index.0)).and_then(|vring| vring.started);
        started.map_or(Ok(()), |ring| self.try_start(index, ring))
    }

    fn try_start(&mut self, index: QueueIndex, ring: Ring) -> Result<()> {
        let early = faults::is(Fault::StartEarly);
        if !(self.status.contains(Status::DRIVER_OK) || early) || self.paused || self.quiesced {
            return Ok(());
        }
        let (asid, logs) = (self.asid_of(index), self.parent.profile().vhost_log);
        let Some(vring) = self.vrings.get_mut(usize::from(index.0)) else { return Ok(()) };
        let Ring { size, addr, features } = ring;
        if !vring.ready || vring.running || size == 0 {
            return Ok(());
        }
        let setup = QueueSetup {
            size,
            desc: addr.desc,
            avail: addr.avail,
            used: addr.used,
            asid,
            log_used: log::of(&addr, logs),
            features,
            kick: vring.kick.clone(),
            call: vring.call.clone().filter(|_| vring.call_installed),
        };
        let position = vring.position(features);
        let result = self.parent.start_queue(index, &setup, position);
        vring.running = result.is_ok();
        if vring.running {
            // A later SET_FEATURES must not change which kind of ring the saved position is of: the parent goes on with this.
            vring.state = Some(position);
            vring.started = Some(ring);
        }
        self.touch(index);
        result
    }

    /// Stops a queue and stores its position; returns whether it was running.
    pub(super) fn stop(&mut self, index: QueueIndex) -> Result<bool> {
        let Some(vring) = self.vrings.get_mut(usize::from(index.0)) else { return Ok(false) };
        if !vring.running {
            return Ok(false);
        }
        if let Some(state) = self.parent.stop_queue(index)? {
            vring.state = Some(state);
            if let (QueueState::Split { avail_index }, true) = (state, faults::is(Fault::BaseBehind)) {
                vring.state = Some(QueueState::Split { avail_index: avail_index.wrapping_sub(1) });
            }
        }
        vring.running = false;
        self.touch(index);
        Ok(true)
    }

    /// Stops all queues. After an error the remaining queues are stopped too; returns the error.
    pub(super) fn stop_all(&mut self) -> Result<()> {
        let mut result = Ok(());
        for index in 0..self.profile().queues {
            if let Err(error) = self.stop(QueueIndex(index)) {
                result = Err(error);
            }
        }
        result
    }
}
