//! Taking a device over from the image that was here before.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{SealFlags, fcntl_get_seals};
use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::types::{Perm, QueueIndex};
use vdpa_sys::clock::monotonic_ns;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::{inherit, memfd};

use super::{
    Cause, PID_VARIABLE, Phase, Report, STATE_VARIABLE, StateFileError, Strategy, UpdateError, steps,
};
use crate::device::{DeviceFile, set_backend};
use crate::dma::{Backing, RegionSpec};
use crate::error::Error;
use crate::queue::{Queue, RingLayout};
use crate::session::{Session, Setup};
use crate::state::{self, Sections, v1};

/// A session taken over from the image that was here before.
#[derive(Debug)]
pub struct Restored<D> {
    /// The device, with the requests that were in flight.
    pub session: Session<D>,
    /// The caller's sections. Call [`Sections::ensure_consumed`] when all that are known are taken.
    pub sections: Sections,
    /// How long everything took, from the beginning of the update in the old image.
    pub report: Report,
}

/// Takes over the session of the image that execed this one.
///
/// `None` when there was none: [`STATE_VARIABLE`] is not set, or meant for another process. Call it once, early and before other threads
/// exist: it adopts inherited descriptors by number. A second call fails, since the descriptor is adopted.
///
/// The first completions may have arrived already: reap before waiting.
///
/// # Errors
/// [`UpdateError`] with the phase. What the device has mapped is still there while this process keeps running,
/// unless the strategy was [`Strategy::Reopen`].
pub fn restore<D: DeviceFile>() -> Result<Option<Restored<D>>, UpdateError> {
    let entered = monotonic_ns();
    let Some(value) = std::env::var_os(STATE_VARIABLE) else {
        return Ok(None);
    };
    if std::env::var_os(PID_VARIABLE).is_some_and(|pid| pid.to_str() != Some(&steps::own_pid().to_string())) {
        return Ok(None);
    }
    let load = || -> Result<Sections, Cause> {
        let number = value
            .to_str()
            .and_then(|v| v.parse::<i32>().ok())
            .ok_or_else(|| StateFileError::NotANumber { value: value.to_string_lossy().into_owned() })?;
        let file = inherit::take(number).map_err(|source| StateFileError::NotInherited { number, source })?;
        Ok(state::decode(&read_state(number, &file)?)?)
    };
    let sections = load().map_err(UpdateError::at(Phase::Load))?;
    restore_from(sections, entered).map(Some)
}

/// [`restore`] from sections that were read already; `entered` is when this image began to, on
/// `CLOCK_MONOTONIC` in ns.
///
/// # Errors
/// As [`restore`].
pub fn restore_from<D: DeviceFile>(mut sections: Sections, entered: u64) -> Result<Restored<D>, UpdateError> {
    let loaded = Loaded::<D>::new(&mut sections, entered).map_err(UpdateError::at(Phase::Load))?;
    let (session, report) = loaded.take_over()?;
    Ok(Restored { session, sections, report })
}

/// The bytes of a state file, if it is one: a memfd that nobody can change any more.
fn read_state(number: i32, file: &OwnedFd) -> Result<Vec<u8>, StateFileError> {
    // Only memory files have seals.
    let seals = fcntl_get_seals(file).map_err(|_| StateFileError::NotMemfd { number })?;
    if !seals.contains(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW) {
        return Err(StateFileError::NotSealed { number });
    }
    let limit = usize::try_from(state::MAX_PAYLOAD).unwrap_or(usize::MAX).saturating_add(state::HEADER_LEN);
    memfd::read_all(file, limit).map_err(|e| StateFileError::Unreadable { number, reason: e.to_string() })
}

/// Everything the new image needs, checked; nothing was asked of the device but what it offers.
struct Loaded<D> {
    ops: Option<D>,
    setup: Setup,
    strategy: Strategy,
    /// In the order of the queues; empty unless the device has to be told.
    bases: Vec<u32>,
    report: Report,
}

impl<D: DeviceFile> Loaded<D> {
    fn new(sections: &mut Sections, entered: u64) -> Result<Self, Cause> {
        let state = v1::State::take(sections)?;
        let strategy = check_update(&state.update)?;
        check_numbers(&state)?;
        let mut report = Report::new(strategy);
        report.suspend = state.update.suspend_ns;
        report.save = state.update.save_ns;
        report.exec = entered.saturating_sub(state.update.exec_begin_ns);
        report.mappings = state.memory.regions.len() as u64;

        let ops = match (strategy, state.session.device_fd) {
            (Strategy::Reopen, _) => None,
            (_, Some(fd)) => Some(D::from_fd(take("device", fd)?)),
            (_, None) => return Err(invalid("device", "there is no descriptor of it")),
        };
        let mut setup = setup(&state.session, ops.as_ref())?;
        for region in state.memory.regions {
            add_region(&mut setup, region)?;
        }
        let bases = bases(strategy, &state.queues)?;
        for queue in state.queues.queues {
            add_queue(&mut setup, queue)?;
        }
        report.load = monotonic_ns().saturating_sub(entered);
        Ok(Self { ops, setup, strategy, bases, report })
    }

    fn take_over(self) -> Result<(Session<D>, Report), UpdateError> {
        let Self { ops, setup, strategy, bases, mut report } = self;
        let Some(ops) = ops else {
            let path = setup.path.clone().unwrap_or_default();
            let ops = steps::reopen(&path, &setup, &bases, &mut report)?;
            return Ok((Session::new(ops, setup), report));
        };
        steps::timed(&mut report.new_owner, || steps::new_owner(&ops))
            .map_err(UpdateError::at(Phase::NewOwner))?;
        let was_reset = strategy == Strategy::Reset;
        if was_reset {
            steps::timed(&mut report.vrings, || steps::set_up_again(&ops, &setup, &bases))
                .map_err(UpdateError::at(Phase::Vrings))?;
        }
        steps::timed(&mut report.remap, || steps::remap(&ops, &setup, was_reset))
            .map_err(UpdateError::at(Phase::Remap))?;
        steps::timed(&mut report.resume, || match strategy {
            Strategy::Reset => steps::run_again(&ops, &setup),
            Strategy::Resume => steps::resume(&ops).map(|()| steps::kick_all(&setup)),
            Strategy::Live | Strategy::Reopen => Ok(()),
        })
        .map_err(UpdateError::at(Phase::Resume))?;
        Ok((Session::new(ops, setup), report))
    }
}

fn check_update(update: &v1::Update) -> Result<Strategy, Cause> {
    let pid = steps::own_pid();
    if update.pid != pid {
        return Err(invalid(
            "state",
            format!("process {} saved it for itself; this is process {pid}", update.pid),
        ));
    }
    update.strategy.parse().map_err(|e: super::UnknownStrategy| invalid("state", e.to_string()))
}

/// No descriptor may be named twice: each gets one owner.
fn check_numbers(state: &v1::State) -> Result<(), Cause> {
    let regions = state.memory.regions.iter().map(|r| r.fd);
    let events = state.queues.queues.iter().flat_map(|q| [q.kick_fd, q.call_fd]);
    let mut numbers: Vec<i32> = regions.chain(events).chain(state.session.device_fd).collect();
    numbers.sort_unstable();
    match numbers.windows(2).find_map(|pair| (pair.first() == pair.last()).then(|| pair.first())).flatten() {
        Some(number) => Err(invalid("descriptors", format!("number {number} is there twice"))),
        None => Ok(()),
    }
}

/// What was negotiated, if the present device still offers it.
fn setup<D: DeviceFile>(session: &v1::Session, ops: Option<&D>) -> Result<Setup, Cause> {
    let saved = Features(session.features);
    let backend = BackendFeatures(session.backend_features);
    let mut setup = Setup {
        path: session.path.as_ref().map(PathBuf::from),
        device_id: session.device_id,
        iova_range: vdpa_core::types::IovaRange::ALL,
        offered: backend,
        backend,
        features: saved,
        regions: Vec::new(),
        queues: Vec::new(),
        running: session.running,
    };
    let Some(ops) = ops else {
        if setup.path.is_none() {
            return Err(Cause::NoPath);
        }
        return Ok(setup);
    };
    let device_id = ops.device_id().map_err(Error::request("VHOST_VDPA_GET_DEVICE_ID"))?;
    if device_id != session.device_id {
        return Err(invalid(
            "device",
            format!(
                "it was of virtio type {}, the descriptor leads to one of type {device_id}",
                session.device_id
            ),
        ));
    }
    let present = ops.features().map_err(Error::request("VHOST_GET_FEATURES"))?;
    if !present.contains(saved) {
        return Err(Cause::Features { saved, present });
    }
    let present = ops.backend_features().map_err(Error::request("VHOST_GET_BACKEND_FEATURES"))?;
    if !present.contains(backend) {
        return Err(Cause::BackendFeatures { saved: backend, present });
    }
    setup.offered = present;
    setup.iova_range = ops.iova_range().map_err(Error::request("VHOST_VDPA_GET_IOVA_RANGE"))?;
    set_backend(ops, backend)?;
    Ok(setup)
}

fn add_region(setup: &mut Setup, region: v1::Region) -> Result<(), Cause> {
    let v1::Region { name, fd, iova, size, perm, asid } = region;
    if asid != 0 {
        return Err(invalid("region", format!("\"{name}\" is in address space {asid}; only 0 is known")));
    }
    let backing = Backing::Object(take(&format!("region \"{name}\""), fd)?);
    setup.add_region(RegionSpec { name, backing, iova, size, perm: Perm(perm), populate: false })?;
    Ok(())
}

fn add_queue(setup: &mut Setup, queue: v1::Queue) -> Result<(), Cause> {
    let index = QueueIndex(queue.index);
    let what = format!("queue {index}");
    if setup.queues.iter().any(|q| q.index() == index) {
        return Err(invalid(&what, "it is there twice"));
    }
    let event = |name: &str, number| -> Result<EventFd, Cause> {
        let what = format!("{name} of queue {index}");
        EventFd::from_fd(take(&what, number)?).map_err(|e| invalid(&what, e.to_string()))
    };
    let events = (event("kick", queue.kick_fd)?, event("call", queue.call_fd)?);
    let v1::Queue { size, desc, avail, used, .. } = queue;
    let layout = RingLayout { size, desc, avail, used };
    let region = setup
        .region(&queue.region)
        .ok_or_else(|| invalid(&what, format!("its region \"{}\" does not exist", queue.region)))?;
    let adopted = Queue::adopt(index, region, layout, setup.features, events, queue.driver)?;
    setup.queues.push(adopted);
    Ok(())
}

fn bases(strategy: Strategy, queues: &v1::Queues) -> Result<Vec<u32>, Cause> {
    if matches!(strategy, Strategy::Live | Strategy::Resume) {
        return Ok(Vec::new());
    }
    let base =
        |q: &v1::Queue| q.base.ok_or_else(|| invalid(&format!("queue {}", q.index), "its base is missing"));
    queues.queues.iter().map(base).collect()
}

fn take(what: &str, number: i32) -> Result<OwnedFd, Cause> {
    inherit::take(number).map_err(|e| invalid(what, format!("descriptor {number}: {e}")))
}

fn invalid(what: &str, reason: impl Into<String>) -> Cause {
    Cause::Invalid { what: what.to_owned(), reason: reason.into() }
}

/// What a restore checks before it adopts a descriptor, for fuzz targets.
#[cfg(fuzzing)]
pub mod fuzzing {
    use vdpa_core::features::Features;
    use vdpa_core::ring::driver::DriverState;

    use super::{bases, check_numbers, v1};
    use crate::update::Strategy;

    /// The checks of the state against itself.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn validate(state: &v1::State) -> Result<(), String> {
        let strategy: Strategy =
            state.update.strategy.parse().map_err(|e: super::super::UnknownStrategy| e.to_string())?;
        check_numbers(state).map_err(|e| e.to_string())?;
        bases(strategy, &state.queues).map(drop).map_err(|e| e.to_string())
    }

    /// The driver side of a ring as it is given to be adopted.
    #[must_use]
    pub fn adopt_driver(driver: v1::Driver, size: u16, features: Features) -> DriverState {
        driver.restore(size, features)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Section, StateError};

    #[test]
    fn only_a_sealed_memfd_is_read() {
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(matches!(read_state(7, &file), Err(StateFileError::NotMemfd { number: 7 })));
        let open = memfd::create(c"open", 100, None).unwrap();
        let error = read_state(7, &open).unwrap_err();
        assert!(error.to_string().contains("not sealed"), "{error}");
        let sealed = memfd::sealed(c"sealed", b"something else entirely, long enough").unwrap();
        let bytes = read_state(7, &sealed).unwrap();
        assert!(matches!(state::decode(&bytes), Err(StateError::BadMagic { .. })));
    }

    fn state() -> v1::State {
        let golden = include_bytes!("../../tests/golden/v1.state");
        v1::State::take(&mut state::decode(golden).unwrap()).unwrap()
    }

    #[test]
    fn state_of_another_process_or_with_shared_descriptors_is_refused() {
        let mut state = state();
        let error = check_update(&state.update).unwrap_err().to_string();
        assert!(error.contains("process 4711 saved it"), "{error}");
        state.update.pid = steps::own_pid();
        assert_eq!(check_update(&state.update).unwrap(), Strategy::Resume);
        state.update.strategy = "teleport".to_owned();
        assert!(check_update(&state.update).unwrap_err().to_string().contains("teleport"));

        check_numbers(&state).unwrap();
        state.queues.queues[0].call_fd = state.memory.regions[1].fd;
        let error = check_numbers(&state).unwrap_err().to_string();
        assert!(error.contains("number 7 is there twice"), "{error}");
    }

    #[test]
    fn a_base_is_needed_where_the_vrings_are_set_up_again() {
        let mut queues = state().queues;
        assert_eq!(bases(Strategy::Reset, &queues).unwrap(), [65535]);
        queues.queues[0].base = None;
        assert!(bases(Strategy::Reopen, &queues).is_err());
        assert!(bases(Strategy::Live, &queues).unwrap().is_empty());
    }

    #[test]
    fn sections_that_are_missing_or_of_another_version_are_named() {
        let mut sections = Sections::default();
        let error = v1::State::take(&mut sections).unwrap_err();
        assert!(matches!(error, StateError::Missing { name: v1::UPDATE }));
        sections.push(Section::new(v1::UPDATE, 2, b"{}".to_vec()));
        let error = v1::State::take(&mut sections).unwrap_err();
        assert!(error.to_string().contains("has version 2; this program reads version 1"), "{error}");
    }
}
