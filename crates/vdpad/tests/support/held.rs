//! A daemon below a holder that tests kill and upgrade.

use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vdpa_control::api::{DaemonInfo, HolderInfo};

use super::robust::{Vdpad, eventually, front};

/// Starts a daemon below a holder, whose files are of the front end in `VDPAD_TEST_FRONT`; FUSE by default. The test may take
/// some minutes from now on.
pub(crate) fn start(args: &[&str]) -> Vdpad {
    Vdpad::start_with(
        Duration::from_secs(if is_cuse() { 600 } else { 120 }),
        &[&["--holder"], front(), args].concat(),
    )
}

/// Whether device files are character devices.
pub(crate) fn is_cuse() -> bool {
    std::env::var_os("VDPAD_TEST_FRONT").is_some_and(|front| front == "cuse")
}

pub(crate) fn daemon(vdpad: &Vdpad) -> DaemonInfo {
    eventually("the daemon answers", || vdpad.client().daemon().ok())
}

pub(crate) fn holder(vdpad: &Vdpad) -> HolderInfo {
    daemon(vdpad).holder.unwrap()
}

/// Kills the daemon; the next one may not serve yet.
pub(crate) fn kill(vdpad: &Vdpad) {
    let pid = daemon(vdpad).pid;
    assert_ne!(pid, vdpad.pid().as_raw_nonzero().get().unsigned_abs(), "the daemon is a child of the holder");
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
}

/// Kills the daemon, and waits until the next one serves.
pub(crate) fn replace(vdpad: &Vdpad) {
    let before = holder(vdpad).generation;
    kill(vdpad);
    eventually("the next daemon serves", || {
        vdpad.client().daemon().ok().and_then(|daemon| daemon.holder).filter(|now| now.generation > before)
    });
}

/// Upgrades the daemon to the same program.
#[track_caller]
pub(crate) fn upgrade(vdpad: &Vdpad) {
    vdpad.ctl("daemon upgrade").succeeds();
}

/// Whether the device has a client already.
pub(crate) fn is_busy(device: &Path) -> bool {
    let open = std::fs::File::options().read(true).write(true).open(device);
    open.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}
