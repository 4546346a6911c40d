//! Updates in which the library does everything: by exec, by a child, by hand-over.
#![expect(unsafe_code, reason = "functions are exported by their names, and strings are those of C programs")]

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::mem::{MaybeUninit, replace};
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use vdpa_client::state::Sections;
use vdpa_client::update::{Image, Prepared, Preparing, Via};

use crate::border::{Out, answer, descriptor, lock, needed, quietly, strings, text};
use crate::failure::Failure;
use crate::failure::errno::EIO;
use crate::log::{self, VDPA_LIVE_LOG_INFO};
use crate::plan::{Held, Places, section, vdpa_live_plan, with_sessions};

/// An update by a child or by hand-over: first a successor gets ready while the devices are driven, then they are switched over.
#[derive(Debug)]
pub struct vdpa_live_update(Mutex<Update>);

#[derive(Debug)]
struct Update {
    stage: Stage,
    places: Places,
    late: Sections,
    successor: i32,
}

#[derive(Debug)]
enum Stage {
    Preparing(Box<Preparing>),
    Ready(Box<Prepared>),
    Over,
}

fn over() -> Failure {
    Failure::invalid("the update is over: free it, and begin another one")
}

/// A program of the caller.
///
/// # Safety
/// `path` is a string or NULL, the others are arrays of strings that end with NULL, or NULL.
unsafe fn image(
    path: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
) -> Result<Image, Failure> {
    // SAFETY: passed on from the caller.
    let (path, argv, envp) = unsafe { (text(path, "path")?, strings(argv), strings(envp)) };
    let os = |string: &CStr| OsStr::from_bytes(string.to_bytes()).to_owned();
    let mut image = Image::new(path);
    if let Some(argv) = argv {
        image = image.args(argv.into_iter().map(os));
    }
    if let Some(envp) = envp {
        image = image.no_env();
        for variable in envp {
            let (name, value) = split(variable.to_bytes());
            image = image.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
        }
    }
    Ok(image)
}

/// Name and value of a variable.
fn split(variable: &[u8]) -> (&[u8], &[u8]) {
    let at = variable.iter().position(|&byte| byte == b'=');
    let (name, value) = variable.split_at(at.unwrap_or(variable.len()));
    (name, value.get(1..).unwrap_or_default())
}

/// Replaces this program by the file path, by exec: the process stays, and the new image finds the devices by
/// vdpa_live_inherit(). argv and envp end with NULL, as for execve(2); NULL stands for those of this program. All other threads
/// end, as by execve(2). Nobody may drive the devices from the call on.
///
/// Returns only on failure, with the devices running in this program as before: -ENOENT or -EACCES for the file, -EOPNOTSUPP for
/// a strategy that a device cannot do, -EINVAL for memory that would end with this program, or the error of a device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_exec(
    plan: Option<&vdpa_live_plan>,
    path: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives strings and arrays of them as the header says.
        let image = unsafe { image(path, argv, envp) }?;
        let parts = lock(&needed(plan, "plan")?.0)?;
        let parts = with_sessions(&parts)?;
        let mut held = Held::new(&parts.places)?;
        let prepared = held.describe(parts.plan())?.prepare(Via::Exec(image))?;
        let devices = held.take()?;
        match prepared.switch(devices, Sections::new()) {
            Ok(_) => Err(Failure::new(EIO, "an exec has come back without an error")),
            Err(failed) => Err(held.give_back(*failed)),
        }
    })
}

fn begin(plan: Option<&vdpa_live_plan>, via: Via) -> Result<vdpa_live_update, Failure> {
    let parts = lock(&needed(plan, "plan")?.0)?;
    let parts = with_sessions(&parts)?;
    let described = Held::new(&parts.places)?.describe(parts.plan())?;
    let preparing = described.begin(via)?;
    let successor = preparing.successor().unwrap_or(0);
    let (stage, places, late) =
        (Stage::Preparing(Box::new(preparing)), parts.places.clone(), Sections::new());
    Ok(vdpa_live_update(Mutex::new(Update { stage, places, late, successor })))
}

/// Begins an update by a child: starts the file path, which finds the devices by vdpa_live_inherit(). argv and envp as for
/// vdpa_live_exec(). Go on with vdpa_live_update_step(), drive the devices meanwhile; their regions, queues and features stay as
/// they are. Free *update with vdpa_live_update_free().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_fork(
    plan: Option<&vdpa_live_plan>,
    path: *const c_char,
    argv: *const *const c_char,
    envp: *const *const c_char,
    update: Option<&mut MaybeUninit<*mut vdpa_live_update>>,
) -> c_int {
    answer(|| {
        let out = Out::new(update, "update")?;
        // SAFETY: the caller gives strings and arrays of them as the header says.
        let image = unsafe { image(path, argv, envp) }?;
        out.put(begin(plan, Via::Fork(image))?);
        Ok(0)
    })
}

/// Begins an update by hand-over to the process at the other end of a Unix stream socket, which calls vdpa_live_receive(). The
/// library copies the descriptor. Go on as after vdpa_live_fork().
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_hand_over(
    plan: Option<&vdpa_live_plan>,
    socket: c_int,
    update: Option<&mut MaybeUninit<*mut vdpa_live_update>>,
) -> c_int {
    answer(|| {
        let out = Out::new(update, "update")?;
        let socket = UnixStream::from(descriptor(socket, "socket")?);
        out.put(begin(plan, Via::HandOver(socket))?);
        Ok(0)
    })
}

/// The descriptor to poll for reading, until vdpa_live_update_step() has returned 1. It belongs to the update.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_update_fd(update: Option<&vdpa_live_update>) -> c_int {
    answer(|| match &lock(&needed(update, "update")?.0)?.stage {
        Stage::Preparing(preparing) => Ok(preparing.as_raw_fd()),
        Stage::Ready(_) => Err(Failure::invalid("the successor is ready: call vdpa_live_update_switch()")),
        Stage::Over => Err(over()),
    })
}

/// Process id of the successor: of a child at once, of another process once it is ready. A child is the caller's to wait for, by
/// waitpid(2), once the update has succeeded.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_update_successor(update: Option<&vdpa_live_update>) -> c_int {
    answer(|| Ok(lock(&needed(update, "update")?.0)?.successor))
}

/// Goes on as far as is possible without waiting. Returns 1 once the successor is ready, 0 when there is more to wait for. After an
/// error the update is over; the devices have not been touched. -ETIMEDOUT: it was not ready in time. -ECHILD: it has ended.
/// -ECANCELED: it refused.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_update_step(update: Option<&vdpa_live_update>) -> c_int {
    answer(|| {
        let mut update = lock(&needed(update, "update")?.0)?;
        let stepped = match &mut update.stage {
            Stage::Preparing(preparing) => preparing.step(),
            Stage::Ready(_) => return Ok(1),
            Stage::Over => return Err(over()),
        };
        match stepped {
            Ok(None) => Ok(0),
            Ok(Some(prepared)) => {
                update.successor = prepared.successor();
                update.stage = Stage::Ready(Box::new(prepared));
                Ok(1)
            }
            Err(error) => {
                update.stage = Stage::Over;
                Err(error.into())
            }
        }
    })
}

/// Sets the contents of a section that vdpa_live_plan_late_section() has announced. The library copies them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_update_section(
    update: Option<&vdpa_live_update>,
    name: *const c_char,
    version: u32,
    optional: c_int,
    data: *const c_void,
    size: usize,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives a string or NULL, and `size` bytes.
        let section = unsafe { section(name, version, optional, data, size) }?;
        let mut update = lock(&needed(update, "update")?.0)?;
        drop(update.late.take(&section.name));
        update.late.push(section);
        Ok(0)
    })
}

/// Switches the devices over to the successor, which is ready. Nobody may drive them from the call on. Blocks for the limit of the
/// switch at most, on failure also for the grace period.
///
/// Returns 0 when the successor has the devices; the sessions are empty then, and are closed as others. On failure the sessions
/// have their devices back, which run as before.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_update_switch(update: Option<&vdpa_live_update>) -> c_int {
    answer(|| {
        let mut update = lock(&needed(update, "update")?.0)?;
        let update = &mut *update;
        let prepared = match replace(&mut update.stage, Stage::Over) {
            Stage::Ready(prepared) => prepared,
            preparing @ Stage::Preparing(_) => {
                update.stage = preparing;
                let text = "the successor is not ready: call vdpa_live_update_step() until it returns 1";
                return Err(Failure::invalid(text));
            }
            Stage::Over => return Err(over()),
        };
        let mut held = Held::new(&update.places)?;
        let devices = held.take()?;
        match prepared.switch(devices, replace(&mut update.late, Sections::new())) {
            Ok(completed) => {
                held.leave();
                log::write(VDPA_LIVE_LOG_INFO, &completed.report.to_string());
                Ok(0)
            }
            Err(failed) => Err(held.give_back(*failed)),
        }
    })
}

/// Frees an update. One that is not over is aborted: the successor is told, a child is killed after the grace period, and the
/// devices stay here. NULL does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_update_free(update: Option<Box<vdpa_live_update>>) {
    quietly(|| drop(update));
}
