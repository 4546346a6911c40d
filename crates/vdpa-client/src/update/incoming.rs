//! Updates that come to this process by exec, fork or hand-over.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::{inherit, memfd};

use super::checkpoint::{Checkpoint, checkpoint};
use super::connection::{Kind, Message};
use super::load::DescriptorSource;
use super::loaded::at_load;
use super::predecessor::Predecessor;
use super::waiter::Waiter;
use super::{
    Cancel, Cause, Loaded, PID_VARIABLE, Phase, Restored, SOCKET_VARIABLE, STATE_VARIABLE, StateFileError,
    Strategy, TakingOver, UpdateError, reaper, steps,
};
use crate::device::DeviceFile;
use crate::memory::Memory;
use crate::state::{self, Section, Sections, v2};

/// An update that a predecessor offers. The devices still belong to the predecessor, and their memory is not mapped yet.
///
/// Read [`sections`](Self::sections) and [`late`](Self::late), name the sections that this program
/// [understands](Self::understands), then [`take_over`](Self::take_over). Dropping it refuses a fork or hand-over: the
/// predecessor keeps its devices.
#[derive(Debug)]
pub struct Incoming<D> {
    loaded: Loaded<D>,
    /// The predecessor, if it is another process and not the previous image of this one.
    predecessor: Option<Predecessor>,
    time_out: Option<Duration>,
    cancel: Option<Cancel>,
}

/// The update that started this program by exec or fork, if one did.
///
/// `None` for a first start: no variable is set, or the variables name another process. Call it once, early and before
/// other threads exist, since it adopts inherited descriptors by number. A second call after an exec fails: the
/// descriptors are adopted already. After an exec it does not block. After a fork it blocks until the predecessor has sent
/// its offer.
///
/// # Errors
/// [`UpdateError`] with the phase. After an exec the devices are closed, and the next open finds them reset. After a fork
/// the predecessor keeps them.
pub fn incoming<D: DeviceFile>() -> Result<Option<Incoming<D>>, UpdateError> {
    let entered = monotonic_ns();
    let at_load = |source| UpdateError { phase: Phase::Load, device: None, source };
    if let Some(socket) = inherited_socket().map_err(at_load)? {
        checkpoint(Checkpoint::Entered);
        return Incoming::receive(socket).map(Some);
    }
    let Some(value) = std::env::var_os(STATE_VARIABLE) else {
        return Ok(None);
    };
    if std::env::var_os(PID_VARIABLE).is_some_and(|pid| pid.to_str() != Some(&steps::own_pid().to_string())) {
        return Ok(None);
    }
    checkpoint(Checkpoint::Entered);
    reaper::adopt();
    let read = || -> Result<Sections, Cause> {
        let number = value
            .to_str()
            .and_then(|v| v.parse::<i32>().ok())
            .ok_or_else(|| StateFileError::NotANumber { value: value.to_string_lossy().into_owned() })?;
        let file = inherit::take(number).map_err(|source| StateFileError::NotInherited { number, source })?;
        Ok(state::decode(&read_state(number, &file)?)?)
    };
    Incoming::from_image(read().map_err(at_load)?, entered).map(Some)
}

/// [`incoming`](incoming()) and [`Incoming::take_over`] in one call, for a program that makes no checks of its own between
/// them.
///
/// The first completions may have arrived already: reap before waiting.
///
/// # Errors
/// Errors of [`incoming`](incoming()) and of [`Incoming::take_over`].
pub fn restore<D: DeviceFile>() -> Result<Option<Restored<D>>, UpdateError> {
    incoming()?.map(Incoming::take_over).transpose()
}

/// The socket that the predecessor passed to its child. The inode protects children of that child, which inherit the
/// variable: under the number they find another file, or none.
fn inherited_socket() -> Result<Option<UnixStream>, Cause> {
    let Some(value) = std::env::var_os(SOCKET_VARIABLE) else { return Ok(None) };
    let not_a_number = || StateFileError::NotANumber { value: value.to_string_lossy().into_owned() };
    let (number, inode) = value.to_str().and_then(|v| v.split_once(':')).ok_or_else(not_a_number)?;
    let (Ok(number), Ok(inode)) = (number.parse::<i32>(), inode.parse::<u64>()) else {
        return Err(not_a_number().into());
    };
    let Ok(fd) = inherit::take(number) else { return Ok(None) };
    Ok(fstat(&fd).is_ok_and(|stat| stat.st_ino == inode).then(|| fd.into()))
}

/// The bytes of a state file. Only a sealed memfd is accepted: nobody can change it any more.
fn read_state(number: i32, file: &OwnedFd) -> Result<Vec<u8>, StateFileError> {
    // Only memfds have seals.
    let seals = fcntl_get_seals(file).map_err(|_| StateFileError::NotMemfd { number })?;
    if !seals.contains(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW) {
        return Err(StateFileError::NotSealed { number });
    }
    let limit = usize::try_from(state::MAX_PAYLOAD).unwrap_or(usize::MAX).saturating_add(state::HEADER_LEN);
    memfd::read_all(file, limit).map_err(|e| StateFileError::Unreadable { number, reason: e.to_string() })
}

impl<D: DeviceFile> Incoming<D> {
    /// Waits for the offer of the predecessor at the other end of `socket`. Blocks, without a limit, until the predecessor prepares
    /// an update by [`Via::HandOver`](super::Via::HandOver) or closes the connection. [`Receiving`] has a limit, and does not block.
    ///
    /// # Errors
    /// [`UpdateError`]; the predecessor receives the reason and keeps its devices.
    pub fn receive(socket: UnixStream) -> Result<Self, UpdateError> {
        Receiving::new(socket)?.receive()
    }

    /// As [`receive`](Self::receive), but also accepts a predecessor that runs as the user `allowed`, besides root and the
    /// user of this process.
    ///
    /// # Errors
    /// As [`receive`](Self::receive); [`ConnectionError::ForbiddenUser`](super::ConnectionError::ForbiddenUser).
    pub fn receive_from(socket: UnixStream, allowed: Option<u32>) -> Result<Self, UpdateError> {
        Receiving::from_user(socket, allowed, None, None)?.receive()
    }

    fn from_offer(mut predecessor: Predecessor, offer: Message) -> Result<Self, UpdateError> {
        let entered = monotonic_ns();
        checkpoint(Checkpoint::Received);
        let fds = offer.fds.into_iter().map(Some).collect();
        let read = || -> Result<_, Cause> {
            let mut sections = state::decode(&offer.payload)?;
            let known = v2::Prepared::take(&mut sections)?;
            sections.end_of_own()?;
            Ok((known, sections))
        };
        let loaded = read().map_err(at_load).and_then(|(known, sections)| {
            let source = DescriptorSource::Received(fds);
            Loaded::new(known, None, sections, source, &v2::Files::default(), entered)
        });
        match loaded {
            Ok(loaded) => Ok(Self { loaded, predecessor: Some(predecessor), time_out: None, cancel: None }),
            Err(error) => {
                predecessor.reject(Kind::Refused, &error);
                Err(error)
            }
        }
    }

    /// The update that the previous image of this process left in `sections`. `entered` is the time at which this image
    /// entered [`incoming`], on `CLOCK_MONOTONIC` in ns.
    fn from_image(mut sections: Sections, entered: u64) -> Result<Self, UpdateError> {
        checkpoint(Checkpoint::Received);
        let files = v2::Files::take(&mut sections).map_err(|e| at_load(e.into()))?;
        let (known, switch) = v2::take(&mut sections).map_err(|e| at_load(e.into()))?;
        check_process(&known.update).map_err(at_load)?;
        let source = DescriptorSource::Inherited;
        let loaded = Loaded::new(known, Some(switch), sections, source, &files, entered)?;
        Ok(Self { loaded, predecessor: None, time_out: None, cancel: None })
    }

    /// Takes the devices over. After an exec this is short. In a fork or hand-over it reports that this process is ready and
    /// then blocks until the predecessor switches: without a limit unless there is a [`time_out`](Self::time_out).
    ///
    /// # Errors
    /// [`UpdateError`]. In a fork or hand-over the predecessor keeps the devices; [`Cause::Aborted`] if it ended the update.
    /// After an exec the devices are closed.
    pub fn take_over(self) -> Result<Restored<D>, UpdateError> {
        if self.predecessor.is_none() {
            let restored = self.loaded.take_over()?;
            reaper::collect();
            return Ok(restored);
        }
        let mut taking = self.begin_take_over()?;
        loop {
            if let Some(restored) = taking.step()? {
                return Ok(restored);
            }
            taking.wait()?;
        }
    }

    /// As [`take_over`](Self::take_over), for a program with an event loop: maps the memory, reports that this process is ready,
    /// and does not wait.
    ///
    /// # Errors
    /// [`UpdateError`]; the predecessor keeps the devices. [`Cause::Refused`] after an exec, which has nothing to wait for.
    pub fn begin_take_over(self) -> Result<TakingOver<D>, UpdateError> {
        let Self { loaded, predecessor, time_out, cancel } = self;
        let nobody = || Cause::Refused { reason: "after an exec there is nobody to wait for".to_owned() };
        let mut predecessor = predecessor.ok_or_else(nobody).map_err(at_load)?;
        match predecessor.waiter(time_out, cancel) {
            Ok(waiter) => TakingOver::new(loaded, predecessor, waiter),
            Err(e) => {
                let error = at_load(e.into());
                predecessor.reject(Kind::Refused, &error);
                Err(error)
            }
        }
    }
}

fn check_process(update: &v2::Update) -> Result<(), Cause> {
    let pid = steps::own_pid();
    if update.predecessor == pid {
        return Ok(());
    }
    let reason = format!("process {} saved it for itself; this is process {pid}", update.predecessor);
    Err(Cause::Invalid { what: "state".to_owned(), reason })
}

impl<D> Incoming<D> {
    /// Limits how long [`take_over`](Self::take_over) waits for the predecessor. When the time is over, the update is refused.
    #[must_use]
    pub fn time_out(self, time_out: Duration) -> Self {
        Self { time_out: Some(time_out), ..self }
    }

    /// Lets another thread cancel the wait of [`take_over`](Self::take_over).
    #[must_use]
    pub fn cancel(self, cancel: &Cancel) -> Self {
        Self { cancel: Some(cancel.clone()), ..self }
    }

    /// Process id of the predecessor; the same process after an exec.
    #[must_use]
    pub const fn predecessor(&self) -> i32 {
        self.loaded.predecessor()
    }

    /// Whether the predecessor is another process, which decides when to switch: [`begin_take_over`](Self::begin_take_over) is
    /// possible then. Not so after an exec.
    #[must_use]
    pub const fn waits(&self) -> bool {
        self.predecessor.is_some()
    }

    /// The caller's sections that have arrived: those known before the switch, and after an exec also the late ones.
    pub const fn sections(&mut self) -> &mut Sections {
        self.loaded.sections()
    }

    /// The sections announced by [`Plan::late_section`](super::Plan::late_section), with empty payloads.
    #[must_use]
    pub fn late(&self) -> Vec<Section> {
        self.loaded.late()
    }

    /// The caller's descriptors, by name. One that is removed here can be used before the devices are taken over, and is
    /// missing from [`Restored::descriptors`].
    pub const fn descriptors(&mut self) -> &mut BTreeMap<String, OwnedFd> {
        self.loaded.descriptors()
    }

    /// The memory of all devices. It is not mapped yet: a program that maps memory itself [brings](Memory::bring) its mappings
    /// before [`take_over`](Self::take_over), which maps the rest.
    pub fn memories(&self) -> impl Iterator<Item = &Arc<Memory>> {
        self.loaded.memories()
    }

    /// Names and strategies of the devices.
    pub fn devices(&self) -> impl Iterator<Item = (&str, Strategy)> {
        self.loaded.devices()
    }

    /// The guest memory of a device; see [`Loaded::guest_memory`].
    ///
    /// # Errors
    /// As [`Loaded::guest_memory`].
    #[cfg(feature = "vm-memory")]
    pub fn guest_memory(&self, device: &str) -> Result<vm_memory::GuestMemoryMmap, UpdateError> {
        self.loaded.guest_memory(device)
    }

    /// Checks that this program understands every section that is not optional. `known` has the names and the versions that
    /// it can read. Otherwise refuses the update now, while the predecessor has the devices.
    ///
    /// # Errors
    /// [`UpdateError`] with the name of the section; the predecessor receives it and keeps its devices.
    pub fn understands(self, known: &[(&str, RangeInclusive<u32>)]) -> Result<Self, UpdateError> {
        match self.loaded.check_sections(known) {
            Ok(()) => Ok(self),
            Err(error) => Err(self.refuse_with(error.into())),
        }
    }

    /// Refuses the update. The predecessor receives `reason`, and keeps its devices.
    #[must_use = "this is what the predecessor receives"]
    pub fn refuse(self, reason: &str) -> UpdateError {
        self.refuse_with(Cause::Refused { reason: reason.to_owned() })
    }

    fn refuse_with(self, source: Cause) -> UpdateError {
        let error = at_load(source);
        let Self { loaded, predecessor, .. } = self;
        drop(loaded);
        if let Some(mut predecessor) = predecessor {
            predecessor.reject(Kind::Refused, &error);
        }
        error
    }
}

/// A successor that waits for an offer, for a program with an event loop: when [the descriptor](Self::as_fd) is readable,
/// [`step`](Self::step) goes on.
///
/// Dropping it refuses the update.
#[derive(Debug)]
pub struct Receiving {
    /// `None` after the last step.
    predecessor: Option<Predecessor>,
    waiter: Waiter,
}

impl Receiving {
    /// Waits at `socket`, for any time.
    ///
    /// # Errors
    /// [`UpdateError`] when `socket` is not a Unix stream socket, or its peer runs as another user.
    pub fn new(socket: UnixStream) -> Result<Self, UpdateError> {
        Self::from_user(socket, None, None, None)
    }

    /// As [`new`](Self::new). Also accepts a predecessor that runs as the user `allowed`; waits for `time_out` at most; `cancel` ends
    /// the wait.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_user(
        socket: UnixStream,
        allowed: Option<u32>,
        time_out: Option<Duration>,
        cancel: Option<&Cancel>,
    ) -> Result<Self, UpdateError> {
        let at = |source| UpdateError { phase: Phase::Prepare, device: None, source };
        let predecessor = Predecessor::new(socket, allowed).map_err(at)?;
        let waiter = predecessor.waiter(time_out, cancel.cloned()).map_err(|e| at(e.into()))?;
        Ok(Self { predecessor: Some(predecessor), waiter })
    }

    /// Returns the update once its offer is there. Does not wait. Not to be called after that.
    ///
    /// # Errors
    /// As [`Incoming::receive`]; [`ConnectionError::TimedOut`](super::ConnectionError::TimedOut) and
    /// [`ConnectionError::Cancelled`](super::ConnectionError::Cancelled).
    pub fn step<D: DeviceFile>(&mut self) -> Result<Option<Incoming<D>>, UpdateError> {
        let at = |source| UpdateError { phase: Phase::Prepare, device: None, source };
        let over = || at(Cause::Refused { reason: "its last step was made before".to_owned() });
        let predecessor = self.predecessor.as_mut().ok_or_else(over)?;
        let Some(offer) = predecessor.receive(Kind::Offer, &self.waiter).map_err(at)? else {
            return Ok(None);
        };
        let predecessor = self.predecessor.take().ok_or_else(over)?;
        Incoming::from_offer(predecessor, offer).map(Some)
    }

    /// Blocks until the offer is there.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn receive<D: DeviceFile>(mut self) -> Result<Incoming<D>, UpdateError> {
        loop {
            if let Some(incoming) = self.step()? {
                return Ok(incoming);
            }
            let wait = self.waiter.wait();
            wait.map_err(|e| UpdateError { phase: Phase::Prepare, device: None, source: e.into() })?;
        }
    }
}

impl AsFd for Receiving {
    /// Readable when a step is worth while.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.waiter.as_fd()
    }
}

impl AsRawFd for Receiving {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

#[cfg(test)]
#[path = "incoming_tests.rs"]
mod tests;
