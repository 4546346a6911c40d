//! The last steps of the predecessor in an update by exec.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Instant;

use rustix::io::FdFlags;
use vdpa_core::Errno;
use vdpa_sys::exec::{Program, execve, set_close_on_exec};
use vdpa_sys::memfd;
use vdpa_sys::mm_reaper::MmReaper;

use super::checkpoint::{Checkpoint, checkpoint};
use super::stop::Stopped;
use super::{Cause, Image, PID_VARIABLE, Phase, STATE_VARIABLE, UpdateError, reaper, save, steps};
use crate::device::DeviceFile;
use crate::state::{self, Sections};

/// Everything that an exec needs, when the devices are stopped.
pub(super) struct ExecSwitch<'a> {
    pub(super) image: &'a Image,
    /// Frees the page tables of this image after the exec. If there is none, the exec frees them.
    pub(super) reaper: Option<&'a MmReaper>,
    pub(super) sections: Sections,
    pub(super) until: Option<Instant>,
}

impl ExecSwitch<'_> {
    /// Writes the state and execs. Returns only on failure, with the reason; close-on-exec flags are restored then.
    pub(super) fn run<D: DeviceFile>(self, stopped: &Stopped<D>) -> UpdateError {
        let at = |phase| move |source| UpdateError { phase, device: None, source };
        let Self { image, reaper: mm_reaper, mut sections, until } = self;
        let plan = &stopped.described.plan;
        let mut write = || -> Result<_, Cause> {
            stopped.put_switch(&mut sections)?;
            memfd::sealed(c"vdpa-live-state", &state::encode(&sections)?)
                .map_err(|source| Cause::System { action: "write the state", source })
        };
        let file = match write() {
            Ok(file) => file,
            Err(cause) => return at(Phase::Save)(cause),
        };
        let exec = || -> Result<std::convert::Infallible, Cause> {
            let mut open = Open::default();
            for device in &stopped.devices {
                device.ops.iter().try_for_each(|ops| open.inherit(ops.fd()))?;
                let regions = device.setup.regions.list().iter().filter_map(|r| r.object());
                let nameless = save::nameless_memories(&device.setup);
                let regions =
                    regions.chain(nameless.filter_map(|(memory, _)| memory.object().map(|(fd, _)| fd)));
                let events = device.setup.vrings().flat_map(|v| [v.kick.as_fd(), v.call.as_fd()]);
                regions.chain(events).try_for_each(|fd| open.inherit(fd))?;
            }
            plan.descriptors.iter().try_for_each(|(_, fd)| open.inherit(fd.as_fd()))?;
            open.inherit(file.as_fd())?;
            let (path, args, mut env) = image.strings()?;
            let pidfds = reaper::inheritable(mm_reaper);
            let numbers: Vec<String> = pidfds.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
            let variables = [
                (STATE_VARIABLE, file.as_raw_fd().to_string()),
                (PID_VARIABLE, steps::own_pid().to_string()),
                (reaper::VARIABLE, numbers.join(",")),
            ];
            for (name, value) in variables {
                let variable = CString::new(format!("{name}={value}"));
                env.push(variable.map_err(|_| Cause::Nul { what: "environment" })?);
            }
            if until.is_some_and(|until| Instant::now() >= until) {
                return Err(Cause::Deadline);
            }
            checkpoint(Checkpoint::BeforeExec);
            execve(Program::Path(&path), &args, &env)
                .map_err(|source| Cause::System { action: "execve the new image", source })
        };
        match exec() {
            Ok(never) => match never {},
            Err(cause) => at(Phase::Transfer)(cause),
        }
    }
}

/// Descriptors that stay open over the exec: their close-on-exec flag is cleared. Dropping it sets the flags again.
#[derive(Default)]
struct Open<'a>(Vec<BorrowedFd<'a>>);

impl<'a> Open<'a> {
    fn inherit(&mut self, fd: BorrowedFd<'a>) -> Result<(), Cause> {
        let system = |source| Cause::System { action: "keep a descriptor open over the exec", source };
        let flags = rustix::io::fcntl_getfd(fd).map_err(|e| system(Errno::from_raw(e.raw_os_error())))?;
        if flags.contains(FdFlags::CLOEXEC) {
            // Not `set_close_on_exec`, which reads the flags once more: each system call adds to the downtime.
            rustix::io::fcntl_setfd(fd, flags - FdFlags::CLOEXEC)
                .map_err(|e| system(Errno::from_raw(e.raw_os_error())))?;
            self.0.push(fd);
        }
        Ok(())
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        for fd in &self.0 {
            // Cannot fail: the flag of this descriptor was changed a moment ago.
            let _ = set_close_on_exec(fd, true);
        }
    }
}
