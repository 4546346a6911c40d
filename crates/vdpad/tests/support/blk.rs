//! [`Blk`]: a block driver for tests, which makes valid and invalid requests.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use vdpa_client::Session;
use vdpa_client::device::Device;
use vdpa_client::queue::RingLayout;
use vdpa_client::vring::GuestRing;
use vdpa_core::blk::{RequestHeader, Segment, kind};
use vdpa_core::features::Features;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Perm, QueueIndex};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{PrivateMap, SharedMap};
use vdpa_sys::vhost_vdpa::VhostVdpaFd;

/// Longest time a request may take.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);

/// `VIRTIO_BLK_S_OK`, `_IOERR` and `_UNSUPP`, and the initial value of a status byte.
pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
pub(crate) const UNSUPP: u8 = 2;
pub(crate) const UNWRITTEN: u8 = 0xee;

/// All features of a `blk` device that this driver supports.
pub(crate) const FEATURES: Features = Features::of(&[
    Features::BLK_FLUSH,
    Features::BLK_MQ,
    Features::BLK_DISCARD,
    Features::BLK_WRITE_ZEROES,
    Features::BLK_RO,
]);

/// Entries of each ring.
pub(crate) const SIZE: u16 = 64;
/// I/O virtual address of the memory.
pub(crate) const IOVA: u64 = 0x1_0000_0000;
/// Bytes of the memory: rings, then headers, then data.
pub(crate) const MEMORY: u64 = 4 << 20;
const RING: u64 = 8192;
const HEADERS: u64 = 256 << 10;
const HEADER: u64 = 64;
/// Offset of the data.
pub(crate) const DATA: u64 = 1 << 20;
const STATUS: u64 = 48;

thread_local! {
    static PACKED: Cell<bool> = const { Cell::new(false) };
}

/// Runs a test whose drivers take packed rings.
pub(crate) fn over_packed_rings(test: impl FnOnce()) {
    PACKED.set(true);
    test();
    PACKED.set(false);
}

/// Result of a request: status byte, and the length in its used element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) token: u64,
    pub(crate) status: u8,
    pub(crate) len: u32,
}

/// A negotiated device with all its memory in one memfd.
pub(crate) struct Blk {
    pub(crate) session: Session<VhostVdpaFd>,
    next: u64,
}

impl Blk {
    /// One queue, all features.
    pub(crate) fn start(path: &Path) -> Self {
        Self::with(path, FEATURES, 1)
    }

    /// `queues` queues, running.
    pub(crate) fn with(path: &Path, features: Features, queues: u16) -> Self {
        let mut blk = Self::negotiated(path, features);
        blk.map(memfd::create(c"blk", MEMORY, None).unwrap());
        blk.run(queues);
        blk
    }

    /// No memory and no queues yet.
    pub(crate) fn negotiated(path: &Path, features: Features) -> Self {
        Self::over(Device::open(path).unwrap(), features)
    }

    /// The same for a device that is open.
    pub(crate) fn over(device: Device<VhostVdpaFd>, features: Features) -> Self {
        let features = if PACKED.get() { features.with(Features::RING_PACKED) } else { features };
        let session = device.negotiate(features).unwrap();
        assert_eq!(session.features().has(Features::RING_PACKED), PACKED.get());
        Self { session, next: 0 }
    }

    pub(crate) fn map(&mut self, memory: OwnedFd) {
        self.session.map_memfd("memory", memory, IOVA, MEMORY, Perm::RW).unwrap();
    }

    pub(crate) fn run(&mut self, queues: u16) {
        for index in 0..queues {
            let at = u64::from(index) * RING;
            self.session.add_queue(QueueIndex(index), SIZE, "memory", at).unwrap();
        }
        self.session.start().unwrap();
    }

    /// The memory, from [`IOVA`] on.
    pub(crate) fn memory(&self) -> &SharedMap {
        self.session.region("memory").unwrap().map().unwrap()
    }

    pub(crate) fn put(&self, offset: u64, bytes: &[u8]) {
        self.memory().write(usize::try_from(offset).unwrap(), bytes).unwrap();
    }

    pub(crate) fn get(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory().read(usize::try_from(offset).unwrap(), &mut bytes).unwrap();
        bytes
    }

    /// Writes a header. Returns it and the status byte as buffers, both in the slot of `token`.
    pub(crate) fn frame(&self, token: u64, kind: u32, sector: u64) -> (Buffer, Buffer) {
        let at = HEADERS + token % 1024 * HEADER;
        self.put(at, &RequestHeader { kind, ioprio: 0, sector }.encode());
        self.put(at + STATUS, &[UNWRITTEN]);
        (Buffer { iova: IOVA + at, len: 16 }, Buffer { iova: IOVA + at + STATUS, len: 1 })
    }

    /// The status byte of `token`.
    pub(crate) fn status(&self, token: u64) -> u8 {
        self.get(HEADERS + token % 1024 * HEADER + STATUS, 1)[0]
    }

    /// Submits a request with these data buffers, without a kick.
    pub(crate) fn submit(
        &mut self,
        queue: u16,
        kind: u32,
        sector: u64,
        readable: &[Buffer],
        writable: &[Buffer],
    ) -> u64 {
        self.next += 1;
        let token = self.next;
        let (header, status) = self.frame(token, kind, sector);
        let readable = [&[header], readable].concat();
        let writable = [writable, &[status]].concat();
        self.session.queue_mut(QueueIndex(queue)).unwrap().submit(&readable, &writable, token).unwrap();
        token
    }

    pub(crate) fn notify(&mut self, queue: u16) {
        self.session.queue_mut(QueueIndex(queue)).unwrap().notify().unwrap();
    }

    /// The next completion; `None` when it does not come within `timeout`.
    pub(crate) fn finish(&mut self, queue: u16, timeout: Duration) -> Option<Done> {
        let ring = self.session.queue_mut(QueueIndex(queue)).unwrap();
        loop {
            if let Some(completion) = ring.reap().unwrap() {
                let token = completion.token;
                return Some(Done { token, status: self.status(token), len: completion.len });
            }
            if !ring.wait(Some(timeout)).unwrap() {
                return None;
            }
        }
    }

    /// Makes a request and waits for its result.
    #[track_caller]
    pub(crate) fn io(
        &mut self,
        queue: u16,
        kind: u32,
        sector: u64,
        readable: &[Buffer],
        writable: &[Buffer],
    ) -> Done {
        let token = self.submit(queue, kind, sector, readable, writable);
        self.notify(queue);
        let Some(done) = self.finish(queue, TIMEOUT) else { panic!("request {kind} has not been answered") };
        assert_eq!(done.token, token);
        done
    }

    /// Writes `bytes` from `sector` on; returns the status.
    #[track_caller]
    pub(crate) fn write(&mut self, queue: u16, sector: u64, bytes: &[u8]) -> u8 {
        self.put(DATA, bytes);
        self.io(queue, kind::OUT, sector, &[data(0, bytes.len())], &[]).status
    }

    /// Reads `len` bytes; the length in the used element must match.
    #[track_caller]
    pub(crate) fn read(&mut self, queue: u16, sector: u64, len: usize) -> Result<Vec<u8>, u8> {
        self.put(DATA, &vec![0xa5; len]);
        let done = self.io(queue, kind::IN, sector, &[], &[data(0, len)]);
        if done.status != OK {
            assert_eq!(done.len, 1, "a failed read has written nothing but its status");
            return Err(done.status);
        }
        assert_eq!(usize::try_from(done.len), Ok(len + 1));
        Ok(self.get(DATA, len))
    }

    /// A discard or write-zeroes request of one segment.
    #[track_caller]
    pub(crate) fn range(&mut self, kind: u32, sector: u64, num_sectors: u32, flags: u32) -> u8 {
        self.put(DATA, &Segment { sector, num_sectors, flags }.encode());
        self.io(0, kind, 0, &[data(0, Segment::BYTES)], &[]).status
    }

    /// Adds queue 0 with a ring that only the test uses, for features that the library's driver does not support, and starts
    /// the device.
    pub(crate) fn run_by_hand(&mut self) -> HandRing {
        let layout = RingLayout::at(0, SIZE);
        let [kick, call] = [EventFd::new().unwrap(), EventFd::new().unwrap()];
        let ring = GuestRing {
            size: SIZE,
            desc: IOVA + layout.desc,
            driver: IOVA + layout.avail,
            device: IOVA + layout.used,
        };
        self.session.add_guest_queue(QueueIndex(0), ring, kick.clone(), call.clone()).unwrap();
        self.session.start().unwrap();
        HandRing { map: self.memory().clone(), layout, kick, call }
    }

    /// Returns the ring of `queue` for direct access. Nothing else may use it from now on.
    pub(crate) fn by_hand(&self, queue: u16) -> HandRing {
        let queue = self.session.queue(QueueIndex(queue)).unwrap();
        HandRing {
            map: self.memory().clone(),
            layout: queue.layout(),
            kick: queue.kick().clone(),
            call: queue.call().clone(),
        }
    }
}

/// A data buffer `offset` bytes into the data.
pub(crate) fn data(offset: u64, len: usize) -> Buffer {
    Buffer { iova: IOVA + DATA + offset, len: u32::try_from(len).unwrap() }
}

/// `VIRTQ_DESC_F_NEXT`, `_WRITE` and `_INDIRECT`.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// A ring that is written field by field (virtio 1.2 section 2.7), so that it can be invalid.
pub(crate) struct HandRing {
    map: SharedMap,
    layout: RingLayout,
    kick: EventFd,
    pub(crate) call: EventFd,
}

impl HandRing {
    /// Writes one entry of the descriptor table.
    pub(crate) fn descriptor(&self, index: u16, buffer: Buffer, flags: u16, next: u16) {
        let at = self.layout.desc + u64::from(index) * 16;
        self.map.write(to_usize(at), &descriptor(buffer, flags, next)).unwrap();
    }

    /// Makes the chain from `head` available as entry `position`, without a kick.
    pub(crate) fn entry(&self, position: u16, head: u16) {
        let at = self.layout.avail + 4 + u64::from(position % self.layout.size) * 2;
        self.map.store_u16(to_usize(at), head).unwrap();
    }

    /// Publishes the available index `index`, and kicks.
    pub(crate) fn available(&self, index: u16) {
        self.map.store_u16(to_usize(self.layout.avail + 2), index).unwrap();
        self.kick.signal();
    }

    /// The device's used index.
    pub(crate) fn used(&self) -> u16 {
        self.map.load_u16(to_usize(self.layout.used + 2)).unwrap()
    }

    /// The used element at `position`: head of the chain, and bytes written.
    pub(crate) fn used_element(&self, position: u16) -> (u32, u32) {
        let at = self.layout.used + 4 + u64::from(position % self.layout.size) * 8;
        let mut raw = [[0; 4]; 2];
        self.map.read(to_usize(at), raw.as_flattened_mut()).unwrap();
        (u32::from_le_bytes(raw[0]), u32::from_le_bytes(raw[1]))
    }

    /// Waits until the used index is `index`. Returns whether that happened.
    pub(crate) fn wait_used(&self, index: u16) -> bool {
        while self.used() != index {
            if !self.call.wait(Some(TIMEOUT)) {
                return self.used() == index;
            }
            let _ = self.call.drain();
        }
        true
    }
}

/// The bytes of a descriptor.
pub(crate) fn descriptor(buffer: Buffer, flags: u16, next: u16) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&buffer.iova.to_le_bytes());
    raw[8..12].copy_from_slice(&buffer.len.to_le_bytes());
    raw[12..14].copy_from_slice(&flags.to_le_bytes());
    raw[14..].copy_from_slice(&next.to_le_bytes());
    raw
}

fn to_usize(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

/// Private memory that other processes change.
pub(crate) struct Private(SharedMap);

impl Private {
    pub(crate) fn new(len: usize) -> Self {
        Self(PrivateMap::new(len).unwrap().into())
    }

    /// The same memory, for a session.
    pub(crate) fn memory(&self, name: &str) -> std::sync::Arc<vdpa_client::memory::Memory> {
        vdpa_client::memory::Memory::private(name, self.0.clone())
    }

    pub(crate) fn addr(&self) -> u64 {
        self.0.addr() as u64
    }

    pub(crate) fn put(&self, offset: usize, bytes: &[u8]) {
        self.0.write(offset, bytes).unwrap();
    }

    pub(crate) fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read(offset, &mut bytes).unwrap();
        bytes
    }
}
