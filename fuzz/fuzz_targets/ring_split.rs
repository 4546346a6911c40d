//! The device side of a split ring whose memory the driver changes between any two calls.
//!
//! The layout of `Op` is the format of the seeds, so the targets of the two ring formats share no operations.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vdpa_core::features::Features;
use vdpa_core::ring::Ring;
use vdpa_core::testing::RingPair;
use vdpa_core::vq::QueueState;
use vdpa_fuzz::ring::{InFlight, descriptor, memory_bytes, poke, protect, write_descriptor, write_indirect};

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
    /// The driver writes anywhere in the ring or the buffers.
    Poke {
        at: u16,
        bytes: [u8; 4],
    },
    /// Writes a descriptor of the ring that is often nearly valid.
    Descriptor {
        index: u8,
        at: u16,
        len: u16,
        flags: u8,
        next: u8,
    },
    /// Writes a descriptor of an indirect table in the buffers.
    Indirect {
        table: u8,
        index: u8,
        at: u16,
        len: u16,
        flags: u8,
        next: u8,
    },
    /// Writes a descriptor with any content.
    Raw {
        index: u8,
        bytes: [u8; 16],
    },
    /// Makes the chain that starts at `head` available.
    MakeAvailable {
        head: u16,
    },
    /// Stores any available index.
    SetAvailIndex(u16),
    Protect {
        at: u16,
        pages: u8,
        perm: u8,
    },
    /// Lets one memory access fail, after this many that succeed.
    Fail(u8),
    Pop,
    Abandon,
    Push {
        which: u8,
        len: u32,
    },
    /// Completes a head that may not be in flight.
    PushWrong(u16),
    Publish,
    EnableKick,
    DisableKick,
    Waiting,
}

fn features(event_idx: bool) -> Features {
    if event_idx { Features::of(&[Features::RING_EVENT_IDX]) } else { Features::NONE }
}

fuzz_target!(|input: Input| {
    let size = 1u16 << (input.size % 5);
    let features = features(input.event_idx);
    let mut pair = RingPair::new(size, features);
    let buffers = pair.buffers();
    let bytes = memory_bytes(&pair);
    let [desc, avail, used] = pair.areas();
    let state = QueueState::Split { avail_index: input.start };
    let queue = Ring::new(size, features, desc, avail, used, state).expect("the areas have the right sizes");
    pair.queue = if input.refuse_indirect { queue.refuse_unnegotiated_indirect(features) } else { queue };

    let mut in_flight = InFlight::default();
    let mut avail_index = input.start;
    for op in input.ops.iter().take(400) {
        match *op {
            Op::Poke { at, bytes: raw } => poke(&pair.memory, bytes, at, raw),
            Op::Descriptor { index, at, len, flags, next } => {
                let raw = descriptor(buffers + u64::from(at), len.into(), flags.into(), next.into());
                write_descriptor(&pair, size, index, &raw);
            }
            Op::Indirect { table, index, at, len, flags, next } => {
                let raw = descriptor(buffers + u64::from(at), len.into(), flags.into(), next.into());
                write_indirect(&pair, table, index, &raw);
            }
            Op::Raw { index, bytes } => write_descriptor(&pair, size, index, &bytes),
            Op::MakeAvailable { head } => {
                let at = pair.ring.avail + 4 + u64::from(avail_index % size) * 2;
                pair.memory.poke(at, &head.to_le_bytes());
                avail_index = avail_index.wrapping_add(1);
                pair.memory.poke(pair.ring.avail + 2, &avail_index.to_le_bytes());
            }
            Op::SetAvailIndex(index) => {
                avail_index = index;
                pair.memory.poke(pair.ring.avail + 2, &index.to_le_bytes());
            }
            Op::Protect { at, pages, perm } => protect(&pair.memory, bytes, at, pages, perm),
            Op::Fail(accesses) => pair.memory.fail_after(accesses.into()),
            Op::Pop => {
                let broken = pair.queue.broken();
                let head = in_flight.pop(&mut pair.queue, &pair.memory);
                assert!(head.is_none_or(|head| head < size && broken.is_none()));
            }
            Op::Abandon => in_flight.abandon(&mut pair.queue),
            Op::Push { which, len } => in_flight.push(&mut pair.queue, which, len),
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
            Op::Waiting => assert!(pair.queue.waiting(u16::MAX).unwrap_or(0) <= size),
        }
        assert_eq!(usize::from(pair.queue.in_flight()), in_flight.heads.len(), "after {op:?}");
        assert!(pair.queue.in_flight() + pair.queue.unpublished() <= size, "after {op:?}");
    }
});
