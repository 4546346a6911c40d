//! Waits for the mm reaper of the previous image ([`MmReaper`]), the process that frees that image's page tables.
//!
//! A reaper is not a child of this process: init, or the nearest subreaper, waits for it. A program that is itself init or a
//! subreaper, such as the first process of a container, would therefore gain one zombie with each update. So each image
//! passes the pidfds of the reapers on to the next image, which waits for them.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};
use vdpa_sys::exec::set_close_on_exec;
use vdpa_sys::inherit;
use vdpa_sys::mm_reaper::MmReaper;

/// Environment variable with the numbers of the reapers' pidfds, separated by commas. Its name is part of the protocol
/// between images of different versions.
pub(super) const VARIABLE: &str = "VDPA_LIVE_KEEPERS";

/// Pidfds of the reapers of previous images that have not ended yet. There is more than one only if updates follow each
/// other faster than page tables are freed.
static PIDFDS: Mutex<Vec<OwnedFd>> = Mutex::new(Vec::new());

fn pidfds() -> MutexGuard<'static, Vec<OwnedFd>> {
    PIDFDS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns inheritable pidfds of `reaper` and of those in [`PIDFDS`], for the next image. The caller drops them if the exec
/// fails.
pub(super) fn inheritable(reaper: Option<&MmReaper>) -> Vec<OwnedFd> {
    collect();
    let open = |reaper: &MmReaper| pidfd_open(Pid::from_raw(reaper.pid())?, PidfdFlags::empty()).ok();
    let before: Vec<OwnedFd> = pidfds().iter().filter_map(|fd| fd.try_clone().ok()).collect();
    let all = before.into_iter().chain(reaper.and_then(open));
    all.filter(|fd| set_close_on_exec(fd, false).is_ok()).collect()
}

/// Takes over the pidfds that the previous image has passed on.
pub(super) fn adopt() {
    let numbers = std::env::var(VARIABLE).unwrap_or_default();
    let numbers = numbers.split(',').filter_map(|number| number.parse().ok());
    *pidfds() = numbers.filter_map(|number| inherit::take(number).ok()).collect();
    collect();
}

/// Waits for the reapers that have ended (`WNOHANG`) and drops their pidfds. Does not block.
pub(super) fn collect() {
    // Usually ECHILD, since init or a subreaper waits for the reaper. Its pidfd is dropped then as well.
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    pidfds().retain(|pidfd| matches!(waitid(WaitId::PidFd(pidfd.as_fd()), options), Ok(None)));
}
