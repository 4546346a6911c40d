//! The crate `virtio-driver` as published, the driver of libblkio and so of QEMU's `virtio-blk-vhost-vdpa`, against
//! real devices. It opens the file for writing only and speaks version-1 IOTLB messages.
#![expect(unsafe_code, reason = "virtio-driver takes the buffers of its requests as pointers")]
#![expect(clippy::unwrap_used, reason = "a failure is a panic here, also outside of test functions")]

mod support;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_driver::{
    Completion, EventFd, QueueNotifier, VhostVdpa, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport,
    VirtioFeatureFlags,
};

use support::daemon::{Daemon, Disk, pattern};
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};

/// The features that libblkio accepts.
const FEATURES: u64 = VirtioFeatureFlags::VERSION_1.bits()
    | VirtioFeatureFlags::RING_EVENT_IDX.bits()
    | VirtioBlkFeatureFlags::SEG_MAX.bits()
    | VirtioBlkFeatureFlags::RO.bits()
    | VirtioBlkFeatureFlags::BLK_SIZE.bits()
    | VirtioBlkFeatureFlags::FLUSH.bits()
    | VirtioBlkFeatureFlags::TOPOLOGY.bits()
    | VirtioBlkFeatureFlags::MQ.bits()
    | VirtioBlkFeatureFlags::DISCARD.bits()
    | VirtioBlkFeatureFlags::WRITE_ZEROES.bits();

const QUEUE_SIZE: u16 = 256;
const DISK: usize = 16 << 20;

/// Memory for the data of one queue.
struct Memory {
    map: SharedMap,
    fd: OwnedFd,
}

impl Memory {
    fn new(len: usize) -> Self {
        let fd = memfd::create(c"data", len as u64, None).unwrap();
        Self { map: SharedMap::map(&fd, 0, len, Prot::RW, false).unwrap(), fd }
    }

    fn put(&self, offset: usize, bytes: &[u8]) {
        self.map.write(offset, bytes).unwrap();
    }

    fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.map.read(offset, &mut bytes).unwrap();
        bytes
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset + len <= self.map.len());
        std::ptr::with_exposed_provenance_mut(self.map.addr() + offset)
    }
}

/// A queue with its memory and its eventfds.
struct Queue {
    ring: VirtioBlkQueue<'static, u64>,
    notifier: Box<dyn QueueNotifier>,
    completed: Arc<EventFd>,
    memory: Memory,
}

/// A connection to a device.
struct Driver {
    // Dropped before the transport, whose memory they use.
    queues: Vec<Queue>,
    transport: Box<VirtioBlkTransport>,
}

impl Driver {
    fn connect(path: &Path, queues: usize) -> Self {
        let vdpa = VhostVdpa::with_path(path.to_str().unwrap(), FEATURES).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(vdpa);
        let rings = VirtioBlkQueue::setup_queues(transport.as_mut(), queues, QUEUE_SIZE).unwrap();
        let mut all = Vec::new();
        for (index, mut ring) in rings.into_iter().enumerate() {
            // With event indices the driver enables notifications only when it is told to.
            ring.set_used_notif_enabled(true);
            let memory = Memory::new(1 << 20);
            transport.map_mem_region(memory.map.addr(), memory.map.len(), memory.fd.as_raw_fd(), 0).unwrap();
            all.push(Queue {
                ring,
                notifier: transport.get_submission_notifier(index),
                completed: transport.get_completion_fd(index),
                memory,
            });
        }
        Self { queues: all, transport }
    }
}

impl Queue {
    fn queue_read(&mut self, offset: u64, at: usize, len: usize, token: u64) {
        let to = self.memory.at(at, len);
        // SAFETY: `at` has checked that the bytes lie in the mapping, which lives as long as the queue, and nobody
        // holds a reference into it.
        unsafe { self.ring.read_raw(offset, to, len, token) }.unwrap();
    }

    fn queue_write(&mut self, offset: u64, at: usize, len: usize, token: u64) {
        let from = self.memory.at(at, len);
        // SAFETY: as for the read.
        unsafe { self.ring.write_raw(offset, from, len, token) }.unwrap();
    }

    fn notify(&mut self) {
        if self.ring.avail_notif_needed() {
            self.notifier.notify().unwrap();
        }
    }

    /// Waits for at least one completion.
    #[track_caller]
    fn wait(&mut self) -> Vec<(u64, i32)> {
        loop {
            let done: Vec<_> =
                self.ring.completions().map(|Completion { context, ret }| (context, ret)).collect();
            if !done.is_empty() {
                return done;
            }
            let time = Timespec { tv_sec: 10, tv_nsec: 0 };
            let ready =
                poll(&mut [PollFd::from_borrowed_fd(self.completed.as_fd(), PollFlags::IN)], Some(&time));
            assert_eq!(ready, Ok(1), "no completion within 10 s");
            self.completed.read().unwrap();
        }
    }

    /// The result of the one request in flight.
    #[track_caller]
    fn result(&mut self) -> i32 {
        self.notify();
        let done = self.wait();
        assert_eq!(done.len(), 1);
        done[0].1
    }

    #[track_caller]
    fn write(&mut self, offset: u64, bytes: &[u8]) -> i32 {
        self.memory.put(0, bytes);
        self.queue_write(offset, 0, bytes.len(), 0);
        self.result()
    }

    #[track_caller]
    fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.memory.put(0, &vec![0xa5; len]);
        self.queue_read(offset, 0, len, 0);
        assert_eq!(self.result(), 0);
        self.memory.get(0, len)
    }
}

/// Random numbers that are the same in every run (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((z ^ z >> 31) % limit as u64).unwrap()
    }
}

/// `count` random reads and writes, 32 at a time, in the `DISK`-sized stretch from `base` on; `model` is what must
/// be there, and is kept.
fn load(queue: &mut Queue, base: u64, model: &mut [u8], count: usize, random: &mut Random) {
    const SLOT: usize = 16 << 10;
    const DEPTH: usize = 32;
    enum Kind {
        Read,
        Write,
    }
    // By slot: the request in flight, as first byte and length.
    let mut flying: BTreeMap<usize, (Kind, usize, usize)> = BTreeMap::new();
    let (mut begun, mut ended) = (0, 0);
    while ended < count {
        while begun < count && flying.len() < DEPTH {
            let len = 512 * (1 + random.below(SLOT / 512));
            let from = 512 * random.below((model.len() - len) / 512 + 1);
            // Overlapping requests have no defined order in virtio.
            if flying.values().any(|(_, at, size)| from < at + size && *at < from + len) {
                continue;
            }
            let slot = (0..DEPTH).find(|slot| !flying.contains_key(slot)).unwrap();
            let kind = if random.below(2) == 0 { Kind::Read } else { Kind::Write };
            match kind {
                Kind::Read => queue.queue_read(base + from as u64, slot * SLOT, len, slot as u64),
                Kind::Write => {
                    let bytes = pattern(8 * random.below(1 << 30) as u64, len);
                    queue.memory.put(slot * SLOT, &bytes);
                    model[from..from + len].copy_from_slice(&bytes);
                    queue.queue_write(base + from as u64, slot * SLOT, len, slot as u64);
                }
            }
            flying.insert(slot, (kind, from, len));
            begun += 1;
        }
        queue.notify();
        for (token, result) in queue.wait() {
            assert_eq!(result, 0);
            let slot = usize::try_from(token).unwrap();
            let (kind, from, len) = flying.remove(&slot).unwrap();
            if matches!(kind, Kind::Read) {
                let found = queue.memory.get(slot * SLOT, len);
                assert!(found == model[from..from + len], "wrong data at {from:#x}, {len} bytes");
            }
            ended += 1;
        }
    }
}

fn blk(attrs: &[(&str, &str)]) -> (Daemon, Disk, std::path::PathBuf) {
    let daemon = Daemon::start();
    let disk = daemon.disk("disk", DISK);
    let path = daemon.add_blk("d0", &disk, attrs);
    (daemon, disk, path)
}

#[test]
fn every_request_on_blk() {
    let (daemon, disk, path) = blk(&[]);
    let mut driver = Driver::connect(&path, 1);
    let config = driver.transport.get_config().unwrap();
    assert_eq!(u64::from(config.capacity) * 512, DISK as u64);
    let queue = &mut driver.queues[0];
    assert_eq!(queue.read(4096, 8192), pattern(4096, 8192));

    let bytes = pattern(1 << 40, 65536);
    assert_eq!(queue.write(512 * 7, &bytes), 0);
    queue.ring.flush(0).unwrap();
    assert_eq!(queue.result(), 0);
    assert_eq!(disk.read(512 * 7, 65536), bytes);
    assert_eq!(disk.read(0, 512 * 7), pattern(0, 512 * 7), "nothing in front was touched");
    assert_eq!(queue.read(512 * 7, 65536), bytes);

    for (unmap, offset) in [(false, 1 << 20), (true, 2 << 20)] {
        queue.ring.write_zeroes(offset, 128 << 10, unmap, 0).unwrap();
        assert_eq!(queue.result(), 0);
        assert_eq!(disk.read(offset, 128 << 10), vec![0; 128 << 10]);
        assert_eq!(disk.read(offset + (128 << 10), 512), pattern(offset + (128 << 10), 512));
    }
    queue.ring.discard(4 << 20, 1 << 20, 0).unwrap();
    assert_eq!(queue.result(), 0);
    assert_eq!(disk.read(5 << 20, 4096), pattern(5 << 20, 4096));
    assert_eq!(disk.all().len(), DISK, "the file keeps its size");

    assert_eq!(queue.write(DISK as u64, &[1; 512]), -5, "beyond the end: EIO");
    daemon.assert_alive();
}

#[test]
fn every_request_on_sim_blk() {
    let daemon = Daemon::start();
    let path = daemon.add("s0", "sim-blk", &[]);
    let bytes = pattern(1 << 40, 65536);
    {
        let mut driver = Driver::connect(&path, 1);
        let queue = &mut driver.queues[0];
        assert_eq!(queue.read(1 << 20, 4096), vec![0; 4096]);
        assert_eq!(queue.write(512 * 7, &bytes), 0);
        queue.ring.flush(0).unwrap();
        assert_eq!(queue.result(), 0);
        queue.ring.write_zeroes(512 * 8, 512, true, 0).unwrap();
        assert_eq!(queue.result(), 0);
        queue.ring.discard(512 * 9, 512, 0).unwrap();
        assert_eq!(queue.result(), 0);
    }
    daemon.wait_for("s0", "the close", |info| !info.state.open);
    // Another client reads what the first one has written.
    let mut driver = Driver::connect(&path, 1);
    let mut expected = bytes;
    expected[512..1024].fill(0);
    assert_eq!(driver.queues[0].read(512 * 7, 65536), expected);
    assert_eq!(driver.queues[0].read(512 * 6, 512), vec![0; 512]);
}

#[test]
fn ten_thousand_verified_requests_at_depth_32() {
    let (daemon, disk, path) = blk(&[]);
    let mut driver = Driver::connect(&path, 1);
    let mut model = disk.all();
    load(&mut driver.queues[0], 0, &mut model, 10_000, &mut Random(1));
    assert!(disk.all() == model, "the file differs from what was written");
    let queue = &daemon.info("d0").state.queues[0];
    assert_eq!((queue.requests, queue.errors), (10_000, 0));
}

#[test]
fn ten_thousand_verified_requests_at_depth_32_on_the_simulator() {
    let daemon = Daemon::start();
    let path = daemon.add("s0", "sim-blk", &[]);
    let mut driver = Driver::connect(&path, 1);
    let mut model = vec![0; DISK];
    load(&mut driver.queues[0], 0, &mut model, 10_000, &mut Random(2));
    assert_eq!(daemon.info("s0").state.queues[0].requests, 10_000);
}

#[test]
fn four_queues_in_two_threads() {
    let (daemon, disk, path) = blk(&[("queues", "4")]);
    let Driver { queues, transport } = Driver::connect(&path, 4);
    let mut parts: Vec<_> = disk.all().chunks(DISK / 4).map(<[u8]>::to_vec).collect();
    thread::scope(|scope| {
        let mut work: Vec<_> = queues.into_iter().zip(&mut parts).enumerate().collect();
        let second = work.split_off(2);
        for half in [work, second] {
            scope.spawn(move || {
                let mut half = half;
                let mut random = Random(3);
                // Alternating, so that both queues of a thread are busy at the same time as those of the other.
                for _ in 0..10 {
                    for (index, (queue, part)) in &mut half {
                        load(queue, (*index * DISK / 4) as u64, part, 200, &mut random);
                    }
                }
            });
        }
    });
    assert!(disk.all() == parts.concat(), "the file differs from what was written");
    let requests: Vec<_> = daemon.info("d0").state.queues.iter().map(|queue| queue.requests).collect();
    assert_eq!(requests, [2000; 4]);
    drop(transport);
}

#[test]
fn every_one_of_many_flushes_is_answered() {
    const BURST: u64 = 64;
    let (daemon, disk, path) = blk(&[("queues", "2")]);
    let mut driver = Driver::connect(&path, 2);
    let bytes = pattern(1 << 40, 4096);
    for round in 0..20 {
        for queue in &mut driver.queues {
            queue.memory.put(0, &bytes);
            for token in 0..BURST {
                // A write before the flushes, so that there is data to flush.
                if token % 16 == 0 {
                    queue.queue_write(4096 * (round * BURST + token), 0, bytes.len(), token);
                } else {
                    queue.ring.flush(token).unwrap();
                }
            }
            queue.notify();
        }
        for queue in &mut driver.queues {
            let mut tokens = Vec::new();
            while tokens.len() < usize::try_from(BURST).unwrap() {
                for (token, result) in queue.wait() {
                    assert_eq!(result, 0);
                    tokens.push(token);
                }
            }
            tokens.sort_unstable();
            assert!(tokens.into_iter().eq(0..BURST), "each once");
        }
    }
    assert_eq!(disk.read(4096 * 16, 4096), bytes);
    let queues = &daemon.info("d0").state.queues;
    assert_eq!([queues[0].requests, queues[1].requests], [20 * BURST; 2]);
}

#[test]
fn memory_can_be_taken_back_while_the_device_runs() {
    let (daemon, _disk, path) = blk(&[]);
    let mut driver = Driver::connect(&path, 1);
    let mapped = daemon.info("d0").state.mappings;
    let extra = Memory::new(1 << 20);
    let (addr, len) = (extra.map.addr(), extra.map.len());
    driver.transport.map_mem_region(addr, len, extra.fd.as_raw_fd(), 0).unwrap();
    assert_eq!(daemon.info("d0").state.mappings, mapped + 1);
    driver.transport.unmap_mem_region(addr, len).unwrap();
    assert_eq!(daemon.info("d0").state.mappings, mapped);
    assert_eq!(driver.queues[0].read(0, 4096), pattern(0, 4096));
}
