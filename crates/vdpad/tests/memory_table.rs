//! Memory as a table: `Session::set_memory`, and SET_MEM_TABLE of a device with `mem_table on`. What is in both tables is not touched:
//! it stays pinned, and I/O in it goes on.
//!
//! Needs /dev/fuse and the right to mount.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vdpa_client::Error;
use vdpa_client::dma::TableRegion;
use vdpa_client::error::RegionProblem;
use vdpa_client::memory::Memory;
use vdpa_client::queue::Queue;
use vdpa_core::Errno;
use vdpa_core::blk::{RequestHeader, kind};
use vdpa_core::features::Features;
use vdpa_core::ops::VdpaOps as _;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Asid, Perm, QueueIndex};
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};
use vdpa_sys::uapi::vhost as uapi;
use vdpa_sys::vhost_vdpa::{RawArg, VhostVdpaFd};

use support::blk::{Blk, FEATURES, IOVA, MEMORY, OK, TIMEOUT};
use support::daemon::{Daemon, pattern};

const MIB: u64 = 1 << 20;
const A: u64 = 0x2_0000_0000;

/// Lets this process pin so many bytes.
fn limit(bytes: u64) {
    let maximum = getrlimit(Resource::Memlock).maximum;
    setrlimit(Resource::Memlock, Rlimit { current: Some(bytes), maximum }).unwrap();
}

fn memory(name: &str, size: u64) -> Arc<Memory> {
    Memory::map(name, memfd::create(c"table", size, None).unwrap(), 0, size, false).unwrap()
}

fn region(memory: &Arc<Memory>, iova: u64) -> TableRegion {
    TableRegion {
        name: memory.name().to_owned(),
        memory: Arc::clone(memory),
        offset: 0,
        iova,
        size: memory.size(),
        perm: Perm::RW,
    }
}

fn pinned(daemon: &Daemon) -> u64 {
    daemon.info("d0").state.pinned_pages
}

/// The table that a session of [`Blk`] has: its rings and data.
fn present(blk: &Blk) -> TableRegion {
    region(blk.session.region("memory").unwrap().memory(), IOVA)
}

#[test]
fn a_session_sends_the_difference() {
    let daemon = Daemon::start();
    let disk = daemon.disk("disk", 1 << 20);
    limit(MEMORY + 2 * MIB);
    let mut blk = Blk::start(&daemon.add_blk("d0", &disk, &[]));
    let own = present(&blk);
    let (a, b) = (region(&memory("a", MIB), A), region(&memory("b", MIB), 2 * A));
    let change = blk.session.set_memory(&[own.clone(), a.clone(), b.clone()]).unwrap();
    assert_eq!(
        (change.mapped.join(" "), change.kept, pinned(&daemon)),
        ("a b".into(), 1, (MEMORY + 2 * MIB) / 4096)
    );
    // From here on nothing may be pinned, so whatever is pinned was not touched.
    limit(0);
    let change = blk.session.set_memory(&[b.clone(), own.clone()]).unwrap();
    assert_eq!((change.unmapped.join(" "), change.kept), ("a".into(), 2));
    assert_eq!(pinned(&daemon), (MEMORY + MIB) / 4096);
    assert_eq!(blk.read(0, 8, 4096), Ok(pattern(4096, 4096)));
    assert_eq!(blk.session.set_memory(&[own.clone(), b.clone()]).unwrap().kept, 2, "the order says nothing");
    // What is refused is named, and everything is as before: "b", which was unmapped to make room, is mapped again.
    limit(MEMORY + MIB);
    let large = region(&memory("large", 2 * MIB), A);
    let error = blk.session.set_memory(&[own.clone(), large.clone()]).unwrap_err();
    assert!(matches!(&error, Error::Memlock { name, .. } if name == "large"), "{error}");
    let names: Vec<_> = blk.session.regions().iter().map(|region| region.name().to_owned()).collect();
    assert_eq!(names, ["memory", "b"]);
    assert_eq!((pinned(&daemon), daemon.info("d0").state.mappings), ((MEMORY + MIB) / 4096, 2));
    assert_eq!(blk.read(0, 8, 4096), Ok(pattern(4096, 4096)));
    // The memory of a ring stays where it is.
    let error = blk.session.set_memory(std::slice::from_ref(&b)).unwrap_err();
    let Error::Region { name, problem: RegionProblem::HoldsRing { queue, .. } } = &error else {
        panic!("{error}")
    };
    assert_eq!((name.as_str(), queue), ("memory", &QueueIndex(0)), "{error}");
    let other = memory("other", MEMORY);
    assert!(blk.session.set_memory(&[region(&other, IOVA), b.clone()]).is_err(), "{error}");
    // A table that cannot be.
    let overlap = TableRegion { name: "c".into(), iova: 2 * A + MIB / 2, ..b.clone() };
    let error = blk.session.set_memory(&[own.clone(), b.clone(), overlap]).unwrap_err();
    assert!(error.to_string().contains("region \"c\" overlaps region \"b\""), "{error}");
    assert_eq!(blk.read(0, 16, 512), Ok(pattern(16 * 512, 512)));
    // What cannot be mapped again, since the limit was lowered, is named, and is not a region any more.
    limit(0);
    let error = blk.session.set_memory(&[own.clone(), large]).unwrap_err();
    assert!(matches!(&error, Error::Lost { names, .. } if names == &["b"]), "{error}");
    assert_eq!((blk.session.regions().len(), pinned(&daemon)), (1, MEMORY / 4096));
    assert_eq!(blk.read(0, 16, 512), Ok(pattern(16 * 512, 512)));
}

/// Reads in one queue, each compared with the disk, until it is told to stop.
fn load(mut queue: Queue, map: &SharedMap, done: &AtomicU64, stop: &AtomicBool) -> Queue {
    const SLOTS: u64 = 16;
    let at = |offset: u64, len| Buffer { iova: IOVA + offset, len };
    let place = |slot: u64| (MIB + slot * 8192, 2 * MIB + slot * 64);
    let sector = |token: u64| token * 7 % 2000;
    let mut next = 0;
    let mut submit = |queue: &mut Queue, slot: u64| {
        next += SLOTS;
        let token = next + slot;
        let (data, header) = place(slot);
        let request = RequestHeader { kind: kind::IN, ioprio: 0, sector: sector(token) };
        map.write(usize::try_from(header).unwrap(), &request.encode()).unwrap();
        map.write(usize::try_from(header + 32).unwrap(), &[0xee]).unwrap();
        queue.submit(&[at(header, 16)], &[at(data, 4096), at(header + 32, 1)], token).unwrap();
    };
    (0..SLOTS).for_each(|slot| submit(&mut queue, slot));
    queue.notify().unwrap();
    let mut open = SLOTS;
    while open > 0 {
        let Some(completion) = queue.reap().unwrap() else {
            assert!(queue.wait(Some(TIMEOUT)).unwrap(), "a request is not answered");
            continue;
        };
        let slot = completion.token % SLOTS;
        let (data, header) = place(slot);
        let (mut status, mut bytes) = ([0], vec![0; 4096]);
        map.read(usize::try_from(header + 32).unwrap(), &mut status).unwrap();
        map.read(usize::try_from(data).unwrap(), &mut bytes).unwrap();
        assert_eq!(status, [OK]);
        assert!(bytes == pattern(sector(completion.token) * 512, 4096), "request {}", completion.token);
        done.fetch_add(1, Ordering::Relaxed);
        if stop.load(Ordering::Relaxed) {
            open -= 1;
        } else {
            submit(&mut queue, slot);
            queue.notify().unwrap();
        }
    }
    queue
}

/// Changes tables, as long as there is load on what is in all of them, and at least `least` times.
fn under_load(blk: &mut Blk, mut change: impl FnMut(&mut Blk, u64)) {
    let queue = blk.session.take_queue(QueueIndex(0)).unwrap();
    let map = blk.memory().clone();
    let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let loading = scope.spawn(|| load(queue, &map, &done, &stop));
        let mut seen = 0;
        for round in 0..200 {
            change(blk, round);
            // Requests are answered between the changes too, and not only after them.
            while done.load(Ordering::Relaxed) < seen + 20 && !loading.is_finished() {
                thread::yield_now();
            }
            seen = done.load(Ordering::Relaxed);
        }
        stop.store(true, Ordering::Relaxed);
        blk.session.put_queue(loading.join().unwrap()).unwrap();
    });
    assert!(done.into_inner() >= 4000);
}

#[test]
fn requests_go_on_while_a_session_changes_other_regions() {
    let daemon = Daemon::start();
    let disk = daemon.disk("disk", 2 << 20);
    let attrs: [&[(&str, &str)]; 2] = [&[("memlock", "unlimited")], &[("pin", "off")]];
    for (name, attrs) in ["d0", "d1"].into_iter().zip(attrs) {
        let disk = daemon.disk(name, 2 << 20);
        let mut blk = Blk::start(&daemon.add_blk(name, &disk, attrs));
        let own = present(&blk);
        let others = ["a", "b", "c"].map(|name| memory(name, MIB));
        under_load(&mut blk, |blk, round| {
            let table = others.iter().zip(1..).filter(|(_, number)| round >> number & 1 == 0);
            let table = table.map(|(memory, number)| region(memory, A * number));
            blk.session.set_memory(&[own.clone()].into_iter().chain(table).collect::<Vec<_>>()).unwrap();
        });
    }
    drop(disk);
}

/// `VHOST_SET_MEM_TABLE`: address for the device, bytes, address here.
fn set_table(device: &VhostVdpaFd, regions: &[(u64, u64, u64)]) -> Result<(), Errno> {
    let mut bytes = u64::try_from(regions.len()).unwrap().to_le_bytes().to_vec();
    for &(iova, size, uaddr) in regions {
        bytes.extend([iova, size, uaddr, 0].into_iter().flat_map(u64::to_le_bytes));
    }
    device.raw_ioctl(uapi::VHOST_SET_MEM_TABLE, RawArg::Bytes(&mut bytes)).map(drop)
}

fn map(size: u64) -> SharedMap {
    let fd = memfd::create(c"table", size, None).unwrap();
    SharedMap::map(fd, 0, usize::try_from(size).unwrap(), Prot::RW, false).unwrap()
}

#[test]
fn a_device_with_a_memory_table_takes_the_difference() {
    let daemon = Daemon::start();
    let disk = daemon.disk("disk", 1 << 20);
    limit(4 * MIB);
    let path = daemon.add_blk("d0", &disk, &[("mem_table", "on")]);
    let device = VhostVdpaFd::open(&path).unwrap();
    let (a, b) = (map(2 * MIB), map(2 * MIB));
    let (a, b) = (a.addr() as u64, b.addr() as u64);
    assert_eq!(set_table(&device, &[(A, MIB, a)]), Err(Errno::PERM));
    device.set_owner().unwrap();
    set_table(&device, &[(A, MIB, a), (2 * A, MIB, b)]).unwrap();
    assert_eq!((pinned(&daemon), daemon.info("d0").state.mappings), (512, 2));
    limit(2 * MIB);
    // Nothing more may be pinned: the first region is not pinned anew. Refused are a region that needs more, and one without memory.
    set_table(&device, &[(A, MIB, a), (2 * A, MIB, b)]).unwrap();
    assert_eq!(set_table(&device, &[(A, MIB, a), (2 * A, 2 * MIB, b)]), Err(Errno::NOMEM));
    assert_eq!(set_table(&device, &[(A, MIB, a), (2 * A, MIB, 0)]), Err(Errno::FAULT));
    assert_eq!(set_table(&device, &[(A, MIB, a), (A + 4096, MIB, b)]), Err(Errno::FAULT));
    assert_eq!((pinned(&daemon), daemon.info("d0").state.mappings), (512, 2));
    // One that grows keeps what it has.
    limit(3 * MIB);
    set_table(&device, &[(A, 2 * MIB, a), (2 * A, MIB, b)]).unwrap();
    assert_eq!((pinned(&daemon), daemon.info("d0").state.mappings), (768, 3));
    limit(0);
    set_table(&device, &[(A, 2 * MIB, a)]).unwrap();
    assert_eq!(pinned(&daemon), 512);
    // Messages of the IOTLB and tables are about the same mappings.
    assert_eq!(device.dma_map(Asid(0), A, MIB, a, Perm::RW), Err(Errno::FAULT));
    device.dma_unmap(Asid(0), A, 1).unwrap();
    assert_eq!((pinned(&daemon), daemon.info("d0").state.mappings), (256, 1));
    device.batch_begin(Asid(0)).unwrap();
    assert_eq!(set_table(&device, &[]), Err(Errno::BUSY));
    device.batch_end(Asid(0)).unwrap();
    set_table(&device, &[]).unwrap();
    assert_eq!((pinned(&daemon), daemon.info("d0").state.mappings), (0, 0));
    let log = daemon.log();
    assert!(log.contains("memory table refused") && log.contains("pinning 256 more pages"), "{log}");
}

#[test]
fn requests_go_on_while_tables_change_other_regions() {
    let daemon = Daemon::start();
    let disk = daemon.disk("disk", 2 << 20);
    let path = daemon.add_blk("d0", &disk, &[("mem_table", "on"), ("memlock", "unlimited")]);
    let mut blk = Blk::negotiated(&path, FEATURES.without(Features::BLK_MQ));
    blk.map(memfd::create(c"blk", MEMORY, None).unwrap());
    blk.run(1);
    let own = blk.memory().addr() as u64;
    let others = [map(MIB), map(MIB), map(MIB)];
    under_load(&mut blk, |blk, round| {
        let regions = others.iter().zip(1..).filter(|(_, number)| round >> number & 1 == 0);
        let regions = regions.map(|(map, number)| (A * number, MIB, map.addr() as u64));
        let table: Vec<_> = [(IOVA, MEMORY, own)].into_iter().chain(regions).collect();
        set_table(blk.session.ops(), &table).unwrap();
    });
    let shown = daemon.info("d0").state;
    assert!(shown.mappings >= 1 && shown.pinned_pages >= MEMORY / 4096);
}
