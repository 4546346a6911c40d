//! Replacing the program of this process by the next image.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Instant;

use rustix::io::FdFlags;
use vdpa_core::Errno;
use vdpa_sys::exec::{Program, execve, set_close_on_exec};
use vdpa_sys::keeper::AddressSpaceKeeper;
use vdpa_sys::memfd;

use super::checkpoint::{Checkpoint, checkpoint};
use super::rest::AtRest;
use super::{Cause, Image, PID_VARIABLE, Phase, Plan, STATE_VARIABLE, UpdateError, keeper, steps};
use crate::device::DeviceFile;
use crate::state::{self, Sections, v2};

/// The last steps of an image that is replaced.
pub(super) struct Leave<'a> {
    pub(super) image: &'a Image,
    pub(super) plan: &'a Plan,
    /// What takes down the page tables of this image.
    pub(super) keeper: Option<&'a AddressSpaceKeeper>,
    pub(super) sections: Sections,
    pub(super) late: Sections,
    pub(super) switch: v2::Switch,
    pub(super) until: Option<Instant>,
}

impl Leave<'_> {
    /// Execs. Returns the reason why this image still runs; close-on-exec flags are as before then.
    pub(super) fn go<D: DeviceFile>(self, resting: &[AtRest<D>]) -> UpdateError {
        let at = |phase| move |source| UpdateError { phase, device: None, source };
        let Self { image, plan, keeper: address_space, mut sections, late, switch, until } = self;
        sections.append(late);
        let mut write = || -> Result<_, Cause> {
            switch.put(&mut sections)?;
            memfd::sealed(c"vdpa-live-state", &state::encode(&sections)?)
                .map_err(|source| Cause::System { action: "write the state", source })
        };
        let file = match write() {
            Ok(file) => file,
            Err(cause) => return at(Phase::Save)(cause),
        };
        let exec = || -> Result<std::convert::Infallible, Cause> {
            let mut open = Open::default();
            for device in resting {
                device.ops.iter().try_for_each(|ops| open.inherit(ops.fd()))?;
                let regions = device.setup.regions.list().iter().filter_map(|r| r.object());
                let events = device.setup.vrings().flat_map(|v| [v.kick.as_fd(), v.call.as_fd()]);
                regions.chain(events).try_for_each(|fd| open.inherit(fd))?;
            }
            plan.descriptors.iter().try_for_each(|(_, fd)| open.inherit(fd.as_fd()))?;
            open.inherit(file.as_fd())?;
            let (path, args, mut env) = image.strings()?;
            let collected = keeper::leave(address_space);
            let numbers: Vec<String> = collected.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
            let variables = [
                (STATE_VARIABLE, file.as_raw_fd().to_string()),
                (PID_VARIABLE, steps::own_pid().to_string()),
                (keeper::VARIABLE, numbers.join(",")),
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

/// Descriptors that are to stay open over the exec. Dropping it puts their flags back.
#[derive(Default)]
struct Open<'a>(Vec<BorrowedFd<'a>>);

impl<'a> Open<'a> {
    fn inherit(&mut self, fd: BorrowedFd<'a>) -> Result<(), Cause> {
        let system = |source| Cause::System { action: "keep a descriptor open over the exec", source };
        let flags = rustix::io::fcntl_getfd(fd).map_err(|e| system(Errno::from_raw(e.raw_os_error())))?;
        if flags.contains(FdFlags::CLOEXEC) {
            // Without the look at the flag that comes with `set_close_on_exec`: each call counts here.
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
            // Cannot fail for a descriptor whose flag was just changed; and there is nobody to tell.
            let _ = set_close_on_exec(fd, true);
        }
    }
}
