//! A driver that keeps a copy of its memory by dirty tracking alone, as a migration does, and compares it with the memory.
//!
//! What the driver writes itself it writes into both. What the device writes gets into the copy only with a page that the device reports.
//! Whenever the device is at rest, both must be the same: no page was written and not reported. A page that is reported and could not be
//! written since the device was at rest last is an error too.
//!
//! Where the device offers vhost's own log, there is a second copy, which is kept by that log alone.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use vdpa_client::Session;
use vdpa_client::device::Device;
use vdpa_client::queue::RingLayout;
use vdpa_core::blk::{RequestHeader, kind};
use vdpa_core::dirty::DirtyRange;
use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::ops::VdpaOps as _;
use vdpa_core::ring::Buffer;
use vdpa_core::types::{Asid, IovaRange, Perm, QueueIndex, VringAddr};
use vdpa_sys::memfd;
use vdpa_sys::mmap::{PrivateMap, Prot, SharedMap};
use vdpa_sys::uapi::vhost as uapi;
use vdpa_sys::vhost_vdpa::{RawArg, VhostVdpaFd};

const PAGE: u64 = 4096;
/// Entries of each ring.
const SIZE: u16 = 256;
/// Requests in flight at most.
const DEPTH: u64 = 64;
/// The rings, headers and so on, and most data.
const MAIN: u64 = 0x10_0000;
const MAIN_SIZE: u64 = 4 << 20;
/// More data, in memory that is unmapped and mapped again.
const OTHER: u64 = 0x4000_0000;
const OTHER_SIZE: u64 = 1 << 20;

// In the main memory.
const RING: u64 = 0x1_0000;
const HEADERS: u64 = 0x4_0000;
const FRAMES: u64 = 0x5_0000;
const STATUS: u64 = 0x10_0000;
const STATUS_SIZE: u64 = 0x1_0000;
const DATA: u64 = 0x12_0000;

/// Sectors that are used of a disk.
const SECTORS: u64 = 8192;
/// Bytes of the log of vhost: bits for 2 GiB.
const LOG_SIZE: u64 = 1 << 16;
const LONG: Duration = Duration::from_secs(60);

/// Memory at an address of the device, and the copy of it.
struct Memory {
    iova: u64,
    /// `None` for memory of this process alone.
    file: Option<OwnedFd>,
    map: SharedMap,
    /// Mapped for the device once; the address can be used again.
    other_map: SharedMap,
    copy: Vec<u8>,
    /// The copy that is kept by the log of vhost.
    logged: Vec<u8>,
    bitmap: Vec<u64>,
    /// Pages that the device may have written since it was at rest, by number.
    may: BTreeSet<u64>,
}

impl Memory {
    fn new(iova: u64, size: u64) -> Self {
        let file = memfd::create(c"model", size, None).unwrap();
        let len = usize::try_from(size).unwrap();
        let map = || SharedMap::map(&file, 0, len, Prot::RW, false).unwrap();
        let (map, other_map) = (map(), map());
        let bitmap = vec![0; usize::try_from((size / PAGE).div_ceil(64)).unwrap()];
        let (copy, logged, may) = (vec![0; len], vec![0; len], BTreeSet::new());
        Self { iova, file: Some(file), map, other_map, copy, logged, bitmap, may }
    }

    /// Memory that a device can only reach by copying.
    fn private(iova: u64, size: u64) -> Self {
        let map: SharedMap = PrivateMap::new(usize::try_from(size).unwrap()).unwrap().into();
        Self { file: None, other_map: map.clone(), map, ..Self::new(iova, size) }
    }

    fn range(&self) -> DirtyRange {
        DirtyRange { asid: Asid(0), range: IovaRange::from_size(self.iova, self.map.len() as u64).unwrap() }
    }

    /// Writes into the memory and into the copy.
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        let at = usize::try_from(offset).unwrap();
        self.map.write(at, bytes).unwrap();
        self.copy[at..at + bytes.len()].copy_from_slice(bytes);
        self.logged[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Copies a page that the log of vhost has.
    fn take_logged(&mut self, page: u64) -> Result<(), String> {
        if !self.may.contains(&page) {
            return Err(format!("page {page} of {:#x} is logged, and was not written", self.iova));
        }
        let at = usize::try_from(page * PAGE).unwrap();
        self.map.read(at, &mut self.logged[at..at + usize::try_from(PAGE).unwrap()]).unwrap();
        Ok(())
    }

    fn may_write(&mut self, offset: u64, len: u64) {
        self.may.extend(offset / PAGE..=(offset + len - 1) / PAGE);
    }

    /// Copies the pages in the bitmap, and makes that empty.
    fn take(&mut self) -> Result<(), String> {
        let size = usize::try_from(PAGE).unwrap();
        for (word, bits) in self.bitmap.iter_mut().enumerate() {
            let mut bits = std::mem::take(bits);
            while bits != 0 {
                let page = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                if !self.may.contains(&(page as u64)) {
                    return Err(format!("page {page} of {:#x} is reported, and was not written", self.iova));
                }
                let at = page * size;
                self.map.read(at, &mut self.copy[at..at + size]).unwrap();
            }
        }
        Ok(())
    }

    /// Compares `len` bytes with the copies.
    fn compare(&self, offset: u64, len: u64, with_log: bool) -> Result<(), String> {
        let (at, len) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
        let mut now = vec![0; len];
        self.map.read(at, &mut now).unwrap();
        let copies =
            [(&self.copy, "reported")].into_iter().chain(with_log.then_some((&self.logged, "logged")));
        for (copy, what) in copies {
            if let Some(place) = now.iter().zip(&copy[at..at + len]).position(|(now, copy)| now != copy) {
                let (at, page) = (at + place, (at + place) / 4096);
                return Err(format!("page {page} of {:#x} was written at {at:#x} and not {what}", self.iova));
            }
        }
        Ok(())
    }
}

/// Random numbers (xorshift).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// What a driver does besides requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Maps the memory at another address of this process.
    Remap,
    /// Unmaps a part with a report, and maps it again.
    Unmap,
    /// Another process becomes the owner, then this one.
    Owner,
    /// SUSPEND, RESUME.
    Suspend,
}

/// A driver and its device.
pub(crate) struct Model {
    session: Session<VhostVdpaFd>,
    main: Memory,
    other: Memory,
    random: Random,
    is_net: bool,
    packed: bool,
    /// Which of the two addresses is mapped for the device.
    remapped: bool,
    /// The log of vhost, if the device offers one.
    log: Option<SharedMap>,
    next: u64,
    done: u64,
    /// Reports.
    pub(crate) reports: u64,
}

impl Model {
    pub(crate) fn start(path: &Path, packed: bool, private: bool, seed: u64) -> Self {
        let features = if packed { Features::of(&[Features::RING_PACKED]) } else { Features::NONE };
        let device = Device::<VhostVdpaFd>::open(path).unwrap();
        let mut session = device.negotiate(features).unwrap();
        assert_eq!(session.features().has(Features::RING_PACKED), packed);
        assert!(session.offered_backend_features().has(BackendFeatures::DIRTY_LOG));
        let other = if private { Memory::private } else { Memory::new };
        let (main, other) = (Memory::new(MAIN, MAIN_SIZE), other(OTHER, OTHER_SIZE));
        let is_net = session.device_id() == 1;
        let fd = main.file.as_ref().unwrap().try_clone().unwrap();
        session.map_memfd("main", fd, MAIN, MAIN_SIZE, Perm::RW).unwrap();
        for queue in 0..if is_net { 2 } else { 1 } {
            session.add_queue(QueueIndex(queue), SIZE, "main", u64::from(queue) * RING).unwrap();
        }
        let this = Self {
            session,
            main,
            other,
            random: Random::new(seed),
            is_net,
            packed,
            remapped: false,
            log: None,
            next: 0,
            done: 0,
            reports: 0,
        };
        this.map_other();
        this
    }

    /// Begins to track, and the device; in this order, or the other one.
    pub(crate) fn run(&mut self, tracking_first: bool) {
        if !tracking_first {
            self.session.start().unwrap();
        }
        let ranges = [self.main.range(), self.other.range()];
        self.session.ops().dirty_start(PAGE, &ranges).unwrap();
        self.start_log();
        if tracking_first {
            self.session.start().unwrap();
        } else {
            self.copy_all();
        }
    }

    /// Whether there is a second copy.
    pub(crate) const fn is_logged(&self) -> bool {
        self.log.is_some()
    }

    /// Has everything logged as by vhost-net, where the device can.
    fn start_log(&mut self) {
        let ops = self.session.ops();
        if !ops.features().unwrap().has(Features::LOG_ALL) {
            return;
        }
        let file = memfd::create(c"log", LOG_SIZE, None).unwrap();
        let log = SharedMap::map(file, 0, usize::try_from(LOG_SIZE).unwrap(), Prot::RW, false).unwrap();
        let mut base = (log.addr() as u64).to_le_bytes();
        ops.raw_ioctl(uapi::VHOST_SET_LOG_BASE, RawArg::Bytes(&mut base)).unwrap();
        ops.set_features(self.session.features().with(Features::LOG_ALL)).unwrap();
        for queue in 0..self.queues() {
            let layout = self.layout(queue);
            let [desc, avail, used] = [layout.desc, layout.avail, layout.used].map(|offset| MAIN + offset);
            let log = if self.packed { desc } else { used };
            ops.set_vring_addr(QueueIndex(queue), &VringAddr { flags: 1, desc, used, avail, log }).unwrap();
        }
        self.log = Some(log);
    }

    /// Copies what the log has, and clears it.
    fn take_log(&mut self) -> Result<(), String> {
        let Some(log) = self.log.clone() else { return Ok(()) };
        for offset in (0..usize::try_from(LOG_SIZE).unwrap()).step_by(8) {
            // Looked at first: most of it is 0.
            if log.load_u64(offset).unwrap() == 0 {
                continue;
            }
            let mut bits = log.clear_bits(offset, u64::MAX).unwrap();
            while bits != 0 {
                let page = offset as u64 * 8 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                let at = page * PAGE;
                let memory = [&mut self.main, &mut self.other].into_iter();
                let mut memory =
                    memory.filter(|memory| at >= memory.iova && at - memory.iova < memory.map.len() as u64);
                let memory =
                    memory.next().ok_or_else(|| format!("page {at:#x} is logged, and nothing is there"))?;
                memory.take_logged((at - memory.iova) / PAGE)?;
            }
        }
        Ok(())
    }

    pub(crate) const fn done(&self) -> u64 {
        self.done
    }

    fn map_other(&self) {
        let map = if self.remapped { &self.other.other_map } else { &self.other.map };
        let (uaddr, size) = (map.addr() as u64, OTHER_SIZE);
        self.session.ops().dma_map(Asid(0), OTHER, size, uaddr, Perm::RW).unwrap();
    }

    /// What was written before the tracking began.
    fn copy_all(&mut self) {
        for memory in [&mut self.main, &mut self.other] {
            memory.map.read(0, &mut memory.copy).unwrap();
            memory.logged.clone_from(&memory.copy);
        }
    }

    fn layout(&self, queue: u16) -> RingLayout {
        self.session.queue(QueueIndex(queue)).unwrap().layout()
    }

    const fn queues(&self) -> u16 {
        if self.is_net { 2 } else { 1 }
    }

    /// The parts of the rings that the device writes.
    fn ring_areas(&self) -> Vec<(u64, u64)> {
        let areas = |queue| {
            let layout = self.layout(queue);
            if self.packed {
                vec![(layout.desc, u64::from(SIZE) * 16), (layout.used, 4)]
            } else {
                vec![(layout.used, 4 + u64::from(SIZE) * 8 + 2)]
            }
        };
        (0..self.queues()).flat_map(areas).collect()
    }

    /// A buffer for the device to write, anywhere.
    fn buffer(&mut self, len: u64) -> Buffer {
        let (iova, offset) = if self.random.below(4) == 0 {
            let offset = self.random.below(OTHER_SIZE - len);
            self.other.may_write(offset, len);
            (OTHER, offset)
        } else {
            let offset = DATA + self.random.below(MAIN_SIZE - DATA - len);
            self.main.may_write(offset, len);
            (MAIN, offset)
        };
        Buffer { iova: iova + offset, len: u32::try_from(len).unwrap() }
    }

    /// Makes a request available.
    fn submit(&mut self) {
        let token = self.next;
        self.next += 1;
        let slot = token % DEPTH;
        if self.is_net {
            let room = self.buffer(2048);
            let rx = self.session.queue_mut(QueueIndex(0)).unwrap();
            rx.submit(&[], &[room], token).unwrap();
            let at = FRAMES + slot * 2048;
            let len = 60 + self.random.below(1400);
            let mut frame: Vec<u8> = [vec![0; 12], vec![0xff; 6], vec![2; 6]].concat();
            frame.extend((0..len).map(|_| u8::try_from(self.random.below(256)).unwrap()));
            self.main.put(at, &frame);
            let sent = Buffer { iova: MAIN + at, len: u32::try_from(frame.len()).unwrap() };
            self.session.queue_mut(QueueIndex(1)).unwrap().submit(&[sent], &[], token).unwrap();
            return;
        }
        let write = self.random.below(3) == 0;
        let sectors = 1 + self.random.below(16);
        let sector = self.random.below(SECTORS - sectors);
        let kind = if write { kind::OUT } else { kind::IN };
        self.main.put(HEADERS + slot * 16, &RequestHeader { kind, ioprio: 0, sector }.encode());
        let header = Buffer { iova: MAIN + HEADERS + slot * 16, len: 16 };
        let at = STATUS + slot * (STATUS_SIZE / DEPTH) + self.random.below(STATUS_SIZE / DEPTH);
        self.main.put(at, &[0xee]);
        self.main.may_write(at, 1);
        let status = Buffer { iova: MAIN + at, len: 1 };
        let bytes = sectors * 512;
        let queue = QueueIndex(0);
        if write {
            let at = FRAMES + slot * 8192;
            let words = (0..bytes / 8).flat_map(|word| (token << 16 | word).to_le_bytes());
            self.main.put(at, &words.collect::<Vec<_>>());
            let data = Buffer { iova: MAIN + at, len: u32::try_from(bytes).unwrap() };
            self.session.queue_mut(queue).unwrap().submit(&[header, data], &[status], token).unwrap();
            return;
        }
        let first = self.random.below(bytes + 1);
        let mut buffers = Vec::new();
        buffers.extend((first > 0).then(|| self.buffer(first)));
        buffers.extend((first < bytes).then(|| self.buffer(bytes - first)));
        buffers.push(status);
        self.session.queue_mut(queue).unwrap().submit(&[header], &buffers, token).unwrap();
    }

    /// Makes up to `count` requests available and kicks.
    pub(crate) fn submit_some(&mut self, count: u64) {
        for _ in 0..count {
            if self.next - self.done >= DEPTH {
                break;
            }
            self.submit();
        }
        self.kick();
    }

    fn kick(&mut self) {
        for queue in 0..self.queues() {
            // As if the driver had been asked for it: a request may wait for its memory.
            let queue = self.session.queue_mut(QueueIndex(queue)).unwrap();
            queue.notify().unwrap();
            queue.kick().signal();
        }
    }

    /// Takes what has completed.
    pub(crate) fn reap(&mut self) {
        if self.is_net {
            while self.session.queue_mut(QueueIndex(1)).unwrap().reap().unwrap().is_some() {}
        }
        while self.session.queue_mut(QueueIndex(0)).unwrap().reap().unwrap().is_some() {
            self.done += 1;
        }
    }

    /// Waits until all requests are answered.
    fn quiesce(&mut self) {
        let deadline = std::time::Instant::now() + LONG;
        loop {
            self.reap();
            if self.done == self.next {
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{} of {} answered", self.done, self.next);
            self.session.queue_mut(QueueIndex(0)).unwrap().wait(Some(Duration::from_millis(20))).unwrap();
            if self.is_net && self.session.queue(QueueIndex(1)).unwrap().in_flight() == 0 {
                // A packet that came while the receive buffer was not mapped is lost: one more for the buffer.
                let sent = Buffer { iova: MAIN + FRAMES, len: 72 };
                self.session.queue_mut(QueueIndex(1)).unwrap().submit(&[sent], &[], u64::MAX).unwrap();
            }
            self.kick();
        }
        while self.is_net && self.session.queue(QueueIndex(1)).unwrap().in_flight() > 0 {
            self.reap();
            assert!(std::time::Instant::now() < deadline, "the sending queue answers nothing");
            std::thread::yield_now();
        }
    }

    /// Copies what the device reports.
    pub(crate) fn report(&mut self) -> Result<(), String> {
        self.reports += 1;
        for (offset, len) in self.ring_areas() {
            self.main.may_write(offset, len);
        }
        for memory in [&mut self.main, &mut self.other] {
            let range = memory.range();
            self.session.ops().dirty_get(range, PAGE, false, &mut memory.bitmap).unwrap();
            memory.take()?;
        }
        self.take_log()
    }

    /// Waits until the device is at rest, and compares all memory.
    pub(crate) fn check(&mut self) -> Result<(), String> {
        self.quiesce();
        self.session.suspend().unwrap();
        self.report()?;
        let log = self.is_logged();
        self.main.compare(HEADERS, MAIN_SIZE - HEADERS, log)?;
        self.other.compare(0, OTHER_SIZE, log)?;
        for (offset, len) in self.ring_areas() {
            self.main.compare(offset, len, log)?;
        }
        for memory in [&mut self.main, &mut self.other] {
            memory.may.clear();
        }
        // Nothing is reported twice.
        for memory in [&mut self.main, &mut self.other] {
            let range = memory.range();
            self.session.ops().dirty_get(range, PAGE, false, &mut memory.bitmap).unwrap();
            memory.take()?;
        }
        self.session.resume().unwrap();
        Ok(())
    }

    /// Does something else than requests.
    pub(crate) fn event(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Unmap => {
                if self.is_net {
                    // As in the kernel, a packet that meets a receive buffer without memory stays, with both chains, until a reset.
                    self.quiesce();
                }
                let range = self.other.range();
                let bytes = self.session.ops().dirty_unmap(range, PAGE, &mut self.other.bitmap).unwrap();
                assert_eq!(bytes, OTHER_SIZE);
                self.other.take()?;
                for (offset, len) in self.ring_areas() {
                    self.main.may_write(offset, len);
                }
                self.take_log()?;
                // Requests are in flight, and none of them can write here.
                self.other.compare(0, OTHER_SIZE, self.is_logged())?;
                self.map_other();
                self.kick();
            }
            Event::Remap => {
                if self.session.offered_backend_features().has(BackendFeatures::IOTLB_REMAP) {
                    self.remapped = !self.remapped;
                    self.remap_other();
                    self.kick();
                }
            }
            // The memory of this process alone would be out of reach.
            Event::Owner if self.other.file.is_none() => {}
            Event::Owner => {
                self.quiesce();
                let device = self.session.ops().as_fd().try_clone_to_owned().unwrap();
                let mut child = Command::new(std::env::current_exe().unwrap());
                child.args(["becomes_owner", "--exact", "--ignored"]).stdin(Stdio::from(device));
                assert!(child.stdout(Stdio::null()).status().unwrap().success());
                self.session.ops().new_owner().unwrap();
                if self.session.offered_backend_features().has(BackendFeatures::IOTLB_REMAP) {
                    let region = self.session.region("main").unwrap().map().unwrap().addr();
                    self.session.ops().dma_remap(Asid(0), MAIN, MAIN_SIZE, region as u64).unwrap();
                    self.remap_other();
                }
                self.kick();
            }
            Event::Suspend => {
                self.session.suspend().unwrap();
                self.report()?;
                self.other.compare(0, OTHER_SIZE, self.is_logged())?;
                self.session.resume().unwrap();
            }
        }
        Ok(())
    }

    fn remap_other(&self) {
        let map = if self.remapped { &self.other.other_map } else { &self.other.map };
        self.session.ops().dma_remap(Asid(0), OTHER, OTHER_SIZE, map.addr() as u64).unwrap();
    }

    /// A number for what to do next.
    pub(crate) fn dice(&mut self, sides: u64) -> u64 {
        self.random.below(sides)
    }
}
