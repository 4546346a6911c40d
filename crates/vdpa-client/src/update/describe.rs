//! The predecessor's description of its devices: the first step of every update.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vdpa_core::features::BackendFeatures;
use vdpa_sys::clock::monotonic_ns;

use super::parcel::Parcel;
use super::stop::Stopped;
use super::{
    Cause, Devices, Failed, Phase, Plan, Prepared, Preparing, Strategy, UpdateError, Via, identity, save,
};
use crate::device::DeviceFile;
use crate::memory::Memory;
use crate::session::{Session, Setup};
use crate::state::{self, Sections, v2};

/// One device of an update.
#[derive(Debug)]
pub(super) struct Chosen {
    pub(super) name: String,
    pub(super) strategy: Strategy,
    generation: u64,
}

/// The description of the devices for the successor: everything that prepare needs.
///
/// It holds duplicates of all descriptors, so it can be moved to another thread while the devices are driven.
#[derive(Debug)]
pub struct Described {
    pub(super) plan: Plan,
    pub(super) chosen: Vec<Chosen>,
    pub(super) known: v2::Prepared,
    pub(super) table: save::Table,
    pub(super) memories: save::Memories,
    pub(super) files: v2::Files,
    pub(super) begun_unix_ns: u64,
    pub(super) took_ns: u64,
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

    /// Describes and stops `devices` in one call, for a program that brings the state to its successor itself:
    /// [`Stopped::parcel`] has it all. `late` as for [`Prepared::switch`].
    ///
    /// # Errors
    /// [`Failed`] with the devices, which run as before.
    pub fn save<D: DeviceFile>(
        self,
        devices: Devices<D>,
        late: Sections,
    ) -> Result<Stopped<D>, Box<Failed<D>>> {
        match self.describe(&devices) {
            Ok(described) => described.stop(devices, late),
            Err(error) => Err(Box::new(Failed { error, devices, lost: Vec::new() })),
        }
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
        let (known, table, memories) =
            save::prepared(&devices, &strategies, &self, begun_unix_ns).map_err(general)?;
        let files =
            v2::Files { files: devices.iter().map(|(_, session)| identity::describe(session)).collect() };
        let took_ns = monotonic_ns().saturating_sub(begin);
        Ok(Described { plan: self, chosen, known, table, memories, files, begun_unix_ns, took_ns })
    }
}

pub(super) fn general(source: Cause) -> UpdateError {
    UpdateError { phase: Phase::Prepare, device: None, source }
}

pub(super) fn of_device(name: &str, source: Cause) -> UpdateError {
    UpdateError { phase: Phase::Prepare, device: Some(name.to_owned()), source }
}

impl Described {
    /// Starts or contacts the successor and waits until it has mapped all memory and understands every section. Blocks for
    /// [`Plan::prepare_timeout`] at most, unless it is [cancelled](Plan::cancel) before. Meanwhile the devices may be driven, but
    /// regions, queues and features must stay as they are.
    ///
    /// # Errors
    /// [`UpdateError`]; nothing has changed. [`Cause::NotReady`] when the time is over, [`Cause::SuccessorEnded`] with the exit
    /// status of a child that has ended.
    pub fn prepare(self, via: Via) -> Result<Prepared, UpdateError> {
        let mut preparing = self.begin(via)?;
        loop {
            if let Some(prepared) = preparing.step()? {
                return Ok(prepared);
            }
            preparing.wait()?;
        }
    }

    /// As [`prepare`](Self::prepare), for a program with an event loop: starts or contacts the successor and does not wait.
    ///
    /// # Errors
    /// [`UpdateError`]; nothing has changed.
    pub fn begin(self, via: Via) -> Result<Preparing, UpdateError> {
        Preparing::new(self, via)
    }

    /// The state that is known before the devices stop, with copies of the descriptors, for a program that brings it to its
    /// successor itself. [`Loaded::load`](super::Loaded::load) takes it there.
    ///
    /// # Errors
    /// [`UpdateError`] when there are no descriptors left, or the state is too large.
    pub fn parcel(&self) -> Result<Parcel, UpdateError> {
        let bytes = self.sections().and_then(|sections| Ok(state::encode(&sections)?)).map_err(general)?;
        Parcel::new(bytes, &self.known, &self.table).map_err(general)
    }

    /// Stops the devices as their strategies say, and collects the rest of the state. Nobody may drive them from here on. Blocks
    /// as long as SUSPEND, reset and close take.
    ///
    /// # Errors
    /// [`Failed`] with the devices, which run as before, and with those that were lost.
    pub fn stop<D: DeviceFile>(
        self,
        devices: Devices<D>,
        late: Sections,
    ) -> Result<Stopped<D>, Box<Failed<D>>> {
        let begun_ns = monotonic_ns();
        Stopped::new(self, devices, late, begun_ns, 0)
    }

    /// The sections that are known before the devices stop. Descriptors are indexes into the table.
    pub(super) fn sections(&self) -> Result<Sections, Cause> {
        let mut sections = self.plan.sections.clone();
        self.known.put(&mut sections)?;
        Ok(sections)
    }

    /// Checks that the devices are those that were described and were not set up differently since.
    pub(super) fn unchanged<D: DeviceFile>(&self, devices: &Devices<D>) -> Result<(), UpdateError> {
        let changed = |device: &str, problem| of_device(device, Cause::Changed { problem });
        for (at, (name, session)) in devices.iter().enumerate() {
            let chosen = self.chosen.get(at).filter(|chosen| chosen.name == name);
            let Some(chosen) = chosen else {
                return Err(changed(name, "was not prepared, or in another order"));
            };
            let setup = session.parts().1;
            if setup.generation != chosen.generation {
                return Err(changed(name, "was set up differently (regions, queues, features)"));
            }
            if let Some(slot) = setup.queues.iter().find(|slot| slot.queue.is_none()) {
                return Err(of_device(name, Cause::QueueTaken { index: slot.vring.index }));
            }
            if save::nameless_memories(setup).any(|(memory, _)| self.memories.index(memory).is_none()) {
                return Err(changed(name, "maps memory that it did not use then"));
            }
            check_state(setup, chosen.strategy).map_err(|source| of_device(name, source))?;
        }
        match self.chosen.get(devices.len()) {
            Some(missing) => Err(changed(&missing.name, "was prepared and is missing")),
            None => Ok(()),
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
    let regions = setup.regions.list().iter().map(|region| (region.name(), region.memory()));
    let nameless = save::nameless_memories(setup).map(|(memory, _)| (memory.name(), memory));
    for (name, memory) in regions.chain(nameless) {
        if verified.insert(Arc::as_ptr(memory)) {
            let named = |problem| Cause::Memory { name: name.to_owned(), problem };
            memory.verify().map_err(named)?;
        }
    }
    if strategy == Strategy::Reopen && setup.path.is_none() {
        return Err(Cause::NoPath);
    }
    check_state(setup, strategy)?;
    Ok(strategy)
}

/// Checks what may change between prepare and switch.
fn check_state(setup: &Setup, strategy: Strategy) -> Result<(), Cause> {
    if setup.suspended && strategy != Strategy::Live {
        return Err(Cause::Suspended { strategy });
    }
    if strategy == Strategy::Reopen { check_reopen(setup) } else { Ok(()) }
}

/// A device that cannot be suspended must have no request in flight when it is closed.
fn check_reopen(setup: &Setup) -> Result<(), Cause> {
    if setup.backend.has(BackendFeatures::SUSPEND) {
        return Ok(());
    }
    if setup.running && !setup.guest_queues.is_empty() {
        return Err(Cause::GuestInFlight);
    }
    match setup.in_flight() {
        0 => Ok(()),
        in_flight => Err(Cause::InFlight { in_flight }),
    }
}
