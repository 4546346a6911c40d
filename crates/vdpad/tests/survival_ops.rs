//! A daemon below a holder in operation: hangs, crash loops, signals, the control socket over crashes and upgrades, and the service
//! manager.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/hanging.rs"]
mod hanging;
#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/held.rs"]
mod held;
#[path = "support/robust.rs"]
mod robust;

use std::fs;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vdpa_control::api::{DaemonInfo, DaemonRole, HolderInfo};
use vdpa_core::Errno;
use vdpa_core::blk::kind;
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::QueueIndex;
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::testing::StoppedThread;
use vdpa_sys::uapi::report::UpdateReport;
use zerocopy::FromZeros;

use hanging::HangingFile;
use held::{daemon, holder, start};
use robust::disk::{self, Disk};
use robust::{Vdpad, eventually, vdpactl};

fn pid(number: u32) -> Pid {
    Pid::from_raw(number.cast_signed()).unwrap()
}

/// Waits until another daemon than `before` serves.
fn next(vdpad: &Vdpad, before: u32) -> DaemonInfo {
    eventually("the next daemon serves", || vdpad.client().daemon().ok().filter(|now| now.pid != before))
}

/// `bench io` with verification on a device.
fn load(vdpad: &Vdpad, device: &std::path::Path, seconds: u32) -> std::process::Child {
    let line = format!("-j bench io --seconds {seconds} --memory 16M --disk 64M --queue-depth 32 --device");
    let mut command = vdpactl(vdpad.dir());
    command.args(line.split_whitespace()).arg(device);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The load has lost nothing.
fn has_lost_nothing(load: std::process::Child) {
    let output = load.wait_with_output().unwrap();
    let (text, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}\n{log}");
    for count in ["lost", "duplicate", "corrupt", "errors"] {
        assert!(text.replace(' ', "").contains(&format!("\"{count}\":0")), "{count}: {text}");
    }
}

/// Under load all threads of the daemon may sleep at the moment of the stop, and none of its counters says anything.
#[test]
fn a_daemon_that_is_stopped_under_load_is_replaced() {
    let vdpad = start(&["--hang-limit", "0.5"]);
    let device = vdpad.add_blk("disk0", 64 << 20, "memlock unlimited");
    let load = load(&vdpad, &device, 8);
    for round in 1..=3 {
        thread::sleep(Duration::from_millis(300));
        let before = daemon(&vdpad).pid;
        kill_process(pid(before), Signal::STOP).unwrap();
        let HolderInfo { crashes, last_crash, .. } = next(&vdpad, before).holder.unwrap();
        assert_eq!((crashes, last_crash.unwrap().hung), (round, true));
    }
    has_lost_nothing(load);
    assert!(vdpad.log().contains("makes no progress"), "{}", vdpad.log());
}

/// The thread of a daemon with this name.
fn thread_of(process: u32, name: &str) -> Pid {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap().map(|task| task.unwrap().path());
    let found =
        tasks.filter(|task| fs::read_to_string(task.join("comm")).is_ok_and(|comm| comm.trim() == name));
    let tid = found.last().unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap();
    Pid::from_raw(tid).unwrap()
}

/// A worker that spins or waits for ever, while the rest of the daemon works and answers.
#[test]
fn a_daemon_with_one_worker_that_hangs_is_replaced() {
    // Long enough for a busy host to have an answer before the daemon is killed.
    let vdpad = start(&["--hang-limit", "3", "--poll-us", "1000"]);
    let device = vdpad.add_blk("disk0", 64 << 20, "memlock unlimited");
    let load = load(&vdpad, &device, 8);
    let client = vdpad.client();
    let before = daemon(&vdpad).pid;
    let worker = thread_of(before, "vq-0");
    let syscall = format!("/proc/{before}/task/{}/syscall", worker.as_raw_nonzero());
    let stopped = eventually("it is stopped in its own code", || {
        let stopped = StoppedThread::stop(worker).unwrap();
        // In a system call it may sleep, which is no hang.
        fs::read_to_string(&syscall).is_ok_and(|text| text.starts_with("-1")).then_some(stopped)
    });
    let answer = thread::spawn(move || client.daemon());
    eventually("the holder ends it", || stopped.has_ended().then_some(()));
    // A process with a stopped thread does not end; without the next daemon, an answer that did not come in time never comes.
    drop(stopped);
    assert_eq!(answer.join().unwrap().unwrap().pid, before, "the other threads work");
    let HolderInfo { crashes, last_crash, .. } = next(&vdpad, before).holder.unwrap();
    assert_eq!((crashes, last_crash.unwrap().hung), (1, true));
    has_lost_nothing(load);
}

/// A read that never ends is in the kernel, and nobody in the daemon waits for it but its own client. Nor is a client that waits for
/// that disk in an ioctl a hang.
#[test]
fn a_disk_that_does_not_answer_is_no_hang() {
    let vdpad = start(&["--hang-limit", "0.3"]);
    let slow = HangingFile::new(&vdpad.dir().join("slow.img"), 64 << 20);
    let device = vdpad.add("slow0", "blk", &format!("path {} format raw", slow.path.display()));
    let fast = vdpad.add_any("disk0", "blk");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    let mut other = Disk::start(&fast, disk::MEMORY_MIN);
    let before = daemon(&vdpad);
    disk.submit(0, (kind::IN, 2, 0));
    disk.kick();
    eventually("the disk has the read", || (slow.waiting() == 1).then_some(()));
    thread::scope(|scope| {
        // Waits for the request in flight.
        scope.spawn(|| disk.session.ops().vring_base(disk::Q0).unwrap());
        let end = Instant::now() + Duration::from_secs(2);
        while Instant::now() < end {
            other.check(1);
        }
        slow.recover();
    });
    let now = daemon(&vdpad);
    assert_eq!((now.pid, now.holder.unwrap().crashes), (before.pid, 0), "{}", vdpad.log());
}

/// After too many crashes nothing hangs: clients get errors, the control API answers, and the next end is that of the service.
#[test]
fn after_too_many_crashes_every_request_gets_an_error() {
    let mut vdpad = start(&["--crash-limit", "2", "--crash-window", "3600"]);
    let device = vdpad.add_any("disk0", "blk");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    let broken = EventFd::new().unwrap();
    disk.session.ops().set_vring_err(QueueIndex(0), Some(&broken)).unwrap();
    disk.check(1);
    for _ in 0..2 {
        let before = daemon(&vdpad).pid;
        kill_process(pid(before), Signal::KILL).unwrap();
        assert_eq!(next(&vdpad, before).role, DaemonRole::Daemon);
        disk.check(2);
    }
    assert_eq!(broken.drain(), 0, "nothing was broken yet");
    let before = daemon(&vdpad).pid;
    kill_process(pid(before), Signal::KILL).unwrap();
    let failed = next(&vdpad, before);
    assert_eq!(failed.role, DaemonRole::Failed);
    assert!(broken.wait(Some(robust::SOON)), "the client hears that its ring is broken");
    for _ in 0..3 {
        assert_eq!(disk.session.ops().status(), Err(Errno::IO));
        assert_eq!(disk.session.ops().vring_base(QueueIndex(0)).map(drop), Err(Errno::IO));
        let open = fs::File::open(&device).unwrap_err();
        assert_eq!(open.raw_os_error(), Some(Errno::IO.raw()));
    }
    let show = vdpad.ctl("daemon show");
    show.succeeds();
    assert!(show.stdout.contains("role failed") && show.stdout.contains("crashes 3"), "{show:?}");
    for command in ["dev show", "daemon upgrade", "dev del disk0"] {
        let output = vdpad.ctl(command);
        assert!(
            output.code == Some(1) && output.stderr.contains("crashed too often"),
            "{command}: {output:?}"
        );
    }
    assert!(vdpad.log().contains("the device is given up: every request gets EIO"), "{}", vdpad.log());
    kill_process(pid(failed.pid), Signal::KILL).unwrap();
    assert_eq!(vdpad.wait().code(), Some(1));
    if held::is_cuse() {
        eventually("the character device is gone", || (!device.exists()).then_some(()));
    } else {
        assert!(!vdpad.is_mounted(), "{}", vdpad.log());
    }
    assert!(disk.session.ops().status().is_err());
}

/// Crashes that lie further apart than the window are not counted together.
#[test]
fn crashes_outside_the_window_are_forgotten() {
    let vdpad = start(&["--crash-limit", "1", "--crash-window", "0.000001"]);
    for _ in 0..4 {
        let before = daemon(&vdpad).pid;
        kill_process(pid(before), Signal::KILL).unwrap();
        assert_eq!(next(&vdpad, before).role, DaemonRole::Daemon);
    }
}

/// SIGHUP to the main process, as `systemctl reload` may send it, and to the daemon itself.
#[test]
fn sighup_is_an_upgrade() {
    let vdpad = start(&[]);
    let device = vdpad.add_any("disk0", "blk");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    let before = daemon(&vdpad).pid;
    vdpad.signal(Signal::HUP);
    let second = next(&vdpad, before);
    disk.check(1);
    kill_process(pid(second.pid), Signal::HUP).unwrap();
    let third = next(&vdpad, second.pid);
    disk.check(2);
    let HolderInfo { upgrades, crashes, .. } = third.holder.unwrap();
    assert_eq!((upgrades, crashes), (2, 0));
    // One that is not possible is logged, and nothing changes.
    vdpad.add("ram0", "sim-blk", "");
    if vdpad.log().contains("the device ends with this daemon") {
        vdpad.signal(Signal::HUP);
        eventually("the log says why", || vdpad.log().contains("no upgrade: device ram0").then_some(()));
        assert_eq!(daemon(&vdpad).pid, third.pid);
    }
    disk.check(3);
}

/// Whatever happens to the daemon, the socket is there, accepts connections, and answers each question.
#[test]
fn the_control_socket_survives_crashes_and_upgrades() {
    let vdpad = start(&["--crash-limit", "100"]);
    vdpad.add_any("disk0", "blk");
    let (done, asked) = (AtomicBool::new(false), AtomicBool::new(false));
    let socket = vdpad.dir().join("control.sock");
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    // Asked again once by the client library, when the daemon ends in the middle of it.
                    assert_eq!(vdpad.client().devices().unwrap().len(), 1);
                    asked.store(true, Ordering::Relaxed);
                }
            });
        }
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert!(fs::symlink_metadata(&socket).is_ok(), "the socket has disappeared");
                assert!(std::os::unix::net::UnixStream::connect(&socket).is_ok(), "a connection was refused");
                // Not so often that the daemon has nothing else to do.
                thread::sleep(Duration::from_millis(5));
            }
        });
        for round in 0..6 {
            asked.store(false, Ordering::Relaxed);
            let before = daemon(&vdpad).pid;
            if round % 2 == 0 {
                vdpad.ctl("daemon upgrade").succeeds();
            } else {
                kill_process(pid(before), Signal::KILL).unwrap();
            }
            next(&vdpad, before);
            eventually("a question is answered", || asked.load(Ordering::Relaxed).then_some(()));
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// A request that changes something is answered before the daemon hands over, and the answer is of the daemon that did it. During
/// the upgrade it is refused.
#[test]
fn requests_in_progress_are_answered_before_an_upgrade() {
    let vdpad = start(&[]);
    for round in 0..4 {
        let before = daemon(&vdpad).pid;
        thread::scope(|scope| {
            let add = scope.spawn(|| {
                for number in 0..8 {
                    let command = format!("dev add name disk{round}-{number} mgmtdev blk null 1048576");
                    eventually("the device is added", || {
                        let added = vdpad.ctl(&command);
                        let refused = added.stderr.contains("an upgrade is in progress");
                        assert!(refused || added.code == Some(0), "{added:?}");
                        (!refused).then_some(())
                    });
                }
            });
            vdpad.ctl("daemon upgrade").succeeds();
            add.join().unwrap();
        });
        next(&vdpad, before);
        assert_eq!(vdpad.client().devices().unwrap().len(), (round + 1) * 8);
    }
    assert_eq!(holder(&vdpad).crashes, 0);
}

#[test]
fn daemon_show_tells_everything() {
    let vdpad = start(&[]);
    vdpad.add_any("disk0", "blk");
    let before = daemon(&vdpad);
    assert!(before.holder.as_ref().unwrap().recovery.is_empty());
    kill_process(pid(before.pid), Signal::ABORT).unwrap();
    next(&vdpad, before.pid);
    // The control socket is served just before the daemon has told its holder that it serves.
    let HolderInfo { held, held_kinds, recovery, last_crash, .. } = eventually("it serves", || {
        Some(holder(&vdpad)).filter(|holder| holder.recovery.iter().any(|phase| phase.name == "serve"))
    });
    assert_eq!(held, held_kinds.values().sum::<u64>());
    assert_eq!(held_kinds.get("fuse"), Some(&1), "{held_kinds:?}");
    assert!(held_kinds.get("memory").is_some_and(|&count| count >= 4), "{held_kinds:?}");
    let names: Vec<_> = recovery.iter().map(|phase| phase.name.as_str()).collect();
    assert_eq!(names, ["start", "take back", "devices", "files", "serve"]);
    let whole: f64 = recovery.iter().map(|phase| phase.ms).sum();
    let told = last_crash.unwrap().recovery_ms;
    assert!((whole - told).abs() < 1.0, "{recovery:?} {told}");
    let show = vdpad.ctl("daemon show");
    show.succeeds();
    for text in ["role daemon poison 0", "crashes 1", "signal 6", "  held ", " fuse 1", "  recovery start "] {
        assert!(show.stdout.contains(text), "{text}: {show:?}");
    }
    let json = vdpad.ctl("-j daemon show");
    json.succeeds();
    for text in ["\"role\":\"daemon\"", "\"held_kinds\"", "\"recovery\"", "\"signal\":6"] {
        assert!(json.stdout.replace(": ", ":").contains(text), "{text}: {json:?}");
    }
    assert!(vdpad.log().contains("signal=\"SIGABRT\""), "{}", vdpad.log());
}

/// What was counted of rings and of updates is the same after a crash and after an upgrade, and goes on from there.
#[test]
fn counters_and_history_survive() {
    let vdpad = start(&[]);
    let device = vdpad.add_blk("disk0", 64 << 20, "packed on");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    (1..20).for_each(|seed| disk.check(seed));
    let report = UpdateReport {
        version: vdpa_sys::uapi::report::VERSION,
        total: 1234,
        predecessor: 7,
        successor: 8,
        ..UpdateReport::new_zeroed()
    };
    disk.session.ops().report_update(&report).unwrap();
    let counts = || {
        let queues = vdpad.info("disk0").state.queues.into_iter();
        let queues: Vec<_> = queues.map(|queue| (queue.requests, queue.bytes, queue.errors)).collect();
        (queues, vdpad.client().update("disk0").unwrap())
    };
    let before = counts();
    assert_eq!(before.0.first().unwrap().0, 38);
    assert_eq!((before.1.updates, before.1.last.is_some()), (1, true));
    for round in 1..4 {
        let pid_before = daemon(&vdpad).pid;
        if round % 2 == 0 {
            vdpad.ctl("daemon upgrade").succeeds();
        } else {
            kill_process(pid(pid_before), Signal::KILL).unwrap();
        }
        next(&vdpad, pid_before);
        assert_eq!(counts(), before, "round {round}");
    }
    disk.check(99);
    disk.session.ops().report_update(&UpdateReport { outcome: 1, ..report }).unwrap();
    let after = counts();
    assert_eq!(after.0.first().unwrap().0, 40);
    assert_eq!((after.1.updates, after.1.rolled_back), (1, 1));
}
