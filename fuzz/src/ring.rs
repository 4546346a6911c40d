//! What the targets of both ring formats have in common: a driver that writes where it likes, and a device that keeps book of
//! the requests it has.

use vdpa_core::ring::{Chain, Ring, RingError};
use vdpa_core::testing::{Pair, TEST_PAGE, TestArea, TestMemory};
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

/// Writes anywhere in the first `bytes` bytes of the memory of a pair.
pub fn poke(memory: &TestMemory, bytes: u64, at: u16, raw: [u8; 4]) {
    memory.poke(Pair::BASE + u64::from(at) % (bytes - 4), &raw);
}

/// Gives some pages of them another permission.
pub fn protect(memory: &TestMemory, bytes: u64, at: u16, pages: u8, perm: u8) {
    let first = Pair::BASE + u64::from(at) % bytes;
    let range = IovaRange::from_size(first, u64::from(pages).max(1) * TEST_PAGE);
    memory.protect(range.expect("far from the end"), Perm(perm & 3));
}

/// The requests that the device has taken.
#[derive(Default)]
pub struct Taken {
    chain: Chain,
    /// Of the request popped last, while it can be put back.
    last: Option<u16>,
    /// In the order in which they were popped.
    pub heads: Vec<u16>,
}

impl Taken {
    /// Pops a request; its head. What fails changes nothing, and what breaks the ring breaks it for good.
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

    /// Puts the request popped last back, where that is possible.
    pub fn abandon(&mut self, queue: &mut Ring<TestArea>) {
        if self.last.take().is_some() {
            queue.abandon(&self.chain).expect("it was popped last");
            self.heads.pop();
        } else if queue.in_flight() == 0 {
            assert!(queue.abandon(&self.chain).is_err());
        }
    }

    /// Completes one of the requests; without any, nothing can be completed.
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
