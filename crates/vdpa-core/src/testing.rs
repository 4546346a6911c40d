//! Memory and rings in one process, for tests of devices and drivers. Feature `test-utils`.
//!
//! [`TestMemory`] is client memory in which pages can be unmapped and a chosen access can fail. [`Pair`] has both sides of a
//! ring on it:
//!
//! ```
//! use vdpa_core::features::Features;
//! use vdpa_core::testing::Pair;
//!
//! let mut pair = Pair::new(8, Features::NONE);
//! let (request, answer) = (pair.allocate(16), pair.allocate(4));
//! pair.driver.add(&[request], &[answer], 7)?;
//! assert!(pair.driver.publish()?, "the device wants to be kicked");
//!
//! assert!(pair.serve(|_memory, _chain| 4)?, "the driver wants to be notified");
//! let completion = pair.driver.pop_used()?.ok_or("lost")?;
//! assert_eq!((completion.token, completion.len), (7, 4));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! A whole device needs a platform: [`TestHost`] has processes that map memory objects, fork and exec, and
//! [`RamBlk`] and [`RamNet`] are devices on it, to be opened as an [`inprocess::Node`](crate::inprocess::Node).
//!
//! Wrong arguments panic, because they are bugs of the test.
#![expect(clippy::expect_used, reason = "a test that cannot set up its ring must fail")]

mod objects;
mod platform;
mod ram_blk;
mod ram_net;
mod ring_pair;
mod table;

pub use objects::{TestObjects, restore_from_bytes};
pub use platform::{TestEvent, TestHost, TestObject, TestPiece, TestProcess, TestSpace};
pub use ram_blk::RamBlk;
pub use ram_net::RamNet;
pub use ring_pair::RingPair;
pub use table::{TableArea, TableMemory};

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use crate::features::Features;
use crate::ring::driver::SplitDriver;
use crate::ring::split::SplitQueue;
use crate::ring::{Area, Buffer, Chain, Fault, Memory, RingError, area_sizes};
use crate::types::{IovaRange, Perm};
use crate::vq::QueueState;

/// Page size of a [`TestMemory`] in bytes: the unit of its permissions.
pub const TEST_PAGE: u64 = 256;

/// Client memory of a test: zeroed bytes from one I/O virtual address on, shared by its clones.
///
/// All accesses are atomic, so the two sides of a ring may run on different threads.
#[derive(Clone, Debug)]
pub struct TestMemory {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    base: u64,
    words: Box<[AtomicU16]>,
    /// Permission of each page.
    perms: Box<[AtomicU8]>,
    /// Number of accesses until one fails; `u64::MAX` for never.
    fail_in: AtomicU64,
}

impl TestMemory {
    /// `size` bytes from `base`, readable and writable.
    ///
    /// # Panics
    /// When `base` or `size` is no multiple of [`TEST_PAGE`].
    #[must_use]
    pub fn new(base: u64, size: usize) -> Self {
        assert!(base.is_multiple_of(TEST_PAGE), "base {base:#x} is no multiple of {TEST_PAGE}");
        assert!((size as u64).is_multiple_of(TEST_PAGE), "size {size} is no multiple of {TEST_PAGE}");
        let pages = size as u64 / TEST_PAGE;
        Self {
            shared: Arc::new(Shared {
                base,
                words: (0..size / 2).map(|_| AtomicU16::new(0)).collect(),
                perms: (0..pages).map(|_| AtomicU8::new(Perm::RW.0)).collect(),
                fail_in: AtomicU64::new(u64::MAX),
            }),
        }
    }

    /// Sets the permission of every page that `range` touches; [`Perm::NONE`] makes a hole. Applies to existing areas too.
    pub fn protect(&self, range: IovaRange, perm: Perm) {
        for (base, page) in (self.shared.base..).step_by(256).zip(&self.shared.perms) {
            if IovaRange::from_size(base, TEST_PAGE).is_some_and(|page| page.overlaps(range)) {
                page.store(perm.0, Ordering::Relaxed);
            }
        }
    }

    /// Lets `accesses` more accesses by the device or the driver succeed, the next one fail, and all later ones
    /// succeed again.
    pub fn fail_after(&self, accesses: u64) {
        self.shared.fail_in.store(accesses, Ordering::Relaxed);
    }

    /// Cancels [`fail_after`](Self::fail_after); returns whether the failure had not happened yet.
    #[must_use]
    pub fn cancel_failure(&self) -> bool {
        self.shared.fail_in.swap(u64::MAX, Ordering::Relaxed) != u64::MAX
    }

    /// Reads the bytes at `iova` without regard to permissions.
    ///
    /// # Panics
    /// When a byte is outside the memory.
    #[must_use]
    pub fn peek(&self, iova: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        let offset = self.shared.offset(iova, len).unwrap_or_else(|fault| panic!("peek: {fault}"));
        self.shared.copy_out(offset, &mut data);
        data
    }

    /// Writes the bytes at `iova` without regard to permissions.
    ///
    /// # Panics
    /// When a byte is outside the memory.
    pub fn poke(&self, iova: u64, data: &[u8]) {
        let offset = self.shared.offset(iova, data.len()).unwrap_or_else(|fault| panic!("poke: {fault}"));
        self.shared.copy_in(offset, data);
    }
}

impl Shared {
    fn offset(&self, iova: u64, len: usize) -> Result<usize, Fault> {
        let fault = Fault { addr: iova };
        let offset =
            iova.checked_sub(self.base).and_then(|offset| usize::try_from(offset).ok()).ok_or(fault)?;
        let end = offset.checked_add(len).ok_or(fault)?;
        if end > self.words.len() * 2 { Err(fault) } else { Ok(offset) }
    }

    fn access(&self, iova: u64, len: usize, perm: Perm) -> Result<usize, Fault> {
        let fault = Fault { addr: iova };
        let next =
            |left| if left == u64::MAX { None } else { Some(if left == 0 { u64::MAX } else { left - 1 }) };
        if self.fail_in.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) == Ok(0) {
            return Err(fault);
        }
        let offset = self.offset(iova, len)?;
        let pages = offset / 256..(offset + len).div_ceil(256);
        let allowed = |page: &AtomicU8| Perm(page.load(Ordering::Relaxed)).allows(perm);
        if self.perms.get(pages).is_some_and(|pages| pages.iter().all(allowed)) {
            Ok(offset)
        } else {
            Err(fault)
        }
    }

    fn copy_out(&self, offset: usize, data: &mut [u8]) {
        for (offset, byte) in (offset..).zip(data) {
            *byte = self.words[offset / 2].load(Ordering::Relaxed).to_le_bytes()[offset % 2];
        }
    }

    fn copy_in(&self, offset: usize, data: &[u8]) {
        for (offset, &byte) in (offset..).zip(data) {
            let merge = |word: u16| {
                let mut bytes = word.to_le_bytes();
                bytes[offset % 2] = byte;
                Some(u16::from_le_bytes(bytes))
            };
            let _ = self.words[offset / 2].fetch_update(Ordering::Relaxed, Ordering::Relaxed, merge);
        }
    }
}

impl Memory for TestMemory {
    type Area = TestArea;

    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let offset = self.shared.access(iova, buf.len(), Perm::RO)?;
        self.shared.copy_out(offset, buf);
        Ok(())
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Fault> {
        let offset = self.shared.access(iova, data.len(), Perm::WO)?;
        self.shared.copy_in(offset, data);
        Ok(())
    }

    fn area(&self, iova: u64, size: u64, perm: Perm) -> Result<TestArea, Fault> {
        let size = usize::try_from(size).map_err(|_| Fault { addr: iova })?;
        self.shared.access(iova, size, perm)?;
        Ok(TestArea { shared: Arc::clone(&self.shared), iova, size })
    }
}

/// A part of a [`TestMemory`].
#[derive(Clone, Debug)]
pub struct TestArea {
    shared: Arc<Shared>,
    iova: u64,
    size: usize,
}

impl TestArea {
    fn access(&self, offset: usize, len: usize, perm: Perm) -> Result<usize, Fault> {
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(Fault { addr: offset as u64 });
        }
        self.shared.access(self.iova + offset as u64, len, perm)
    }
}

impl Area for TestArea {
    fn size(&self) -> usize {
        self.size
    }

    fn load_u16(&self, offset: usize) -> Result<u16, Fault> {
        let offset = self.access(offset, 2, Perm::RO)?;
        assert!(offset.is_multiple_of(2), "u16 at odd offset {offset}");
        Ok(self.shared.words[offset / 2].load(Ordering::Acquire))
    }

    fn store_u16(&self, offset: usize, value: u16) -> Result<(), Fault> {
        let offset = self.access(offset, 2, Perm::WO)?;
        assert!(offset.is_multiple_of(2), "u16 at odd offset {offset}");
        self.shared.words[offset / 2].store(value, Ordering::Release);
        Ok(())
    }

    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Fault> {
        let offset = self.access(offset, buf.len(), Perm::RO)?;
        self.shared.copy_out(offset, buf);
        Ok(())
    }

    fn write(&self, offset: usize, data: &[u8]) -> Result<(), Fault> {
        let offset = self.access(offset, data.len(), Perm::WO)?;
        self.shared.copy_in(offset, data);
        Ok(())
    }
}

/// The I/O virtual addresses of the areas of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor area.
    pub desc: u64,
    /// Driver area (available ring).
    pub avail: u64,
    /// Device area (used ring).
    pub used: u64,
}

/// A driver and a device on one split ring, at the start of a [`TestMemory`]; the rest is for buffers.
#[derive(Debug)]
pub struct Pair {
    /// The memory of both sides.
    pub memory: TestMemory,
    /// The driver side.
    pub driver: SplitDriver<TestArea>,
    /// The device side.
    pub queue: SplitQueue<TestArea>,
    /// The addresses of the ring.
    pub ring: RingAddresses,
    size: u16,
    features: Features,
    next_buffer: u64,
}

impl Pair {
    /// First address of the memory of a pair.
    pub const BASE: u64 = 0x10_0000;
    /// Bytes for buffers.
    pub const BUFFER_BYTES: u64 = 1 << 16;

    /// An empty ring of `size` entries with both sides started.
    ///
    /// # Panics
    /// When there is no such ring.
    #[must_use]
    pub fn new(size: u16, features: Features) -> Self {
        Self::starting_at(size, features, 0)
    }

    /// As [`new`](Self::new), with all indices at `index` as if that many requests had been served.
    ///
    /// # Panics
    /// When there is no such ring.
    #[must_use]
    pub fn starting_at(size: u16, features: Features, index: u16) -> Self {
        let (memory, ring, next_buffer) = memory_for(size, features);
        let [desc, avail, used] = areas(&memory, ring, size, features);
        let mut driver =
            SplitDriver::new(size, features, desc.clone(), avail.clone(), used.clone()).expect("a ring");
        if index != 0 {
            let mut state = driver.state();
            (state.avail_index, state.last_used_index) = (index, index);
            avail.store_u16(2, index).expect("a ring");
            used.store_u16(2, index).expect("a ring");
            driver =
                SplitDriver::adopt(state, desc.clone(), avail.clone(), used.clone()).expect("an empty ring");
        }
        let state = QueueState::Split { avail_index: index };
        let queue = SplitQueue::new(size, features, desc, avail, used, state).expect("a ring");
        Self { memory, driver, queue, ring, size, features, next_buffer }
    }

    /// The three areas, translated again: descriptor, available, used.
    ///
    /// # Panics
    /// When a part of the ring was made a hole.
    #[must_use]
    pub fn areas(&self) -> [TestArea; 3] {
        areas(&self.memory, self.ring, self.size, self.features)
    }

    /// A buffer that no earlier call has returned.
    ///
    /// # Panics
    /// When all [`BUFFER_BYTES`](Self::BUFFER_BYTES) are given away.
    pub fn allocate(&mut self, len: u32) -> Buffer {
        let iova = self.next_buffer;
        self.next_buffer += u64::from(len);
        let bytes = self.memory.shared.words.len() as u64 * 2;
        assert!(self.next_buffer - Self::BASE <= bytes, "no memory left for a buffer of {len} bytes");
        Buffer { iova, len }
    }

    /// Processes the available requests on the device side. `request` returns the number of bytes written. Returns whether the
    /// driver must be notified.
    ///
    /// # Errors
    /// Errors of the ring; requests popped before are completed.
    pub fn serve(&mut self, mut request: impl FnMut(&TestMemory, &Chain) -> u32) -> Result<bool, RingError> {
        let mut chain = Chain::new();
        while self.queue.pop(&self.memory, &mut chain)? {
            let len = request(&self.memory, &chain);
            self.queue.push_used(chain.head, len)?;
        }
        self.queue.publish()
    }

    /// Stops the device side and starts it again at the same position, as SUSPEND and RESUME do.
    ///
    /// # Panics
    /// When requests are in flight: a queue is drained before it stops.
    pub fn restart_queue(&mut self) {
        assert_eq!((self.queue.in_flight(), self.queue.unpublished()), (0, 0), "the queue is not drained");
        let [desc, avail, used] = self.areas();
        let state = self.queue.state();
        self.queue =
            SplitQueue::new(self.size, self.features, desc, avail, used, state).expect("the same ring");
    }

    /// Replaces the driver by one adopted from its state, as an exec does.
    ///
    /// # Panics
    /// When the state is refused.
    pub fn restart_driver(&mut self) {
        let [desc, avail, used] = self.areas();
        self.driver = SplitDriver::adopt(self.driver.state(), desc, avail, used).expect("its own state");
    }
}

fn memory_for(size: u16, features: Features) -> (TestMemory, RingAddresses, u64) {
    let sizes = area_sizes(size, features);
    let round = |address: u64| address.next_multiple_of(TEST_PAGE);
    let desc = Pair::BASE;
    let avail = round(desc + sizes.desc as u64);
    let used = round(avail + sizes.avail as u64);
    let buffers = round(used + sizes.used as u64);
    let bytes = usize::try_from(buffers - Pair::BASE + Pair::BUFFER_BYTES).expect("a few MiB");
    (TestMemory::new(Pair::BASE, bytes), RingAddresses { desc, avail, used }, buffers)
}

fn areas(memory: &TestMemory, ring: RingAddresses, size: u16, features: Features) -> [TestArea; 3] {
    let sizes = area_sizes(size, features);
    let desc = if features.has(Features::RING_PACKED) { Perm::RW } else { Perm::RO };
    [(ring.desc, sizes.desc, desc), (ring.avail, sizes.avail, Perm::RO), (ring.used, sizes.used, Perm::RW)]
        .map(|(iova, size, perm)| memory.area(iova, size as u64, perm).expect("the ring is mapped"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_has_edges_holes_and_permissions() {
        let memory = TestMemory::new(0x1000, 0x400);
        memory.write(0x10ff, &[1, 2]).unwrap();
        let mut data = [0; 4];
        memory.read(0x10fe, &mut data).unwrap();
        assert_eq!(data, [0, 1, 2, 0]);
        assert_eq!(memory.read(0x13fe, &mut data), Err(Fault { addr: 0x13fe }));
        assert_eq!(memory.read(0xfff, &mut data), Err(Fault { addr: 0xfff }));

        memory.protect(IovaRange::new(0x1150, 0x1150).unwrap(), Perm::RO);
        assert!(memory.read(0x1100, &mut data).is_ok());
        assert!(memory.write(0x10ff, &data).is_err() && memory.write(0x1200, &data).is_ok());
        assert!(memory.area(0x1000, 0x400, Perm::RO).is_ok());
        assert!(memory.area(0x1000, 0x400, Perm::RW).is_err());
    }

    #[test]
    fn one_access_fails_when_asked() {
        let memory = TestMemory::new(0, 0x100);
        memory.fail_after(1);
        assert!(memory.write(0, &[1]).is_ok());
        assert!(memory.write(0, &[1]).is_err());
        assert!(memory.write(0, &[1]).is_ok());
        assert!(!memory.cancel_failure());
    }
}
