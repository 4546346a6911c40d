//! The device side of a ring that its driver changes at any moment, between any two calls.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vdpa_core::features::Features;
use vdpa_core::ring::split::SplitQueue;
use vdpa_core::ring::{Chain, RingError};
use vdpa_core::testing::{Pair, TEST_PAGE};
use vdpa_core::types::{IovaRange, Perm};
use vdpa_core::vq::QueueState;

#[derive(Arbitrary, Debug)]
struct Input {
    size: u8,
    event_idx: bool,
    refuse_indirect: bool,
    start: u16,
    ops: Vec<Op>,
}

#[derive(Arbitrary, Debug)]
enum Op {
    /// The driver writes anywhere in its memory.
    Poke {
        at: u16,
        bytes: [u8; 4],
    },
    /// A descriptor of the ring that is often almost right.
    Descriptor {
        index: u8,
        at: u16,
        len: u16,
        flags: u8,
        next: u8,
    },
    /// One of an indirect table in the buffers.
    Indirect {
        table: u8,
        index: u8,
        at: u16,
        len: u16,
        flags: u8,
        next: u8,
    },
    /// A descriptor with any content.
    Raw {
        index: u8,
        bytes: [u8; 16],
    },
    Offer {
        head: u16,
    },
    Index(u16),
    Protect {
        at: u16,
        pages: u8,
        perm: u8,
    },
    Fail(u8),
    Pop,
    Abandon,
    Push {
        which: u8,
        len: u32,
    },
    PushWrong(u16),
    Publish,
    EnableKick,
    DisableKick,
}

fn features(event_idx: bool) -> Features {
    if event_idx { Features::of(&[Features::RING_EVENT_IDX]) } else { Features::NONE }
}

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..8].copy_from_slice(&addr.to_le_bytes());
    raw[8..12].copy_from_slice(&len.to_le_bytes());
    raw[12..14].copy_from_slice(&flags.to_le_bytes());
    raw[14..].copy_from_slice(&next.to_le_bytes());
    raw
}

fuzz_target!(|input: Input| {
    let size = 1u16 << (input.size % 5);
    let features = features(input.event_idx);
    let mut pair = Pair::new(size, features);
    let buffers = pair.allocate(0).iova;
    let bytes = buffers - Pair::BASE + Pair::BUFFER_BYTES;
    let [desc, avail, used] = pair.areas();
    let state = QueueState::Split { avail_index: input.start };
    let queue = SplitQueue::new(size, features, desc, avail, used, state).expect("a ring in place");
    pair.queue = if input.refuse_indirect { queue.refuse_unnegotiated_indirect(features) } else { queue };

    let mut chain = Chain::new();
    let mut last: Option<u16> = None;
    let mut heads: Vec<u16> = Vec::new();
    let mut offered = input.start;
    for op in input.ops.iter().take(400) {
        match *op {
            Op::Poke { at, bytes: raw } => pair.memory.poke(Pair::BASE + u64::from(at) % (bytes - 4), &raw),
            Op::Descriptor { index, at, len, flags, next } => {
                let raw = descriptor(buffers + u64::from(at), len.into(), flags.into(), next.into());
                pair.memory.poke(pair.ring.desc + u64::from(u16::from(index) % size) * 16, &raw);
            }
            Op::Indirect { table, index, at, len, flags, next } => {
                let raw = descriptor(buffers + u64::from(at), len.into(), flags.into(), next.into());
                pair.memory.poke(buffers + u64::from(table) * 64 + u64::from(index) * 16, &raw);
            }
            Op::Raw { index, bytes } => {
                pair.memory.poke(pair.ring.desc + u64::from(u16::from(index) % size) * 16, &bytes);
            }
            Op::Offer { head } => {
                let at = pair.ring.avail + 4 + u64::from(offered % size) * 2;
                pair.memory.poke(at, &head.to_le_bytes());
                offered = offered.wrapping_add(1);
                pair.memory.poke(pair.ring.avail + 2, &offered.to_le_bytes());
            }
            Op::Index(index) => {
                offered = index;
                pair.memory.poke(pair.ring.avail + 2, &index.to_le_bytes());
            }
            Op::Protect { at, pages, perm } => {
                let first = Pair::BASE + u64::from(at) % bytes;
                let range = IovaRange::from_size(first, u64::from(pages).max(1) * TEST_PAGE);
                pair.memory.protect(range.expect("far from the end"), Perm(perm & 3));
            }
            Op::Fail(accesses) => pair.memory.fail_after(accesses.into()),
            Op::Pop => {
                let before = pair.queue.in_flight();
                last = None;
                match pair.queue.pop(&pair.memory, &mut chain) {
                    Ok(true) => {
                        assert!(chain.head < size);
                        let total = chain.readable().len() + chain.writable().len();
                        assert!(total <= 1 << 32);
                        heads.push(chain.head);
                        last = Some(chain.head);
                    }
                    Ok(false) => assert_eq!(pair.queue.in_flight(), before),
                    Err(error) => {
                        assert_eq!(pair.queue.in_flight(), before);
                        if !matches!(error, RingError::Fault(_)) {
                            assert_eq!(pair.queue.broken(), Some(error));
                            assert_eq!(pair.queue.pop(&pair.memory, &mut chain), Err(error));
                        }
                    }
                }
            }
            Op::Abandon => {
                if last.take().is_some() {
                    pair.queue.abandon(&chain).expect("it was popped last");
                    heads.pop();
                } else if heads.is_empty() {
                    assert!(pair.queue.abandon(&chain).is_err());
                }
            }
            Op::Push { which, len } => {
                if heads.is_empty() {
                    assert!(pair.queue.push_used(0, len).is_err());
                    continue;
                }
                let which = usize::from(which) % heads.len();
                match pair.queue.push_used(heads[which], len) {
                    Ok(()) => {
                        heads.remove(which);
                        last = None;
                    }
                    Err(error) => assert!(matches!(error, RingError::Fault(_)), "{error}"),
                }
            }
            Op::PushWrong(head) => {
                if head >= size {
                    assert!(pair.queue.push_used(head, 0).is_err());
                }
            }
            Op::Publish => {
                if pair.queue.publish().is_ok() {
                    assert_eq!(pair.queue.unpublished(), 0);
                }
            }
            Op::EnableKick => drop(pair.queue.enable_kick()),
            Op::DisableKick => drop(pair.queue.disable_kick()),
        }
        assert_eq!(usize::from(pair.queue.in_flight()), heads.len(), "after {op:?}");
        assert!(pair.queue.in_flight() + pair.queue.unpublished() <= size, "after {op:?}");
    }
});
