//! The predecessor's side of an update, once the successor is ready: switch, roll back.

use std::process::Child;
use std::time::{Duration, Instant};

use vdpa_core::Errno;
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::mm_reaper::MmReaper;

use super::checkpoint::{Checkpoint, checkpoint};
use super::describe::Described;
use super::exec::ExecSwitch;
use super::stop::{Stopped, Successor as Other, report_roll_back};
use super::stopped::StoppedDevice;
use super::successor::{AbortOutcome, Successor};
use super::{Cause, Devices, Image, Phase, Report, Strategy, UpdateError, Way, steps};
use crate::device::DeviceFile;
use crate::state::Sections;

/// An update that is ready for the switch. Everything that can be done without stopping a device has been done; the devices
/// run and may be driven.
///
/// Dropping it aborts the update: the successor gets a message, and a child is killed after the grace period.
#[derive(Debug)]
pub struct Prepared {
    pub(super) described: Described,
    pub(super) to: Target,
    pub(super) prepare_ns: u64,
}

#[derive(Debug)]
pub(super) enum Target {
    /// The mm reaper frees the page tables of this image after the exec, so that the exec does not wait for that. Starting it
    /// takes longer than the rest of a switch, so prepare starts it. Without it the update is slower and otherwise the same.
    /// The sections are those that are known before the switch.
    Exec(Image, Option<MmReaper>, Sections),
    Process(Way, Successor),
}

/// A completed update by fork or hand-over, in the predecessor: the successor has the devices.
#[derive(Debug)]
#[non_exhaustive]
pub struct Completed {
    /// The times of the update.
    pub report: Report,
    /// The successor, if it is a child of this process. The caller waits for it.
    pub child: Option<Child>,
}

impl Completed {
    /// Gives the calling thread idle priority (SCHED_IDLE), for a predecessor that is about to end. Unmapping memory takes
    /// 10 ms and more per GiB. At normal priority that delays the successor and the servers of its devices on a machine with
    /// few CPUs. Memory of a session is unmapped when the last clone of its map is dropped: keep a clone until after this
    /// call, and none of it happens in the switch.
    ///
    /// # Errors
    /// None is known for a thread of this process.
    pub fn run_when_idle(&self) -> Result<(), Errno> {
        vdpa_sys::priority::run_when_idle(None)
    }
}

/// An update that failed in the switch.
#[derive(Debug)]
pub struct Failed<D> {
    /// The error because of which the update failed.
    pub error: UpdateError,
    /// The devices that were rolled back; they work as before.
    pub devices: Devices<D>,
    /// Devices that could not be rolled back, with the reasons. They are closed.
    pub lost: Vec<UpdateError>,
}

impl Prepared {
    /// The strategy that was chosen for a device; `None` for an unknown name.
    #[must_use]
    pub fn strategy(&self, device: &str) -> Option<Strategy> {
        self.described.chosen.iter().find(|c| c.name == device).map(|c| c.strategy)
    }

    /// How long describe and prepare took together.
    #[must_use]
    pub const fn took(&self) -> Duration {
        Duration::from_nanos(self.prepare_ns)
    }

    /// Process id of the successor; of this process for an exec.
    #[must_use]
    pub fn successor(&self) -> i32 {
        match &self.to {
            Target::Exec(..) => steps::own_pid(),
            Target::Process(_, successor) => successor.pid(),
        }
    }

    /// Transfers the devices to the successor. Nobody may drive them from here on. `late` are the sections that were
    /// announced by [`Plan::late_section`](super::Plan::late_section).
    ///
    /// An exec returns only if it failed. Otherwise, on success, the successor has the devices and all descriptors of them
    /// are closed in this process. Blocks until the plan's deadline; on failure also for the grace period and the roll-back.
    ///
    /// # Errors
    /// [`Failed`] with the devices, which run in this process as before, and with those that were lost.
    pub fn switch<D: DeviceFile>(
        self,
        devices: Devices<D>,
        late: Sections,
    ) -> Result<Completed, Box<Failed<D>>> {
        let begun_ns = monotonic_ns();
        let Self { described, mut to, prepare_ns } = self;
        let until = described.plan.deadline.and_then(|deadline| Instant::now().checked_add(deadline));
        checkpoint(Checkpoint::Switching);
        if let Target::Process(_, successor) = &mut to {
            if let Err(source) = successor.check_waiting() {
                let error = UpdateError { phase: Phase::Prepare, device: None, source };
                return Err(Box::new(Failed { error, devices, lost: Vec::new() }));
            }
            successor.announce_switch();
        }
        let stopped = Stopped::new(described, devices, late, begun_ns, prepare_ns)?;
        match to {
            Target::Exec(image, reaper, sections) => {
                let exec = ExecSwitch { image: &image, reaper: reaper.as_ref(), sections, until };
                let error = exec.run(&stopped);
                Err(stopped.give_back(error, Other::Untouched))
            }
            Target::Process(way, successor) => hand_over(successor, stopped, until, way),
        }
    }
}

/// Sends the devices' state to another process and commits.
fn hand_over<D: DeviceFile>(
    mut successor: Successor,
    stopped: Stopped<D>,
    until: Option<Instant>,
    way: Way,
) -> Result<Completed, Box<Failed<D>>> {
    let mut taken = None;
    let mut exchange = || -> Result<(), UpdateError> {
        let bytes = stopped.switch()?;
        // The last check of the deadline: an answer that has arrived counts, even if it is read late.
        if until.is_some_and(|until| Instant::now() >= until) {
            return Err(successor_error(Cause::Deadline));
        }
        successor.switch(&bytes, until).map_err(successor_error)?;
        taken = Some(monotonic_ns());
        checkpoint(Checkpoint::TakenReceived);
        // Up to the commit this process decides. A successor that has ended by then does not get the devices.
        successor.commit(until).map_err(successor_error)
    };
    if let Err(error) = exchange() {
        match successor.abort() {
            Ok(AbortOutcome::Released) => return Err(stopped.give_back(error, Other::MayHaveActed)),
            // The confirmation was sent before the abort arrived.
            Ok(AbortOutcome::Committed) => {}
            Err(unresponsive) => {
                let failed = lost(error, &unresponsive, &stopped.devices);
                return Err(report_roll_back(&stopped.described, failed));
            }
        }
    }
    let (begun_unix_ns, begun_ns) = (stopped.described.begun_unix_ns, stopped.switch.begun_ns);
    // Closes every descriptor of the devices, so this process cannot access them any more.
    stopped.release();
    checkpoint(Checkpoint::Released);
    let mut report = successor.take_report().unwrap_or_else(|| Report::new(way));
    let now = monotonic_ns();
    report.commit = taken.map_or(0, |taken| now.saturating_sub(taken));
    report.total = now.saturating_sub(begun_ns);
    report.begun_unix_ns = begun_unix_ns;
    report.way = way;
    Ok(Completed { report, child: successor.into_child() })
}

/// All devices as lost. The successor neither answers nor can be killed, and two processes must not drive a device.
fn lost<D: DeviceFile>(
    error: UpdateError,
    unresponsive: &Cause,
    stopped: &[StoppedDevice<D>],
) -> Box<Failed<D>> {
    let lost = |device: &StoppedDevice<D>| UpdateError {
        phase: Phase::Commit,
        device: Some(device.name.clone()),
        source: unresponsive.repeat(),
    };
    Box::new(Failed { error, devices: Devices::new(), lost: stopped.iter().map(lost).collect() })
}

/// Takes phase and device from the successor, if the successor failed.
fn successor_error(source: Cause) -> UpdateError {
    match &source {
        Cause::Successor { phase, device, .. } => {
            UpdateError { phase: *phase, device: device.clone(), source }
        }
        _ => UpdateError { phase: Phase::Transfer, device: None, source },
    }
}
