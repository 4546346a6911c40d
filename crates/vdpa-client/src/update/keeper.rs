//! Waits for the process that freed the page tables of the previous image (`vdpa_sys::mm_reaper`).
//!
//! When that process ends its parent is gone, so init or the nearest subreaper waits for it. A program that is init or a
//! subreaper itself, such as the first process of a container, would gain one zombie with each update. So the new image
//! waits for it here.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};
use vdpa_sys::exec::set_close_on_exec;
use vdpa_sys::inherit;
use vdpa_sys::mm_reaper::MmReaper;

/// Environment variable with the numbers of the pidfds of such processes, separated by commas.
pub(super) const VARIABLE: &str = "VDPA_LIVE_KEEPERS";

/// Pidfds of processes left by previous images that have not ended yet. More than one only if updates follow each other
/// faster than page tables are freed.
static LAST: Mutex<Vec<OwnedFd>> = Mutex::new(Vec::new());

fn last() -> MutexGuard<'static, Vec<OwnedFd>> {
    LAST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Inheritable pidfds of `keeper` and of those in [`LAST`], for the next image. The caller drops them if the exec fails.
pub(super) fn leave(keeper: Option<&MmReaper>) -> Vec<OwnedFd> {
    collect();
    let open = |keeper: &MmReaper| pidfd_open(Pid::from_raw(keeper.pid())?, PidfdFlags::empty()).ok();
    let before: Vec<OwnedFd> = last().iter().filter_map(|fd| fd.try_clone().ok()).collect();
    let all = before.into_iter().chain(keeper.and_then(open));
    all.filter(|fd| set_close_on_exec(fd, false).is_ok()).collect()
}

/// Adopts the pidfds that the previous image left.
pub(super) fn adopt() {
    let numbers = std::env::var(VARIABLE).unwrap_or_default();
    let numbers = numbers.split(',').filter_map(|number| number.parse().ok());
    *last() = numbers.filter_map(|number| inherit::take(number).ok()).collect();
    collect();
}

/// Waits for those that have ended (`WNOHANG`). Does not block.
pub(super) fn collect() {
    // Usually ECHILD, since init or a subreaper waits for it; it is dropped then.
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    last().retain(|pidfd| matches!(waitid(WaitId::PidFd(pidfd.as_fd()), options), Ok(None)));
}
