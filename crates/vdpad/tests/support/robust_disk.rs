//! A small block driver that verifies everything that it reads.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use vdpa_client::device::Device;
use vdpa_client::{Error, Session};
use vdpa_core::Errno;
use vdpa_core::blk::{SECTOR, kind};
use vdpa_core::features::Features;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Perm, QueueIndex};
use vdpa_sys::mmap::SharedMap;
use vdpa_sys::vhost_vdpa::VhostVdpaFd;
use vdpa_sys::{memfd, rlimit};

pub(crate) const Q0: QueueIndex = QueueIndex(0);
/// I/O virtual address of the memory.
pub(crate) const IOVA: u64 = 0x1_0000_0000;
/// Entries of the ring.
pub(crate) const RING: u16 = 256;
/// Most requests in flight, with three descriptors each.
pub(crate) const SLOTS: u64 = 64;
/// Bytes of data in a request.
pub(crate) const DATA: u32 = 4096;
/// Smallest size of memory in bytes.
pub(crate) const MEMORY_MIN: u64 = 1 << 20;

const HEADERS_AT: u64 = 0x8000;
const DATA_AT: u64 = 0x1_0000;
const SECTORS: u64 = DATA as u64 / SECTOR;
const LIMIT: Duration = Duration::from_secs(10);

/// A request in flight: kind, block, seed of its data.
pub(crate) type Flight = (u32, u64, u64);

/// A block device with one queue, blocks of [`DATA`] bytes and a request for each slot.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) session: Session<VhostVdpaFd>,
    pub(crate) flying: BTreeMap<u64, Flight>,
}

/// Opens and negotiates. Waits while the kernel tears down a killed client, and returns for how long.
pub(crate) fn open(path: &Path) -> (Session<VhostVdpaFd>, Duration) {
    open_with(path, std::env::var_os(PACKED).is_some())
}

fn open_with(path: &Path, packed: bool) -> (Session<VhostVdpaFd>, Duration) {
    let begin = Instant::now();
    let device = loop {
        match Device::<VhostVdpaFd>::open(path) {
            Err(Error::Open { source: Errno::BUSY, .. }) if begin.elapsed() < LIMIT => {
                thread::sleep(Duration::from_micros(100));
            }
            result => break result.unwrap(),
        }
    };
    let waited = begin.elapsed();
    let wanted = if packed { Features::of(&[Features::RING_PACKED]) } else { Features::NONE };
    let session = device.negotiate(wanted).unwrap();
    assert_eq!(session.features().has(Features::RING_PACKED), packed);
    (session, waited)
}

/// Environment variable of programs that use packed rings.
pub(crate) const PACKED: &str = "TEST_PACKED";

/// As much of `wanted` bytes as this process can have pinned: raises its limit on locked memory where that is
/// allowed (`CAP_SYS_RESOURCE`), and says so where it is not.
pub(crate) fn pinnable(wanted: u64) -> u64 {
    if rlimit::raise_memlock(Some(wanted)).is_ok() {
        return wanted;
    }
    let limit = rlimit::memlock().soft.unwrap_or(wanted);
    eprintln!("RLIMIT_MEMLOCK is {limit} bytes and cannot be raised: no more is pinned by this test");
    (limit & !0xf_ffff).min(wanted)
}

impl Disk {
    /// Opens a device and sets it up with `memory` bytes.
    pub(crate) fn start(path: &Path, memory: u64) -> Self {
        Self::start_timed(path, memory).0
    }

    /// Also returns how long the device was busy.
    pub(crate) fn start_timed(path: &Path, memory: u64) -> (Self, Duration) {
        pinnable(memory);
        Self::set_up(open(path), memory)
    }

    /// With a ring of this format.
    pub(crate) fn start_with(path: &Path, memory: u64, packed: bool) -> Self {
        pinnable(memory);
        Self::set_up(open_with(path, packed), memory).0
    }

    /// Without changing RLIMIT_MEMLOCK.
    pub(crate) fn start_within_limit(path: &Path, memory: u64) -> Self {
        Self::set_up(open(path), memory).0
    }

    fn set_up((mut session, waited): (Session<VhostVdpaFd>, Duration), memory: u64) -> (Self, Duration) {
        let ram = memfd::create(c"robust-ram", memory, None).unwrap();
        session.map_memfd("ram", ram, IOVA, memory, Perm::RW).unwrap();
        session.add_queue(Q0, RING, "ram", 0).unwrap();
        session.start().unwrap();
        (Self { session, flying: BTreeMap::new() }, waited)
    }

    fn map(&self) -> &SharedMap {
        self.session.region("ram").unwrap().map().unwrap()
    }

    /// Queues a request in its slot; [`kick`](Self::kick) shows it to the device.
    pub(crate) fn submit(&mut self, slot: u64, (kind, block, seed): Flight) {
        let header = usize::try_from(HEADERS_AT + slot * 64).unwrap();
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&(block * SECTORS).to_le_bytes());
        self.map().write(header, &bytes).unwrap();
        self.map().write(header + 32, &[0xff]).unwrap();
        let data = usize::try_from(DATA_AT).unwrap() + usize::try_from(slot).unwrap() * DATA as usize;
        let contents = if kind == kind::OUT { pattern(block, seed) } else { vec![0xa5; DATA as usize] };
        self.map().write(data, &contents).unwrap();
        let header = Buffer { iova: IOVA + HEADERS_AT + slot * 64, len: 16 };
        let data = Buffer { iova: IOVA + DATA_AT + slot * u64::from(DATA), len: DATA };
        let status = Buffer { iova: header.iova + 32, len: 1 };
        let queue = self.session.queue_mut(Q0).unwrap();
        if kind == kind::OUT {
            queue.submit(&[header, data], &[status], slot).unwrap();
        } else {
            queue.submit(&[header], &[data, status], slot).unwrap();
        }
        assert!(self.flying.insert(slot, (kind, block, seed)).is_none(), "slot {slot} is in use");
    }

    pub(crate) fn kick(&mut self) {
        self.session.queue_mut(Q0).unwrap().notify().unwrap();
    }

    /// Takes completions and verifies them. Returns their slots.
    pub(crate) fn reap(&mut self) -> Vec<u64> {
        self.reap_but(None).0
    }

    /// As `reap`, with the slots of requests about the block `may_fail` that have failed.
    fn reap_but(&mut self, may_fail: Option<u64>) -> (Vec<u64>, Vec<u64>) {
        let (mut slots, mut failed) = (Vec::new(), Vec::new());
        while let Some(done) = self.session.queue_mut(Q0).unwrap().reap().unwrap() {
            let slot = done.token;
            let flight = self.flying.remove(&slot);
            let Some((kind, block, seed)) = flight else { panic!("slot {slot} was not in flight: {done:?}") };
            if self.answer(slot) == 1 && may_fail == Some(block) {
                failed.push(slot);
                continue;
            }
            assert_eq!(self.answer(slot), 0, "kind {kind} of block {block}: {done:?}");
            if kind == kind::IN {
                assert!(self.data(slot) == pattern(block, seed), "block {block} does not hold seed {seed}");
            }
            slots.push(slot);
        }
        (slots, failed)
    }

    /// Waits until nothing is in flight, while requests about the block `may_fail` may fail. Returns the slots of those that did.
    pub(crate) fn settle_but(&mut self, may_fail: u64) -> Vec<u64> {
        let (_, mut failed) = self.reap_but(Some(may_fail));
        while !self.flying.is_empty() {
            self.wait();
            failed.extend(self.reap_but(Some(may_fail)).1);
        }
        failed
    }

    /// Status of the request that was in a slot.
    pub(crate) fn answer(&self, slot: u64) -> u8 {
        let mut status = [0];
        self.map().read(usize::try_from(HEADERS_AT + slot * 64).unwrap() + 32, &mut status).unwrap();
        status[0]
    }

    /// Its data.
    pub(crate) fn data(&self, slot: u64) -> Vec<u8> {
        let at = usize::try_from(DATA_AT).unwrap() + usize::try_from(slot).unwrap() * DATA as usize;
        let mut bytes = vec![0; DATA as usize];
        self.map().read(at, &mut bytes).unwrap();
        bytes
    }

    /// Waits for a completion, at most 10 s.
    pub(crate) fn wait(&mut self) {
        assert!(self.session.queue_mut(Q0).unwrap().wait(Some(LIMIT)).unwrap(), "{:?}", self.flying);
    }

    /// Waits until nothing is in flight. Returns the slots in order of completion.
    pub(crate) fn settle(&mut self) -> Vec<u64> {
        let mut slots = self.reap();
        while !self.flying.is_empty() {
            self.wait();
            slots.extend(self.reap());
        }
        slots
    }

    /// Makes a request and waits for its completion.
    pub(crate) fn one(&mut self, flight: Flight) {
        self.submit(0, flight);
        self.kick();
        self.settle();
    }

    /// Reads a block. Nothing else may be in flight.
    pub(crate) fn read_block(&mut self, block: u64) -> Vec<u8> {
        self.submit(0, (kind::IN, block, 0));
        self.flying.clear();
        self.kick();
        let done = loop {
            match self.session.queue_mut(Q0).unwrap().reap().unwrap() {
                Some(done) => break done,
                None => self.wait(),
            }
        };
        assert_eq!((done.token, done.len), (0, DATA + 1), "{done:?}");
        self.data(0)
    }

    /// Writes block 1 and reads it back.
    pub(crate) fn check(&mut self, seed: u64) {
        self.one((kind::OUT, 1, seed));
        self.one((kind::IN, 1, seed));
    }
}

/// Contents of a block written with `seed`, different for each seed.
pub(crate) fn pattern(block: u64, seed: u64) -> Vec<u8> {
    let mut word = block.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed;
    let words = (0..DATA / 8).flat_map(|_| {
        // xorshift64*; a state of zero would stay there.
        word |= 1 << 63;
        word ^= word >> 12;
        word ^= word << 25;
        word ^= word >> 27;
        word.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
    });
    words.collect()
}
