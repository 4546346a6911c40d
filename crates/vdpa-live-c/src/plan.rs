//! What an update carries over.
#![expect(unsafe_code, reason = "functions are exported by their names, and strings are those of C programs")]

use std::ffi::{c_char, c_int, c_void};
use std::mem::{MaybeUninit, replace};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vdpa_client::error::chain;
use vdpa_client::state::Section;
use vdpa_client::update::{Described, Devices, Failed, Plan, Strategy};
use vdpa_client::vhost_vdpa::VhostVdpaFd;

use crate::border::{Out, answer, array, descriptor, lock, needed, quietly, text};
use crate::failure::Failure;
use crate::failure::errno::{EEXIST, EINVAL};
use crate::log::{self, VDPA_LIVE_LOG_ERROR, VDPA_LIVE_LOG_WARNING};
use crate::session::{Place, here, vdpa_live_session};

/// The best strategy that the device offers.
pub const VDPA_LIVE_BEST: u32 = 0;
/// The device never stops.
pub const VDPA_LIVE_LIVE: u32 = 1;
/// The device is suspended and resumed.
pub const VDPA_LIVE_RESUME: u32 = 2;
/// The device is suspended, reset and set up again; mappings stay.
pub const VDPA_LIVE_RESET: u32 = 3;
/// The device is closed and opened again, and everything is pinned again. Works on every device.
pub const VDPA_LIVE_REOPEN: u32 = 4;

/// What an update carries over: sessions, state and descriptors of the caller. It can be used for any number of attempts.
#[derive(Debug, Default)]
pub struct vdpa_live_plan(pub(crate) Mutex<Parts>);

/// The sessions of a plan, by name.
pub(crate) type Places = Vec<(String, Arc<Mutex<Place>>)>;

#[derive(Debug, Default)]
pub(crate) struct Parts {
    pub(crate) places: Places,
    strategies: Vec<(String, Strategy)>,
    sections: Vec<Section>,
    late: Vec<Section>,
    descriptors: Vec<(String, OwnedFd)>,
    limits: Option<[u32; 3]>,
}

impl Parts {
    /// The plan of one attempt.
    pub(crate) fn plan(&self) -> Plan {
        let mut plan = Plan::new();
        for (name, strategy) in &self.strategies {
            plan = plan.strategy_of(name, *strategy);
        }
        for section in &self.sections {
            plan = plan.section(section.clone());
        }
        for late in &self.late {
            plan = plan.late_section(&late.name, late.version, late.optional);
        }
        for (name, fd) in &self.descriptors {
            plan = plan.descriptor(name, fd);
        }
        let Some([prepare, switch, grace]) = self.limits.map(|limits| limits.map(u64::from)) else {
            return plan;
        };
        plan = match prepare {
            0 => plan.no_prepare_timeout(),
            ms => plan.prepare_timeout(Duration::from_millis(ms)),
        };
        plan = match switch {
            0 => plan.no_deadline(),
            ms => plan.deadline(Duration::from_millis(ms)),
        };
        plan.grace(Duration::from_millis(grace))
    }
}

/// The sessions of a plan, locked, so that nobody uses them.
pub(crate) struct Held<'a>(Vec<(&'a str, MutexGuard<'a, Place>)>);

impl<'a> Held<'a> {
    pub(crate) fn new(places: &'a Places) -> Result<Self, Failure> {
        // Two updates with the same sessions in another order would wait for each other for ever.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let locked = places.iter().map(|(name, place)| Ok((name.as_str(), lock(place)?)));
        locked.collect::<Result<_, Failure>>().map(Self)
    }

    pub(crate) fn describe(&mut self, plan: Plan) -> Result<Described, Failure> {
        let mut sessions = Vec::with_capacity(self.0.len());
        for (name, place) in &mut self.0 {
            sessions.push((*name, &*here(place)?));
        }
        Ok(plan.describe(sessions)?)
    }

    /// Takes the sessions out, to be stopped.
    pub(crate) fn take(&mut self) -> Result<Devices<VhostVdpaFd>, Failure> {
        // All must be here before one is taken.
        self.0.iter_mut().try_for_each(|(_, place)| here(place).map(drop))?;
        let mut devices = Devices::new();
        for (name, place) in &mut self.0 {
            if let Place::Here(session) = replace(&mut **place, Place::Stopped) {
                devices.push(name, *session);
            }
        }
        Ok(devices)
    }

    /// Puts back what an update has left, and says what is wrong.
    pub(crate) fn give_back(&mut self, failed: Failed<VhostVdpaFd>) -> Failure {
        let failure = Failure::from(&failed);
        log::write(VDPA_LIVE_LOG_WARNING, &format!("rolled back: {}", failure.text));
        let Failed { error, mut devices, lost } = failed;
        for (name, place) in &mut self.0 {
            if let Place::Gone(_) = **place {
                // Closed meanwhile: dropping its device closes it.
                drop(devices.take(name));
                continue;
            }
            **place = match devices.take(name) {
                Some(session) => Place::Here(Box::new(session)),
                None => {
                    let why =
                        lost.iter().find(|lost| lost.device.as_deref() == Some(*name)).unwrap_or(&error);
                    let why = format!("it was lost in an update: {}", chain(why));
                    log::write(VDPA_LIVE_LOG_ERROR, &format!("device \"{name}\": {why}"));
                    Place::Gone(why)
                }
            };
        }
        failure
    }

    /// Another process has the devices.
    pub(crate) fn leave(&mut self) {
        for (_, place) in &mut self.0 {
            **place = Place::Gone("a successor has it".to_owned());
        }
    }
}

fn strategy(number: u32) -> Result<Option<Strategy>, Failure> {
    match number {
        VDPA_LIVE_BEST => Ok(None),
        VDPA_LIVE_LIVE => Ok(Some(Strategy::Live)),
        VDPA_LIVE_RESUME => Ok(Some(Strategy::Resume)),
        VDPA_LIVE_RESET => Ok(Some(Strategy::Reset)),
        VDPA_LIVE_REOPEN => Ok(Some(Strategy::Reopen)),
        other => Err(Failure::invalid(format!(
            "strategy {other} is none: there are VDPA_LIVE_BEST (0) to VDPA_LIVE_REOPEN (4)"
        ))),
    }
}

/// Makes an empty plan. Free it with vdpa_live_plan_free().
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_plan_new(plan: Option<&mut MaybeUninit<*mut vdpa_live_plan>>) -> c_int {
    answer(|| {
        Out::new(plan, "plan")?.put(vdpa_live_plan::default());
        Ok(0)
    })
}

/// Frees a plan; its sessions stay. NULL does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_plan_free(plan: Option<Box<vdpa_live_plan>>) {
    quietly(|| drop(plan));
}

/// Adds a session under a name, by which the successor finds it. strategy is VDPA_LIVE_BEST or another of its group; whether the
/// device can do it is found when the update begins. The session stays the caller's, and is closed after the plan is freed.
/// -EEXIST: the name or the session is there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_plan_session(
    plan: Option<&vdpa_live_plan>,
    name: *const c_char,
    session: Option<&vdpa_live_session>,
    strategy: u32,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives a string or NULL.
        let name = unsafe { text(name, "name") }?;
        let session = needed(session, "session")?;
        let strategy = self::strategy(strategy)?;
        let mut parts = lock(&needed(plan, "plan")?.0)?;
        if let Some((there, _)) =
            parts.places.iter().find(|(other, place)| other == name || Arc::ptr_eq(place, &session.0))
        {
            return Err(Failure::new(
                EEXIST,
                format!("session \"{name}\" is in the plan already, as \"{there}\""),
            ));
        }
        parts.places.push((name.to_owned(), Arc::clone(&session.0)));
        parts.strategies.extend(strategy.map(|strategy| (name.to_owned(), strategy)));
        Ok(0)
    })
}

/// Sets state of the caller that is known now: a section, size bytes with the version of their layout. The library copies them. A
/// section of that name is replaced, as for a further attempt. A successor that does not know a section with optional 0 refuses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_plan_section(
    plan: Option<&vdpa_live_plan>,
    name: *const c_char,
    version: u32,
    optional: c_int,
    data: *const c_void,
    size: usize,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives a string or NULL, and `size` bytes.
        let section = unsafe { section(name, version, optional, data, size) }?;
        let mut parts = lock(&needed(plan, "plan")?.0)?;
        parts.sections.retain(|there| there.name != section.name);
        parts.sections.push(section);
        Ok(0)
    })
}

/// A section of the caller.
///
/// # Safety
/// `name` and `data` are as the header says.
pub(crate) unsafe fn section(
    name: *const c_char,
    version: u32,
    optional: c_int,
    data: *const c_void,
    size: usize,
) -> Result<Section, Failure> {
    // SAFETY: passed on from the caller.
    let (name, data) = unsafe { (text(name, "name")?, array(data.cast::<u8>(), size, "data")?) };
    let section = Section::new(name, version, data.to_vec());
    Ok(if optional == 0 { section } else { section.optional() })
}

/// Announces a section that will be given by vdpa_live_update_section(), so that a successor that does not know it refuses before
/// a device stops.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_plan_late_section(
    plan: Option<&vdpa_live_plan>,
    name: *const c_char,
    version: u32,
    optional: c_int,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives a string or NULL.
        let section = unsafe { section(name, version, optional, std::ptr::null(), 0) }?;
        let mut parts = lock(&needed(plan, "plan")?.0)?;
        parts.late.retain(|there| there.name != section.name);
        parts.late.push(section);
        Ok(0)
    })
}

/// Passes an open file to the successor, under a name. The library copies the descriptor. -EEXIST: the name is there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_plan_descriptor(
    plan: Option<&vdpa_live_plan>,
    name: *const c_char,
    fd: c_int,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives a string or NULL.
        let name = unsafe { text(name, "name") }?;
        let fd = descriptor(fd, "fd")?;
        let mut parts = lock(&needed(plan, "plan")?.0)?;
        if parts.descriptors.iter().any(|(other, _)| other == name) {
            return Err(Failure::new(EEXIST, format!("descriptor \"{name}\" is in the plan already")));
        }
        parts.descriptors.push((name.to_owned(), fd));
        Ok(0)
    })
}

/// Limits the update, in ms: how long a successor may take until it is ready (30000), how long the switch may take (30000), and how
/// long an aborted successor may take to release the devices until it is killed (2000). 0 is no limit for the first two.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_plan_limits(
    plan: Option<&vdpa_live_plan>,
    prepare_ms: u32,
    switch_ms: u32,
    grace_ms: u32,
) -> c_int {
    answer(|| {
        lock(&needed(plan, "plan")?.0)?.limits = Some([prepare_ms, switch_ms, grace_ms]);
        Ok(0)
    })
}

/// A plan with sessions, for an update that begins.
pub(crate) fn with_sessions(parts: &Parts) -> Result<&Parts, Failure> {
    match parts.places.is_empty() {
        true => Err(Failure::new(EINVAL, "the plan has no session: add one by vdpa_live_plan_session()")),
        false => Ok(parts),
    }
}
