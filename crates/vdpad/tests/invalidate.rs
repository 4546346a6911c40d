//! INVALIDATE waits for the requests that use what it removes, and for no others.
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

#[expect(dead_code, reason = "every test binary uses its own part")]
#[path = "support/hanging.rs"]
mod hanging;
mod support;
#[macro_use]
#[path = "support/both_rings.rs"]
mod both_rings;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use vdpa_core::blk::kind;
use vdpa_core::ops::VdpaOps;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Asid, Perm, QueueIndex};
use vdpa_sys::memfd;
use vdpa_sys::mmap::SharedMap;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

use hanging::HangingFile;
use support::blk::{Blk, FEATURES, IOERR, MEMORY, OK, SIZE, TIMEOUT};
use support::daemon::Daemon;

const DISK: u64 = 1 << 20;
/// Bytes of each of the regions below.
const REGION: u64 = 1 << 20;
const A: u64 = 0x2_0000_0000;
const B: u64 = 0x3_0000_0000;
const C: u64 = 0x4_0000_0000;
/// How long to watch something that must not end.
const WHILE: Duration = Duration::from_millis(200);

/// A device on a disk that hangs, with additional memory at `A`, `B` and `C`.
struct Setup {
    blk: Blk,
    file: HangingFile,
    /// The device file.
    path: PathBuf,
    daemon: Daemon,
}

fn device(attrs: &[(&str, &str)]) -> (Daemon, HangingFile, PathBuf) {
    let daemon = Daemon::start();
    let file = HangingFile::new(&daemon.dir().join("hanging"), DISK);
    let all = [
        ("path", file.path.to_str().unwrap()),
        ("format", "raw"),
        ("packed", "on"),
        ("memlock", "unlimited"),
    ];
    let path = daemon.add("d0", "blk", &[&all, attrs].concat());
    (daemon, file, path)
}

impl Setup {
    fn new(attrs: &[(&str, &str)]) -> Self {
        let (daemon, file, path) = device(attrs);
        let mut blk = Blk::negotiated(&path, FEATURES);
        blk.map(memfd::create(c"blk", MEMORY, None).unwrap());
        for (name, iova) in [("a", A), ("b", B), ("c", C)] {
            let memory = memfd::create(c"region", REGION, None).unwrap();
            blk.session.map_memfd(name, memory, iova, REGION, Perm::RW).unwrap();
        }
        Self { blk, file, path, daemon }
    }

    /// With one queue, whose ring is in none of the regions.
    fn running(attrs: &[(&str, &str)]) -> Self {
        let mut setup = Self::new(attrs);
        setup.blk.run(1);
        setup
    }

    fn region(&self, name: &str) -> SharedMap {
        self.blk.session.region(name).unwrap().map().unwrap().clone()
    }

    /// Starts a read of 4 KiB at byte `offset` of the disk.
    fn hang(&mut self, queue: u16, offset: u64, into: &[Buffer]) -> u64 {
        let token = self.blk.submit(queue, kind::IN, offset / 512, &[], into);
        self.blk.notify(queue);
        token
    }

    /// Waits until this number of requests hangs.
    #[track_caller]
    fn hanging(&self, count: usize) {
        let deadline = Instant::now() + TIMEOUT;
        while self.file.waiting() != count {
            assert!(Instant::now() < deadline, "{} requests hang", self.file.waiting());
            sleep(Duration::from_millis(1));
        }
    }

    /// Sends INVALIDATE on another thread.
    fn invalidate(&self, iova: u64) -> JoinHandle<()> {
        let ops = self.blk.session.ops();
        let other = VhostVdpaFd::from_fd(ops.as_fd().try_clone_to_owned().unwrap());
        other.set_acknowledged(ops.acknowledged());
        spawn(move || other.dma_unmap(Asid(0), iova, REGION).unwrap())
    }

    /// Waits until new requests do not translate `iova` to `memory` any more. As long as they do, GET_ID requests, which need no
    /// disk, write the id there.
    #[track_caller]
    fn translated_anew(&mut self, iova: u64, memory: &SharedMap, offset: usize) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            memory.write(offset, &[0]).unwrap();
            let id = Buffer { iova: iova + offset as u64, len: 20 };
            self.blk.io(0, kind::GET_ID, 0, &[], &[id]);
            let mut byte = [0];
            memory.read(offset, &mut byte).unwrap();
            if byte == [0] {
                return;
            }
            assert!(Instant::now() < deadline, "the old translation is still used");
            sleep(Duration::from_millis(1));
        }
    }

    /// Sends a request that needs no disk. Returns whether the queue is served.
    #[track_caller]
    fn is_served(&mut self) {
        let done = self.blk.io(0, kind::GET_ID, 0, &[], &[support::blk::data(0, 20)]);
        assert_eq!((done.status, done.len), (OK, 21));
    }
}

fn page(iova: u64) -> Buffer {
    Buffer { iova, len: 4096 }
}

#[track_caller]
fn ends(invalidate: JoinHandle<()>) {
    let deadline = Instant::now() + TIMEOUT;
    while !invalidate.is_finished() {
        assert!(Instant::now() < deadline, "INVALIDATE waits");
        sleep(Duration::from_millis(1));
    }
    invalidate.join().unwrap();
}

#[track_caller]
fn waits(invalidate: &JoinHandle<()>) {
    sleep(WHILE);
    assert!(!invalidate.is_finished(), "INVALIDATE has not waited for a request that uses the memory");
}

fn invalidate_waits_for_requests_that_use_the_range() {
    for attrs in [[("pin", "on")], [("pin", "off")]] {
        let mut setup = Setup::running(&attrs);
        let in_a = setup.hang(0, 0, &[page(A)]);
        // In two pieces of memory, one of which stays mapped.
        let halves = [Buffer { iova: A + 8192, len: 2048 }, Buffer { iova: C, len: 2048 }];
        let in_both = setup.hang(0, 4096, &halves);
        let in_c = setup.hang(0, 8192, &[page(C + 4096)]);
        setup.hanging(3);

        ends(setup.invalidate(B));
        assert_eq!(setup.file.waiting(), 3, "nothing of this has waited for the disk");
        setup.is_served();

        let (a, c) = (setup.region("a"), setup.region("c"));
        let of_a = setup.invalidate(A);
        setup.translated_anew(A, &a, 65536);
        waits(&of_a);
        setup.is_served();
        // New requests use the new translation already.
        let late = setup.blk.io(0, kind::IN, 0, &[], &[page(A)]);
        assert_eq!(late.status, IOERR);
        setup.file.release(0);
        assert_eq!(setup.blk.finish(0, TIMEOUT).map(|done| (done.token, done.status)), Some((in_a, OK)));
        waits(&of_a);
        setup.file.release(4096);
        ends(of_a);
        let untouched = vec![0xa5; 12288];
        a.write(0, &untouched).unwrap();
        assert_eq!(setup.blk.finish(0, TIMEOUT).map(|done| (done.token, done.status)), Some((in_both, OK)));

        c.write(4096, &[0xa5; 4096]).unwrap();
        assert_eq!(setup.file.waiting(), 1, "the request in other memory hangs all the time");
        setup.file.recover();
        assert_eq!(setup.blk.finish(0, TIMEOUT).map(|done| (done.token, done.status)), Some((in_c, OK)));
        let read = |map: &SharedMap, offset, len| {
            let mut bytes = vec![1; len];
            map.read(offset, &mut bytes).unwrap();
            bytes
        };
        assert_eq!(read(&c, 4096, 4096), vec![0; 4096], "its data have come");
        assert!(read(&a, 0, 12288) == untouched, "what was removed is left alone");
    }
}

/// The status byte and the ring are used until the answer.
fn a_ring_or_a_status_in_the_range_is_a_use() {
    let mut setup = Setup::new(&[("queues", "2")]);
    setup.blk.session.add_queue(QueueIndex(0), SIZE, "memory", 0).unwrap();
    setup.blk.session.add_queue(QueueIndex(1), SIZE, "a", 0).unwrap();
    setup.blk.session.start().unwrap();

    let (header, _) = setup.blk.frame(900, kind::IN, 16);
    let status = Buffer { iova: B + 77, len: 1 };
    setup.region("b").write(77, &[0xee]).unwrap();
    let ring = setup.blk.session.queue_mut(QueueIndex(0)).unwrap();
    ring.submit(&[header], &[support::blk::data(4096, 4096), status], 900).unwrap();
    setup.hang(0, 0, &[support::blk::data(0, 4096)]);
    setup.hanging(2);
    let of_b = setup.invalidate(B);
    waits(&of_b);
    setup.file.release(8192);
    ends(of_b);
    let mut byte = [0xee];
    setup.region("b").read(77, &mut byte).unwrap();
    assert_eq!(byte, [OK]);
    assert_eq!(setup.blk.finish(0, TIMEOUT).unwrap().token, 900);

    // The data of this request is elsewhere, but its completion is written to the ring.
    setup.hang(1, 4096, &[support::blk::data(8192, 4096)]);
    setup.hanging(2);
    let of_a = setup.invalidate(A);
    waits(&of_a);
    setup.is_served();
    setup.file.release(4096);
    ends(of_a);
    assert!(setup.blk.finish(1, TIMEOUT).is_some(), "it was answered while the ring was there");
    let late = setup.blk.submit(1, kind::GET_ID, 0, &[], &[support::blk::data(0, 20)]);
    setup.blk.notify(1);
    assert_eq!(setup.blk.finish(1, WHILE), None, "the ring is not mapped");
    setup.is_served();
    assert_eq!(setup.file.waiting(), 1, "the other queue has a request all the time");

    // When it is mapped again, the ring continues at its position.
    let uaddr = setup.region("a").addr() as u64;
    setup.blk.session.ops().dma_map(Asid(0), A, REGION, uaddr, Perm::RW).unwrap();
    assert_eq!(setup.blk.finish(1, TIMEOUT).map(|done| done.token), Some(late));
}

/// A mapping that is replaced within a batch counts as removed, and is not confused with its replacement.
fn a_replaced_mapping_is_removed() {
    let mut setup = Setup::running(&[]);
    let in_a = setup.hang(0, 0, &[page(A)]);
    setup.hanging(1);
    let ops = setup.blk.session.ops();
    let other = VhostVdpaFd::from_fd(ops.as_fd().try_clone_to_owned().unwrap());
    other.set_acknowledged(ops.acknowledged());
    let uaddr = setup.region("b").addr() as u64;
    let batch = spawn(move || {
        other.batch_begin(Asid(0)).unwrap();
        other.dma_unmap(Asid(0), A, REGION).unwrap();
        other.dma_map(Asid(0), A, REGION, uaddr, Perm::RW).unwrap();
        other.batch_end(Asid(0)).unwrap();
    });
    let a = setup.region("a");
    setup.translated_anew(A, &a, 65536);
    waits(&batch);
    // A request with the same addresses and other memory is not waited for.
    let into_b = setup.hang(0, 4096, &[page(A + 4096)]);
    setup.hanging(2);
    setup.file.release(0);
    ends(batch);
    assert_eq!(setup.blk.finish(0, TIMEOUT).map(|done| done.token), Some(in_a));
    a.write(4096, &[0xa5; 4096]).unwrap();
    setup.region("b").write(4096, &[0xa5; 4096]).unwrap();
    setup.file.recover();
    assert_eq!(setup.blk.finish(0, TIMEOUT).map(|done| (done.token, done.status)), Some((into_b, OK)));
    let first = |name| {
        let mut byte = [1];
        setup.region(name).read(4096, &mut byte).unwrap();
        byte[0]
    };
    assert_eq!((first("a"), first("b")), (0xa5, 0));
}

over_both_rings!(
    invalidate_waits_for_requests_that_use_the_range,
    a_ring_or_a_status_in_the_range_is_a_use,
    a_replaced_mapping_is_removed,
);

/// A device cannot be revoked from a client during a request to it.
#[test]
fn a_device_that_is_busy_with_a_request_is_not_deleted_and_keeps_its_file() {
    let mut setup = Setup::running(&[]);
    let token = setup.hang(0, 0, &[page(A)]);
    setup.hanging(1);
    let invalidate = setup.invalidate(A);
    waits(&invalidate);
    let said = setup.daemon.delete("d0").unwrap_err().to_string();
    assert!(said.contains("device d0 is busy with a request of its client"), "{said}");
    // Checked in a list, because the kernel keeps the name of an open file.
    let files = || std::fs::read_dir(setup.path.parent().unwrap()).unwrap().count();
    assert_eq!(files(), 1, "the device is there, and its file is not");
    setup.file.recover();
    ends(invalidate);
    assert_eq!(setup.blk.finish(0, TIMEOUT).map(|done| (done.token, done.status)), Some((token, OK)));
    setup.daemon.delete("d0").unwrap();
    assert_eq!(files(), 0);
}
