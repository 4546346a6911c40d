//! What the kernel may withhold from the daemon: io_uring, descriptors.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/blk.rs"]
mod blk;
#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/held.rs"]
mod held;
#[path = "support/robust.rs"]
mod robust;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use vdpa_core::blk::{Segment, kind};
use vdpa_sys::testing::without_io_uring;

use blk::{Blk, OK};
use held::{replace, upgrade};
use robust::disk::{self, Disk};
use robust::{Vdpad, command_at, eventually, run, vdpactl};

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

fn start(dir: &Path, args: &[&str]) -> Vdpad {
    let mut command = command_at(dir);
    command.args(["--front", "fuse"]).args(args);
    without_io_uring(&mut command);
    Vdpad::start_command(dir, LIMIT, command)
}

/// Where a seccomp profile or the sysctl forbids io_uring, disks are served by threads.
#[test]
fn disks_work_without_io_uring() {
    let outer = tempfile::tempdir().unwrap();
    let dir = outer.path().canonicalize().unwrap();
    let vdpad = start(&dir, &[]);
    assert!(vdpad.log().contains("disks are served by threads"), "{}", vdpad.log());
    for (name, attrs) in [("d0", ""), ("d1", "direct on"), ("d2", "pin off")] {
        let mut disk = Blk::start(&vdpad.add_blk(name, 64 * MIB, attrs));
        let data: Vec<u8> = (0..1 << 16_u32).flat_map(u32::to_le_bytes).collect();
        assert_eq!(disk.write(0, 64, &data), OK);
        assert_eq!(disk.io(0, kind::FLUSH, 0, &[], &[]).status, OK);
        assert!(disk.read(0, 64, data.len()).unwrap() == data, "{name} {attrs}");
        assert_eq!(disk.range(kind::WRITE_ZEROES, 64, 8, Segment::UNMAP), OK);
        assert_eq!(disk.range(kind::DISCARD, 128, 8, 0), OK);
        assert_eq!(disk.read(0, 64, 4096), Ok(vec![0; 4096]));
        assert!(disk.read(0, 72, 4096).unwrap() == data[4096..8192]);
    }
    // Many at a time, from several devices of one thread.
    let mut disks: Vec<_> = (0..4)
        .map(|n| Disk::start(&vdpad.add_blk(&format!("m{n}"), 64 * MIB, "packed on"), disk::MEMORY_MIN))
        .collect();
    for round in 0..20 {
        for disk in &mut disks {
            for slot in 0..disk::SLOTS {
                disk.submit(slot, (kind::OUT, slot, round));
            }
            disk.kick();
        }
        for disk in &mut disks {
            disk.settle();
            for slot in 0..disk::SLOTS {
                disk.submit(slot, (kind::IN, slot, round));
            }
            disk.kick();
            disk.settle();
        }
    }
    // The client leaves while requests are in flight; the next one gets the device.
    let mut last = disks.pop().unwrap();
    for slot in 0..disk::SLOTS {
        last.submit(slot, (kind::OUT, slot, 1));
    }
    last.kick();
    drop(last);
    vdpad.is_released("m3");
    Disk::start(&vdpad.info("m3").path, disk::MEMORY_MIN).check(1);
}

#[test]
fn crashes_and_upgrades_without_io_uring() {
    let outer = tempfile::tempdir().unwrap();
    let dir = outer.path().canonicalize().unwrap();
    let vdpad = start(&dir, &["--holder"]);
    let mut disk = Disk::start(&vdpad.add_blk("d0", 64 * MIB, "packed on"), disk::MEMORY_MIN);
    disk.check(1);
    for (seed, replace) in (2..).zip([replace as fn(&Vdpad), upgrade, replace, upgrade]) {
        for slot in 1..disk::SLOTS {
            disk.submit(slot, (kind::OUT, slot + 8, seed));
        }
        disk.kick();
        replace(&vdpad);
        disk.settle();
        disk.check(seed);
    }
}

#[test]
fn the_doctor_names_what_is_withheld() {
    let dir = tempfile::tempdir().unwrap();
    let mut doctor = vdpactl(dir.path());
    without_io_uring(doctor.arg("doctor"));
    let output = run(&mut doctor);
    let line = output.stdout.lines().find(|line| line.starts_with("io_uring")).unwrap();
    assert!(line.contains("limited") && line.contains("served by threads"), "{output:?}");
    assert!(output.stdout.contains("seccomp profile"), "{output:?}");
    let json = run(vdpactl(dir.path()).args(["-j", "doctor"]));
    let json: serde_json::Value = serde_json::from_str(&json.stdout).unwrap();
    let checks = json["doctor"].as_object().unwrap();
    assert_eq!(checks["fuse"]["state"], "works");
    for (name, check) in checks {
        let works = check["state"] == "works";
        assert!(check["finding"].is_string() && check["remedy"].is_string() != works, "{name}: {check}");
    }
}

/// One request fails, and what frees descriptors is heard.
#[test]
fn without_descriptors_one_request_fails_and_the_next_is_heard() {
    let outer = tempfile::tempdir().unwrap();
    let dir = outer.path().canonicalize().unwrap();
    let daemon = command_at(&dir);
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -n 100 && exec \"$@\"", "sh"])
        .arg(daemon.get_program())
        .args(daemon.get_args());
    command.args(["--front", "fuse"]).env_remove("NOTIFY_SOCKET").env_remove("VDPAD_LOG");
    let vdpad = Vdpad::start_command(&dir, LIMIT, command);
    let image = vdpad.image("disk", MIB);
    let add = |n: usize| {
        vdpad.ctl(&format!("dev add name d{n} mgmtdev blk path {} readonly on worker own", image.display()))
    };
    let refused = (0..200).map(|n| (n, add(n))).find(|(_, output)| output.code != Some(0));
    let (added, refused) = refused.expect("there are 200 devices in 100 descriptors");
    assert!(added > 3, "{refused:?}");
    assert!(refused.stderr.contains("kernel answers: Too many open files"), "{refused:?}");
    assert!(refused.stderr.contains("LimitNOFILE"), "{refused:?}");
    // Whatever is left is taken by callers that say nothing.
    let mut idle = Vec::new();
    for _ in 0..30 {
        idle.extend(UnixStream::connect(dir.join("control.sock")));
    }
    eventually("the last descriptor is for a caller", || {
        let show = vdpad.ctl("dev show");
        (show.code == Some(0)).then_some(show)
    });
    drop(idle);
    eventually("a device is deleted", || (vdpad.ctl("dev del d0").code == Some(0)).then_some(()));
    vdpad.ctl("dev del d1").succeeds();
    add(0).succeeds();
}
