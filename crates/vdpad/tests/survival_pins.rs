//! Memory that is pinned stays pinned when the daemon is killed or upgraded: nothing is pinned again, and nothing is left over.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/robust.rs"]
mod robust;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use vdpa_control::api::{DaemonInfo, HolderInfo};
use vdpa_core::types::Perm;
use vdpa_sys::memfd;

use robust::disk::{self, Disk};
use robust::{Vdpad, eventually};

const LIMIT: Duration = Duration::from_secs(120);
const PAGE: u64 = 4096;
/// Bytes of one registered buffer.
const PIECE: u64 = 64 << 20;

fn start() -> Vdpad {
    Vdpad::start_with(LIMIT, &["--holder", "--front", "fuse", "--crash-limit", "1000"])
}

fn daemon(vdpad: &Vdpad) -> (DaemonInfo, HolderInfo) {
    eventually("the daemon answers", || {
        let daemon = vdpad.client().daemon().ok()?;
        let holder = daemon.holder.clone()?;
        Some((daemon, holder))
    })
}

/// Waits until a later daemon than that of `generation` serves.
fn next(vdpad: &Vdpad, generation: u64) {
    eventually("the next daemon serves", || (daemon(vdpad).1.generation > generation).then_some(()));
}

fn kill(vdpad: &Vdpad) {
    let (DaemonInfo { pid, .. }, HolderInfo { generation, .. }) = daemon(vdpad);
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
    next(vdpad, generation);
}

fn upgrade(vdpad: &Vdpad) {
    let generation = daemon(vdpad).1.generation;
    vdpad.ctl("daemon upgrade").succeeds();
    next(vdpad, generation);
}

/// Pages that the kernel has pinned since it was started, for whomever.
fn pinned_ever() -> u64 {
    let vmstat = fs::read_to_string("/proc/vmstat").unwrap();
    let line = vmstat.lines().find_map(|line| line.strip_prefix("nr_foll_pin_acquired "));
    line.unwrap().parse().unwrap()
}

/// A buffer in the table of a ring: inode, offset, bytes, address.
type Buffer = [u64; 4];

/// The registered buffers in the tables of all rings that the holder keeps, and how many tables there are.
fn buffers(vdpad: &Vdpad) -> (Vec<Buffer>, usize) {
    let fds = fs::read_dir(format!("/proc/{}/fd", vdpad.pid().as_raw_nonzero())).unwrap();
    let is_table =
        |path: &PathBuf| fs::read_link(path).is_ok_and(|name| name.to_string_lossy().contains("vdpa-slots"));
    let tables: Vec<_> = fds.map(|entry| entry.unwrap().path()).filter(is_table).collect();
    let mut buffers = Vec::new();
    for table in &tables {
        let table = File::open(table).unwrap();
        let word = |at: u64| {
            let mut bytes = [0; 8];
            table.read_exact_at(&mut bytes, at * 8).unwrap();
            u64::from_ne_bytes(bytes)
        };
        for slot in (0..word(2)).map(|slot| 512 + 8 * slot) {
            assert_ne!(word(slot), 1, "a slot is being changed");
            if word(slot) == 2 {
                buffers.push([slot + 2, slot + 4, slot + 5, slot + 6].map(word));
            }
        }
    }
    buffers.sort_unstable();
    (buffers, tables.len())
}

/// Descriptors of the holder and of the daemon, and what is held. The daemon's settle when its last client has left.
fn counts(vdpad: &Vdpad) -> [u64; 3] {
    let fds = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count() as u64;
    let (daemon, holder) = daemon(vdpad);
    [fds(holder.pid), fds(daemon.pid), holder.held]
}

/// Also when its thread panics.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The same buffers, at the addresses of the first process, serve every later one.
#[test]
fn nothing_is_pinned_again() {
    const MEMORY: u64 = 8 * PIECE;
    let vdpad = start();
    let device = vdpad.add_blk("disk0", 64 << 20, "memlock unlimited direct on");
    let mut disk = Disk::start(&device, MEMORY);
    disk.check(1);
    let before = (buffers(&vdpad), counts(&vdpad));
    assert_eq!(before.0.0.len() as u64, MEMORY / PIECE);
    let pinned = pinned_ever();
    for round in 0..4 {
        if round % 2 == 0 {
            kill(&vdpad)
        } else {
            upgrade(&vdpad)
        }
        disk.check(round);
        assert_eq!((buffers(&vdpad), counts(&vdpad)[2]), (before.0.clone(), before.1[2]), "round {round}");
    }
    // Other tests pin at the same time, but less.
    let more = pinned_ever() - pinned;
    assert!(more < MEMORY / PAGE, "{more} pages were pinned meanwhile");
    assert!(!vdpad.log().contains("pinned again"), "{}", vdpad.log());
    // The client leaves, and another one comes.
    drop(disk);
    vdpad.is_released("disk0");
    eventually("its memory is unpinned", || buffers(&vdpad).0.is_empty().then_some(()));
    Disk::start(&device, PIECE).check(7);
}

/// A device with a thread of its own has its own ring, which ends with the device.
#[test]
fn each_ring_is_found_again() {
    let vdpad = start();
    let shared = vdpad.add_blk("disk0", 64 << 20, "memlock unlimited");
    let own = vdpad.add_blk("disk1", 64 << 20, "memlock unlimited worker own");
    let mut disks = [shared, own].map(|device| Disk::start(&device, PIECE));
    let before = buffers(&vdpad);
    assert_eq!((before.0.len(), before.1), (2, 2));
    for round in 0..4 {
        if round % 2 == 0 {
            upgrade(&vdpad)
        } else {
            kill(&vdpad)
        }
        disks.iter_mut().for_each(|disk| disk.check(round));
        assert_eq!(buffers(&vdpad), before, "round {round}");
    }
    drop(disks);
    vdpad.is_released("disk1");
    vdpad.ctl("dev del disk1").succeeds();
    eventually("its ring is given up", || (buffers(&vdpad).1 == 1).then_some(()));
}

/// No descriptor, no item and no slot remains of twenty crashes and twenty upgrades.
#[test]
fn nothing_grows() {
    let vdpad = start();
    let device = vdpad.add_blk("disk0", 64 << 20, "memlock unlimited");
    let mut disk = Disk::start(&device, 2 * PIECE);
    disk.check(1);
    kill(&vdpad);
    upgrade(&vdpad);
    disk.check(2);
    let before = (counts(&vdpad), buffers(&vdpad));
    for round in 0..20 {
        kill(&vdpad);
        disk.check(round);
        upgrade(&vdpad);
        disk.check(round + 100);
    }
    // The holder closes what it had of an old daemon when that one has ended.
    eventually("nothing is left over", || {
        let now = (counts(&vdpad), buffers(&vdpad));
        (now.0[0] <= before.0[0] && now.0[1] <= before.0[1] && now.0[2] == before.0[2] && now.1 == before.1)
            .then_some(())
    });
}

/// A client maps and unmaps memory all the time: a device that has changed since the candidate has made it is made again, and its
/// other memory stays pinned.
#[test]
fn a_device_that_changes_during_an_upgrade_is_made_again() {
    const EXTRA: u64 = disk::IOVA + 64 * PIECE;
    let vdpad = start();
    let device = vdpad.add_blk("disk0", 64 << 20, "memlock unlimited");
    let mut disk = Disk::start(&device, 2 * PIECE);
    disk.check(1);
    let before = buffers(&vdpad);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let _upgrades = scope.spawn(|| {
            let _done = SetAtEnd(&done);
            (0..10).for_each(|_| upgrade(&vdpad));
        });
        let mut seed = 2;
        while !done.load(Ordering::Acquire) {
            let extra = memfd::create(c"extra", 1 << 20, None).unwrap();
            disk.session.map_memfd("extra", extra, EXTRA, 1 << 20, Perm::RW).unwrap();
            disk.check(seed);
            disk.session.unmap("extra").unwrap();
            seed += 1;
        }
        assert!(seed > 10, "{seed}");
    });
    disk.check(1);
    assert_eq!(buffers(&vdpad), before, "{}", vdpad.log());
    assert!(!vdpad.log().contains("pinned again"), "{}", vdpad.log());
}

/// A device is added during an upgrade, or refused; it is never lost.
#[test]
fn a_device_that_is_added_during_an_upgrade_is_not_lost() {
    let vdpad = start();
    let done = AtomicBool::new(false);
    let mut added = Vec::new();
    thread::scope(|scope| {
        let _upgrades = scope.spawn(|| {
            let _done = SetAtEnd(&done);
            (0..10).for_each(|_| upgrade(&vdpad));
        });
        for number in 0.. {
            if done.load(Ordering::Acquire) {
                break;
            }
            let name = format!("net{number}");
            let output = vdpad.ctl(&format!("dev add name {name} mgmtdev sim-net"));
            match output.code {
                Some(0) => added.push(name),
                // The daemon may also have ended before it has answered.
                _ => assert!(!output.stderr.is_empty(), "{output:?}"),
            }
        }
    });
    let names: Vec<_> = vdpad.client().devices().unwrap().into_iter().map(|info| info.name).collect();
    let lost: Vec<_> = added.iter().filter(|name| !names.contains(name)).collect();
    assert!(!added.is_empty() && lost.is_empty(), "{lost:?} of {added:?}, {}", vdpad.log());
}
