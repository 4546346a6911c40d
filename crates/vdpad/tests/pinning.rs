//! Pinned pages: charged to the owner, limited by its RLIMIT_MEMLOCK, and really pinned.
//!
//! The owners are other processes, so each has a limit of its own.
#![expect(unsafe_code, reason = "another process forks before its main")]
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[path = "support/peer.rs"]
mod peer;
mod support;

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use vdpa_control::api::DevInfo;
use vdpa_core::Errno;
use vdpa_core::blk::kind;
use vdpa_core::ops::VdpaOps as _;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Asid, Perm};
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};

use peer::Peer;
use support::blk::{Blk, IOERR, OK};
use support::daemon::{Daemon, pattern};
use support::registered;

/// Where tests map memory in addition to the driver's.
const ELSEWHERE: u64 = 0x2_0000_0000;
const FAULT: Result<(), Errno> = Err(Errno::FAULT);

/// A daemon with `count` devices `d0`, `d1`, ... of `pin`.
fn setup(count: usize, pin: &str) -> (Daemon, Vec<PathBuf>) {
    let daemon = Daemon::start();
    let add = |index| {
        let name = format!("d{index}");
        let disk = daemon.disk(&format!("disk{index}"), 1 << 20);
        daemon.add_blk(&name, &disk, &[("pin", pin)])
    };
    let paths = (0..count).map(add).collect();
    (daemon, paths)
}

/// A process that may pin `pages` pages and owns the devices; they are its devices 1, 2, ...
fn owner(pages: u64, devices: &[PathBuf]) -> Peer {
    let mut peer = Peer::start();
    limit(&mut peer, pages);
    for device in devices {
        peer.send(&format!("open {}", device.display())).unwrap();
        peer.send("owner").unwrap();
    }
    peer
}

fn limit(peer: &mut Peer, pages: u64) {
    peer.send(&format!("memlock {}", pages * 4096)).unwrap();
}

fn pinned(daemon: &Daemon, name: &str) -> u64 {
    daemon.info(name).state.pinned_pages
}

/// Pages that the kernel counts as pinned by the daemon (`VmPin`).
fn really_pinned(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() / 4
}

/// Lengths of the buffers registered with the daemon's rings.
fn registered(daemon: &Daemon) -> Vec<u64> {
    let mut lens: Vec<u64> = registered::buffers(daemon.pid()).into_iter().map(|buffer| buffer.len).collect();
    lens.sort_unstable();
    lens
}

#[track_caller]
fn wait_closed(daemon: &Daemon, name: &str) {
    daemon.wait_for(name, "the close", |info: &DevInfo| !info.state.open);
}

#[test]
fn every_mapped_page_is_counted_shown_and_pinned() {
    let (daemon, devices) = setup(1, "on");
    let before = really_pinned(&daemon);
    assert!(registered(&daemon).is_empty());
    let mut peer = owner(1000, &devices);
    assert_eq!(pinned(&daemon, "d0"), 0);
    peer.send("map 0x100000 256").unwrap();
    assert_eq!(pinned(&daemon, "d0"), 256);
    peer.send("map 0x300000 3").unwrap();
    let state = daemon.info("d0").state;
    assert_eq!((state.pinned_pages, state.memlock_limit_pages, state.mappings), (259, Some(1000), 2));
    assert_eq!(registered(&daemon), [3 * 4096, 256 * 4096]);
    // At least, because all pages of a huge page count.
    assert!(really_pinned(&daemon) >= before + 259, "VmPin: {before}, then {}", really_pinned(&daemon));
    let shown = support::vdpactl(&daemon.dir().join("control.sock"), "-s -j dev show d0").stdout;
    assert!(shown.contains("\"pinned_pages\":259"), "{shown}");

    peer.send("unmap 0x300000 3").unwrap();
    assert_eq!((pinned(&daemon, "d0"), registered(&daemon)), (256, vec![256 * 4096]));
    peer.send("unmap 0 0x1000").unwrap();
    assert_eq!((pinned(&daemon, "d0"), registered(&daemon)), (0, vec![]));
    assert_eq!(really_pinned(&daemon), before);

    peer.send("map 0x100000 256").unwrap();
    peer.send("close").unwrap();
    wait_closed(&daemon, "d0");
    assert_eq!((pinned(&daemon, "d0"), registered(&daemon), really_pinned(&daemon)), (0, vec![], before));
}

#[test]
fn the_death_of_the_client_gives_everything_back() {
    let (daemon, devices) = setup(2, "on");
    let before = really_pinned(&daemon);
    let mut peer = owner(1000, &devices);
    peer.send("map 0 100").unwrap();
    peer.send("use 1").unwrap();
    peer.send("map 0 100").unwrap();
    peer.kill();
    wait_closed(&daemon, "d0");
    wait_closed(&daemon, "d1");
    assert_eq!((pinned(&daemon, "d0"), pinned(&daemon, "d1")), (0, 0));
    assert_eq!((registered(&daemon), really_pinned(&daemon)), (vec![], before));
}

#[test]
fn beyond_the_limit_nothing_is_mapped_and_the_log_has_the_numbers() {
    let (daemon, devices) = setup(1, "on");
    let mut peer = owner(300, &devices);
    peer.send("map 0 200").unwrap();
    let real = really_pinned(&daemon);
    for _ in 0..3 {
        assert_eq!(peer.send("map 0x1000000 101"), FAULT);
        assert_eq!((pinned(&daemon, "d0"), daemon.info("d0").state.mappings), (200, 1));
        assert_eq!((registered(&daemon), really_pinned(&daemon)), (vec![200 * 4096], real));
    }
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains("RLIMIT_MEMLOCK") && line.contains("refused")).unwrap();
    assert!(line.contains("pinning 101 more pages") && line.contains("200 pinned of 300"), "{line}");

    peer.send("map 0x1000000 100").unwrap();
    assert_eq!(pinned(&daemon, "d0"), 300);
    assert_eq!(peer.send("map 0x2000000 1"), FAULT);
    peer.send("unmap 0x1000000 100").unwrap();
    peer.send("map 0x2000000 1").unwrap();
    assert_eq!(pinned(&daemon, "d0"), 201);
    // The present limit applies, and lowering it unpins nothing.
    limit(&mut peer, 100);
    assert_eq!(peer.send("map 0x1000000 1"), FAULT);
    assert_eq!((pinned(&daemon, "d0"), daemon.info("d0").state.memlock_limit_pages), (201, Some(100)));
    limit(&mut peer, 202);
    peer.send("map 0x1000000 1").unwrap();
}

#[test]
fn devices_of_one_process_share_one_account() {
    let (daemon, devices) = setup(2, "on");
    let mut peer = owner(300, &devices);
    peer.send("use 1").unwrap();
    peer.send("map 0 200").unwrap();
    peer.send("use 2").unwrap();
    assert_eq!(peer.send("map 0 101"), FAULT);
    peer.send("map 0 100").unwrap();
    assert_eq!((pinned(&daemon, "d0"), pinned(&daemon, "d1")), (200, 100));
    // Another process has its own.
    let third = daemon.disk("third", 1 << 20);
    let third = daemon.add_blk("third", &third, &[]);
    let mut other = owner(300, &[third]);
    other.send("map 0 300").unwrap();
    // Pages that one device unpins are available to the other.
    peer.send("use 1").unwrap();
    peer.send("close").unwrap();
    wait_closed(&daemon, "d0");
    peer.send("use 1").unwrap();
    peer.send("map 0x10000000 200").unwrap();
    assert_eq!((pinned(&daemon, "d0"), pinned(&daemon, "d1")), (0, 300));
    assert_eq!(pinned(&daemon, "third"), 300);
}

fn open(path: &Path) -> OwnedFd {
    File::options().read(true).write(true).open(path).unwrap().into()
}

#[test]
fn a_new_owner_takes_the_charge_if_its_limit_allows() {
    let (daemon, devices) = setup(2, "on");
    let device = open(&devices[0]);
    let (mut old, mut new) = (Peer::inheriting(&device), Peer::inheriting(&device));
    limit(&mut old, 300);
    old.send("owner").unwrap();
    old.send("map 0 200").unwrap();
    let real = really_pinned(&daemon);

    limit(&mut new, 199);
    assert_eq!(new.send("new_owner"), Err(Errno::NOMEM));
    assert_eq!(daemon.info("d0").state.owner.unwrap().pid, old.pid(), "the old owner stays");
    assert_eq!((old.send("num"), new.send("num")), (Ok(()), Err(Errno::PERM)));
    assert_eq!(pinned(&daemon, "d0"), 200);
    assert_eq!(old.send("map 0x1000000 101"), FAULT, "the charge stays, too");

    limit(&mut new, 200);
    new.send("new_owner").unwrap();
    let state = daemon.info("d0").state;
    assert_eq!((state.owner.unwrap().pid, state.pinned_pages), (new.pid(), 200));
    assert_eq!(state.memlock_limit_pages, Some(200));
    assert_eq!(old.send("num"), Err(Errno::PERM));
    assert_eq!(
        (registered(&daemon), really_pinned(&daemon)),
        (vec![200 * 4096], real),
        "pinned all the while"
    );
    assert_eq!(new.send("map 0x1000000 1"), FAULT, "its account is full");

    // The old owner is charged for nothing, and can use all of its limit with another device.
    old.send(&format!("open {}", devices[1].display())).unwrap();
    old.send("owner").unwrap();
    old.send("map 0 300").unwrap();
    assert_eq!((pinned(&daemon, "d0"), pinned(&daemon, "d1")), (200, 300));
    new.send("unmap 0 200").unwrap();
    assert_eq!((pinned(&daemon, "d0"), pinned(&daemon, "d1")), (0, 300));
}

#[test]
fn a_forked_child_pays_with_its_own_limit() {
    let (daemon, devices) = setup(1, "on");
    let mut peer = owner(100, &devices);
    peer.send("map 0 100").unwrap();
    // The child has the limit of its parent, and is charged separately.
    peer.send("fork new_owner").unwrap();
    assert_eq!(pinned(&daemon, "d0"), 100);
    limit(&mut peer, 99);
    assert_eq!(peer.send("new_owner"), Err(Errno::NOMEM));
    limit(&mut peer, 100);
    peer.send("new_owner").unwrap();
    assert_eq!(pinned(&daemon, "d0"), 100);
}

/// Memory of a file system whose pages the kernel does not pin for long.
fn unpinnable(pages: usize) -> (tempfile::NamedTempFile, SharedMap) {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let kind = rustix::fs::fstatfs(file.as_file()).unwrap().f_type;
    assert_ne!(kind, TMPFS_MAGIC, "the target directory must be on a disk for this test");
    file.as_file().set_len(4096 * pages as u64).unwrap();
    let map = SharedMap::map(file.as_file(), 0, 4096 * pages, Prot::RW, false).unwrap();
    (file, map)
}

#[test]
fn memory_that_cannot_be_pinned_is_refused_and_charged_to_nobody() {
    let (daemon, devices) = setup(1, "on");
    let blk = Blk::start(&devices[0]);
    let (before, real) = (daemon.info("d0").state, really_pinned(&daemon));
    let (_file, map) = unpinnable(4);
    let result = blk.session.ops().dma_map(Asid(0), ELSEWHERE, 16384, map.addr() as u64, Perm::RW);
    assert_eq!(result, FAULT);
    let after = daemon.info("d0").state;
    assert_eq!((after.pinned_pages, after.mappings), (before.pinned_pages, before.mappings));
    assert_eq!(really_pinned(&daemon), real);
    assert!(daemon.log().contains("guest memory cannot be pinned"), "the log says why");
}

#[test]
fn what_is_unmapped_is_out_of_reach_whatever_else_cannot_be_pinned() {
    let (daemon, devices) = setup(1, "on");
    let mut blk = Blk::start(&devices[0]);
    let (before, real) = (registered(&daemon), really_pinned(&daemon));
    let fd = memfd::create(c"extra", 8192, None).unwrap();
    blk.session.map_memfd("extra", fd, ELSEWHERE, 8192, Perm::RW).unwrap();
    let extra = Buffer { iova: ELSEWHERE, len: 4096 };
    assert_eq!(blk.io(0, kind::IN, 0, &[], &[extra]).status, OK);
    let (_file, map) = unpinnable(4);
    let far = 2 * ELSEWHERE;
    let ops = blk.session.ops();
    ops.batch_begin(Asid(0)).unwrap();
    ops.dma_map(Asid(0), far, 16384, map.addr() as u64, Perm::RW).unwrap();
    assert_eq!(ops.batch_end(Asid(0)), FAULT, "the device could not take the batch");

    blk.session.unmap("extra").unwrap();
    assert_eq!(blk.io(0, kind::IN, 0, &[], &[extra]).status, IOERR, "unmapped memory was written");
    assert_eq!((registered(&daemon), really_pinned(&daemon)), (before, real), "unmapped memory is pinned");
    assert_eq!(blk.read(0, 0, 512), Ok(pattern(0, 512)), "other memory is served");
    let unpinned = Buffer { iova: far, len: 4096 };
    assert_eq!(blk.io(0, kind::IN, 0, &[], &[unpinned]).status, IOERR, "what is not pinned is not served");
    blk.session.ops().dma_unmap(Asid(0), far, 16384).unwrap();
    let fd = memfd::create(c"again", 8192, None).unwrap();
    blk.session.map_memfd("again", fd, ELSEWHERE, 8192, Perm::RW).unwrap();
    assert_eq!(blk.io(0, kind::IN, 0, &[], &[extra]).status, OK);
}

#[test]
fn without_pinning_no_limit_counts() {
    let (daemon, devices) = setup(1, "off");
    let before = really_pinned(&daemon);
    let mut peer = owner(0, &devices);
    peer.send("map 0 1000").unwrap();
    let state = daemon.info("d0").state;
    assert_eq!((state.pinned_pages, state.mappings), (0, 1));
    assert_eq!((registered(&daemon), really_pinned(&daemon)), (vec![], before));
}

#[test]
fn the_simulator_pins_nothing() {
    let daemon = Daemon::start();
    let device = daemon.add("s0", "sim-blk", &[]);
    let mut peer = owner(0, &[device]);
    peer.send("map 0 1000").unwrap();
    assert_eq!((pinned(&daemon, "s0"), daemon.info("s0").state.mappings), (0, 1));
}
