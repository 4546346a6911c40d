//! The predecessor's side of an update: describe, prepare, switch, roll back.

use std::collections::{HashMap, HashSet};
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use vdpa_core::Errno;
use vdpa_core::features::BackendFeatures;
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::mm_reaper::MmReaper;

use super::checkpoint::{Checkpoint, checkpoint};
use super::exec::ExecSwitch;
use super::stopped::StoppedDevice;
use super::successor::{AbortOutcome, Successor};
use super::{
    Cause, Devices, Image, Phase, Plan, Report, Strategy, UpdateError, Via, Way, identity, save, steps,
};
use crate::device::DeviceFile;
use crate::memory::Memory;
use crate::session::{Session, Setup};
use crate::state::{self, Sections, v2};

/// An update that is ready for the switch. Everything that can be done without stopping a device has been done; the devices
/// run and may be driven.
///
/// Dropping it aborts the update: the successor gets a message, and a child is killed after the grace period.
#[derive(Debug)]
pub struct Prepared {
    plan: Plan,
    to: Target,
    chosen: Vec<Chosen>,
    /// Sections of the library and the caller that are known before the switch.
    sections: Sections,
    begun_unix_ns: u64,
    prepare_ns: u64,
}

#[derive(Debug)]
enum Target {
    /// The mm reaper frees the page tables of this image after the exec, so that the exec does not wait for that. Starting it
    /// takes longer than the rest of a switch, so prepare starts it. Without it the update is slower and otherwise the same.
    Exec(Image, Option<MmReaper>),
    Process(Way, Successor),
}

impl Target {
    const fn way(&self) -> Way {
        match self {
            Self::Exec(..) => Way::Exec,
            Self::Process(way, _) => *way,
        }
    }
}

/// One device of a prepared update.
#[derive(Debug)]
struct Chosen {
    name: String,
    strategy: Strategy,
    generation: u64,
}

/// A completed update by fork or hand-over, in the predecessor: the successor has the devices.
#[derive(Debug)]
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

/// The description of the devices for the successor: everything that prepare needs.
///
/// It holds duplicates of all descriptors, so it can be moved to another thread while the devices are driven.
#[derive(Debug)]
pub struct Described {
    plan: Plan,
    chosen: Vec<Chosen>,
    known: v2::Prepared,
    table: save::Table,
    files: v2::Files,
    begun_unix_ns: u64,
    took_ns: u64,
}

impl Plan {
    /// Prepares an update of `devices`: [`describe`](Self::describe) and [`Described::prepare`] in one. For programs whose
    /// devices need no driver meanwhile, since it blocks until the successor is ready.
    ///
    /// # Errors
    /// [`UpdateError`]; nothing has changed.
    pub fn prepare<'a, D: DeviceFile + 'a>(
        self,
        devices: impl IntoIterator<Item = (&'a str, &'a Session<D>)>,
        via: Via,
    ) -> Result<Prepared, UpdateError> {
        self.describe(devices)?.prepare(via)
    }

    /// Checks strategies, memory and names, and describes `devices` for the successor. Does not block; takes some
    /// microseconds for each mapping. `devices` is a [`Devices`], or names with sessions that the caller keeps elsewhere;
    /// [`Prepared::switch`] is given the same ones in the same order.
    ///
    /// # Errors
    /// [`UpdateError`]; nothing has changed.
    pub fn describe<'a, D: DeviceFile + 'a>(
        self,
        devices: impl IntoIterator<Item = (&'a str, &'a Session<D>)>,
    ) -> Result<Described, UpdateError> {
        let devices: Vec<_> = devices.into_iter().collect();
        let begin = monotonic_ns();
        let begun_unix_ns = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_nanos();
        let begun_unix_ns = u64::try_from(begun_unix_ns).unwrap_or(u64::MAX);
        self.check(devices.iter().map(|(name, _)| *name).collect()).map_err(general)?;
        let strategies: HashMap<&str, Strategy> = self.strategies().collect();
        // Each memory is checked once, however many mappings use it.
        let mut verified = HashSet::new();
        let mut chosen = Vec::with_capacity(devices.len());
        for &(name, session) in &devices {
            let setup = session.parts().1;
            let wanted = strategies.get(name).copied().or(self.strategy);
            let strategy = check(setup, wanted, &mut verified).map_err(|source| of_device(name, source))?;
            chosen.push(Chosen { name: name.to_owned(), strategy, generation: setup.generation });
        }
        let strategies: Vec<Strategy> = chosen.iter().map(|c| c.strategy).collect();
        let (known, table) = save::prepared(&devices, &strategies, &self, begun_unix_ns).map_err(general)?;
        let files =
            v2::Files { files: devices.iter().map(|(_, session)| identity::describe(session)).collect() };
        let took_ns = monotonic_ns().saturating_sub(begin);
        Ok(Described { plan: self, chosen, known, table, files, begun_unix_ns, took_ns })
    }
}

fn general(source: Cause) -> UpdateError {
    UpdateError { phase: Phase::Prepare, device: None, source }
}

fn of_device(name: &str, source: Cause) -> UpdateError {
    UpdateError { phase: Phase::Prepare, device: Some(name.to_owned()), source }
}

impl Described {
    /// Starts or contacts the successor and waits until it has mapped all memory and understands every section. Blocks
    /// without a limit, unless [cancelled](Plan::cancel). Meanwhile the devices may be driven, but regions, queues and
    /// features must stay as they are.
    ///
    /// # Errors
    /// [`UpdateError`]; nothing has changed.
    pub fn prepare(self, via: Via) -> Result<Prepared, UpdateError> {
        let begin = monotonic_ns();
        let (to, sections) = self.connect(via).map_err(general)?;
        checkpoint(Checkpoint::Ready);
        let Self { plan, chosen, begun_unix_ns, took_ns, .. } = self;
        let prepare_ns = monotonic_ns().saturating_sub(begin).saturating_add(took_ns);
        Ok(Prepared { plan, to, chosen, sections, begun_unix_ns, prepare_ns })
    }

    fn connect(&self, via: Via) -> Result<(Target, Sections), Cause> {
        let way = via.way();
        // Descriptors are indexes into the table, as another process receives them.
        let offer = || {
            let mut known = self.known.clone();
            way.name().clone_into(&mut known.update.way);
            let mut sections = self.plan.sections.clone();
            known.put(&mut sections)?;
            let bytes = state::encode(&sections)?;
            Ok::<_, Cause>((sections, bytes))
        };
        let (sections, bytes) = offer()?;
        if let Via::Exec(image) | Via::Fork(image) = &via {
            image.check()?;
        }
        checkpoint(Checkpoint::Checked);
        let (cancel, grace) = (self.plan.cancel.as_ref(), self.plan.grace);
        let fds = self.table.fds();
        let connected = |successor: Result<Successor, Cause>| {
            let mut successor = successor?;
            checkpoint(Checkpoint::Connected);
            successor.offer(&bytes, &fds, cancel)?;
            Ok::<_, Cause>(successor)
        };
        match via {
            Via::Exec(image) => {
                if self.plan.dry_run {
                    drop(connected(Successor::start(&image, grace))?);
                }
                image.prefetch();
                let mut known = self.known.clone();
                way.name().clone_into(&mut known.update.way);
                save::by_number(&mut known, &self.table);
                let mut sections = self.plan.sections.clone();
                known.put(&mut sections)?;
                self.files.put(&mut sections)?;
                Ok((Target::Exec(image, MmReaper::spawn().ok()), sections))
            }
            Via::Fork(image) => {
                Ok((Target::Process(way, connected(Successor::start(&image, grace))?), sections))
            }
            Via::HandOver(socket) => {
                let successor = Successor::connect(socket, self.plan.allowed_uid, grace);
                Ok((Target::Process(way, connected(successor)?), sections))
            }
        }
    }
}

/// Checks one device without a request to it, and chooses its strategy.
fn check(
    setup: &Setup,
    strategy: Option<Strategy>,
    verified: &mut HashSet<*const Memory>,
) -> Result<Strategy, Cause> {
    let strategy = strategy.unwrap_or_else(|| Strategy::pick(setup.offered));
    strategy.check(setup.offered)?;
    for region in setup.regions.list() {
        let named = |problem| Cause::Memory { name: region.name().to_owned(), problem };
        if verified.insert(Arc::as_ptr(region.memory())) {
            region.memory().verify().map_err(named)?;
        }
    }
    if strategy == Strategy::Reopen {
        if setup.path.is_none() {
            return Err(Cause::NoPath);
        }
        check_reopen(setup)?;
    }
    Ok(strategy)
}

/// A device that cannot be suspended must have no request in flight when it is closed.
fn check_reopen(setup: &Setup) -> Result<(), Cause> {
    if setup.backend.has(BackendFeatures::SUSPEND) {
        return Ok(());
    }
    if setup.running && !setup.guest_queues.is_empty() {
        return Err(Cause::GuestInFlight);
    }
    match setup.queues.iter().map(|q| usize::from(q.in_flight())).sum() {
        0 => Ok(()),
        in_flight => Err(Cause::InFlight { in_flight }),
    }
}

impl Prepared {
    /// The strategy that was chosen for a device; `None` for an unknown name.
    #[must_use]
    pub fn strategy(&self, device: &str) -> Option<Strategy> {
        self.chosen.iter().find(|c| c.name == device).map(|c| c.strategy)
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
    /// announced by [`Plan::late_section`].
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
        let until = self.plan.deadline.and_then(|deadline| Instant::now().checked_add(deadline));
        checkpoint(Checkpoint::Switching);
        if let Err(error) =
            self.unchanged(&devices).and_then(|()| self.plan.check_late(&late).map_err(general))
        {
            return Err(Box::new(Failed { error, devices, lost: Vec::new() }));
        }
        if let Target::Process(_, successor) = &self.to {
            successor.announce_switch();
        }
        let mut stopped: Vec<StoppedDevice<D>> = Vec::with_capacity(devices.len());
        let mut waiting = devices.into_iter().zip(&self.chosen);
        while let Some(((name, session), chosen)) = waiting.next() {
            match StoppedDevice::stop(name.clone(), session, chosen.strategy) {
                Ok(device) => stopped.push(device),
                Err(failed) => {
                    let (error, undone) = *failed;
                    let rest = waiting.map(|((name, session), _)| (name, Ok(session)));
                    let others = std::iter::once((name, undone)).chain(rest);
                    let failed = roll_back(error, stopped, StoppedDevice::undo, others);
                    return Err(report_roll_back(self.to.way(), self.begun_unix_ns, failed, &self.chosen));
                }
            }
        }
        let Self { plan, to, sections, begun_unix_ns, prepare_ns, chosen } = self;
        let save_begin = monotonic_ns();
        let mut switch = v2::Switch {
            begun_ns,
            saved_ns: 0,
            prepare_ns,
            save_ns: 0,
            devices: stopped.iter().map(StoppedDevice::saved).collect(),
        };
        switch.saved_ns = monotonic_ns();
        switch.save_ns = switch.saved_ns.saturating_sub(save_begin);
        checkpoint(Checkpoint::Saved);
        match to {
            Target::Exec(image, reaper) => {
                let reaper = reaper.as_ref();
                let exec = ExecSwitch { image: &image, plan: &plan, reaper, sections, late, switch, until };
                let error = exec.run(&stopped);
                let failed = roll_back(error, stopped, StoppedDevice::undo, std::iter::empty());
                Err(report_roll_back(Way::Exec, begun_unix_ns, failed, &chosen))
            }
            Target::Process(way, successor) => {
                let begun = Begun { way, unix_ns: begun_unix_ns, ns: begun_ns };
                hand_over(successor, stopped, &switch, late, until, begun)
                    .map_err(|failed| report_roll_back(way, begun_unix_ns, failed, &chosen))
            }
        }
    }

    /// Checks that the devices are those that were prepared and were not set up differently since.
    fn unchanged<D: DeviceFile>(&self, devices: &Devices<D>) -> Result<(), UpdateError> {
        let error = |device: &str, problem| UpdateError {
            phase: Phase::Prepare,
            device: Some(device.to_owned()),
            source: Cause::Changed { problem },
        };
        for (at, (name, session)) in devices.iter().enumerate() {
            match self.chosen.get(at) {
                Some(chosen) if chosen.name == name => {
                    let setup = session.parts().1;
                    if setup.generation != chosen.generation {
                        return Err(error(name, "was set up differently (regions, queues, features)"));
                    }
                    if chosen.strategy == Strategy::Reopen {
                        check_reopen(setup).map_err(|source| of_device(name, source))?;
                    }
                }
                _ => return Err(error(name, "was not prepared, or in another order")),
            }
        }
        match self.chosen.get(devices.len()) {
            Some(missing) => Err(error(&missing.name, "was prepared and is missing")),
            None => Ok(()),
        }
    }
}

/// Rolls a failed update back: `how` starts each stopped device again, the last one first. `others` were not stopped.
fn roll_back<D: DeviceFile>(
    error: UpdateError,
    stopped: Vec<StoppedDevice<D>>,
    how: impl Fn(StoppedDevice<D>) -> super::stopped::RollBack<D>,
    others: impl Iterator<Item = (String, super::stopped::RollBack<D>)>,
) -> Box<Failed<D>> {
    let mut all: Vec<_> =
        stopped.into_iter().rev().map(|device| (device.name.clone(), how(device))).collect();
    all.reverse();
    let mut lost = Vec::new();
    let mut devices = Devices::new();
    for (name, undone) in all.into_iter().chain(others) {
        match undone {
            Ok(session) => devices.push(&name, session),
            Err(e) => lost.push(e),
        }
    }
    Box::new(Failed { error, devices, lost })
}

/// Reports the roll-back and its reason to the servers of the devices.
fn report_roll_back<D: DeviceFile>(
    way: Way,
    begun_unix_ns: u64,
    failed: Box<Failed<D>>,
    chosen: &[Chosen],
) -> Box<Failed<D>> {
    for (name, session) in &failed.devices {
        let strategy = chosen.iter().find(|c| c.name == name).map_or(Strategy::Reopen, |c| c.strategy);
        let report = Report::rolled_back(way, strategy, begun_unix_ns, &failed.error);
        // The report is for operators only, and a kernel device does not know the request.
        let _ = session.parts().0.report_update(&report);
    }
    failed
}

/// When an update began.
struct Begun {
    way: Way,
    unix_ns: u64,
    ns: u64,
}

/// Sends the devices' state to another process and commits.
fn hand_over<D: DeviceFile>(
    mut successor: Successor,
    stopped: Vec<StoppedDevice<D>>,
    switch: &v2::Switch,
    mut late: Sections,
    until: Option<Instant>,
    begun: Begun,
) -> Result<Completed, Box<Failed<D>>> {
    let mut taken = None;
    let mut exchange = || -> Result<(), Cause> {
        switch.put(&mut late)?;
        // The last check of the deadline: an answer that has arrived counts, even if it is read late.
        if until.is_some_and(|until| Instant::now() >= until) {
            return Err(Cause::Deadline);
        }
        successor.switch(&state::encode(&late)?, until)?;
        taken = Some(monotonic_ns());
        checkpoint(Checkpoint::TakenReceived);
        // Up to the commit this process decides. A successor that has ended by then does not get the devices.
        successor.commit(until)
    };
    if let Err(source) = exchange() {
        let error = successor_error(source);
        match successor.abort() {
            Ok(AbortOutcome::Released) => {
                return Err(roll_back(error, stopped, StoppedDevice::take_back, std::iter::empty()));
            }
            // The confirmation was sent before the abort arrived.
            Ok(AbortOutcome::Committed) => {}
            Err(unresponsive) => return Err(lost(error, &unresponsive, &stopped)),
        }
    }
    // Closes every descriptor of the devices, so this process cannot access them any more.
    drop(stopped);
    checkpoint(Checkpoint::Released);
    let mut report = successor.take_report().unwrap_or_else(|| Report::new(begun.way));
    let now = monotonic_ns();
    report.commit = taken.map_or(0, |taken| now.saturating_sub(taken));
    report.total = now.saturating_sub(begun.ns);
    report.begun_unix_ns = begun.unix_ns;
    report.way = begun.way;
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
