//! What the client library says when a real device refuses.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/robust.rs"]
mod robust;

use std::os::fd::AsRawFd as _;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vdpa_client::device::Device;
use vdpa_client::features::Features;
use vdpa_client::types::{Perm, QueueIndex};
use vdpa_client::vhost_vdpa::VhostVdpaFd;
use vdpa_client::{Error, memfd};

use robust::Vdpad;

type Disk = Device<VhostVdpaFd>;

#[test]
fn a_device_that_this_process_has_open_is_named_by_its_descriptor() {
    let vdpad = Vdpad::start(Duration::from_secs(60));
    let path = vdpad.add_any("disk0", "blk");
    let mut session = Disk::open(&path).unwrap().negotiate(Features::NONE).unwrap();
    let error = Disk::open(&path).unwrap_err();
    let fd = session.as_raw_fd();
    assert!(matches!(error, Error::Open { here: Some(there), .. } if there == fd), "{error}");
    session.map_memfd("ram", memfd::create(c"ram", 65536, None).unwrap(), 0, 65536, Perm::RW).unwrap();
    let error = session.add_queue(QueueIndex(99), 64, "ram", 0).unwrap_err().to_string();
    assert_eq!(error, "queue 99 does not exist: the device has 4 queues, from 0 to 3");
}

/// nextest runs each test in a process of its own, so the limit is that of no other.
#[test]
fn the_limit_on_locked_memory_is_told_from_a_bad_address() {
    let vdpad = Vdpad::start(Duration::from_secs(60));
    let own = vdpad.add_blk("own", 1 << 20, "");
    let set = vdpad.add_blk("set", 1 << 20, "memlock 64K");
    let open = |path| Disk::open(path).unwrap().negotiate(Features::NONE).unwrap();
    let memory = || memfd::create(c"ram", 1 << 20, None).unwrap();

    let mut session = open(set);
    let error = session.map_memfd("ram", memory(), 0, 1 << 20, Perm::RW).unwrap_err();
    assert!(matches!(error, Error::Map { .. } | Error::Memlock { .. }), "{error}");
    drop(session);

    let maximum = getrlimit(Resource::Memlock).maximum;
    setrlimit(Resource::Memlock, Rlimit { current: Some(128 << 10), maximum }).unwrap();
    let mut session = open(own);
    session.map_memfd("low", memfd::create(c"low", 65536, None).unwrap(), 0, 65536, Perm::RW).unwrap();
    let error = session.map_memfd("ram", memory(), 0x10_0000, 1 << 20, Perm::RW).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the device refused to map region \"ram\" at [0x100000, 0x1fffff]: with it 1114112 bytes are pinned for this process, whose \
         RLIMIT_MEMLOCK is 131072; raise it (ulimit -l, LimitMEMLOCK= of a unit), or have the device made with the attribute memlock"
    );
    assert_eq!(session.regions().len(), 1);
}
