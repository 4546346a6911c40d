//! A write that a dead daemon had handed to a slow disk must not overwrite anything newer. That the next daemon waits for it is
//! shown to be necessary: without that, the disk has old data.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/late.rs"]
mod late;
#[path = "support/robust.rs"]
mod robust;

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vdpa_core::blk::kind;

use late::LateFile;
use robust::disk::{self, Disk};
use robust::{Vdpad, eventually};

const BLOCK: u64 = 2;
const OLD: u64 = 1;
const NEW: u64 = 2;

/// The daemon dies with the write of OLD at the disk. Returns what the disk has when that write has been done, and NEW was written
/// in the meantime if that was possible.
fn contents(fence: bool) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let dir = std::fs::canonicalize(dir.path()).unwrap();
    let late = LateFile::new(&dir.join("late.img"), 1 << 20);
    let mut command = robust::command_at(&dir);
    command.args(["--holder", "--front", "fuse"]);
    if !fence {
        command.env("VDPA_NO_FENCE", "1");
    }
    let vdpad = Vdpad::start_command(&dir, Duration::from_secs(60), command);
    let device = vdpad.add("disk0", "blk", &format!("path {} direct on", late.path.display()));
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    disk.submit(0, (kind::OUT, BLOCK, OLD));
    disk.kick();
    eventually("the disk has the write", || (late.waiting() == 1).then_some(()));
    let pid = eventually("the daemon answers", || vdpad.client().daemon().ok()).pid;
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
    // Without the fence the next daemon does the write again, and then the newer one.
    let deadline = Instant::now() + Duration::from_secs(3);
    while !disk.flying.is_empty() && Instant::now() < deadline {
        disk.reap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(
        disk.flying.is_empty(),
        !fence,
        "it was repeated while the first one was at the disk, or never: {}",
        vdpad.log()
    );
    if fence {
        assert_eq!(late.done(), 0);
        late.release();
        disk.settle();
    }
    disk.one((kind::OUT, BLOCK, NEW));
    if !fence {
        assert_eq!((late.waiting(), late.done()), (1, 2));
        late.release();
        eventually("the first write is done", || (late.done() == 3).then_some(()));
    }
    disk.read_block(BLOCK)
}

#[test]
fn with_the_fence_the_newer_write_stays() {
    assert!(contents(true) == disk::pattern(BLOCK, NEW));
}

#[test]
fn without_the_fence_the_disk_has_old_data() {
    assert!(contents(false) == disk::pattern(BLOCK, OLD));
}
