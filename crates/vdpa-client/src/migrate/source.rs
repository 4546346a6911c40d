//! The side that gives the device away.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::host::PAGE_SIZE;
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::QueueIndex;
use vdpa_sys::eventfd::EventFd;

use super::error::{MachineError, MigrateError, Unfit, request};
use super::offer::{Offer, RegionOffer, Ring, Switched};
use super::pages::{Area, Sender, Sent};
use super::rounds::{Convergence, Decision, Plan};
use super::wire::{self, Kind};
use super::{Control, DEVICE, Progress, SWITCHED, Step};
use crate::session::{DirtyPages, Session};
use crate::state::{self, Section, Sections};

/// The machine whose device moves, as the program that runs it sees it. All calls come from the thread that calls [`send`].
pub trait Machine {
    /// Begins to track which pages of memory the processors write, and everybody but the device.
    ///
    /// # Errors
    /// Any: the migration ends, and the machine runs on.
    fn track(&mut self) -> Result<(), MachineError>;

    /// Adds the pages of a region that were written since [`track`](Self::track), or since the last call: from the dirty log of KVM,
    /// for example, by [`DirtyPages::add_words`]. The library adds what the device has written. What was written before the call is
    /// reported by it; what is written during it is reported by it or the next one.
    ///
    /// # Errors
    /// Any: the migration ends, and the machine runs on.
    fn written(&mut self, region: &str, pages: &mut DirtyPages) -> Result<(), MachineError>;

    /// Ends the tracking. Also called when it was not begun.
    fn untrack(&mut self);

    /// Stops the processors: when it returns, nobody but the device writes memory.
    ///
    /// # Errors
    /// Any: the machine has to run on as if it had not been stopped; [`resume`](Self::resume) is called too.
    fn pause(&mut self) -> Result<(), MachineError>;

    /// What moves besides memory and the device: registers, other devices. The device is suspended, so that also a disk that is
    /// copied is at rest: what is left of it can be copied now.
    ///
    /// # Errors
    /// Any: the migration ends, and [`resume`](Self::resume) is called.
    fn save(&mut self) -> Result<Sections, MachineError>;

    /// The machine goes on here: the migration has failed after [`pause`](Self::pause). The device runs again.
    fn resume(&mut self);

    /// A step was done. The failures that matter lie between two steps: docs/migration.md.
    fn step(&mut self, _step: Step) {}

    /// Asked now and then while memory is sent.
    fn progress(&mut self, _progress: &Progress) -> Control {
        Control::Continue
    }
}

/// How a migration went, as the source saw it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// Name of the migration.
    pub id: String,
    /// What each round has sent while the machine ran, in which time.
    pub rounds: Vec<(Sent, Duration)>,
    /// What was sent while it stood still.
    pub last: Sent,
    /// From before the machine was stopped until the device runs at the destination.
    pub downtime: Duration,
    /// The parts of the downtime, in their order.
    pub phases: Vec<(&'static str, Duration)>,
    /// All of it.
    pub total: Duration,
}

/// How a migration has failed, and who has the device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The machine runs here as before.
    #[error("the machine was not moved, and runs here")]
    Here(#[source] MigrateError),
    /// The destination was told to start, and has not said that it did. The machine stands still here: whoever knows where it
    /// runs decides. [`ask`](super::ask) the destination over a new stream; then drop the session, or [`resume`].
    #[error(
        "the machine was given away, and the destination has not said that it runs there: ask it, or make sure that it cannot run it any more"
    )]
    Undecided {
        /// Name of the migration.
        id: String,
        /// Why nothing is known.
        #[source]
        source: MigrateError,
    },
    /// The machine runs here, but the device cannot be resumed.
    #[error("the machine was not moved, and its device cannot be resumed here: {resume}")]
    Lost {
        /// Why it was not moved.
        #[source]
        source: MigrateError,
        /// Why it does not run.
        resume: Box<MigrateError>,
    },
}

/// Moves the device of `session`, and the memory that it maps, to the destination at the other end of `stream`.
///
/// Blocks until it runs there or here. On success the session's device is suspended: drop the session, nothing here may run any more.
/// A stream with time limits for reading and writing keeps this from waiting for a destination that hangs.
///
/// # Errors
/// [`SendError`], which says where the machine is.
pub fn send<D, S>(
    session: &mut Session<D>,
    machine: &mut dyn Machine,
    stream: &mut S,
    plan: &Plan,
) -> Result<Report, SendError>
where
    D: VdpaOps<Event = EventFd>,
    S: Read + Write,
{
    let mut source = Source { session, machine, stream, plan, begun: Instant::now(), stopped: None };
    match source.run() {
        Ok(report) => Ok(report),
        Err(Failed::Before(error)) => Err(source.go_on(error)),
        Err(Failed::After { id, source }) => Err(SendError::Undecided { id, source }),
    }
}

/// Has a machine go on here that [`send`] has left [undecided](SendError::Undecided): it is certain that it does not run at the
/// destination, and will not.
///
/// # Errors
/// [`MigrateError::Device`]: the device does not run then.
pub fn resume<D: VdpaOps<Event = EventFd>>(
    session: &mut Session<D>,
    machine: &mut dyn Machine,
) -> Result<(), MigrateError> {
    if session.parts().1.running {
        session.resume()?;
    }
    machine.resume();
    Ok(())
}

enum Failed {
    /// Before the destination was told to start.
    Before(MigrateError),
    /// After that.
    After { id: String, source: MigrateError },
}

impl<T: Into<MigrateError>> From<T> for Failed {
    fn from(error: T) -> Self {
        Self::Before(error.into())
    }
}

struct Source<'a, D, S> {
    session: &'a mut Session<D>,
    machine: &'a mut dyn Machine,
    stream: &'a mut S,
    plan: &'a Plan,
    begun: Instant,
    /// When the machine was stopped.
    stopped: Option<Instant>,
}

impl<D, S> Source<'_, D, S>
where
    D: VdpaOps<Event = EventFd>,
    S: Read + Write,
{
    fn run(&mut self) -> Result<Report, Failed> {
        let (offer, areas) = self.offer()?;
        wire::write_json(self.stream, Kind::Offer, &offer)?;
        self.machine.step(Step::Offered);
        wire::expect(self.stream, Kind::Ready)?;
        self.machine.step(Step::Accepted);
        let mut left: Vec<_> = areas.iter().map(|area| DirtyPages::all(area.range, PAGE_SIZE)).collect();
        let mut rounds = Vec::new();
        if self.plan.track {
            self.machine
                .track()
                .map_err(MigrateError::machine("tracking the memory that the machine writes"))?;
            let ranges = self.session.writable_ranges();
            if !ranges.is_empty() {
                self.session.start_dirty_tracking(&ranges)?;
            }
            self.machine.step(Step::Tracking);
            rounds = self.rounds(&areas, &mut left)?;
        }
        self.stop(offer.id, &areas, left, rounds)
    }

    /// What would move, and its memory.
    fn offer(&self) -> Result<(Offer, Vec<Area>), MigrateError> {
        let (_, setup) = self.session.parts();
        if !setup.offered.has(BackendFeatures::DEVICE_STATE) {
            return Err(Unfit::NoState.into());
        }
        if self.plan.track && !setup.offered.has(BackendFeatures::DIRTY_LOG) {
            return Err(Unfit::NoTracking.into());
        }
        if let Some(slot) = setup.queues.first() {
            return Err(Unfit::OwnQueue { index: slot.vring.index.0 }.into());
        }
        if self.session.mappings() > 0 {
            return Err(Unfit::Nameless.into());
        }
        if setup.suspended {
            return Err(Unfit::Suspended.into());
        }
        let regions = self.session.regions();
        let areas: Option<Vec<Area>> = regions.iter().map(Area::of).collect();
        let regions = regions.iter().map(|region| RegionOffer {
            name: region.name().to_owned(),
            iova: region.range().first(),
            size: region.range().size(),
            perm: region.perm(),
        });
        let offer = Offer {
            id: name()?,
            device_id: setup.device_id,
            features: setup.features,
            page_size: PAGE_SIZE,
            regions: regions.collect(),
        };
        Ok((offer, areas.ok_or(Unfit::MemoryChanged)?))
    }

    /// Sends memory while the machine runs, until what is left is so little that it can be stopped.
    fn rounds(
        &mut self,
        areas: &[Area],
        left: &mut Vec<DirtyPages>,
    ) -> Result<Vec<(Sent, Duration)>, MigrateError> {
        let (mut rounds, mut rules) = (Vec::new(), Convergence::default());
        loop {
            let begun = Instant::now();
            let sent = self.send_pages(areas, left, rules.rounds(), self.plan.rate)?;
            wire::write(self.stream, Kind::Round, &[])?;
            wire::expect(self.stream, Kind::RoundDone)?;
            let time = begun.elapsed();
            rounds.push((sent, time));
            self.machine.step(Step::Round);
            self.check_memory(areas)?;
            *left = self.written(areas)?;
            let pages = count(left);
            match rules.after(self.plan, sent.bytes, time, pages * PAGE_SIZE) {
                Decision::Round => {}
                Decision::Stop => return Ok(rounds),
                Decision::GiveUp => {
                    let ms = rules.estimate(pages * PAGE_SIZE).as_millis();
                    let (rounds, ms) = (rules.rounds(), u64::try_from(ms).unwrap_or(u64::MAX));
                    return Err(MigrateError::NoConvergence { rounds, pages, ms });
                }
            }
        }
    }

    /// Checks that the session has the memory that was offered.
    fn check_memory(&self, areas: &[Area]) -> Result<(), MigrateError> {
        let now = self.session.regions().iter().map(|region| (region.name(), region.range()));
        let same = now.eq(areas.iter().map(|area| (area.name.as_str(), area.range)));
        if same && self.session.mappings() == 0 { Ok(()) } else { Err(Unfit::MemoryChanged.into()) }
    }

    fn send_pages(
        &mut self,
        areas: &[Area],
        pages: &[DirtyPages],
        round: u32,
        rate: Option<u64>,
    ) -> Result<Sent, MigrateError> {
        let total = count(pages);
        let mut sender = Sender::new(self.stream, PAGE_SIZE, rate);
        let machine = &mut *self.machine;
        let running = self.stopped.is_none();
        let mut go_on = |sent: Sent| {
            let progress = Progress { round, running, sent, total };
            match machine.progress(&progress) {
                Control::Continue => Ok(()),
                Control::Cancel => Err(MigrateError::Cancelled),
            }
        };
        for ((number, area), pages) in (0..).zip(areas).zip(pages) {
            sender.region(number, area, pages, &mut go_on)?;
        }
        sender.flush()?;
        Ok(sender.sent)
    }

    /// The pages that were written since the last call, by the device or by others.
    fn written(&mut self, areas: &[Area]) -> Result<Vec<DirtyPages>, MigrateError> {
        let mut all = Vec::with_capacity(areas.len());
        for area in areas {
            let device_writes = self.session.region(&area.name).is_some_and(|region| region.perm().write());
            let mut pages = if device_writes {
                self.session.take_dirty_pages(area.range)?
            } else {
                DirtyPages::none(area.range, PAGE_SIZE)
            };
            self.machine
                .written(&area.name, &mut pages)
                .map_err(MigrateError::machine("asking which memory the machine has written"))?;
            all.push(pages);
        }
        Ok(all)
    }

    /// Stops the machine, sends the rest, and has the destination start it.
    fn stop(
        &mut self,
        id: String,
        areas: &[Area],
        mut left: Vec<DirtyPages>,
        rounds: Vec<(Sent, Duration)>,
    ) -> Result<Report, Failed> {
        let mut clock = Clock::start();
        self.stopped = Some(clock.begun);
        self.machine.pause().map_err(MigrateError::machine("stopping the machine"))?;
        self.machine.step(Step::Paused);
        clock.lap("pause");
        let (ops, setup) = self.session.parts();
        let running = setup.running;
        if running {
            ops.suspend().map_err(request("VHOST_VDPA_SUSPEND"))?;
        }
        self.machine.step(Step::Suspended);
        clock.lap("suspend");
        self.check_memory(areas)?;
        if self.plan.track {
            let written = self.written(areas)?;
            left.iter_mut().zip(&written).for_each(|(left, written)| left.merge(written));
        }
        let last = self.send_pages(areas, &left, u32::try_from(rounds.len()).unwrap_or(u32::MAX), None)?;
        self.machine.step(Step::LastPages);
        clock.lap("pages");
        let sections = self.state(running)?;
        self.machine.step(Step::Saved);
        clock.lap("save");
        wire::write(self.stream, Kind::State, &state::encode(&sections)?)?;
        self.machine.step(Step::StateSent);
        wire::expect(self.stream, Kind::Loaded)?;
        self.machine.step(Step::LoadedHeard);
        clock.lap("load");
        // A message that was not written as a whole is none for the destination.
        wire::write(self.stream, Kind::Commit, &[])?;
        self.machine.step(Step::Committed);
        match wire::expect(self.stream, Kind::Running) {
            Ok(_) => {}
            // It could not start: nothing of the device runs there.
            Err(error @ MigrateError::Refused { .. }) => return Err(error.into()),
            Err(source) => return Err(Failed::After { id, source }),
        }
        clock.lap("start");
        self.machine.step(Step::RunningHeard);
        self.machine.untrack();
        let Clock { begun, laps: phases, .. } = clock;
        Ok(Report { id, rounds, last, downtime: begun.elapsed(), phases, total: self.begun.elapsed() })
    }

    /// The state of the device, and of the machine.
    fn state(&mut self, running: bool) -> Result<Sections, MigrateError> {
        let mut sections = self.machine.save().map_err(MigrateError::machine("saving the machine"))?;
        sections.check_names()?;
        let (ops, setup) = self.session.parts();
        let queues = setup.guest_queues.iter().map(|queue| {
            let (QueueIndex(index), ring) = (queue.index(), queue.ring());
            Ring {
                index,
                size: ring.size,
                desc: ring.desc,
                driver: ring.driver,
                device: ring.device,
                enabled: queue.enabled(),
            }
        });
        let switched = Switched { features: setup.features, running, queues: queues.collect() };
        let device = ops.state_save().map_err(request("VDPA_STATE_SAVE"))?;
        sections.push(Section::json(SWITCHED, 1, &switched)?);
        sections.push(Section::new(DEVICE, 1, device));
        Ok(sections)
    }

    /// Has the machine go on here.
    fn go_on(&mut self, error: MigrateError) -> SendError {
        // The destination may be gone.
        let _ = wire::write_json(self.stream, Kind::Abort, &error.text());
        self.machine.untrack();
        let resumed = if self.stopped.is_some() { self.resume() } else { Ok(()) };
        if self.session.dirty_info().is_ok_and(|info| info.page_size.is_some()) {
            // What is tracked is of no use to anybody.
            let _ = self.session.stop_dirty_tracking();
        }
        match resumed {
            Ok(()) => SendError::Here(error),
            Err(resume) => SendError::Lost { source: error, resume: Box::new(resume) },
        }
    }

    fn resume(&mut self) -> Result<(), MigrateError> {
        let (ops, setup) = self.session.parts();
        let result = if setup.running {
            // Also where it was not suspended: the request changes nothing then.
            ops.resume().map_err(request("VHOST_VDPA_RESUME"))
        } else {
            Ok(())
        };
        // A device need not remember kicks that came while it was suspended.
        setup.vrings().for_each(|vring| vring.kick.signal());
        self.machine.resume();
        result
    }
}

fn count(pages: &[DirtyPages]) -> u64 {
    pages.iter().map(DirtyPages::count).sum()
}

/// A name that no other migration has.
fn name() -> Result<String, MigrateError> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    Ok(text.trim().to_owned())
}

/// What took how long.
struct Clock {
    begun: Instant,
    last: Instant,
    laps: Vec<(&'static str, Duration)>,
}

impl Clock {
    fn start() -> Self {
        let begun = Instant::now();
        Self { begun, last: begun, laps: Vec::new() }
    }

    fn lap(&mut self, name: &'static str) {
        let now = Instant::now();
        self.laps.push((name, now - self.last));
        self.last = now;
    }
}

/// Features that the driver uses and a device lacks.
pub(super) fn missing(used: Features, offered: Features) -> Option<Features> {
    let missing = Features(used.0 & !offered.0);
    (missing != Features::NONE).then_some(missing)
}
