//! A daemon that is stopped or killed while clients use its devices.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/robust.rs"]
mod robust;

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use vdpa_core::Errno;
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::Asid;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use robust::disk::{self, Disk};
use robust::{Vdpad, eventually};

const LIMIT: Duration = Duration::from_secs(60);
/// The errors of clients whose daemon has ended: the connection was aborted while they waited, or before.
const GONE: [i32; 2] = [libc::ECONNABORTED, libc::ENOTCONN];

#[track_caller]
fn is_gone<T: std::fmt::Debug>(result: Result<T, Errno>) {
    assert!(result.as_ref().is_err_and(|errno| GONE.contains(&errno.raw())), "{result:?}");
}

/// Opens the file, which must fail because nobody serves it.
fn open_raw(path: &Path) -> i32 {
    std::fs::File::options().read(true).write(true).open(path).unwrap_err().raw_os_error().unwrap()
}

/// Number of voluntary context switches of each thread of the process.
fn sleeps(pid: rustix::process::Pid) -> Vec<(String, u64)> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())).unwrap();
    let mut sleeps: Vec<_> = tasks
        .map(|task| {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let field = |name: &str| {
                status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned()
            };
            let count = field("voluntary_ctxt_switches:").parse().unwrap();
            (format!("{} {}", field("Pid:"), field("Name:")), count)
        })
        .collect();
    sleeps.sort();
    sleeps
}

mod heavy {
    use super::*;

    #[test]
    fn a_daemon_that_nobody_asks_does_not_wake_up() {
        let vdpad = Vdpad::start(LIMIT);
        let device = vdpad.add_any("disk0", "blk");
        vdpad.add_any("disk1", "sim-blk");
        let mut disk = Disk::start(&device, disk::MEMORY_MIN);
        disk.check(8);
        // It is idle when it has polled again.
        let (mut before, mut rounds) = (sleeps(vdpad.pid()), 0);
        loop {
            thread::sleep(Duration::from_secs(3));
            let now = sleeps(vdpad.pid());
            if now == before {
                break;
            }
            rounds += 1;
            assert!(rounds < 5, "it does not come to rest:\n{before:?}\n{now:?}");
            before = now;
        }
        disk.check(8);
    }

    #[test]
    fn a_stopped_daemon_does_not_hold_its_clients() {
        // Long enough for the heartbeats of a daemon on a busy machine.
        const TIMEOUT: Duration = Duration::from_secs(3);
        let mut vdpad = Vdpad::start_with(LIMIT, &["--watchdog-timeout", "3"]);
        let device = vdpad.add_any("disk0", "blk");
        let mut disk = Disk::start(&device, disk::MEMORY_MIN);
        // Longer than the time-out: the watchdog leaves a working daemon alone.
        let quiet = Instant::now() + TIMEOUT * 2;
        while Instant::now() < quiet {
            disk.check(1);
            thread::sleep(TIMEOUT / 4);
        }
        let begin = Instant::now();
        vdpad.stop();
        thread::scope(|scope| {
            // One client blocks in an ioctl, one in a write, one in an open.
            let waiting = scope.spawn(|| disk.session.ops().suspend());
            let writing = scope.spawn(|| disk.session.ops().batch_begin(Asid(0)));
            let opening = scope.spawn(|| open_raw(&device));
            is_gone(waiting.join().unwrap());
            is_gone(writing.join().unwrap());
            assert!(GONE.contains(&opening.join().unwrap()));
        });
        let freed = begin.elapsed();
        assert!(TIMEOUT / 2 < freed && freed < TIMEOUT * 4, "{freed:?}");
        is_gone(disk.session.ops().status());
        assert!(!vdpad.is_mounted());
        // Memory and ring belong to the client and stay usable, but nobody answers.
        drop(disk);

        // The daemon ends, since it is useless without its files; its supervisor can start another one.
        vdpad.signal(Signal::CONT);
        assert_eq!(vdpad.wait().code(), Some(1), "{}", vdpad.log());
        assert!(vdpad.log().contains("have been ended from outside"), "{}", vdpad.log());
    }

    #[test]
    fn a_killed_daemon_frees_its_clients_and_its_place() {
        let outer = tempfile::tempdir().unwrap();
        let dir = std::fs::canonicalize(outer.path()).unwrap();
        for _ in 0..5 {
            let mut vdpad = Vdpad::start_at(&dir, LIMIT, &[]);
            let device = vdpad.add_any("disk0", "blk");
            let mut disk = Disk::start(&device, disk::MEMORY_MIN);
            disk.check(1);
            vdpad.signal(Signal::KILL);
            let begin = Instant::now();
            vdpad.wait();
            is_gone(disk.session.ops().suspend());
            is_gone(disk.session.ops().batch_begin(Asid(0)));
            assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
            eventually("the watchdog has removed the mount", || (!vdpad.is_mounted()).then_some(()));
            // Its path is free even while the old client has the old file open; so is the backing file, whose
            // lock ended with the process.
            let next = Vdpad::start_at(&dir, LIMIT, &[]);
            let device = next.add_any("disk0", "blk");
            let mut other = Disk::start(&device, disk::MEMORY_MIN);
            other.check(2);
            is_gone(disk.session.ops().status());
            drop(disk);
            other.check(3);
            next.ctl("dev del disk0 --force").succeeds();
        }
    }

    /// A supervisor can start the next daemon before the watchdog has run.
    #[test]
    fn a_dead_mount_is_replaced() {
        let outer = tempfile::tempdir().unwrap();
        let dir = std::fs::canonicalize(outer.path()).unwrap();
        let mut vdpad = Vdpad::start_at(&dir, LIMIT, &[]);
        let device = vdpad.add_any("disk0", "sim-blk");
        let watchdog = eventually("the watchdog runs", || child_of(vdpad.pid()));
        rustix::process::kill_process(watchdog, Signal::KILL).unwrap();
        vdpad.signal(Signal::KILL);
        vdpad.wait();
        assert!(vdpad.is_mounted() && GONE.contains(&open_raw(&device)));
        let next = Vdpad::start_at(&dir, LIMIT, &[]);
        let device = next.add_any("disk0", "sim-blk");
        assert!(VhostVdpaFd::open(&device).is_ok());
    }
}

/// The only child of a process.
fn child_of(pid: rustix::process::Pid) -> Option<rustix::process::Pid> {
    let pid = pid.as_raw_nonzero();
    let mut children = std::fs::read_dir(format!("/proc/{}/task", pid)).unwrap().flat_map(|task| {
        let text = std::fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default();
        text.split_whitespace().map(|child| child.parse().unwrap()).collect::<Vec<i32>>()
    });
    rustix::process::Pid::from_raw(children.next()?)
}
