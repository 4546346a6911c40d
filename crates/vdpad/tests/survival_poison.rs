//! A request that ends the daemon, again and again: it is the only one that is refused. The daemon has a planted fault.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/robust.rs"]
mod robust;

use std::thread;
use std::time::Duration;

use vdpa_control::api::{DaemonInfo, DaemonRole};
use vdpa_core::Errno;
use vdpa_core::blk::kind;
use vdpa_core::faults::Fault;
use vdpa_core::ops::VdpaOps;

use robust::disk::{self, Disk};
use robust::{Vdpad, eventually};

const LIMIT: Duration = Duration::from_secs(60);
/// The block with sector 4096.
const DEADLY: u64 = 512;

fn start(fault: Fault) -> Vdpad {
    let args = ["--holder", "--front", "fuse", "--crash-limit", "10"];
    Vdpad::start_with_env(LIMIT, &args, ("VDPA_PLANTED_FAULT", fault.name()))
}

fn daemon(vdpad: &Vdpad) -> DaemonInfo {
    eventually("the daemon answers", || vdpad.client().daemon().ok())
}

/// A deadly write among 31 others, and another device whose requests are in flight at the same time.
#[test]
fn a_deadly_request_is_refused_and_its_neighbours_are_done() {
    let vdpad = start(Fault::DeadlyWrite);
    let device = vdpad.add_blk("disk0", 64 << 20, "packed on direct on");
    let other = vdpad.add_blk("disk1", 64 << 20, "packed on direct on");
    let mut disk = Disk::start(&device, disk::MEMORY_MIN);
    let mut other = Disk::start(&other, disk::MEMORY_MIN);
    for slot in 0..32 {
        disk.submit(slot, (kind::OUT, if slot == 13 { DEADLY } else { slot + 1 }, slot));
        other.submit(slot, (kind::OUT, slot + 1, slot));
    }
    other.kick();
    disk.kick();
    assert_eq!(disk.settle_but(DEADLY), [13]);
    assert_eq!(other.settle().len(), 32);
    let info = daemon(&vdpad);
    assert_eq!((info.poison, info.role, info.holder.unwrap().crashes), (1, DaemonRole::Daemon, 3));
    let counts = |name| vdpad.info(name).state.queues.iter().map(|queue| (queue.poison, queue.errors)).next();
    assert_eq!((counts("disk0"), counts("disk1")), (Some((1, 1)), Some((0, 0))));
    let log = vdpad.log();
    assert!(log.contains("died with the request of type 1, sector 4096, 4096 bytes"), "{log}");
    let show = vdpad.ctl("-s dev show disk0");
    show.succeeds();
    assert!(show.stdout.contains("poison 1"), "{show:?}");
    // Everything that was written is there, and the device works on.
    (0..32).filter(|&slot| slot != 13).for_each(|slot| disk.submit(slot, (kind::IN, slot + 1, slot)));
    disk.kick();
    assert_eq!(disk.settle().len(), 31);
    disk.check(99);
}

/// An ioctl in flight at two crashes in a row gets EIO, and is not tried a third time. Those of another client go on.
#[test]
fn a_deadly_command_gets_an_error() {
    let vdpad = start(Fault::DeadlySuspend);
    let (first, second) = (vdpad.add_any("disk0", "blk"), vdpad.add_any("disk1", "blk"));
    let mut disk = Disk::start(&first, disk::MEMORY_MIN);
    let mut other = Disk::start(&second, disk::MEMORY_MIN);
    disk.check(1);
    let status = disk.session.ops().status().unwrap();
    thread::scope(|scope| {
        let suspend = scope.spawn(|| disk.session.ops().suspend());
        while !suspend.is_finished() {
            assert_eq!(other.session.ops().status().unwrap(), status);
        }
        assert_eq!(suspend.join().unwrap(), Err(Errno::IO));
    });
    let info = daemon(&vdpad);
    assert_eq!((info.poison, info.role, info.holder.unwrap().crashes), (1, DaemonRole::Daemon, 2));
    let log = vdpad.log();
    assert!(log.contains("processes have died with this request"), "{log}");
    assert_eq!(disk.session.ops().status().unwrap(), status);
    disk.check(2);
    other.check(2);
}
