//! Dirty tracking against a model: a copy of memory that is kept by it alone is the memory, whatever happens meanwhile.
//!
//! `VDPA_TEST_DIRTY_REQUESTS` sets the number of requests of each run. Needs /dev/fuse and the right to mount.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

#[path = "support/dirty_model.rs"]
mod dirty_model;
#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/held.rs"]
mod held;
#[path = "support/robust.rs"]
mod robust;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use vdpa_client::Session;
use vdpa_client::device::Device;
use vdpa_core::blk::{RequestHeader, kind};
use vdpa_core::features::Features;
use vdpa_core::ops::VdpaOps;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{IovaRange, Perm, QueueIndex};
use vdpa_sys::memfd;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use dirty_model::{Event, Model};
use held::{daemon, kill, upgrade};
use robust::Vdpad;

/// Requests of a run, unless set otherwise.
const REQUESTS: u64 = 20_000;

fn requests() -> u64 {
    std::env::var("VDPA_TEST_DIRTY_REQUESTS").map_or(REQUESTS, |count| count.parse().unwrap())
}

fn start() -> Vdpad {
    let limit = Duration::from_secs(110 + requests() / 2000);
    let front: &[&str] = if held::is_cuse() { &[] } else { &["--front", "fuse"] };
    Vdpad::start_with(limit, &[&["--holder", "--crash-limit", "1000"], front].concat())
}

fn add(vdpad: &Vdpad, mgmtdev: &str, attrs: &str) -> PathBuf {
    match mgmtdev {
        "blk" => vdpad.add_blk("device", 8 << 20, attrs),
        other => vdpad.add("device", other, attrs),
    }
}

/// Runs the model; `disturb` is called now and then.
fn run(model: &mut Model, requests: u64, mut disturb: impl FnMut(u64)) -> Result<(), String> {
    const EVENTS: [Event; 4] = [Event::Remap, Event::Unmap, Event::Owner, Event::Suspend];
    let mut number = 0;
    while model.done() < requests {
        let count = 1 + model.dice(48);
        model.submit_some(count);
        if model.dice(3) == 0 {
            model.report()?;
        }
        model.reap();
        if model.dice(40) == 0 {
            let event = EVENTS[usize::try_from(model.dice(4)).unwrap()];
            // A second process takes some milliseconds.
            if event != Event::Owner || model.dice(8) == 0 {
                model.event(event)?;
            }
        }
        if model.dice(60) == 0 {
            model.check()?;
        }
        number += 1;
        disturb(number);
    }
    model.check()
}

/// Without crashes, and with a crash or an upgrade of the daemon now and then.
fn agrees(mgmtdev: &str, attrs: &str, packed: bool, private: bool) {
    let vdpad = start();
    let device = add(&vdpad, mgmtdev, attrs);
    // The second copy, by the log, takes as long again.
    let requests = if attrs.contains("vhost_log") { requests() / 2 } else { requests() };
    for (seed, tracking_first) in [(1, true), (2, false)] {
        let mut model = Model::start(&device, packed, private, seed);
        model.run(tracking_first);
        assert_eq!(model.is_logged(), attrs.contains("vhost_log"));
        run(&mut model, requests / 2, |_| {}).unwrap();
        drop(model);
        vdpad.is_released("device");
    }
    let mut model = Model::start(&device, packed, private, 3);
    model.run(true);
    let mut kills = 0;
    let every = (requests / 25 / 12).max(60);
    run(&mut model, requests, |number| {
        if number % every == 0 {
            kills += 1;
            if kills % 4 == 0 { upgrade(&vdpad) } else { kill(&vdpad) }
        }
    })
    .unwrap();
    assert!(kills > 2, "{kills}");
    println!(
        "{mgmtdev} {attrs}: {} requests, {} reports, {kills} daemons, generation {}",
        2 * requests,
        model.reports,
        daemon(&vdpad).holder.unwrap().generation
    );
}

#[test]
fn blk() {
    agrees("blk", "", false, false);
}

#[test]
fn blk_packed() {
    agrees("blk", "packed on", true, false);
}

/// Data by bounce buffers.
#[test]
fn blk_private_memory() {
    agrees("blk", "", false, true);
}

/// Data by readv.
#[test]
fn blk_not_pinned() {
    agrees("blk", "pin off", false, false);
}

#[test]
fn blk_handover() {
    agrees("blk", "handover open", false, false);
}

#[test]
fn sim_blk() {
    agrees("sim-blk", "", false, false);
}

#[test]
fn sim_blk_pinned() {
    agrees("sim-blk", "use_va off", false, false);
}

#[test]
fn sim_net() {
    agrees("sim-net", "", false, false);
}

/// With the log of vhost as the second reader.
#[test]
fn blk_vhost_log() {
    agrees("blk", "vhost_log on", false, false);
}

#[test]
fn blk_packed_vhost_log() {
    agrees("blk", "vhost_log on packed on", true, false);
}

#[test]
fn sim_net_vhost_log() {
    agrees("sim-net", "vhost_log on", false, false);
}

/// What the client library offers, and what administrators see.
#[test]
fn a_session_takes_dirty_pages() {
    let vdpad = Vdpad::start(Duration::from_secs(60));
    let device = add(&vdpad, "sim-blk", "");
    let mut session = Device::<VhostVdpaFd>::open(device).unwrap().negotiate(Features::NONE).unwrap();
    let map = |session: &mut Session<_>, name: &str, iova, size| {
        session.map_memfd(name, memfd::create(c"memory", size, None).unwrap(), iova, size, Perm::RW).unwrap();
    };
    map(&mut session, "ring", 0, 0x4000);
    map(&mut session, "data", 0x4000, 0x4000);
    map(&mut session, "far", 1 << 32, 0x1000);
    let ranges = session.writable_ranges();
    let range = |first, size| IovaRange::from_size(first, size).unwrap();
    assert_eq!(ranges, [range(0, 0x8000), range(1 << 32, 0x1000)], "adjacent regions are one");
    assert!(session.tracks_dirty_pages() && session.dirty_info().unwrap().page_size.is_none());
    assert!(session.take_dirty_pages(ranges[0]).is_err(), "nothing is tracked");
    session.start_dirty_tracking(&ranges).unwrap();
    assert_eq!(session.dirty_info().unwrap().page_size, Some(4096));
    let shown = vdpad.ctl("-s dev show device").stdout;
    assert!(shown.contains("  dirty_tracking page_size 4096 ranges 2 pages 9\n"), "{shown}");
    session.add_queue(QueueIndex(0), 16, "ring", 0).unwrap();
    let memory = session.region("ring").unwrap().map().unwrap().clone();
    memory.write(0x2000, &RequestHeader { kind: kind::IN, ioprio: 0, sector: 0 }.encode()).unwrap();
    session.start().unwrap();
    let at = |iova, len| Buffer { iova, len };
    let queue = session.queue_mut(QueueIndex(0)).unwrap();
    queue.submit(&[at(0x2000, 16)], &[at(0x5800, 0x1000), at(0x3000, 1)], 1).unwrap();
    queue.notify().unwrap();
    while queue.reap().unwrap().is_none() {
        assert!(queue.wait(Some(Duration::from_secs(10))).unwrap(), "the request is not answered");
    }
    let written = [0, 0x3000, 0x5000, 0x6000];
    let kept = session.dirty_pages(ranges[0]).unwrap();
    assert_eq!((kept.iter().collect::<Vec<_>>(), kept.count()), (written.to_vec(), 4));
    assert!(session.dirty_pages(ranges[1]).unwrap().is_empty());
    // The unmap takes those of its region, and a later report the others.
    session.suspend().unwrap();
    assert_eq!(session.unmap_dirty("data").unwrap().iter().collect::<Vec<_>>(), [0x5000, 0x6000]);
    assert!(session.region("data").is_none());
    assert_eq!(session.take_dirty_pages(ranges[0]).unwrap().iter().collect::<Vec<_>>(), [0, 0x3000]);
    assert!(session.take_dirty_pages(ranges[0]).unwrap().is_empty());
    session.stop_dirty_tracking().unwrap();
    assert!(session.unmap_dirty("far").is_err() && session.region("far").is_some());
    assert!(!vdpad.ctl("-s dev show device").stdout.contains("dirty_tracking"));
}

/// The second process of [`Event::Owner`]: its standard input is the device.
#[test]
#[ignore = "a process of the other tests"]
fn becomes_owner() {
    let device = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    VhostVdpaFd::from_fd(device).new_owner().unwrap();
}

/// The model finds a mark that is missing.
#[cfg(feature = "planted-faults")]
#[test]
fn a_missing_mark_is_found() {
    for fault in ["dirty-data-unmarked", "dirty-ring-unmarked"] {
        let variable = ("VDPA_PLANTED_FAULT", fault);
        let vdpad = Vdpad::start_with_env(Duration::from_secs(100), &["--front", "fuse"], variable);
        for (mgmtdev, attrs, packed) in
            [("blk", "", false), ("blk", "packed on", true), ("sim-blk", "", false), ("sim-net", "", false)]
        {
            let device = add(&vdpad, mgmtdev, attrs);
            let mut model = Model::start(&device, packed, false, 4);
            model.run(true);
            let found = run(&mut model, 2000, |_| {}).unwrap_err();
            assert!(found.contains("and not reported"), "{fault} on {mgmtdev} {attrs}: {found}");
            drop(model);
            vdpad.ctl("dev del device --force").succeeds();
        }
    }
}
