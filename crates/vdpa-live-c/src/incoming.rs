//! The side that takes devices over.
#![expect(unsafe_code, reason = "functions are exported by their names, and strings are those of C programs")]

use std::ffi::{CString, c_char, c_int, c_void};
use std::mem::{MaybeUninit, replace};
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd as _, IntoRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vdpa_client::memory::Memory;
use vdpa_client::state::{Section, Sections};
use vdpa_client::update::{Incoming, Loaded, Receiving, Restored, TakingOver, incoming};
use vdpa_client::vhost_vdpa::VhostVdpaFd;

use crate::border::{Out, answer, array, c_text, descriptor, lock, needed, optional_text, quietly, text};
use crate::failure::Failure;
use crate::failure::errno::{ENODEV, ENOENT, ERANGE};
use crate::log::{self, VDPA_LIVE_LOG_INFO};
use crate::memory::vdpa_live_memory;
use crate::session::vdpa_live_session;

/// Poll the descriptor of vdpa_live_incoming_fd() and call vdpa_live_incoming_step() again.
pub const VDPA_LIVE_WAIT: c_int = 0;
/// The update is there: sections, descriptors and memory can be read, and vdpa_live_take_over() can be called.
pub const VDPA_LIVE_OFFERED: c_int = 1;
/// The devices are this program's.
pub const VDPA_LIVE_TAKEN: c_int = 2;

/// An update that comes to this program.
#[derive(Debug)]
pub struct vdpa_live_incoming(Mutex<State>);

#[derive(Debug)]
struct State {
    stage: Stage,
    /// What the caller has pointers to.
    given: Vec<Box<[u8]>>,
    report: CString,
}

type Device = VhostVdpaFd;

#[derive(Debug)]
enum Stage {
    Receiving(Box<Receiving>),
    Offered(Box<Incoming<Device>>),
    Loaded(Box<Loaded<Device>>),
    Taking(Box<TakingOver<Device>>),
    Taken(Box<Restored<Device>>),
    /// With the reason.
    Over(String),
}

impl vdpa_live_incoming {
    fn new(stage: Stage) -> Self {
        Self(Mutex::new(State { stage, given: Vec::new(), report: CString::default() }))
    }
}

impl Stage {
    /// The stage is something else than what the function needs.
    fn wrong(&self, needed: &str) -> Failure {
        let now = match self {
            Self::Receiving(_) => "no offer has arrived yet",
            Self::Offered(_) | Self::Loaded(_) => {
                "the update is there and the devices are not taken over yet"
            }
            Self::Taking(_) => "the predecessor has not switched yet",
            Self::Taken(_) => "the devices are taken over",
            Self::Over(reason) => return Failure::invalid(format!("the update is over: {reason}")),
        };
        Failure::invalid(format!("{now}, and this function {needed}"))
    }

    fn sections(&mut self) -> Result<&mut Sections, Failure> {
        match self {
            Self::Offered(incoming) => Ok(incoming.sections()),
            Self::Loaded(loaded) => Ok(loaded.sections()),
            Self::Taken(restored) => Ok(&mut restored.sections),
            other => Err(other.wrong("needs an update that is there")),
        }
    }

    fn descriptors(&mut self) -> Result<&mut std::collections::BTreeMap<String, OwnedFd>, Failure> {
        match self {
            Self::Offered(incoming) => Ok(incoming.descriptors()),
            Self::Loaded(loaded) => Ok(loaded.descriptors()),
            Self::Taken(restored) => Ok(&mut restored.descriptors),
            other => Err(other.wrong("needs an update that is there")),
        }
    }

    fn memory(&self, at: usize) -> Result<Arc<Memory>, Failure> {
        let (found, count) = match self {
            Self::Offered(incoming) => (incoming.memories().nth(at), incoming.memories().count()),
            Self::Loaded(loaded) => (loaded.memories().nth(at), loaded.memories().count()),
            other => return Err(other.wrong("needs an update that is not taken over")),
        };
        let none = || Failure::new(ERANGE, format!("there are {count} memories, and none with number {at}"));
        found.cloned().ok_or_else(none)
    }
}

impl State {
    /// Keeps the devices, and tells of the update.
    fn taken(&mut self, restored: Restored<Device>) {
        restored.report_to_server();
        let text = restored.report.to_string();
        self.report = c_text(text.trim_end());
        log::write(VDPA_LIVE_LOG_INFO, &text);
        self.stage = Stage::Taken(Box::new(restored));
    }

    /// The update is over by an error.
    fn fail(&mut self, failure: Failure) -> Failure {
        self.stage = Stage::Over(failure.text.clone());
        failure
    }
}

/// Finds the update by which this program was started, by exec or as a child: returns 1 and sets *incoming, or 0 on a first start.
/// Call it once, early, before other threads exist, since it adopts inherited descriptors. For a child it blocks until the
/// predecessor has sent its offer. After an exec that fails here the devices are closed.
///
/// The update is at VDPA_LIVE_OFFERED. Free it with vdpa_live_incoming_free().
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_inherit(incoming: Option<&mut MaybeUninit<*mut vdpa_live_incoming>>) -> c_int {
    answer(|| {
        let out = Out::new(incoming, "incoming")?;
        let Some(update) = self::incoming::<Device>()? else { return Ok(0) };
        out.put(vdpa_live_incoming::new(Stage::Offered(Box::new(update))));
        Ok(1)
    })
}

/// Waits at a Unix stream socket for a predecessor that calls vdpa_live_hand_over(), which must be root or the user of this process.
/// The library copies the descriptor. Go on with vdpa_live_incoming_step(). timeout_ms 0 is no limit.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_receive(
    socket: c_int,
    timeout_ms: u32,
    incoming: Option<&mut MaybeUninit<*mut vdpa_live_incoming>>,
) -> c_int {
    answer(|| {
        let out = Out::new(incoming, "incoming")?;
        let socket = UnixStream::from(descriptor(socket, "socket")?);
        let time_out = (timeout_ms > 0).then(|| Duration::from_millis(timeout_ms.into()));
        let receiving = Receiving::from_user(socket, None, time_out, None)?;
        out.put(vdpa_live_incoming::new(Stage::Receiving(Box::new(receiving))));
        Ok(0)
    })
}

/// A descriptor by its name.
#[repr(C)]
#[derive(Debug)]
pub struct vdpa_live_descriptor {
    /// The name that vdpa_live_saved_descriptor() gave it.
    pub name: *const c_char,
    /// The descriptor.
    pub fd: c_int,
}

/// Reads the state of vdpa_live_save(), which the caller has brought here: size bytes, and count descriptors by their names. The
/// library copies both. Checks that the state is consistent and fits the devices, by requests that change nothing. The update is at
/// VDPA_LIVE_OFFERED. -EBADMSG: it is damaged, or a descriptor is missing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_load(
    data: *const c_void,
    size: usize,
    descriptors: *const vdpa_live_descriptor,
    count: usize,
    incoming: Option<&mut MaybeUninit<*mut vdpa_live_incoming>>,
) -> c_int {
    answer(|| {
        let out = Out::new(incoming, "incoming")?;
        // SAFETY: the caller gives `size` bytes and `count` descriptors.
        let (data, named) =
            unsafe { (array(data.cast::<u8>(), size, "data")?, array(descriptors, count, "descriptors")?) };
        let one = |named: &vdpa_live_descriptor| {
            // SAFETY: the caller gives a string or NULL.
            let name = unsafe { text(named.name, "name of a descriptor") }?;
            Ok((name.to_owned(), descriptor(named.fd, name)?))
        };
        let named = named.iter().map(one).collect::<Result<Vec<_>, Failure>>()?;
        let loaded = Loaded::load(data, named)?;
        out.put(vdpa_live_incoming::new(Stage::Loaded(Box::new(loaded))));
        Ok(0)
    })
}

/// The descriptor to poll for reading at VDPA_LIVE_WAIT. It belongs to incoming, and is another one after
/// vdpa_live_take_over().
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_incoming_fd(incoming: Option<&vdpa_live_incoming>) -> c_int {
    answer(|| match &lock(&needed(incoming, "incoming")?.0)?.stage {
        Stage::Receiving(receiving) => Ok(receiving.as_raw_fd()),
        Stage::Taking(taking) => Ok(taking.as_raw_fd()),
        other => Err(other.wrong("needs an update that waits")),
    })
}

/// Goes on as far as is possible without waiting: returns VDPA_LIVE_WAIT, VDPA_LIVE_OFFERED or VDPA_LIVE_TAKEN. After an error the
/// update is over, and the predecessor keeps the devices. -ETIMEDOUT: the time is over. -ECONNRESET: the predecessor is gone.
/// -ECANCELED: it has called the update off.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_incoming_step(incoming: Option<&vdpa_live_incoming>) -> c_int {
    answer(|| {
        let mut state = lock(&needed(incoming, "incoming")?.0)?;
        match &mut state.stage {
            Stage::Receiving(receiving) => match receiving.step() {
                Ok(None) => Ok(VDPA_LIVE_WAIT),
                Ok(Some(update)) => {
                    state.stage = Stage::Offered(Box::new(update));
                    Ok(VDPA_LIVE_OFFERED)
                }
                Err(error) => Err(state.fail(error.into())),
            },
            Stage::Taking(taking) => match taking.step() {
                Ok(None) => Ok(VDPA_LIVE_WAIT),
                Ok(Some(restored)) => {
                    state.taken(restored);
                    Ok(VDPA_LIVE_TAKEN)
                }
                Err(error) => Err(state.fail(error.into())),
            },
            Stage::Offered(_) | Stage::Loaded(_) => Ok(VDPA_LIVE_OFFERED),
            Stage::Taken(_) => Ok(VDPA_LIVE_TAKEN),
            over @ Stage::Over(_) => Err(over.wrong("")),
        }
    })
}

/// Finds a section of the predecessor: sets *data and *size, and *version if it is not NULL. The data is valid until incoming is
/// freed. -ENOENT: there is none of that name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_incoming_section(
    incoming: Option<&vdpa_live_incoming>,
    name: *const c_char,
    version: Option<&mut MaybeUninit<u32>>,
    data: Option<&mut MaybeUninit<*const c_void>>,
    size: Option<&mut MaybeUninit<usize>>,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives a string or NULL.
        let name = unsafe { text(name, "name") }?;
        let (data, size) = (needed(data, "data")?, needed(size, "size")?);
        let mut state = lock(&needed(incoming, "incoming")?.0)?;
        let missing = || Failure::new(ENOENT, format!("the predecessor has sent no section \"{name}\""));
        let section: &Section = state.stage.sections()?.get(name).ok_or_else(missing)?;
        let (copy, of) = (section.payload.clone().into_boxed_slice(), section.version);
        data.write(copy.as_ptr().cast());
        size.write(copy.len());
        if let Some(version) = version {
            version.write(of);
        }
        state.given.push(copy);
        Ok(0)
    })
}

/// A section that a program knows, and the versions of it that it can read.
#[repr(C)]
#[derive(Debug)]
pub struct vdpa_live_known {
    /// Name of the section.
    pub name: *const c_char,
    /// Oldest version.
    pub oldest: u32,
    /// Newest version.
    pub newest: u32,
}

/// Checks that this program knows every section that is not optional, and refuses the update otherwise: the predecessor keeps its
/// devices and is told which one. -EBADMSG then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_incoming_understands(
    incoming: Option<&vdpa_live_incoming>,
    known: *const vdpa_live_known,
    count: usize,
) -> c_int {
    answer(|| {
        let range = |known: &vdpa_live_known| {
            // SAFETY: the caller gives a string or NULL.
            let name = unsafe { text(known.name, "name of a section") }?;
            Ok((name, known.oldest..=known.newest))
        };
        // SAFETY: the caller gives `count` elements.
        let known = unsafe { array(known, count, "known") }?.iter().map(range);
        let known = known.collect::<Result<Vec<(&str, RangeInclusive<u32>)>, Failure>>()?;
        let mut state = lock(&needed(incoming, "incoming")?.0)?;
        match replace(&mut state.stage, Stage::Over("it was refused".to_owned())) {
            Stage::Offered(update) => match update.understands(&known) {
                Ok(update) => state.stage = Stage::Offered(Box::new(update)),
                Err(error) => return Err(state.fail(error.into())),
            },
            Stage::Loaded(loaded) => match loaded.check_sections(&known) {
                Ok(()) => state.stage = Stage::Loaded(loaded),
                Err(error) => return Err(state.fail(error.into())),
            },
            other => {
                let failure = other.wrong("needs an update that is not taken over");
                state.stage = other;
                return Err(failure);
            }
        }
        Ok(0)
    })
}

/// Takes a descriptor that the predecessor has passed by vdpa_live_plan_descriptor(): it is the caller's to close, and
/// close-on-exec. -ENOENT: there is none of that name, or it was taken before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_incoming_descriptor(
    incoming: Option<&vdpa_live_incoming>,
    name: *const c_char,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives a string or NULL.
        let name = unsafe { text(name, "name") }?;
        let mut state = lock(&needed(incoming, "incoming")?.0)?;
        let missing = || Failure::new(ENOENT, format!("the predecessor has passed no descriptor \"{name}\""));
        Ok(state.stage.descriptors()?.remove(name).ok_or_else(missing)?.into_raw_fd())
    })
}

/// Sets *memory to memory number at of the devices, from 0 on, for vdpa_live_memory_info() and vdpa_live_memory_bring(). Free it
/// with vdpa_live_memory_free(). -ERANGE: there are not so many.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_incoming_memory(
    incoming: Option<&vdpa_live_incoming>,
    at: usize,
    memory: Option<&mut MaybeUninit<*mut vdpa_live_memory>>,
) -> c_int {
    answer(|| {
        let out = Out::new(memory, "memory")?;
        let found = lock(&needed(incoming, "incoming")?.0)?.stage.memory(at)?;
        out.put(vdpa_live_memory::new(found));
        Ok(0)
    })
}

/// Takes the devices over. After an exec or vdpa_live_load() that is done at once: returns VDPA_LIVE_TAKEN. Otherwise tells the
/// predecessor that this program is ready, and returns VDPA_LIVE_WAIT until the predecessor has switched: poll and step. After an
/// error the predecessor keeps or gets the devices; after an exec they are closed.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_take_over(incoming: Option<&vdpa_live_incoming>) -> c_int {
    answer(|| {
        let mut state = lock(&needed(incoming, "incoming")?.0)?;
        let restored = match replace(&mut state.stage, Stage::Over("it has failed".to_owned())) {
            Stage::Offered(update) if update.waits() => {
                return match update.begin_take_over() {
                    Ok(taking) => {
                        state.stage = Stage::Taking(Box::new(taking));
                        Ok(VDPA_LIVE_WAIT)
                    }
                    Err(error) => Err(state.fail(error.into())),
                };
            }
            Stage::Offered(update) => update.take_over(),
            Stage::Loaded(loaded) => loaded.take_over(),
            other => {
                let failure = other.wrong("needs an update that is not taken over");
                state.stage = other;
                return Err(failure);
            }
        };
        match restored {
            Ok(restored) => {
                state.taken(restored);
                Ok(VDPA_LIVE_TAKEN)
            }
            Err(error) => Err(state.fail(error.into())),
        }
    })
}

/// Gives a device that was taken over to the caller, as a session to be closed with vdpa_live_close(). Those that are left are
/// closed with incoming. -ENODEV: there is none of that name, or it was given before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_incoming_session(
    incoming: Option<&vdpa_live_incoming>,
    name: *const c_char,
    session: Option<&mut MaybeUninit<*mut vdpa_live_session>>,
) -> c_int {
    answer(|| {
        let out = Out::new(session, "session")?;
        // SAFETY: the caller gives a string or NULL.
        let name = unsafe { text(name, "name") }?;
        let mut state = lock(&needed(incoming, "incoming")?.0)?;
        let restored = match &mut state.stage {
            Stage::Taken(restored) => restored,
            other => return Err(other.wrong("needs devices that are taken over")),
        };
        let missing = || Failure::new(ENODEV, format!("the predecessor has passed no device \"{name}\""));
        out.put(vdpa_live_session::new(restored.devices.take(name).ok_or_else(missing)?));
        Ok(0)
    })
}

/// The times of an update that is taken over, as text of several lines; NULL before. Valid until incoming is freed.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_incoming_report(incoming: Option<&vdpa_live_incoming>) -> *const c_char {
    let mut text = std::ptr::null();
    answer(|| {
        let state = lock(&needed(incoming, "incoming")?.0)?;
        match &state.stage {
            // Set once, before the stage.
            Stage::Taken(_) => text = state.report.as_ptr(),
            other => return Err(other.wrong("needs devices that are taken over")),
        }
        Ok(0)
    });
    text
}

/// Refuses an update that is not taken over: the predecessor is told reason, which may be NULL, and keeps its devices.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_incoming_refuse(
    incoming: Option<&vdpa_live_incoming>,
    reason: *const c_char,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives a string or NULL.
        let reason = unsafe { optional_text(reason, "reason") }?.unwrap_or("the successor does not want it");
        let mut state = lock(&needed(incoming, "incoming")?.0)?;
        match replace(&mut state.stage, Stage::Over("it was refused".to_owned())) {
            // The error is what the predecessor gets.
            Stage::Offered(update) => drop(update.refuse(reason)),
            // Dropping it refuses, or closes what a transport of the caller has brought.
            Stage::Receiving(_) | Stage::Loaded(_) | Stage::Taking(_) => {}
            other @ (Stage::Taken(_) | Stage::Over(_)) => {
                let failure = other.wrong("needs an update that is not taken over");
                state.stage = other;
                return Err(failure);
            }
        }
        Ok(0)
    })
}

/// Frees an update. One that is not taken over is refused; devices that were taken over and not given to the caller are closed.
/// NULL does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_incoming_free(incoming: Option<Box<vdpa_live_incoming>>) {
    quietly(|| drop(incoming));
}
