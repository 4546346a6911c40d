//! The predecessor's side of an update: prepare, switch, roll back.

use std::collections::{HashMap, HashSet};
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use vdpa_core::Errno;
use vdpa_core::features::BackendFeatures;
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::keeper::AddressSpaceKeeper;

use super::checkpoint::{Checkpoint, checkpoint};
use super::leave::Leave;
use super::rest::AtRest;
use super::successor::{AbortOutcome, Successor};
use super::{Cause, Devices, Image, Phase, Plan, Report, Strategy, UpdateError, Via, Way, same, save, steps};
use crate::device::DeviceFile;
use crate::memory::Memory;
use crate::session::{Session, Setup};
use crate::state::{self, Sections, v2};

/// An update that is ready to happen: everything that can fail without a device being stopped has been done, and the
/// devices run and are driven as before.
///
/// Dropping it gives the update up; a successor is told so.
#[derive(Debug)]
pub struct Prepared {
    plan: Plan,
    to: To,
    chosen: Vec<Chosen>,
    /// The library's and the caller's, as far as they are known.
    sections: Sections,
    begun_unix_ns: u64,
    prepare_ns: u64,
}

#[derive(Debug)]
enum To {
    /// The keeper has the page tables of this image taken down after the exec and not in it. Starting it takes longer than
    /// the whole rest of a switch, so it is there before. Without one the update is slower and otherwise the same.
    Exec(Image, Option<AddressSpaceKeeper>),
    Process(Way, Successor),
}

impl To {
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

/// The predecessor's view of an update that is done: the devices are another process's.
#[derive(Debug)]
pub struct Completed {
    /// What it cost.
    pub report: Report,
    /// The successor, if it is a child of this process; to be waited for as long as this process goes on.
    pub child: Option<Child>,
}

impl Completed {
    /// Has the calling thread run only when nobody else wants its CPU, for a predecessor that has nothing left to do but to
    /// end. Giving memory back takes 10 ms and more for each GiB; at the usual priority the successor and the servers of its
    /// devices wait for that where there are few CPUs. The memory of the sessions is given back when the last clone of its
    /// map is dropped: keep one until here to have none of that in the switch.
    ///
    /// # Errors
    /// None is known for a thread of this process.
    pub fn run_when_idle(&self) -> Result<(), Errno> {
        vdpa_sys::priority::run_when_idle(None)
    }
}

/// An update that did not happen.
#[derive(Debug)]
pub struct Failed<D> {
    /// What failed.
    pub error: UpdateError,
    /// The devices as they were, working.
    pub devices: Devices<D>,
    /// Devices that could not be brought back, and why. They are closed.
    pub lost: Vec<UpdateError>,
}

/// Devices as a plan found them, and what the successor will be told of them: all that preparing needs.
///
/// Holds copies of all descriptors, so it can be moved to another thread while the devices are driven.
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
    /// Prepares an update of `devices`. This is [`describe`](Self::describe) and [`Described::prepare`] in one, for
    /// programs whose devices need nobody to drive them: it blocks as long as preparing takes.
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
        // Each piece of memory is looked at once, however many mappings there are of it.
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
        let files = v2::Files { files: devices.iter().map(|(_, session)| same::describe(session)).collect() };
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
    /// Starts or contacts the successor and waits until it has mapped all memory and says that it understands every
    /// section. Blocks as long as that takes, unless [cancelled](Plan::cancel); the devices may be driven meanwhile, but
    /// not be set up differently.
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

    fn connect(&self, via: Via) -> Result<(To, Sections), Cause> {
        let way = via.way();
        // Descriptors by place, as another process gets them.
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
                Ok((To::Exec(image, AddressSpaceKeeper::spawn().ok()), sections))
            }
            Via::Fork(image) => Ok((To::Process(way, connected(Successor::start(&image, grace))?), sections)),
            Via::HandOver(socket) => {
                let successor = Successor::connect(socket, self.plan.allowed_uid, grace);
                Ok((To::Process(way, connected(successor)?), sections))
            }
        }
    }
}

/// Everything about one device that can be known before it is touched.
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

/// A device that cannot come to rest must have nothing in flight when it is closed.
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
    /// The strategy that was chosen for a device.
    #[must_use]
    pub fn strategy(&self, device: &str) -> Option<Strategy> {
        self.chosen.iter().find(|c| c.name == device).map(|c| c.strategy)
    }

    /// How long preparing took.
    #[must_use]
    pub const fn took(&self) -> Duration {
        Duration::from_nanos(self.prepare_ns)
    }

    /// The process that will have the devices; this one for an exec.
    #[must_use]
    pub fn successor(&self) -> i32 {
        match &self.to {
            To::Exec(..) => steps::own_pid(),
            To::Process(_, successor) => successor.pid(),
        }
    }

    /// Lets the devices go. Nobody may drive them from here on; `late` are the sections that were announced.
    ///
    /// An exec does not return from here unless it failed. Another process has the devices when this returns with
    /// success; nothing in this process can reach them any more. Blocks at most until the plan's deadline.
    ///
    /// # Errors
    /// [`Failed`] with the devices, which run in this process as before.
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
        if let To::Process(_, successor) = &self.to {
            successor.announce_switch();
        }
        let mut resting: Vec<AtRest<D>> = Vec::with_capacity(devices.len());
        let mut waiting = devices.into_iter().zip(&self.chosen);
        while let Some(((name, session), chosen)) = waiting.next() {
            match AtRest::bring(name.clone(), session, chosen.strategy) {
                Ok(device) => resting.push(device),
                Err(failed) => {
                    let (error, undone) = *failed;
                    let rest = waiting.map(|((name, session), _)| (name, Ok(session)));
                    let others = std::iter::once((name, undone)).chain(rest);
                    let failed = back(error, resting, AtRest::undo, others);
                    return Err(announced(self.to.way(), self.begun_unix_ns, failed, &self.chosen));
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
            devices: resting.iter().map(AtRest::saved).collect(),
        };
        switch.saved_ns = monotonic_ns();
        switch.save_ns = switch.saved_ns.saturating_sub(save_begin);
        checkpoint(Checkpoint::Saved);
        match to {
            To::Exec(image, keeper) => {
                let keeper = keeper.as_ref();
                let leave = Leave { image: &image, plan: &plan, keeper, sections, late, switch, until };
                let error = leave.go(&resting);
                let failed = back(error, resting, AtRest::undo, std::iter::empty());
                Err(announced(Way::Exec, begun_unix_ns, failed, &chosen))
            }
            To::Process(way, successor) => {
                let begun = Begun { way, unix_ns: begun_unix_ns, ns: begun_ns };
                depart(successor, resting, &switch, late, until, begun)
                    .map_err(|failed| announced(way, begun_unix_ns, failed, &chosen))
            }
        }
    }

    /// Checks that the devices are those that were prepared, set up as they were then.
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

/// All devices of a failed update: those `others`, and those at rest, which `how` brings back, the last one first.
fn back<D: DeviceFile>(
    error: UpdateError,
    resting: Vec<AtRest<D>>,
    how: impl Fn(AtRest<D>) -> super::rest::Undone<D>,
    others: impl Iterator<Item = (String, super::rest::Undone<D>)>,
) -> Box<Failed<D>> {
    let mut all: Vec<_> =
        resting.into_iter().rev().map(|device| (device.name.clone(), how(device))).collect();
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

/// Tells the servers of devices that were brought back that their update was rolled back, and why.
fn announced<D: DeviceFile>(
    way: Way,
    begun_unix_ns: u64,
    failed: Box<Failed<D>>,
    chosen: &[Chosen],
) -> Box<Failed<D>> {
    for (name, session) in &failed.devices {
        let strategy = chosen.iter().find(|c| c.name == name).map_or(Strategy::Reopen, |c| c.strategy);
        let report = Report::rolled_back(way, strategy, begun_unix_ns, &failed.error);
        // Nothing depends on it; a kernel device does not know the request.
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

/// Lets another process have the devices.
fn depart<D: DeviceFile>(
    mut successor: Successor,
    resting: Vec<AtRest<D>>,
    switch: &v2::Switch,
    mut late: Sections,
    until: Option<Instant>,
    begun: Begun,
) -> Result<Completed, Box<Failed<D>>> {
    let mut taken = None;
    let mut exchange = || -> Result<(), Cause> {
        switch.put(&mut late)?;
        // From here on an answer counts that has come, however late it is looked at.
        if until.is_some_and(|until| Instant::now() >= until) {
            return Err(Cause::Deadline);
        }
        successor.switch(&state::encode(&late)?, until)?;
        taken = Some(monotonic_ns());
        checkpoint(Checkpoint::TakenReceived);
        // Until here this process decides; a successor that has ended meanwhile does not get the devices.
        successor.commit(until)
    };
    if let Err(source) = exchange() {
        let error = successor_error(source);
        match successor.abort() {
            Ok(AbortOutcome::Released) => {
                return Err(back(error, resting, AtRest::take_back, std::iter::empty()));
            }
            // Its answer had crossed.
            Ok(AbortOutcome::Committed) => {}
            Err(unresponsive) => return Err(lost(error, &unresponsive, &resting)),
        }
    }
    // Every descriptor of a device ends here, and with it all that this process could do to it.
    drop(resting);
    checkpoint(Checkpoint::Released);
    let mut report = successor.take_report().unwrap_or_else(|| Report::new(begun.way));
    let now = monotonic_ns();
    report.commit = taken.map_or(0, |taken| now.saturating_sub(taken));
    report.total = now.saturating_sub(begun.ns);
    report.begun_unix_ns = begun.unix_ns;
    report.way = begun.way;
    Ok(Completed { report, child: successor.into_child() })
}

/// Two processes must not drive a device: this one lets go, since the other can be neither heard nor killed.
fn lost<D: DeviceFile>(error: UpdateError, unresponsive: &Cause, resting: &[AtRest<D>]) -> Box<Failed<D>> {
    let lost = |device: &AtRest<D>| UpdateError {
        phase: Phase::Commit,
        device: Some(device.name.clone()),
        source: unresponsive.repeat(),
    };
    Box::new(Failed { error, devices: Devices::new(), lost: resting.iter().map(lost).collect() })
}

/// The phase in which it failed is the successor's, if it is the one that failed.
fn successor_error(source: Cause) -> UpdateError {
    match &source {
        Cause::Successor { phase, device, .. } => {
            UpdateError { phase: *phase, device: device.clone(), source }
        }
        _ => UpdateError { phase: Phase::Transfer, device: None, source },
    }
}
