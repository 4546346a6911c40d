//! A daemon that ends while a request of the client stops or starts a queue in whose ring there are requests: each of them is answered
//! once, and nothing that was answered before is done again.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/crash.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod crash;
#[path = "support/loads.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod loads;
#[path = "support/net.rs"]
#[expect(dead_code, reason = "every test binary uses its own part")]
mod net;
#[path = "support/robust.rs"]
mod robust;
#[path = "support/tap.rs"]
mod tap;

use std::os::fd::AsFd as _;
use std::time::Duration;

use vdpa_core::crash_points::CrashPoint;
use vdpa_core::features::Status;
use vdpa_core::ops::VdpaOps as _;
use vdpa_sys::eventfd::EventFd;
use vdpad::crash_points::Action;

use crash::Crashes;
use loads::{Blocks, Faults, Load as _};
use robust::Vdpad;
use robust::disk::Q0;

const LIMIT: Duration = Duration::from_secs(100);

/// A request that stops the queue, starts it, or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// RESUME, after a SUSPEND.
    Resume,
    Call,
    Kick,
    Enable,
    /// The last one: nothing is in flight.
    Reset,
}

const CHANGES: [Change; 5] = [Change::Resume, Change::Call, Change::Kick, Change::Enable, Change::Reset];

impl Change {
    /// Whether the device does not start the queue in the same request.
    const fn only_stops(self) -> bool {
        matches!(self, Self::Reset)
    }

    fn request(self, load: &Blocks) {
        let device = load.device();
        let queue = load.disk.session.queue(Q0).unwrap();
        let again = |event: &EventFd| EventFd::try_from(event.as_fd().try_clone_to_owned().unwrap()).unwrap();
        match self {
            Self::Resume => device.resume().unwrap(),
            Self::Call => device.set_vring_call(Q0, Some(&again(queue.call()))).unwrap(),
            Self::Kick => device.set_vring_kick(Q0, Some(&again(queue.kick()))).unwrap(),
            Self::Enable => device.set_vring_enable(Q0, true).unwrap(),
            Self::Reset => device.set_status(Status(0)).unwrap(),
        }
    }
}

/// A daemon that is killed at `point` in each of the changes.
fn killed(packed: bool, point: CrashPoint, action: Action) {
    let dir = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(dir.path()).unwrap();
    let crashes = Crashes::new();
    let mut command = robust::command_at(&dir);
    command.args(["--holder", "--front", "fuse", "--crash-limit", "60000"]);
    crashes.watch(&mut command);
    let vdpad = Vdpad::start_command(&dir, LIMIT, command);
    let path = vdpad.add_any("used", "blk");
    let mut load = Blocks::start(&path, packed);
    for change in CHANGES {
        if change.only_stops() && point == CrashPoint::QueueStarted {
            continue;
        }
        // The last of them leaves a ring whose requests are all answered.
        for round in 0..12 {
            let faults = load.burst();
            assert_eq!(
                faults,
                Faults { requests: faults.requests, ..Faults::default() },
                "{change:?} {round}"
            );
        }
        match change {
            Change::Resume => load.device().suspend().unwrap(),
            Change::Enable => load.device().set_vring_enable(Q0, false).unwrap(),
            _ => {}
        }
        if change != Change::Reset {
            load.begin();
        }
        let fired = crashes.fired();
        crashes.arm(point, 1, action);
        change.request(&load);
        crashes.disarm();
        assert_eq!(crashes.fired(), fired + 1, "{change:?}: {point:?} was not reached");
        let faults = load.end();
        println!("{change:?}: {faults:?}");
        assert_eq!(faults, Faults { requests: faults.requests, ..Faults::default() }, "{change:?}");
        if change == Change::Reset {
            load.check_image(&dir.join("used.img"));
        }
    }
}

#[test]
fn split_queue_started() {
    killed(false, CrashPoint::QueueStarted, Action::Kill);
}

#[test]
fn packed_queue_started() {
    killed(true, CrashPoint::QueueStarted, Action::Kill);
}

#[test]
fn split_request_executed() {
    killed(false, CrashPoint::RequestExecuted, Action::Kill);
}

#[test]
fn packed_request_executed() {
    killed(true, CrashPoint::RequestExecuted, Action::Kill);
}

#[test]
fn split_request_executed_and_ring_served() {
    killed(false, CrashPoint::RequestExecuted, Action::KillLater);
}

#[test]
fn packed_request_executed_and_ring_served() {
    killed(true, CrashPoint::RequestExecuted, Action::KillLater);
}
