//! Code that the targets of both ring formats share: a driver that writes anywhere in its memory, and a device that
//! records the requests in flight.

use vdpa_core::ring::{Chain, Ring, RingError};
use vdpa_core::testing::{Pair, RingPair, TEST_PAGE, TestArea, TestMemory};
use vdpa_core::types::{IovaRange, Perm};

/// A descriptor of either format: the last two fields are flags and next in a split ring, id and flags in a packed one.
#[must_use]
pub fn descriptor(addr: u64, len: u32, third: u16, fourth: u16) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&addr.to_le_bytes());
    raw[8..12].copy_from_slice(&len.to_le_bytes());
    raw[12..14].copy_from_slice(&third.to_le_bytes());
    raw[14..].copy_from_slice(&fourth.to_le_bytes());
    raw
}

/// Bytes of the memory of a pair: its ring areas and its buffers.
#[must_use]
pub fn memory_bytes(pair: &RingPair) -> u64 {
    pair.buffers() - Pair::BASE + Pair::BUFFER_BYTES
}

/// Writes descriptor `index` (modulo `size`) of the ring.
pub fn write_descriptor(pair: &RingPair, size: u16, index: u8, raw: &[u8; 16]) {
    pair.memory.poke(pair.ring.desc + u64::from(u16::from(index) % size) * 16, raw);
}

/// Writes descriptor `index` of an indirect table; table `n` begins `n * 64` bytes into the buffers.
pub fn write_indirect(pair: &RingPair, table: u8, index: u8, raw: &[u8; 16]) {
    pair.memory.poke(pair.buffers() + u64::from(table) * 64 + u64::from(index) * 16, raw);
}

/// Writes anywhere in the first `bytes` bytes of the memory of a pair.
pub fn poke(memory: &TestMemory, bytes: u64, at: u16, raw: [u8; 4]) {
    memory.poke(Pair::BASE + u64::from(at) % (bytes - 4), &raw);
}

/// Changes the permission of some pages in the first `bytes` bytes of the memory of a pair.
pub fn protect(memory: &TestMemory, bytes: u64, at: u16, pages: u8, perm: u8) {
    let first = Pair::BASE + u64::from(at) % bytes;
    let range = IovaRange::from_size(first, u64::from(pages).max(1) * TEST_PAGE);
    memory.protect(range.expect("the range does not wrap"), Perm(perm & 3));
}

/// The requests in flight on the device side.
#[derive(Default)]
pub struct InFlight {
    chain: Chain,
    /// Head of the request popped last, while it can be abandoned.
    last: Option<u16>,
    /// Heads of the requests in flight, in the order in which they were popped.
    pub heads: Vec<u16>,
}

impl InFlight {
    /// Pops a request and returns its head. Checks that a failure changes nothing, and that a violation stops the ring permanently.
    pub fn pop(&mut self, queue: &mut Ring<TestArea>, memory: &TestMemory) -> Option<u16> {
        let before = (queue.in_flight(), queue.state());
        self.last = None;
        match queue.pop(memory, &mut self.chain) {
            Ok(true) => {
                assert!(self.chain.readable().len() + self.chain.writable().len() <= 1 << 32);
                self.heads.push(self.chain.head);
                self.last = Some(self.chain.head);
            }
            Ok(false) => assert_eq!((queue.in_flight(), queue.state()), before),
            Err(error) => {
                assert_eq!((queue.in_flight(), queue.state()), before);
                if !matches!(error, RingError::Fault(_)) {
                    assert_eq!(queue.broken(), Some(error));
                    assert_eq!(queue.pop(memory, &mut self.chain), Err(error));
                }
            }
        }
        self.last
    }

    /// Abandons the request popped last, if that is possible.
    pub fn abandon(&mut self, queue: &mut Ring<TestArea>) {
        if self.last.take().is_some() {
            queue.abandon(&self.chain).expect("it was popped last");
            self.heads.pop();
        } else if queue.in_flight() == 0 {
            assert!(queue.abandon(&self.chain).is_err());
        }
    }

    /// Completes one of the requests in flight. Without any, checks that nothing can be completed.
    pub fn push(&mut self, queue: &mut Ring<TestArea>, which: u8, len: u32) {
        if self.heads.is_empty() {
            assert!(queue.push_used(0, len).is_err());
            return;
        }
        let which = usize::from(which) % self.heads.len();
        match queue.push_used(self.heads[which], len) {
            Ok(()) => {
                self.heads.remove(which);
                self.last = None;
            }
            Err(error) => assert!(matches!(error, RingError::Fault(_)), "{error}"),
        }
    }
}
