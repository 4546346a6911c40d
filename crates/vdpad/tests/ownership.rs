//! Who may use a device that several processes have open: the owner and its threads, and nobody else before NEW_OWNER.
#![expect(unsafe_code, reason = "another process forks before its main")]
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[path = "support/peer.rs"]
mod peer;
mod support;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use vdpa_core::Errno;
use vdpa_core::blk::kind;
use vdpa_core::ops::VdpaOps as _;
use vdpa_core::types::QueueIndex;

use peer::Peer;
use support::blk::{Blk, OK, data};
use support::daemon::{Daemon, pattern};

const PERM: Result<(), Errno> = Err(Errno::PERM);
const FAULT: Result<(), Errno> = Err(Errno::FAULT);

/// Runs `test` on the device file of each kind of device, called `d0`.
fn on_both(test: impl Fn(&Daemon, &Path)) {
    let daemon = Daemon::start();
    test(&daemon, &daemon.add("d0", "sim-blk", &[]));
    let daemon = Daemon::start();
    let disk = daemon.disk("disk", 1 << 20);
    test(&daemon, &daemon.add_blk("d0", &disk, &[]));
}

fn open(path: &Path) -> OwnedFd {
    File::options().read(true).write(true).open(path).unwrap().into()
}

/// Asserts that requests of the owner only have the results `vring` and `iotlb`, and that all others succeed.
#[track_caller]
fn expect(peer: &mut Peer, prefix: &str, (vring, iotlb): (Result<(), Errno>, Result<(), Errno>)) {
    let mut tell = |command: &str| peer.send(&format!("{prefix}{command}"));
    for command in ["num", "base", "enable"] {
        assert_eq!(tell(command), vring, "{prefix}{command}");
    }
    assert_eq!(tell("map 0x900000 1"), iotlb, "{prefix}map");
    assert_eq!(tell("unmap 0x900000 1"), iotlb, "{prefix}unmap");
    for command in ["features", "status"] {
        assert_eq!(tell(command), Ok(()), "{prefix}{command}");
    }
}

/// Address spaces that the daemon holds.
fn holds(daemon: &Daemon) -> usize {
    let files = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
    let targets = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
    targets.filter(|target| target.starts_with("/proc") && target.ends_with("mem")).count()
}

#[test]
fn another_process_with_the_descriptor_has_to_become_the_owner() {
    on_both(|daemon, path| {
        let device = open(path);
        let (mut first, mut second) = (Peer::inheriting(&device), Peer::inheriting(&device));
        assert_eq!(second.send("new_owner"), Err(Errno::INVAL), "there is no owner to follow");
        expect(&mut first, "", (PERM, FAULT));
        assert_eq!(first.send("owner"), Ok(()));
        expect(&mut first, "", (Ok(()), Ok(())));
        assert_eq!(second.send("owner"), Err(Errno::BUSY));
        expect(&mut second, "", (PERM, FAULT));
        assert_eq!(daemon.info("d0").state.owner.unwrap().pid, first.pid());

        assert_eq!(second.send("new_owner"), Ok(()));
        assert_eq!(second.send("new_owner"), Err(Errno::BUSY), "it is the owner already");
        assert_eq!(daemon.info("d0").state.owner.unwrap().pid, second.pid());
        expect(&mut second, "", (Ok(()), Ok(())));
        expect(&mut first, "", (PERM, FAULT));
        assert_eq!(first.send("owner"), Err(Errno::BUSY));

        second.kill();
        expect(&mut first, "", (PERM, FAULT));
        assert_eq!(first.send("new_owner"), Ok(()), "also after a dead owner");
        expect(&mut first, "", (Ok(()), Ok(())));
    });
}

#[test]
fn a_forked_child_is_another_process() {
    on_both(|_, path| {
        let device = open(path);
        let mut peer = Peer::inheriting(&device);
        assert_eq!(peer.send("owner"), Ok(()));
        expect(&mut peer, "", (Ok(()), Ok(())));
        expect(&mut peer, "fork ", (PERM, FAULT));
        expect(&mut peer, "", (Ok(()), Ok(())));
        assert_eq!(peer.send("fork new_owner"), Ok(()));
        expect(&mut peer, "", (PERM, FAULT));
        expect(&mut peer, "fork ", (PERM, FAULT));
        assert_eq!(peer.send("new_owner"), Ok(()));
        expect(&mut peer, "", (Ok(()), Ok(())));
    });
}

#[test]
fn a_thread_of_the_owner_is_the_owner() {
    on_both(|_, path| {
        let device = open(path);
        let (mut peer, mut other) = (Peer::inheriting(&device), Peer::inheriting(&device));
        assert_eq!(peer.send("thread owner"), Ok(()));
        expect(&mut peer, "", (Ok(()), Ok(())));
        expect(&mut peer, "thread ", (Ok(()), Ok(())));
        assert_eq!(peer.send("thread new_owner"), Err(Errno::BUSY));
        assert_eq!(other.send("thread new_owner"), Ok(()));
        expect(&mut peer, "thread ", (PERM, FAULT));
    });
}

#[test]
fn an_image_after_exec_is_another_owner() {
    on_both(|daemon, path| {
        let device = open(path);
        let mut peer = Peer::inheriting(&device);
        assert_eq!(peer.send("owner"), Ok(()));
        expect(&mut peer, "", (Ok(()), Ok(())));
        assert_eq!(peer.send("exec"), Ok(()));
        expect(&mut peer, "", (PERM, FAULT));
        assert_eq!(peer.send("owner"), Err(Errno::BUSY));
        assert_eq!(peer.send("new_owner"), Ok(()));
        expect(&mut peer, "", (Ok(()), Ok(())));
        assert_eq!(daemon.info("d0").state.owner.unwrap().pid, peer.pid());
    });
}

/// The daemon keeps the identity of a refused process, and must not mistake a later process for it.
#[test]
fn who_was_refused_is_another_after_exec() {
    on_both(|daemon, path| {
        let device = open(path);
        let (mut owner, mut heir) = (Peer::inheriting(&device), Peer::inheriting(&device));
        assert_eq!(owner.send("owner"), Ok(()));
        expect(&mut heir, "", (PERM, FAULT));
        assert_eq!(heir.send("exec"), Ok(()));
        assert_eq!(heir.send("new_owner"), Ok(()));
        expect(&mut heir, "", (Ok(()), Ok(())));
        expect(&mut owner, "", (PERM, FAULT));
        assert_eq!(daemon.info("d0").state.owner.unwrap().pid, heir.pid());
    });
}

/// Of all refused processes the daemon keeps the identity of the last one only, and none once the device is closed.
#[test]
fn of_those_it_refused_the_daemon_holds_one_at_most() {
    on_both(|daemon, path| {
        let device = open(path);
        let mut owner = Peer::inheriting(&device);
        assert_eq!(owner.send("owner"), Ok(()));
        let before = holds(daemon);
        for _ in 0..20 {
            let mut stranger = Peer::inheriting(&device);
            expect(&mut stranger, "", (PERM, FAULT));
            assert!(holds(daemon) <= before + 1);
            stranger.kill();
        }
        assert_eq!(holds(daemon), before + 1, "the last one is known");
        let mut heir = Peer::inheriting(&device);
        expect(&mut heir, "", (PERM, FAULT));
        assert_eq!(heir.send("new_owner"), Ok(()));
        // The former owner is released after this answer and before the next one.
        expect(&mut heir, "", (Ok(()), Ok(())));
        assert_eq!(holds(daemon), before);
    });
}

#[test]
fn a_device_is_open_until_the_last_process_has_closed_it() {
    on_both(|daemon, path| {
        let device = open(path);
        let mut peer = Peer::inheriting(&device);
        assert_eq!(peer.send("owner"), Ok(()));
        drop(device);
        assert_eq!(peer.send("num"), Ok(()));
        let mut other = Peer::start();
        let again = format!("open {}", path.display());
        assert_eq!(other.send(&again), Err(Errno::BUSY));
        peer.kill();
        daemon.wait_for("d0", "the close", |info| !info.state.open);
        assert_eq!(daemon.info("d0").state.owner, None);
        assert_eq!(other.send(&again), Ok(()));
        assert_eq!(other.send("owner"), Ok(()));
        expect(&mut other, "", (Ok(()), Ok(())));
    });
}

/// `blk` accesses memory by its object, so requests continue regardless of the owner.
#[test]
fn requests_go_on_over_a_change_of_owner() {
    let daemon = Daemon::start();
    let disk = daemon.disk("disk", 1 << 20);
    let path = daemon.add_blk("d0", &disk, &[]);
    let mut blk = Blk::start(&path);
    let device = std::os::fd::AsFd::as_fd(blk.session.ops()).try_clone_to_owned().unwrap();
    let mut peer = Peer::inheriting(&device);
    let pinned = daemon.info("d0").state.pinned_pages;
    let token = blk.submit(0, kind::IN, 8, &[], &[data(0, 4096)]);
    assert_eq!(peer.send("new_owner"), Ok(()));
    blk.notify(0);
    let done = blk.finish(0, support::blk::TIMEOUT).unwrap();
    assert_eq!((done.token, done.status), (token, OK));
    assert_eq!(blk.get(support::blk::DATA, 4096), pattern(4096, 4096));
    assert_eq!(blk.session.ops().vring_base(QueueIndex(0)), Err(Errno::PERM));
    assert_eq!(daemon.info("d0").state.pinned_pages, pinned);
    blk.session.ops().new_owner().unwrap();
    assert_eq!(blk.session.ops().vring_base(QueueIndex(0)), Ok(1));
    peer.kill();
    assert_eq!(blk.read(0, 0, 512), Ok(pattern(0, 512)));
}
