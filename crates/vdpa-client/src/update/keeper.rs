//! Collecting the process that took down the page tables of the image before.
//!
//! It is nobody's child when it ends, so init collects it, or the nearest subreaper. A program that is one of these itself
//! (the first process of a container) would have one more dead child with each update.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};
use vdpa_sys::exec::set_close_on_exec;
use vdpa_sys::inherit;
use vdpa_sys::mm_reaper::MmReaper;

/// Environment variable with the numbers of descriptors of such processes (pidfds).
pub(super) const VARIABLE: &str = "VDPA_LIVE_KEEPERS";

/// Those of images before that were not collected yet and may be this process's to collect. More than one only where
/// updates follow each other faster than memory is taken down.
static LAST: Mutex<Vec<OwnedFd>> = Mutex::new(Vec::new());

fn last() -> MutexGuard<'static, Vec<OwnedFd>> {
    LAST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Descriptors by which the next image can collect `keeper` and those before it. They are inherited; dropped when the exec
/// fails.
pub(super) fn leave(keeper: Option<&MmReaper>) -> Vec<OwnedFd> {
    collect();
    let open = |keeper: &MmReaper| pidfd_open(Pid::from_raw(keeper.pid())?, PidfdFlags::empty()).ok();
    let before: Vec<OwnedFd> = last().iter().filter_map(|fd| fd.try_clone().ok()).collect();
    let all = before.into_iter().chain(keeper.and_then(open));
    all.filter(|fd| set_close_on_exec(fd, false).is_ok()).collect()
}

/// Takes the descriptors that the image before has left, if it has left any.
pub(super) fn adopt() {
    let numbers = std::env::var(VARIABLE).unwrap_or_default();
    let numbers = numbers.split(',').filter_map(|number| number.parse().ok());
    *last() = numbers.filter_map(|number| inherit::take(number).ok()).collect();
    collect();
}

/// Collects those that have ended; does not block.
pub(super) fn collect() {
    // Not this process's child, as a rule: ECHILD.
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    last().retain(|pidfd| matches!(waitid(WaitId::PidFd(pidfd.as_fd()), options), Ok(None)));
}
