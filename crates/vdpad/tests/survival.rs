//! A daemon below a holder (`--holder`) that is killed while clients use its devices: the next daemon goes on.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/hanging.rs"]
mod hanging;
#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/held.rs"]
mod held;
#[path = "support/robust.rs"]
mod robust;

use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vdpa_control::api::HolderInfo;
use vdpa_core::Errno;
use vdpa_core::blk::kind;
use vdpa_core::features::Status;
use vdpa_core::ops::VdpaOps;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use hanging::HangingFile;
use held::{daemon, holder, is_busy, kill, replace, start};
use robust::disk::{self, Disk};
use robust::{Vdpad, eventually, run, vdpactl};

const LIMIT: Duration = Duration::from_secs(120);
/// The errors of clients whose device is gone.
const GONE: [i32; 4] = [libc::ECONNABORTED, libc::ENOTCONN, libc::ENODEV, libc::ENOENT];

#[track_caller]
fn is_gone<T: std::fmt::Debug>(result: Result<T, Errno>) {
    assert!(result.as_ref().is_err_and(|errno| GONE.contains(&errno.raw())), "{result:?}");
}

/// What the client sees, and what an administrator sees of the client, is as before; requests on its rings are served.
#[test]
fn a_client_keeps_its_device() {
    let vdpad = start(&[]);
    let device = vdpad.add_any("disk0", "blk");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    disk.check(1);
    let before = vdpad.info("disk0");
    for seed in 2..6 {
        kill(&vdpad);
        // Answered by the next daemon.
        assert_eq!(disk.session.ops().status().unwrap(), before.state.status);
        assert!(is_busy(&device));
        disk.check(seed);
        let now = vdpad.info("disk0");
        assert_eq!(now.state.owner.as_ref().unwrap().pid, std::process::id());
        let shared = |info: &vdpa_control::api::DevInfo| {
            let state = &info.state;
            let queues: Vec<_> =
                state.queues.iter().map(|queue| (queue.size, queue.enabled, queue.running)).collect();
            let counts = (state.pinned_pages, state.mappings);
            (state.status, state.negotiated_features, counts, queues, info.path.clone())
        };
        assert_eq!(shared(&now), shared(&before));
    }
    let HolderInfo { crashes, generation, last_crash, .. } = holder(&vdpad);
    assert_eq!((crashes, generation), (4, 5));
    let crash = last_crash.unwrap();
    assert_eq!((crash.signal, crash.hung), (libc::SIGKILL, false));
    assert!(crash.recovery_ms > 0.0 && crash.recovery_ms < 30_000.0, "{crash:?}");
    // The client can leave, and another one gets the device.
    drop(disk);
    vdpad.is_released("disk0");
    Disk::start(&device, disk::MEMORY_MIN).check(7);
}

/// Devices that were added, deleted and opened by nobody.
#[test]
fn devices_stay_as_they_were_added() {
    let vdpad = start(&[]);
    let disk0 = vdpad.add_any("disk0", "blk");
    vdpad.add_any("disk1", "blk");
    let net = vdpad.add("net0", "sim-net", "mac 02:00:00:00:00:07");
    vdpad.ctl("dev del disk1").succeeds();
    vdpad.ctl("dev set name net0 mac 02:00:00:00:00:08").succeeds();
    replace(&vdpad);
    let names: Vec<_> = vdpad.client().devices().unwrap().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["disk0", "net0"]);
    let show = vdpad.ctl("dev config show net0");
    show.succeeds();
    assert!(show.stdout.contains("02:00:00:00:00:08"), "{show:?}");
    assert!(VhostVdpaFd::open(&net).is_ok());
    // A name that has become free, and one more crash.
    let disk1 = vdpad.add_any("disk1", "blk");
    let mut first = Disk::start(&disk0, disk::MEMORY_MIN);
    let mut second = Disk::start(&disk1, disk::MEMORY_MIN);
    first.check(1);
    replace(&vdpad);
    first.check(2);
    second.check(3);
    assert_eq!(vdpad.ctl("dev del disk0").code, Some(1), "its client has it open");
    vdpad.ctl("dev del disk0 --force").succeeds();
    assert!(first.session.ops().status().unwrap().contains(Status::NEEDS_RESET), "it was taken away");
    replace(&vdpad);
    is_gone(first.session.ops().status());
    let names: Vec<_> = vdpad.client().devices().unwrap().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["net0", "disk1"]);
    second.check(4);
}

/// The memory of a client is free when it has closed the device, whatever happened before.
#[test]
fn the_memory_of_a_client_is_given_back() {
    let vdpad = start(&[]);
    let device = vdpad.add_any("disk0", "blk");
    let pieces =
        |of: Pid| robust::Resources::of(of).fds.get("/memfd:robust-ram (deleted)").copied().unwrap_or(0);
    for round in 0..3 {
        let mut disk = Disk::start(&device, disk::MEMORY_MIN);
        disk.check(round);
        if round == 1 {
            replace(&vdpad);
        }
        assert_eq!(pieces(vdpad.pid()), 1, "it is held");
        drop(disk);
        vdpad.is_released("disk0");
        let daemon = Pid::from_raw(daemon(&vdpad).pid.cast_signed()).unwrap();
        eventually("it is free", || ((pieces(vdpad.pid()), pieces(daemon)) == (0, 0)).then_some(()));
    }
}

/// A copy of a descriptor of the dead daemon makes its control socket look used: it is replaced.
#[test]
fn a_control_socket_that_seems_to_be_in_use_is_replaced() {
    let vdpad = start(&[]);
    let device = vdpad.add_any("disk0", "blk");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    let _listener = UnixListener::bind(vdpad.dir().join("other")).unwrap();
    std::fs::rename(vdpad.dir().join("other"), vdpad.dir().join("control.sock")).unwrap();
    kill_process(child(&vdpad), Signal::KILL).unwrap();
    // Nobody answers at the old one.
    let client = vdpad.client().with_timeout(Duration::from_millis(500));
    eventually("the next daemon serves", || client.daemon().ok());
    disk.check(1);
}

/// A daemon that cannot start leaves the devices to the one after it.
#[test]
fn a_successor_that_fails_is_followed_by_another() {
    let vdpad = start(&["--crash-limit", "60000"]);
    let device = vdpad.add_any("disk0", "blk");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    let socket = vdpad.dir().join("control.sock");
    std::fs::remove_file(&socket).unwrap();
    std::fs::create_dir(&socket).unwrap();
    kill_process(child(&vdpad), Signal::KILL).unwrap();
    let failed = || (vdpad.log().matches("is not a socket").count() >= 3).then_some(());
    eventually("three successors have failed", failed);
    std::fs::remove_dir(&socket).unwrap();
    let crashes =
        eventually("the next daemon serves", || vdpad.client().daemon().ok()).holder.unwrap().crashes;
    assert!(crashes >= 4, "{crashes}");
    disk.check(1);
    drop(disk);
    vdpad.is_released("disk0");
}

/// The daemon, by the kernel: it may not answer.
fn child(vdpad: &Vdpad) -> Pid {
    let holder = vdpad.pid().as_raw_nonzero();
    let children = std::fs::read_to_string(format!("/proc/{holder}/task/{holder}/children")).unwrap();
    Pid::from_raw(children.trim().parse().unwrap()).unwrap()
}

/// What cannot be restored ends with its daemon, and does not stand in the way of what has its name later.
#[test]
fn a_device_that_cannot_be_restored_is_given_up_for_good() {
    let vdpad = start(&["--dev", "name=ram0 mgmtdev=sim-blk", "--dev", "name=ram1 mgmtdev=sim-blk"]);
    // A device of --dev may have been deleted, or have made room for another one.
    vdpad.ctl("dev del ram0").succeeds();
    vdpad.ctl("dev del ram1").succeeds();
    let stays = vdpad.add_any("ram0", "blk");
    let mut stays = Disk::start(&stays, disk::MEMORY_MIN);
    vdpad.add_any("disk0", "blk");
    std::fs::remove_file(vdpad.dir().join("disk0.img")).unwrap();
    replace(&vdpad);
    let names = || vdpad.client().devices().unwrap().into_iter().map(|info| info.name).collect::<Vec<_>>();
    assert_eq!(names(), ["ram0"], "{}", vdpad.log());
    stays.check(1);
    let disk = vdpad.add_any("disk0", "blk");
    let mut disk = Disk::start(&disk, disk::MEMORY_MIN);
    replace(&vdpad);
    assert_eq!(names(), ["ram0", "disk0"], "{}", vdpad.log());
    stays.check(2);
    disk.check(3);
}

/// A request in progress is executed exactly once, whenever the daemon dies: `SET_OWNER` succeeds once.
#[test]
fn a_request_in_progress_is_executed_once() {
    let vdpad = start(&["--crash-limit", "1000"]);
    let device = vdpad.add_any("disk0", "blk");
    for round in 0..20_u64 {
        let client = eventually("the device is free", || VhostVdpaFd::open(&device).ok());
        let pid = Pid::from_raw(daemon(&vdpad).pid.cast_signed()).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_micros(round * 50));
                kill_process(pid, Signal::KILL).unwrap();
            });
            client.set_owner().unwrap();
            let wanted = Status::ACKNOWLEDGE | Status::DRIVER;
            client.set_status(Status::ACKNOWLEDGE).unwrap();
            client.set_status(wanted).unwrap();
            assert_eq!(client.status().unwrap(), wanted);
            assert_eq!(client.set_owner(), Err(Errno::BUSY));
        });
        drop(client);
    }
    assert_eq!(holder(&vdpad).crashes, 20);
}

/// A write that the dead daemon had handed to a slow disk may reach it any time. It must not overwrite anything newer: nothing is
/// repeated, and nothing else begun, before it has ended.
#[test]
fn nothing_is_repeated_before_the_old_write_has_ended() {
    let vdpad = start(&[]);
    let slow = HangingFile::new(&vdpad.dir().join("slow.img"), 64 << 20);
    let device = vdpad.add("disk0", "blk", &format!("path {} format raw", slow.path.display()));
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    disk.submit(0, (kind::OUT, 2, 1));
    disk.kick();
    eventually("the disk has the write", || (slow.waiting() == 1).then_some(()));
    kill(&vdpad);
    // Long enough for a daemon that does not wait.
    let end = Instant::now() + Duration::from_secs(1);
    while Instant::now() < end {
        assert!(disk.reap().is_empty(), "completed while the write of the dead daemon was in flight");
        assert_eq!(slow.waiting(), 1, "only the write of the dead daemon is at the disk");
        thread::sleep(Duration::from_millis(5));
    }
    slow.recover();
    assert_eq!(disk.settle(), [0]);
    assert_eq!(holder(&vdpad).crashes, 1);
}

/// Writes and reads that are verified, with at most `depth` in flight, while `end` ends the daemon `times` times.
fn under_load(depth: u32, more: &str, times: u32, end: impl Fn(&Vdpad, u32)) {
    let vdpad = start(&["--crash-limit", "1000"]);
    let device = vdpad.add_blk("disk0", 64 << 20, "packed on memlock unlimited");
    let line = format!(
        "-j bench io --seconds 7 --memory 16M --disk 64M --queue-depth {depth} --read 50 {more} --device"
    );
    let mut command = vdpactl(vdpad.dir());
    command.args(line.split_whitespace()).arg(&device);
    let load = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    for round in 0..times {
        thread::sleep(Duration::from_millis(250));
        end(&vdpad, round);
    }
    let HolderInfo { crashes, upgrades, .. } = holder(&vdpad);
    assert_eq!(crashes + upgrades, u64::from(times));
    let output = load.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let result: Value = serde_json::from_str(&text).unwrap();
    println!("queue depth {depth} {more}, {crashes} crashes, {upgrades} upgrades: {result}");
    has_lost_nothing(&result);
}

fn killed_under_load(depth: u32, more: &str) {
    under_load(depth, more, 15, |vdpad, _| replace(vdpad));
}

/// Every count of a fault in the result of `bench io` is 0, and there was work.
fn has_lost_nothing(result: &Value) {
    let found = find(result, "requests").unwrap();
    assert!(found.as_u64().unwrap() > 100, "{result}");
    for count in ["lost", "duplicate", "corrupt", "errors"] {
        let found = find(result, count).unwrap_or_else(|| panic!("no {count} in {result}"));
        assert_eq!(found.as_u64(), Some(0), "{count}: {result}");
    }
}

/// The value of the first key with this name, at any depth.
fn find<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => map.get(name).or_else(|| map.values().find_map(|inner| find(inner, name))),
        Value::Array(list) => list.iter().find_map(|inner| find(inner, name)),
        _ => None,
    }
}

/// An upgrade to the same program, as to another: the client keeps everything.
#[test]
fn an_upgrade_keeps_clients() {
    let vdpad = start(&[]);
    let device = vdpad.add_any("disk0", "blk");
    vdpad.add("net0", "sim-net", "");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    for round in 1..4 {
        let before = daemon(&vdpad);
        let output = vdpad.ctl("daemon upgrade");
        output.succeeds();
        assert!(output.stdout.contains(&format!("upgrades {round} crashes 0")), "{output:?}");
        let now = daemon(&vdpad);
        assert_ne!(now.pid, before.pid);
        assert_eq!(now.holder.unwrap().pid, vdpad.pid().as_raw_nonzero().get().unsigned_abs());
        disk.check(round);
        assert_eq!(vdpad.client().devices().unwrap().len(), 2);
    }
    // A crash starts what was upgraded to.
    replace(&vdpad);
    disk.check(9);
    let HolderInfo { upgrades, crashes, generation, .. } = holder(&vdpad);
    assert_eq!((upgrades, crashes, generation), (3, 1, 5));
}

/// Whatever is wrong with the new program, the daemon goes on, and the answer says why.
#[test]
fn an_upgrade_that_fails_is_rolled_back() {
    let vdpad = start(&[]);
    let device = vdpad.add_any("disk0", "blk");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    let before = daemon(&vdpad).pid;
    let text = vdpad.dir().join("text");
    std::fs::write(&text, "no program").unwrap();
    let attempts = [
        ("/nonexistent/vdpad", "cannot open /nonexistent/vdpad"),
        (text.to_str().unwrap(), "cannot start"),
        ("/bin/false", "the candidate has refused with exit status 1"),
        ("/bin/true", "the candidate has refused with exit status 0"),
    ];
    for (binary, wanted) in attempts {
        let output = vdpad.ctl(&format!("daemon upgrade --binary {binary}"));
        assert!(output.code == Some(1) && output.stderr.contains(wanted), "{binary}: {output:?}");
        assert_eq!(daemon(&vdpad).pid, before);
        disk.check(1);
    }
    vdpad.ctl("daemon upgrade --dry-run").succeeds();
    assert_eq!(daemon(&vdpad).pid, before);
    vdpad.ctl("daemon upgrade").succeeds();
    disk.check(3);
    let plain = Vdpad::start(LIMIT);
    let output = plain.ctl("daemon upgrade");
    assert!(output.code == Some(1) && output.stderr.contains("it has no holder"), "{output:?}");
}

mod heavy {
    use super::*;

    /// Upgrades and crashes in turn under verified load.
    #[test]
    fn nothing_is_lost_by_upgrades() {
        under_load(32, "", 16, |vdpad, round| {
            if round.is_multiple_of(4) {
                replace(vdpad);
            } else {
                vdpad.ctl("daemon upgrade").succeeds();
            }
        });
    }

    #[test]
    fn nothing_is_lost_at_queue_depth_1() {
        killed_under_load(1, "");
    }

    #[test]
    fn nothing_is_lost_at_queue_depth_32() {
        killed_under_load(32, "");
    }

    #[test]
    fn nothing_is_lost_on_a_packed_ring() {
        killed_under_load(128, "--packed");
    }
}

/// The service ends in order by a signal to its main process, also after a crash.
#[test]
fn sigterm_ends_the_service() {
    let mut vdpad = start(&[]);
    let device = vdpad.add_any("disk0", "blk");
    let disk = Disk::start(&device, disk::MEMORY_MIN);
    replace(&vdpad);
    vdpad.signal(Signal::TERM);
    assert_eq!(vdpad.wait().code(), Some(0), "{}", vdpad.log());
    is_gone(disk.session.ops().status());
    assert!(!vdpad.is_mounted());
}

/// Nobody would start the daemon again: it serves on, and says so when it is asked.
#[test]
fn a_daemon_serves_on_without_its_holder() {
    let mut vdpad = start(&[]);
    let device = vdpad.add_any("disk0", "blk");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    let pid = daemon(&vdpad).pid;
    vdpad.signal(Signal::KILL);
    vdpad.wait();
    disk.check(1);
    let show = vdpad.ctl("daemon show");
    assert_eq!(show.code, Some(1), "{show:?}");
    assert!(show.stderr.contains("the holder does not answer"), "{show:?}");
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::TERM).unwrap();
    eventually("the mount is removed", || (!vdpad.is_mounted()).then_some(()));
    is_gone(disk.session.ops().status());
}

#[test]
fn daemon_show_tells_of_the_holder() {
    let vdpad = start(&[]);
    replace(&vdpad);
    let show = vdpad.ctl("daemon show");
    show.succeeds();
    for text in ["holder pid", "crashes 1", "signal 9"] {
        assert!(show.stdout.contains(text), "{text}: {show:?}");
    }
    let plain = Vdpad::start(LIMIT);
    let show = plain.ctl("daemon show");
    show.succeeds();
    assert!(show.stdout.contains("holder none"), "{show:?}");
}

#[test]
fn options_that_cannot_survive_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut command: Command = robust::command_at(dir.path());
    let output = run(command.args(["--crash-limit", "3"]));
    assert_eq!(output.code, Some(2), "{output:?}");
    assert!(output.stderr.contains("--holder"), "{output:?}");
}
