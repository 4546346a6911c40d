//! What the machine gives this daemon, and what it withholds.

use vdpa_sys::machine::{Check, Loss, checks};
use vdpa_sys::rlimit;

/// Says which rights are missing, before the first client meets it.
pub(super) fn report() {
    // The choice of the front end has been logged.
    let lacks = |check: &Check| check.loss != Loss::None && check.name != "cuse";
    for check in checks().into_iter().filter(lacks) {
        tracing::warn!(remedy = check.remedy, "{}: {}", check.name, check.finding);
    }
}

/// Raises the limits of this process that devices use up.
pub(crate) fn raise_limits() {
    // The daemon charges pinned guest memory to its owner, so its own limit must not be reached first. Where it cannot be
    // raised, devices report that when they fail to pin.
    if let Err(error) = rlimit::raise_memlock(None) {
        tracing::debug!("RLIMIT_MEMLOCK stays as it is: {error}");
    }
    // Each device needs descriptors, and the usual soft limit of 1024 is for programs that use select(2).
    if let Err(error) = rlimit::raise_nofile() {
        tracing::warn!("RLIMIT_NOFILE stays as it is: {error}");
    }
}
