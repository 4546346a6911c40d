//! `handover open`: a second program opens a device that is in use, and takes it over.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

mod support;

use std::fs::{self, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use vdpa_client::Error;
use vdpa_client::device::Device;
use vdpa_control::api::{DevInfo, Successor};
use vdpa_core::Errno;
use vdpa_core::features::Status;
use vdpa_core::ops::VdpaOps as _;
use vdpa_core::types::{Asid, QueueIndex};
use vdpa_sys::memfd;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use support::blk::{Blk, FEATURES, IOERR, IOVA, MEMORY, OK};
use support::daemon::Daemon;
use support::registered::{self, Buffer};

fn setup() -> (Daemon, PathBuf) {
    let daemon = Daemon::start();
    let disk = daemon.disk("disk", 1 << 20);
    let path = daemon.add_blk("d0", &disk, &[("handover", "open"), ("memlock", "unlimited")]);
    (daemon, path)
}

/// A running driver, and its memory.
fn at_work(path: &Path) -> (Blk, OwnedFd) {
    let memory = memfd::create(c"blk", MEMORY, None).unwrap();
    let mut blk = Blk::negotiated(path, FEATURES);
    blk.map(memory.try_clone().unwrap());
    blk.run(1);
    (blk, memory)
}

/// The buffers registered with the daemon's rings.
fn registered(daemon: &Daemon) -> Vec<Buffer> {
    registered::buffers(daemon.pid())
}

fn open(path: &Path) -> Result<Device<VhostVdpaFd>, Errno> {
    Device::open(path).map_err(|error| match error {
        Error::Open { source, .. } => source,
        other => panic!("{other}"),
    })
}

#[test]
fn the_second_open_takes_over_what_is_pinned_once_the_first_rests() {
    let (daemon, path) = setup();
    let (mut old, memory) = at_work(&path);
    assert_eq!(old.write(0, 8, &[0x11; 4096]), OK);
    let pinned = registered(&daemon);
    assert_eq!(pinned.len(), 1, "{pinned:?}");

    let mut new = Blk::negotiated(&path, FEATURES);
    assert_eq!(open(&path).err(), Some(Errno::BUSY), "there are two at most");
    assert_eq!(new.session.ops().set_status(Status(0xf)), Err(Errno::BUSY), "the first one drives");
    assert_eq!(old.read(0, 8, 4096), Ok(vec![0x11; 4096]));

    // In QEMU's order: the first one stops and unmaps its memory before the second one maps anything.
    let ops = old.session.ops();
    ops.suspend().unwrap();
    assert_eq!(ops.vring_base(QueueIndex(0)), Ok(2));
    ops.set_status(Status(0)).unwrap();
    ops.dma_unmap(Asid(0), IOVA, MEMORY).unwrap();
    assert_eq!(daemon.info("d0").state.pinned_pages, 0, "the first one is charged no more");
    new.map(memory);
    new.run(1);
    assert_eq!(registered(&daemon), pinned, "the same memory is pinned as it was");
    let state = daemon.info("d0").state;
    assert_eq!((state.pinned_pages, state.mappings), (MEMORY / 4096, 1));
    assert_eq!(new.read(0, 8, 4096), Ok(vec![0x11; 4096]));

    for result in [old.session.ops().status().map(drop), old.session.ops().resume()] {
        assert_eq!(result, Err(Errno::IO), "the device is somebody else's");
    }
    drop(old);
    assert_eq!(new.write(0, 16, &[0x22; 512]), OK);
    assert_eq!(registered(&daemon), pinned);
    let third = open(&path).unwrap().negotiate(FEATURES).unwrap();
    drop(new);
    daemon.wait_for("d0", "the close", |info: &DevInfo| info.state.open && info.state.mappings == 0);
    assert_eq!(third.ops().status(), Ok(Status(0xb)), "the successor has a successor");
    drop(third);
    daemon.wait_for("d0", "the last close", |info: &DevInfo| !info.state.open);
    assert_eq!(registered(&daemon), []);
    daemon.assert_alive();
}

/// The successor is shown with its state.
#[test]
fn a_successor_is_shown_until_it_drives() {
    let (daemon, path) = setup();
    let (old, memory) = at_work(&path);
    let shown = || daemon.info("d0").state.successor;
    assert_eq!(shown(), None);
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let opened = open(&path).unwrap();
    let waits = shown().unwrap();
    assert_eq!((waits.pid, waits.status, waits.mappings), (Some(std::process::id()), Status(0), 0));
    assert!(waits.since >= before && !waits.comm.is_empty(), "{waits:?}");

    let mut new = Blk::over(opened, FEATURES);
    new.map(memory);
    let state = daemon.info("d0").state;
    let own = state.owner.unwrap();
    let expected =
        Successor { pid: Some(own.pid), comm: own.comm, status: Status(0xb), mappings: 1, ..waits };
    assert_eq!(state.successor, Some(expected));
    assert_eq!(state.status, Status(0xf), "all else is the predecessor's");
    old.session.ops().suspend().unwrap();
    new.run(1);
    assert_eq!(shown(), None);

    drop(old);
    let next = open(&path).unwrap();
    assert_eq!(shown().map(|waits| waits.status), Some(Status(0)));
    drop(next);
    daemon.wait_for("d0", "the end of the successor", |info| info.state.successor.is_none());
    let _next = open(&path).unwrap();
    drop(new);
    daemon.wait_for("d0", "its own device", |info| info.state.open && info.state.successor.is_none());
}

#[test]
fn other_memory_is_pinned_anew() {
    let (daemon, path) = setup();
    let (mut old, _) = at_work(&path);
    let pinned = registered(&daemon);
    old.session.reset().unwrap();
    let (mut new, _) = at_work(&path);
    assert_ne!(registered(&daemon), pinned);
    assert_eq!(registered(&daemon).len(), 1);
    assert_eq!(new.write(0, 0, &[0x33; 512]), OK);
    old.put(0, &[0; 16]);
    assert_eq!(new.read(0, 0, 512), Ok(vec![0x33; 512]));
}

#[test]
fn a_successor_that_gives_up_or_dies_leaves_the_first_one_at_work() {
    let (daemon, path) = setup();
    let (mut old, memory) = at_work(&path);
    let mut new = Blk::negotiated(&path, FEATURES);
    new.map(memory);
    drop(new);
    assert_eq!(old.write(0, 0, &[1; 512]), OK);
    let new = Blk::negotiated(&path, FEATURES);
    old.session.ops().suspend().unwrap();
    drop(new);
    old.session.ops().resume().unwrap();
    assert_eq!(old.read(0, 0, 512), Ok(vec![1; 512]));
    assert_eq!(registered(&daemon).len(), 1);
}

#[test]
fn a_device_that_is_taken_away_is_so_for_both() {
    let (daemon, path) = setup();
    let (mut old, memory) = at_work(&path);
    let mut new = Blk::negotiated(&path, FEATURES);
    new.map(memory);
    daemon.delete("d0").unwrap();
    assert_eq!(old.write(0, 0, &[1; 512]), IOERR);
    assert_eq!(new.session.ops().status(), Err(Errno::IO));
    drop(old);
    assert_eq!(new.session.ops().status(), Err(Errno::IO));
    drop(new);
    daemon.assert_alive();
}

#[test]
fn only_the_same_user_may_be_the_successor() {
    let (daemon, path) = setup();
    let (mut old, _memory) = at_work(&path);
    for place in [daemon.dir(), &path] {
        fs::set_permissions(place, Permissions::from_mode(0o777)).unwrap();
    }
    let nobody = Command::new("sh").args(["-c", "exec 3<>\"$0\""]).arg(&path).uid(65534).output().unwrap();
    let said = String::from_utf8_lossy(&nobody.stderr).into_owned();
    assert!(said.contains("busy"), "{said}");
    assert_eq!(old.write(0, 0, &[1; 512]), OK);
    drop(old);
    daemon.wait_for("d0", "the close", |info: &DevInfo| !info.state.open);
    let nobody = Command::new("sh").args(["-c", "exec 3<>\"$0\""]).arg(&path).uid(65534).status().unwrap();
    assert!(nobody.success(), "a device that nobody has is for everybody whom its file allows");
}

#[test]
fn the_attribute_is_checked() {
    let daemon = Daemon::start();
    let disk = daemon.disk("disk", 1 << 20);
    let path = disk.path.to_str().unwrap();
    let wrong = daemon.try_add("d0", "blk", &[("path", path), ("handover", "on")]).unwrap_err().to_string();
    assert!(wrong.contains("handover is \"on\""), "{wrong}");
    let refused = daemon.try_add("d0", "sim-blk", &[("handover", "open")]).unwrap_err().to_string();
    assert!(refused.contains("cannot be opened by a successor"), "{refused}");
    let file = daemon.add_blk("d0", &disk, &[("handover", "off")]);
    let _first = open(&file).unwrap();
    assert_eq!(open(&file).err(), Some(Errno::BUSY));
}
