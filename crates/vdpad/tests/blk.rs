//! How a `blk` device answers valid and invalid requests, as seen by the driver and in the backing file.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

mod support;
#[macro_use]
#[path = "support/both_rings.rs"]
mod both_rings;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{ftruncate, statfs};
use vdpa_client::dma::{Backing, RegionSpec};
use vdpa_core::Errno;
use vdpa_core::blk::{BlkConfig, RequestHeader, Segment, kind};
use vdpa_core::features::{Features, Status};
use vdpa_core::ops::VdpaOps;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Asid, Perm, QueueIndex};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};
use zerocopy::FromBytes;

use support::blk::{
    Blk, DATA, FEATURES, INDIRECT, IOERR, IOVA, MEMORY, NEXT, OK, Private, TIMEOUT, UNSUPP, UNWRITTEN, WRITE,
    data, descriptor, over_packed_rings,
};
use support::daemon::{Daemon, Disk, pattern};

const DISK: usize = 8 << 20;
const SECTORS: u64 = DISK as u64 / 512;
/// How long to wait for an event that must not happen.
const WHILE: Duration = Duration::from_millis(200);
/// Where tests map memory in addition to the driver's.
const ELSEWHERE: u64 = 0x2_0000_0000;

over_both_rings!(
    a_read_only_device_changes_nothing,
    what_is_beyond_the_end_or_no_whole_sector_fails_and_changes_nothing,
    what_the_device_does_not_know_is_unsupported,
    the_id_is_the_serial_or_the_name,
    direct_io_takes_any_memory,
    private_memory_is_served_by_copying,
    buffers_that_are_not_mapped_fail_their_request_only,
    a_header_out_of_reach_keeps_its_request_and_those_behind_it_in_the_ring,
    truncated_data_memory_fails_requests_and_nothing_else,
    truncated_ring_memory_harms_its_own_device_only,
    without_flush_every_change_is_on_the_disk_when_it_is_answered,
    event_indices,
    a_ring_goes_on_from_every_base,
    discard_and_write_zeroes_where_the_file_system_cannot_zero,
    requests_wait_for_a_device_that_is_suspended,
    a_device_taken_away_fails_requests_and_leaves_its_file_to_the_next_one,
    every_request_is_answered_when_a_device_is_taken_away,
);

fn setup(attrs: &[(&str, &str)]) -> (Daemon, Disk, PathBuf) {
    let daemon = Daemon::start();
    let disk = daemon.disk("disk", DISK);
    let path = daemon.add_blk("d0", &disk, attrs);
    (daemon, disk, path)
}

fn a_read_only_device_changes_nothing() {
    let (_daemon, disk, path) = setup(&[("readonly", "on")]);
    let mut blk = Blk::start(&path);
    assert!(blk.session.features().has(Features::BLK_RO));
    assert_eq!(blk.write(0, 0, &[1; 512]), IOERR);
    assert_eq!(blk.range(kind::DISCARD, 0, 8, 0), IOERR);
    assert_eq!(blk.range(kind::WRITE_ZEROES, 0, 8, 0), IOERR);
    assert_eq!(blk.range(kind::WRITE_ZEROES, 0, 8, Segment::UNMAP), IOERR);
    assert_eq!(blk.io(0, kind::FLUSH, 0, &[], &[]).status, OK);
    assert_eq!(blk.read(0, 8, 4096), Ok(pattern(4096, 4096)));
    assert!(disk.all() == pattern(0, DISK), "the file was changed");
}

fn what_is_beyond_the_end_or_no_whole_sector_fails_and_changes_nothing() {
    let (daemon, disk, path) = setup(&[]);
    let mut blk = Blk::start(&path);
    for (sector, len) in
        [(SECTORS, 512), (SECTORS - 1, 1024), (u64::MAX, 512), (1 << 55, 512), (0, 100), (0, 700)]
    {
        assert_eq!(blk.write(0, sector, &vec![1; len]), IOERR, "write of {len} bytes at {sector}");
        assert_eq!(blk.read(0, sector, len), Err(IOERR), "read of {len} bytes at {sector}");
    }
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        for (sector, count) in [(SECTORS, 1), (SECTORS - 1, 2), (u64::MAX, 1), (0, u32::MAX)] {
            assert_eq!(blk.range(kind, sector, count, 0), IOERR, "{kind} of {count} sectors at {sector}");
        }
        assert_eq!(blk.range(kind, 0, 0, 0), OK, "an empty range is one");
        let twice = blk.io(0, kind, 0, &[data(0, 2 * Segment::BYTES)], &[]);
        assert_eq!(twice.status, IOERR, "one segment is what the device offers");
        assert_eq!(blk.io(0, kind, 0, &[data(0, 15)], &[]).status, IOERR);
    }
    assert_eq!(blk.read(0, SECTORS - 1, 512), Ok(pattern(DISK as u64 - 512, 512)));
    assert!(disk.all() == pattern(0, DISK), "the file was changed");
    assert!(daemon.info("d0").state.queues[0].errors > 10);
}

fn what_the_device_does_not_know_is_unsupported() {
    let (_daemon, disk, path) = setup(&[]);
    let mut blk = Blk::start(&path);
    for kind in [2, 3, 5, 7, kind::SECURE_ERASE, 15, 16, 0x8000_0000, u32::MAX] {
        let done = blk.io(0, kind, 0, &[data(0, 512)], &[data(512, 512)]);
        assert_eq!((done.status, done.len), (UNSUPP, 1), "request {kind}");
    }
    assert_eq!(blk.range(kind::DISCARD, 0, 8, Segment::UNMAP), UNSUPP, "no flag of discard");
    assert_eq!(blk.range(kind::WRITE_ZEROES, 0, 8, 2), UNSUPP, "a reserved flag");
    assert!(disk.all() == pattern(0, DISK), "the file was changed");
}

fn the_id_is_the_serial_or_the_name() {
    let (daemon, _disk, path) = setup(&[("serial", "serial no. 123456789")]);
    let other = daemon.disk("other", DISK);
    let second = daemon.add_blk("second", &other, &[]);
    for (path, id) in [(path, b"serial no. 123456789"), (second, b"second\0\0\0\0\0\0\0\0\0\0\0\0\0\0")] {
        let mut blk = Blk::start(&path);
        let done = blk.io(0, kind::GET_ID, 0, &[], &[data(0, 20)]);
        assert_eq!((done.status, done.len), (OK, 21));
        assert_eq!(blk.get(DATA, 20), id);
        blk.put(DATA, &[0xee; 20]);
        let done = blk.io(0, kind::GET_ID, 0, &[], &[data(0, 5), data(7, 3)]);
        assert_eq!((done.status, done.len), (OK, 9));
        let expected = [&id[..5], &[0xee; 2], &id[5..8], &[0xee; 10]].concat();
        assert_eq!(blk.get(DATA, 20), expected, "scattered, and not a byte more than there is room");
    }
}

/// The base of an idle packed ring in its first lap, after this number of requests and descriptors.
fn base(blk: &Blk, requests: u32, descriptors: u32) -> u32 {
    let place = descriptors | 1 << 15;
    if blk.session.features().has(Features::RING_PACKED) { place | place << 16 } else { requests }
}

#[test]
fn the_configuration_describes_the_disk() {
    let (_daemon, _disk, path) = setup(&[("queues", "3"), ("queue_size", "128")]);
    let blk = Blk::with(&path, FEATURES, 3);
    let config = BlkConfig::read_from_bytes(&blk.session.config().unwrap()).unwrap();
    assert_eq!((config.capacity.get(), config.blk_size.get()), (SECTORS, 512));
    assert_eq!((config.num_queues.get(), config.max_discard_seg.get()), (3, 1));
    assert_eq!((config.write_zeroes_may_unmap, config.discard_sector_alignment.get()), (1, 1));
    let ops = blk.session.ops();
    assert_eq!((ops.vring_num(), ops.vqs_count()), (Ok(128), Ok(3)));
}

#[test]
fn a_null_device_answers_and_touches_nothing() {
    let daemon = Daemon::start();
    let path = daemon.add("n0", "blk", &[("null", "1048576")]);
    let mut blk = Blk::start(&path);
    let config = BlkConfig::read_from_bytes(&blk.session.config().unwrap()).unwrap();
    assert_eq!((config.capacity.get(), config.blk_size.get()), (2048, 512));
    assert_eq!(blk.write(0, 0, &[1; 4096]), OK);
    blk.put(DATA, &[0xee; 4096]);
    let done = blk.io(0, kind::IN, 0, &[], &[data(0, 4096)]);
    assert_eq!((done.status, done.len), (OK, 4097));
    assert_eq!(blk.get(DATA, 4096), [0xee; 4096], "the driver's memory is as it was");
    assert_eq!(blk.io(0, kind::FLUSH, 0, &[], &[]).status, OK);
    assert_eq!(blk.range(kind::WRITE_ZEROES, 0, 8, 0), OK);
    assert_eq!(blk.io(0, kind::GET_ID, 0, &[], &[data(0, 20)]).len, 21);
    assert_eq!(blk.io(0, 3, 0, &[], &[data(0, 512)]).status, UNSUPP);
    for (sector, len) in [(2048, 512), (2047, 1024), (u64::MAX, 512), (0, 100)] {
        assert_eq!(blk.write(0, sector, &vec![1; len]), IOERR, "{len} bytes at {sector}");
        assert_eq!(blk.read(0, sector, len), Err(IOERR), "{len} bytes at {sector}");
    }
}

#[test]
fn a_file_in_memory_or_on_a_disk_with_and_without_pins() {
    let daemon = Daemon::start();
    let (memory, other) = (tempfile::tempdir_in("/dev/shm").unwrap(), direct_dir());
    assert_eq!(statfs(memory.path()).unwrap().f_type, 0x0102_1994, "a tmpfs");
    for (index, (dir, pin)) in
        [(&memory, "on"), (&memory, "off"), (&other, "on"), (&other, "off")].into_iter().enumerate()
    {
        let disk = Disk::new(dir.path().join(format!("disk{index}")), DISK);
        let path = daemon.add_blk(&format!("d{index}"), &disk, &[("pin", pin)]);
        let mut blk = Blk::start(&path);
        assert_eq!(blk.read(0, 8, 65536), Ok(pattern(4096, 65536)));
        let bytes = pattern(1 << 40, 12288);
        assert_eq!(blk.write(0, 3, &bytes), OK);
        assert_eq!(disk.read(1536, 12288), bytes);
        // In pieces that are not adjacent; the last one has a sector whose first byte is in another piece.
        blk.put(DATA, &[0xee; 4096]);
        let pieces = [data(0, 512), data(1024, 100), data(2048, 412)];
        assert_eq!(blk.io(0, kind::IN, 3, &[], &pieces).len, 1025);
        let found = [blk.get(DATA, 512), blk.get(DATA + 1024, 100), blk.get(DATA + 2048, 412)].concat();
        assert_eq!(found, bytes[..1024]);
        assert_eq!(blk.get(DATA + 512, 512), [0xee; 512]);
        let done = blk.io(0, kind::OUT, SECTORS - 2, &pieces, &[]);
        assert_eq!((done.status, done.len), (OK, 1));
        assert_eq!(disk.read(DISK as u64 - 1024, 1024), bytes[..1024]);
        assert_eq!(disk.all().len(), DISK);
        // Partly evicted from the page cache, where that does not delete the data.
        let expected = disk.read(0, 65536);
        let file = std::fs::File::open(dir.path().join(format!("disk{index}"))).unwrap();
        file.sync_all().unwrap();
        for from in [32768, 0] {
            rustix::fs::fadvise(&file, from, None, rustix::fs::Advice::DontNeed).unwrap();
            assert_eq!(blk.read(0, 0, 65536).as_ref(), Ok(&expected));
        }
    }
}

/// A directory on a file system that supports O_DIRECT.
fn direct_dir() -> tempfile::TempDir {
    let candidates = [Path::new(env!("CARGO_TARGET_TMPDIR")), Path::new("/var/tmp")];
    let usable = |dir: &&Path| {
        let file = tempfile::NamedTempFile::new_in(dir).ok()?;
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::DIRECT;
        rustix::fs::open(file.path(), flags, rustix::fs::Mode::empty()).ok()
    };
    let dir = candidates.iter().find(|dir| usable(dir).is_some());
    tempfile::tempdir_in(dir.unwrap_or_else(|| panic!("no O_DIRECT in any of {candidates:?}"))).unwrap()
}

fn direct_io_takes_any_memory() {
    let (daemon, dir) = (Daemon::start(), direct_dir());
    for pin in ["on", "off"] {
        let disk = Disk::new(dir.path().join(pin), DISK);
        let path = daemon.add_blk(pin, &disk, &[("direct", "on"), ("pin", pin)]);
        let mut blk = Blk::start(&path);
        let mut model = pattern(0, DISK);
        // The memory of a request of 8 KiB: aligned, at odd addresses, and in pieces of odd lengths.
        let whole = vec![data(0, 8192)];
        let odd = vec![data(1, 8192)];
        let pages = vec![data(0x1000, 4096), data(0x8000, 4096)];
        let pieces = vec![data(3, 100), data(0x2000, 4096), data(0x4001, 3996)];
        for (turn, buffers) in [whole, odd, pages, pieces].into_iter().enumerate() {
            let (sector, bytes) = (64 * turn as u64, pattern(1 << (33 + turn), 8192));
            let mut rest = &bytes[..];
            for buffer in &buffers {
                let (piece, more) = rest.split_at(buffer.len as usize);
                blk.put(buffer.iova - IOVA, piece);
                rest = more;
            }
            assert_eq!(blk.io(0, kind::OUT, sector, &buffers, &[]).status, OK, "write {turn}");
            model[512 * 64 * turn..][..8192].copy_from_slice(&bytes);

            buffers.iter().for_each(|buffer| blk.put(buffer.iova - IOVA, &vec![0; buffer.len as usize]));
            let done = blk.io(0, kind::IN, sector, &[], &buffers);
            assert_eq!((done.status, done.len), (OK, 8193), "read {turn}");
            let piece = |buffer: &Buffer| blk.get(buffer.iova - IOVA, buffer.len as usize);
            assert!(buffers.iter().flat_map(piece).eq(bytes), "read {turn}");
        }
        assert_eq!(blk.io(0, kind::FLUSH, 0, &[], &[]).status, OK);
        assert_eq!(blk.range(kind::WRITE_ZEROES, 1024, 64, 0), OK);
        model[512 * 1024..][..512 * 64].fill(0);
        assert!(disk.all() == model, "pin {pin}: the file differs");
    }
}

fn private_memory_is_served_by_copying() {
    for pin in ["on", "off"] {
        let (daemon, disk, path) = setup(&[("pin", pin)]);
        let mut blk = Blk::start(&path);
        let pinned = daemon.info("d0").state.pinned_pages;
        let memory = Private::new(1 << 20);
        let spec = RegionSpec {
            name: "private".into(),
            backing: Backing::Memory(memory.memory("private"), 0),
            iova: ELSEWHERE,
            size: 1 << 20,
            perm: Perm::RW,
            populate: false,
        };
        blk.session.map(vec![spec]).unwrap();
        assert_eq!(daemon.info("d0").state.pinned_pages, pinned, "private memory cannot be pinned");
        let bytes = pattern(1 << 40, 65536);
        memory.put(4096 * 3 + 1, &bytes);
        let buffer = Buffer { iova: ELSEWHERE + 4096 * 3 + 1, len: 65536 };
        assert_eq!(blk.io(0, kind::OUT, 10, &[buffer], &[]).status, OK);
        assert_eq!(disk.read(512 * 10, 65536), bytes);
        let buffer = Buffer { iova: ELSEWHERE + 777, len: 65536 };
        assert_eq!(blk.io(0, kind::IN, 1000, &[], &[buffer]).status, OK);
        assert_eq!(memory.get(777, 65536), pattern(512_000, 65536));
        // One request with data in two memory areas.
        let both = [data(0, 512), Buffer { iova: ELSEWHERE, len: 1024 }];
        assert_eq!(blk.io(0, kind::IN, 2000, &[], &both).status, OK);
        assert_eq!([blk.get(DATA, 512), memory.get(0, 1024)].concat(), pattern(1_024_000, 1536));
    }
}

#[test]
fn a_whole_ring_in_private_memory() {
    let (_daemon, _disk, path) = setup(&[]);
    let mut blk = Blk::negotiated(&path, FEATURES);
    let memory = Private::new(1 << 20);
    let ops = blk.session.ops();
    ops.dma_map(Asid(0), ELSEWHERE, 1 << 20, memory.addr(), Perm::RW).unwrap();
    // Descriptors at 0, available ring at 4096, used ring at 8192; header, status and data behind.
    let at = |offset: usize, len| Buffer { iova: ELSEWHERE + offset as u64, len };
    memory.put(0, &descriptor(at(0x4000, 16), NEXT, 1));
    memory.put(16, &descriptor(at(0x5000, 4096), NEXT | WRITE, 2));
    memory.put(32, &descriptor(at(0x4010, 1), WRITE, 0));
    memory.put(0x4010, &[UNWRITTEN]);
    memory.put(4096, &[0, 0, 1, 0]);
    let (kick, call) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    let q = QueueIndex(0);
    ops.set_vring_num(q, 16).unwrap();
    let addr = vdpa_core::types::VringAddr {
        desc: ELSEWHERE,
        avail: ELSEWHERE + 4096,
        used: ELSEWHERE + 8192,
        ..Default::default()
    };
    ops.set_vring_addr(q, &addr).unwrap();
    ops.set_vring_kick(q, Some(&kick)).unwrap();
    ops.set_vring_call(q, Some(&call)).unwrap();
    ops.set_vring_enable(q, true).unwrap();
    blk.session.start().unwrap();
    kick.signal();
    assert!(call.wait(Some(TIMEOUT)), "no completion");
    // Without the flags, which show whether the device is busy-polling.
    assert_eq!(memory.get(8194, 10), [1, 0, 0, 0, 0, 0, 1, 0x10, 0, 0], "one element of 4097 bytes");
    assert_eq!((memory.get(0x4010, 1), memory.get(0x5000, 4096)), (vec![OK], pattern(0, 4096)));
}

#[test]
fn memory_that_cannot_be_reached_is_refused() {
    let (daemon, _disk, path) = setup(&[]);
    let blk = Blk::start(&path);
    let (ops, before) = (blk.session.ops(), daemon.info("d0").state);
    let map = |size, uaddr: usize, perm| ops.dma_map(Asid(0), ELSEWHERE, size, uaddr as u64, perm);
    let fd = memfd::create(c"page", 8192, None).unwrap();
    let shared = SharedMap::map(&fd, 0, 8192, Prot::RW, true).unwrap();
    let read_only = SharedMap::map(&fd, 0, 8192, Prot::RO, true).unwrap();
    assert_eq!(map(4096, 0, Perm::RW), Err(Errno::FAULT), "nothing at all");
    assert_eq!(map(4096, 0x1000, Perm::RO), Err(Errno::FAULT), "nothing at all");
    assert_eq!(map(1 << 40, shared.addr(), Perm::RW), Err(Errno::FAULT), "a hole behind it");
    assert_eq!(map(8192, read_only.addr(), Perm::RW), Err(Errno::FAULT), "shared and read-only");
    let text = "private and read-only".as_ptr().addr() & !4095;
    map(4096, text, Perm::RO).unwrap();
    ops.dma_unmap(Asid(0), ELSEWHERE, 4096).unwrap();
    // What is not memory for devices does not get as far as the device.
    assert_eq!(map(4096, text, Perm::RW), Err(Errno::FAULT));
    assert_eq!(map(4096, text, Perm::WO), Err(Errno::FAULT));
    assert_eq!(map(0, shared.addr(), Perm::RW), Err(Errno::INVAL));
    let after = daemon.info("d0").state;
    assert_eq!((after.mappings, after.pinned_pages), (before.mappings, before.pinned_pages));
    map(8192, read_only.addr(), Perm::RO).unwrap();
    assert!(daemon.log().contains("no accessible memory at user address"), "the log says why");
}

fn buffers_that_are_not_mapped_fail_their_request_only() {
    let (_daemon, disk, path) = setup(&[]);
    let mut blk = Blk::start(&path);
    let fd = memfd::create(c"page", 4096, None).unwrap();
    blk.session.map_memfd("read-only", fd, ELSEWHERE, 4096, Perm::RO).unwrap();
    let nowhere = Buffer { iova: ELSEWHERE + (1 << 30), len: 512 };
    let half = Buffer { iova: ELSEWHERE + 4096 - 256, len: 512 };
    let forbidden = Buffer { iova: ELSEWHERE, len: 512 };
    for buffer in [nowhere, half, forbidden] {
        assert_eq!(blk.io(0, kind::IN, 0, &[], &[buffer]).status, IOERR, "{buffer:?}");
    }
    for buffer in [nowhere, half] {
        assert_eq!(blk.io(0, kind::OUT, 0, &[buffer], &[]).status, IOERR, "{buffer:?}");
    }
    assert!(disk.all() == pattern(0, DISK), "the file was changed");
    assert_eq!(blk.io(0, kind::OUT, 0, &[forbidden], &[]).status, OK, "reading it is allowed");
    assert_eq!(disk.read(0, 512), [0; 512]);
}

fn a_header_out_of_reach_keeps_its_request_and_those_behind_it_in_the_ring() {
    let (_daemon, _disk, path) = setup(&[]);
    let mut blk = Blk::start(&path);
    let header = memfd::create(c"header", 4096, None).unwrap();
    let bytes = RequestHeader { kind: kind::IN, ioprio: 0, sector: 2 }.encode();
    SharedMap::map(&header, 0, 4096, Prot::RW, true).unwrap().write(0, &bytes).unwrap();
    let first = blk.submit(0, kind::IN, 1, &[], &[data(0, 512)]);
    let (_, status) = blk.frame(900, kind::IN, 0);
    let queue = blk.session.queue_mut(QueueIndex(0)).unwrap();
    queue.submit(&[Buffer { iova: ELSEWHERE, len: 16 }], &[data(512, 512), status], 900).unwrap();
    let behind = [3, 4].map(|sector| blk.submit(0, kind::IN, sector, &[], &[data(sector * 512, 512)]));
    let finish = |blk: &mut Blk| blk.finish(0, WHILE).map(|done| (done.token, done.status));
    // Further kicks change nothing: the ring is examined again, and the request stays.
    for expected in [Some((first, OK)), None, None] {
        blk.notify(0);
        assert_eq!(finish(&mut blk), expected);
    }
    blk.session.map_memfd("header", header, ELSEWHERE, 4096, Perm::RO).unwrap();
    let mut answers: Vec<_> = (0..3).map(|_| finish(&mut blk)).collect();
    // In whatever order the disk completes them.
    answers.sort_unstable();
    assert_eq!(answers, [behind[0], behind[1], 900].map(|token| Some((token, OK))));
    let read = [0, 512, 3 * 512, 4 * 512].map(|at| blk.get(DATA + at, 512));
    assert_eq!(read, [1, 2, 3, 4].map(|sector| pattern(sector * 512, 512)));
}

/// Memory whose file descriptor the client keeps.
fn extra(blk: &mut Blk, size: u64) -> OwnedFd {
    let fd = memfd::create(c"extra", size, None).unwrap();
    blk.session.map_memfd("extra", fd.try_clone().unwrap(), ELSEWHERE, size, Perm::RW).unwrap();
    fd
}

fn truncated_data_memory_fails_requests_and_nothing_else() {
    for (pin, direct) in [("off", "off"), ("off", "on"), ("on", "off")] {
        let (daemon, dir) = (Daemon::start(), direct_dir());
        let disk = Disk::new(dir.path().join("disk"), DISK);
        let path = daemon.add_blk("d0", &disk, &[("pin", pin), ("direct", direct)]);
        let mut blk = Blk::start(&path);
        let fd = extra(&mut blk, 1 << 20);
        ftruncate(&fd, 4096).unwrap();
        // One piece, and pieces that need a bounce buffer.
        let whole = [Buffer { iova: ELSEWHERE + 8192, len: 4096 }];
        let odd = [Buffer { iova: ELSEWHERE + 8193, len: 95 }, Buffer { iova: ELSEWHERE + 9000, len: 4001 }];
        for buffers in [&whole[..], &odd] {
            let (read, write) =
                (blk.io(0, kind::IN, 0, &[], buffers).status, blk.io(0, kind::OUT, 0, buffers, &[]).status);
            // Pinned pages still exist, although they are not in the file any more.
            if pin == "off" {
                assert_eq!((read, write), (IOERR, IOERR), "direct {direct}");
            }
        }
        daemon.assert_alive();
        assert_eq!(blk.read(0, 64, 4096), Ok(pattern(512 * 64, 4096)), "other memory is as before");
    }
}

fn truncated_ring_memory_harms_its_own_device_only() {
    let (daemon, _disk, path) = setup(&[("queues", "1")]);
    let other = daemon.disk("other", DISK);
    let mut neighbour = Blk::start(&daemon.add_blk("d1", &other, &[]));
    let mut blk = Blk::negotiated(&path, FEATURES);
    let memory = memfd::create(c"blk", MEMORY, None).unwrap();
    blk.map(memory.try_clone().unwrap());
    blk.run(1);
    assert_eq!(blk.read(0, 0, 512), Ok(pattern(0, 512)));
    blk.submit(0, kind::IN, 0, &[], &[data(0, 512)]);
    ftruncate(&memory, 0).unwrap();
    // From here on this process must not access it either.
    blk.session.queue(QueueIndex(0)).unwrap().kick().signal();
    assert_eq!(blk.session.ops().suspend(), Ok(()), "the worker answers, so it has seen the kick");
    daemon.assert_alive();
    assert_eq!(neighbour.read(0, 8, 4096), Ok(pattern(4096, 4096)));
    drop(blk);
    daemon.wait_for("d0", "the close", |info| !info.state.open);
    let mut blk = Blk::start(&path);
    assert_eq!(blk.read(0, 8, 4096), Ok(pattern(4096, 4096)), "the next client is not harmed");
}

fn without_flush_every_change_is_on_the_disk_when_it_is_answered() {
    let (_daemon, disk, path) = setup(&[]);
    let features = Features::of(&[Features::BLK_DISCARD, Features::BLK_WRITE_ZEROES]);
    let mut blk = Blk::with(&path, features, 1);
    let bytes = pattern(1 << 40, 65536);
    for round in 0..8 {
        assert_eq!(blk.write(0, 128 * round, &bytes), OK);
        assert_eq!(disk.read(65536 * round, 65536), bytes);
    }
    assert_eq!(blk.range(kind::WRITE_ZEROES, 2048, 128, 0), OK);
    assert_eq!(disk.read(512 * 2048, 65536), vec![0; 65536]);
    assert_eq!(blk.range(kind::DISCARD, 4096, 128, 0), OK);
    assert_eq!(blk.read(0, 0, 65536), Ok(bytes));
}

fn event_indices() {
    let (daemon, disk, path) = setup(&[]);
    let mut blk = Blk::with(&path, FEATURES.with(Features::RING_EVENT_IDX), 1);
    assert!(blk.session.features().has(Features::RING_EVENT_IDX));
    let mut answered = 0;
    // Bursts of every length up to 20, so that indices wrap at every position.
    for burst in (1..=20).cycle().take(200) {
        for i in 0..burst {
            blk.submit(0, kind::IN, i, &[], &[data(4096 * i, 512)]);
        }
        blk.notify(0);
        for _ in 0..burst {
            assert_eq!(blk.finish(0, TIMEOUT).map(|done| done.status), Some(OK), "lost after {answered}");
            answered += 1;
        }
        for i in 0..burst {
            assert_eq!(blk.get(DATA + 4096 * i, 512), disk.read(512 * i, 512));
        }
    }
    assert_eq!(daemon.info("d0").state.queues[0].requests, answered);
}

/// Whenever the ring is idle, in laps of both wrap counters, the base has its position, and the queue continues from there.
fn a_ring_goes_on_from_every_base() {
    let (daemon, disk, path) = setup(&[]);
    let mut blk = Blk::start(&path);
    let (q, mut seen, mut requests) = (QueueIndex(0), std::collections::BTreeSet::new(), 0u32);
    for burst in (1..=9u32).cycle().take(60) {
        for i in 0..burst {
            blk.submit(0, kind::IN, u64::from(i), &[], &[data(4096 * u64::from(i), 512)]);
        }
        blk.notify(0);
        for _ in 0..burst {
            assert_eq!(blk.finish(0, TIMEOUT).map(|done| done.status), Some(OK), "after {requests}");
        }
        requests += burst;
        for i in 0..u64::from(burst) {
            assert_eq!(blk.get(DATA + 4096 * i, 512), disk.read(512 * i, 512));
        }
        let ops = blk.session.ops();
        ops.suspend().unwrap();
        // Three descriptors each; a lap has 64 of them.
        let (place, lap) = (3 * requests % 64, 3 * requests / 64);
        let place = place | u32::from(lap % 2 == 0) << 15;
        let packed = blk.session.features().has(Features::RING_PACKED);
        let expected = if packed { place | place << 16 } else { requests };
        assert_eq!(ops.vring_base(q), Ok(expected));
        seen.insert(expected >> 15 & 1);
        ops.set_vring_base(q, expected).unwrap();
        assert_eq!(ops.vring_base(q), Ok(expected));
        ops.resume().unwrap();
    }
    assert_eq!(seen.len(), if blk.session.features().has(Features::RING_PACKED) { 2 } else { 1 });
    assert_eq!(daemon.info("d0").state.queues[0].requests, u64::from(requests));
}

/// DPDK sets the available half of the base, and leaves the used half 0.
#[test]
fn a_packed_ring_begins_where_half_a_base_says() {
    over_packed_rings(|| {
        let (_daemon, _disk, path) = setup(&[]);
        let mut blk = Blk::negotiated(&path, FEATURES);
        blk.map(memfd::create(c"blk", MEMORY, None).unwrap());
        blk.session.add_queue(QueueIndex(0), 64, "memory", 0).unwrap();
        blk.session.ops().set_vring_base(QueueIndex(0), 1 << 15).unwrap();
        blk.session.start().unwrap();
        for _ in 0..50 {
            assert_eq!(blk.read(0, 8, 512), Ok(pattern(4096, 512)));
        }
    });
}

/// A base that is invalid for the ring size, and every error that the driver of a packed ring can make.
#[test]
fn a_broken_packed_ring_retires_its_queue_and_nothing_else() {
    const AVAIL: u16 = 1 << 7;
    over_packed_rings(|| {
        let (daemon, _disk, path) = setup(&[("queues", "2")]);
        // Buffer id and flags have swapped positions in comparison with a split ring.
        let lies: [Lie; 4] = [
            ("a chain that has no end", |blk| {
                let ring = blk.by_hand(0);
                (0..64).rev().for_each(|index| ring.descriptor(index, data(0, 16), 0, AVAIL | NEXT));
            }),
            ("an indirect table refers to itself", |blk| {
                blk.put(DATA, &descriptor(data(0, 16), 0, INDIRECT));
                blk.by_hand(0).descriptor(0, data(0, 16), 0, AVAIL | INDIRECT);
            }),
            ("a buffer goes beyond the address space", |blk| {
                let buffer = Buffer { iova: u64::MAX - 255, len: 512 };
                blk.by_hand(0).descriptor(0, buffer, 0, AVAIL);
            }),
            ("the base is outside the ring", |blk| {
                let ops = blk.session.ops();
                ops.suspend().unwrap();
                ops.set_vring_base(QueueIndex(0), 0x8041_8041).unwrap();
                ops.resume().unwrap();
            }),
        ];
        for (what, lie) in lies {
            let mut blk = Blk::with(&path, FEATURES, 2);
            lie(&blk);
            blk.session.queue(QueueIndex(0)).unwrap().kick().signal();
            for _ in 0..2 {
                assert_eq!(blk.read(1, 8, 512), Ok(pattern(4096, 512)), "{what}");
            }
            let token = blk.submit(0, kind::IN, 0, &[], &[data(65536, 512)]);
            blk.notify(0);
            assert_eq!(blk.finish(0, Duration::from_millis(50)), None, "{what}: the queue is still served");
            assert_eq!(blk.status(token), UNWRITTEN, "{what}");
            close(&daemon, blk);
        }
        assert_next_client_is_served(&path);
    });
}

#[test]
fn indirect_tables() {
    let (_daemon, _disk, path) = setup(&[]);
    let blk = Blk::with(&path, FEATURES.with(Features::RING_INDIRECT_DESC), 1);
    let ring = blk.by_hand(0);
    for position in 0..200 {
        let sector = u64::from(position);
        let (header, status) = blk.frame(sector, kind::IN, sector);
        let table = [
            descriptor(header, NEXT, 2),
            descriptor(status, WRITE, 0),
            descriptor(data(0, 512), NEXT | WRITE, 3),
            descriptor(data(4096, 512), NEXT | WRITE, 1),
        ];
        blk.put(DATA + 65536, &table.concat());
        let head = position % 64;
        ring.descriptor(head, data(65536, 64), INDIRECT, 0);
        ring.entry(position, head);
        ring.available(position + 1);
        assert!(ring.wait_used(position + 1), "request {position} has not been answered");
        assert_eq!(blk.status(sector), OK);
        let found = [blk.get(DATA, 512), blk.get(DATA + 4096, 512)].concat();
        assert_eq!(found, pattern(512 * sector, 1024));
    }
}

#[test]
fn as_many_segments_as_the_device_offers() {
    for (pin, direct) in [("on", "off"), ("off", "off"), ("on", "on")] {
        let (daemon, dir) = (Daemon::start(), direct_dir());
        let disk = Disk::new(dir.path().join("disk"), DISK);
        let path = daemon.add_blk("d0", &disk, &[("pin", pin), ("direct", direct)]);
        let blk = Blk::with(&path, FEATURES.with(Features::RING_INDIRECT_DESC), 1);
        let config = BlkConfig::read_from_bytes(&blk.session.config().unwrap()).unwrap();
        let segments = u16::try_from(config.seg_max.get()).unwrap();
        assert_eq!(segments, 126);
        let ring = blk.by_hand(0);
        // Not adjacent, so that none can be merged; 512 bytes each, in two halves.
        let at = |index: u16| data(131_072 + 5000 * u64::from(index), 512);
        for (position, kind) in [kind::OUT, kind::IN].into_iter().enumerate() {
            let position = u16::try_from(position).unwrap();
            let writable = if kind == kind::IN { WRITE } else { 0 };
            let (header, status) = blk.frame(1, kind, 16);
            let mut table = descriptor(header, NEXT, 1).to_vec();
            for index in 0..segments {
                table.extend(descriptor(at(index), NEXT | writable, index + 2));
                let fill = if kind == kind::IN { 0 } else { u8::try_from(index).unwrap() };
                blk.put(at(index).iova - IOVA, &[fill; 512]);
            }
            table.extend(descriptor(status, WRITE, 0));
            blk.put(DATA, &table);
            ring.descriptor(0, data(0, table.len()), INDIRECT, 0);
            ring.entry(position, 0);
            ring.available(position + 1);
            assert!(ring.wait_used(position + 1), "not answered");
            assert_eq!(blk.status(1), OK);
        }
        for index in 0..segments {
            let expected = vec![u8::try_from(index).unwrap(); 512];
            assert_eq!(blk.get(at(index).iova - IOVA, 512), expected);
            assert_eq!(disk.read(8192 + 512 * u64::from(index), 512), expected);
        }
    }
}

/// A fault of a ring: its name, and the function that causes it.
type Lie = (&'static str, fn(&Blk));

#[test]
fn a_broken_ring_retires_its_queue_and_nothing_else() {
    let (daemon, _disk, path) = setup(&[("queues", "2")]);
    let other = daemon.disk("other", DISK);
    let mut neighbour = Blk::start(&daemon.add_blk("d1", &other, &[]));
    let lies: [Lie; 6] = [
        ("the available index is ahead of the ring", |blk| blk.by_hand(0).available(65)),
        ("a chain comes back to its head", |blk| {
            let ring = blk.by_hand(0);
            ring.descriptor(0, data(0, 16), NEXT, 1);
            ring.descriptor(1, data(0, 16), NEXT, 0);
            ring.entry(0, 0);
            ring.available(1);
        }),
        ("a head is outside the table", |blk| {
            let ring = blk.by_hand(0);
            ring.entry(0, 64);
            ring.available(1);
        }),
        ("a successor is outside the table", |blk| {
            let ring = blk.by_hand(0);
            ring.descriptor(0, data(0, 16), NEXT, 0xffff);
            ring.entry(0, 0);
            ring.available(1);
        }),
        ("an indirect table refers to itself", |blk| {
            // Not where the other queue reads to.
            let table = data(0x8000, 16);
            blk.put(DATA + 0x8000, &descriptor(table, INDIRECT, 0));
            let ring = blk.by_hand(0);
            ring.descriptor(0, table, INDIRECT, 0);
            ring.entry(0, 0);
            ring.available(1);
        }),
        ("a buffer goes beyond the address space", |blk| {
            let ring = blk.by_hand(0);
            ring.descriptor(0, Buffer { iova: u64::MAX - 255, len: 512 }, 0, 0);
            ring.entry(0, 0);
            ring.available(1);
        }),
    ];
    for (what, lie) in lies {
        let mut blk = Blk::with(&path, FEATURES, 2);
        lie(&blk);
        // The same thread serves both queues. It may be about to serve the other one when the ring is broken. Between two
        // answers it has processed everything that was published before the first request.
        for _ in 0..2 {
            assert_eq!(blk.read(1, 8, 512), Ok(pattern(4096, 512)), "{what}");
        }
        // Now a valid request.
        let (header, status) = blk.frame(1, kind::IN, 0);
        let ring = blk.by_hand(0);
        ring.descriptor(0, header, NEXT, 1);
        ring.descriptor(1, data(65536, 512), NEXT | WRITE, 2);
        ring.descriptor(2, status, WRITE, 0);
        ring.entry(0, 0);
        ring.available(1);
        assert_eq!(blk.read(1, 8, 512), Ok(pattern(4096, 512)), "{what}");
        assert_eq!((ring.used(), blk.status(1)), (0, UNWRITTEN), "{what}: the queue is still served");
        assert_eq!(neighbour.read(0, 8, 512), Ok(pattern(4096, 512)), "{what}");
        close(&daemon, blk);
    }
    assert_next_client_is_served(&path);
}

/// Closes `d0`, and waits until the daemon has noticed.
fn close(daemon: &Daemon, blk: Blk) {
    drop(blk);
    daemon.wait_for("d0", "the close", |info| !info.state.open);
    daemon.assert_alive();
}

#[track_caller]
fn assert_next_client_is_served(path: &Path) {
    let mut blk = Blk::start(path);
    assert_eq!(blk.read(0, 8, 512), Ok(pattern(4096, 512)), "the next client has a sound queue");
}

#[test]
fn a_chain_that_is_no_request_is_returned_and_the_next_one_served() {
    let (_daemon, _disk, path) = setup(&[]);
    let blk = Blk::start(&path);
    let ring = blk.by_hand(0);
    let (header, status) = blk.frame(1, kind::IN, 0);
    // A chain without a status byte, one with an incomplete header, and a valid one.
    ring.descriptor(0, header, 0, 0);
    ring.descriptor(1, Buffer { len: 15, ..header }, NEXT, 2);
    ring.descriptor(2, status, WRITE, 0);
    ring.descriptor(3, header, NEXT, 4);
    ring.descriptor(4, data(0, 512), NEXT | WRITE, 5);
    ring.descriptor(5, status, WRITE, 0);
    for (position, head) in [0, 1, 3].into_iter().enumerate() {
        ring.entry(u16::try_from(position).unwrap(), head);
    }
    ring.available(3);
    assert!(ring.wait_used(3), "only {} of 3 came back", ring.used());
    assert_eq!((blk.status(1), blk.get(DATA, 512)), (OK, pattern(0, 512)));
}

fn discard_and_write_zeroes_where_the_file_system_cannot_zero() {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    assert_eq!(statfs(dir.path()).unwrap().f_type, TMPFS_MAGIC, "/dev/shm must be a tmpfs");
    let daemon = Daemon::start();
    let disk = Disk::new(dir.path().join("disk"), DISK);
    let path = daemon.add_blk("d0", &disk, &[]);
    for features in [FEATURES, FEATURES.without(Features::BLK_FLUSH)] {
        let mut blk = Blk::with(&path, features, 1);
        let mut model = pattern(0, DISK);
        blk.put(DATA, &model[..3 << 20]);
        assert_eq!(blk.io(0, kind::OUT, 0, &[data(0, 3 << 20)], &[]).status, OK);
        // More than the daemon writes at a time, and not a multiple of that.
        assert_eq!(blk.range(kind::WRITE_ZEROES, 1, 5001, 0), OK);
        model[512..][..512 * 5001].fill(0);
        assert!(disk.all() == model, "write-zeroes");
        assert_eq!(blk.range(kind::WRITE_ZEROES, 8000, 100, Segment::UNMAP), OK);
        model[512 * 8000..][..51200].fill(0);
        assert!(disk.all() == model, "write-zeroes that may unmap");
        assert_eq!(blk.range(kind::DISCARD, 10_000, 1000, 0), OK);
        model[512 * 10_000..][..512_000].fill(0);
        assert!(disk.all() == model, "tmpfs frees what is discarded");
        drop(blk);
        daemon.wait_for("d0", "the close", |info| !info.state.open);
        std::fs::write(&disk.path, pattern(0, DISK)).unwrap();
    }
}

fn requests_wait_for_a_device_that_is_suspended() {
    let (_daemon, _disk, path) = setup(&[]);
    let mut blk = Blk::start(&path);
    assert_eq!(blk.read(0, 0, 512), Ok(pattern(0, 512)));
    blk.session.ops().suspend().unwrap();
    let token = blk.submit(0, kind::IN, 8, &[], &[data(0, 512)]);
    blk.notify(0);
    assert_eq!(blk.session.ops().vring_base(QueueIndex(0)), Ok(base(&blk, 1, 3)));
    assert_eq!(blk.finish(0, Duration::from_millis(50)), None);
    blk.session.ops().resume().unwrap();
    assert_eq!(blk.finish(0, TIMEOUT).map(|done| (done.token, done.status)), Some((token, OK)));
    assert_eq!(blk.get(DATA, 512), pattern(4096, 512));
}

fn a_device_taken_away_fails_requests_and_leaves_its_file_to_the_next_one() {
    let (daemon, disk, path) = setup(&[]);
    let mut blk = Blk::start(&path);
    assert_eq!(blk.read(0, 8, 512), Ok(pattern(4096, 512)));
    let [config, errors] = [EventFd::new().unwrap(), EventFd::new().unwrap()];
    let is_set = |event: &EventFd| {
        let time = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&time)).unwrap() == 1
    };
    blk.session.ops().set_config_call(Some(&config)).unwrap();
    blk.session.ops().set_vring_err(QueueIndex(0), Some(&errors)).unwrap();
    assert!(!is_set(&config) && !is_set(&errors));

    daemon.delete("d0").unwrap();
    assert!(is_set(&config) && is_set(&errors), "the client is told");
    assert!(blk.session.ops().status().unwrap().contains(Status::NEEDS_RESET));
    let path = daemon.add_blk("d0", &disk, &[]);
    let mut next = Blk::start(&path);
    assert_eq!(next.read(0, 8, 512), Ok(pattern(4096, 512)));

    for kind in [kind::IN, kind::OUT, kind::FLUSH] {
        let (out, into) = match kind {
            kind::OUT => (&[data(0, 512)][..], &[][..]),
            kind::IN => (&[][..], &[data(0, 512)][..]),
            _ => (&[][..], &[][..]),
        };
        let token = blk.submit(0, kind, 0, out, into);
        blk.notify(0);
        let done = blk.finish(0, TIMEOUT).unwrap();
        assert_eq!((done.token, done.status), (token, IOERR), "{kind}");
    }
    assert!(disk.all() == pattern(0, DISK), "the file was changed");
    // The client can stop it like any other device, and unmap its memory.
    let ops = blk.session.ops();
    ops.suspend().unwrap();
    // Two reads and a write of three descriptors each, and a flush of two.
    assert_eq!(ops.vring_base(QueueIndex(0)), Ok(base(&blk, 4, 11)));
    ops.set_status(Status::RESET).unwrap();
    assert_eq!(ops.status(), Ok(Status::RESET));
    drop(blk);
    assert_eq!(next.read(0, 16, 512), Ok(pattern(8192, 512)));
    assert!(daemon.info("d0").state.open);
}

/// Includes requests in flight.
fn every_request_is_answered_when_a_device_is_taken_away() {
    let (daemon, _disk, path) = setup(&[]);
    let mut blk = Blk::start(&path);
    for round in 0..8 {
        for _ in 0..16 {
            blk.submit(0, kind::OUT, 8, &[data(0, 4096)], &[]);
        }
        blk.notify(0);
        if round == 3 {
            daemon.delete("d0").unwrap();
        }
        for _ in 0..16 {
            let done = blk.finish(0, TIMEOUT).unwrap();
            assert!(if round < 3 { done.status == OK } else { round == 3 || done.status == IOERR });
        }
    }
}
