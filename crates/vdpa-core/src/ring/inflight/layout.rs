//! The log in memory.

use super::{LogError, LogMemory};
use crate::features::Features;

/// First word of a log: "VDPAINFL".
const MAGIC: u64 = u64::from_be_bytes(*b"VDPAINFL");
/// Version of everything in this file.
const VERSION: u64 = 1;

/// Words of the header, by what they hold. The first line does not change while the log is in use.
const KIND: usize = 1;
const START: usize = 2;
const LOST: usize = 3;
const CHECKSUM: usize = 4;
/// Alone in its cache line, since it is the one word of the header that changes.
pub(super) const PUBLISHED: usize = 8;
/// The first slot.
const SLOTS: usize = 16;

/// Words of a slot of a packed ring: the state; id, count and next part; three descriptors. One cache line.
const PACKED_SLOT: usize = 8;
/// Descriptors in one slot of a packed ring.
pub(in crate::ring) const DESCRIPTORS: usize = 3;

const POSITION_BITS: u32 = 56;
const ATTEMPTS_MAX: u8 = 63;
/// Greatest position that a log may start at, so that the rest lasts for the lifetime of any machine.
const POSITION_MAX: u64 = 1 << 55;

/// Bytes of the log of a ring of `size` entries under `features`, a multiple of 64. A page boundary or at least a
/// multiple of 64 should be the start of its memory.
#[must_use]
pub const fn log_size(size: u16, features: Features) -> usize {
    (Shape::new(size, features).words() * 8).next_multiple_of(64)
}

/// What decides the layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) size: u16,
    pub(super) packed: bool,
    pub(super) in_order: bool,
}

impl Shape {
    pub(super) const fn new(size: u16, features: Features) -> Self {
        Self { size, packed: features.has(Features::RING_PACKED), in_order: features.has(Features::IN_ORDER) }
    }

    const fn words(self) -> usize {
        SLOTS + self.size as usize * if self.packed { PACKED_SLOT } else { 1 }
    }

    /// The state word of a request.
    #[inline]
    pub(super) const fn slot(self, name: u16) -> usize {
        SLOTS + name as usize * if self.packed { PACKED_SLOT } else { 1 }
    }

    const fn kind(self) -> u64 {
        VERSION << 48 | (self.packed as u64) << 32 | (self.in_order as u64) << 33 | self.size as u64
    }

    pub(super) fn check_room<M: LogMemory>(self, memory: &M) -> Result<(), LogError> {
        let (words, needed) = (memory.words(), self.words());
        if words < needed { Err(LogError::Room { words, needed }) } else { Ok(()) }
    }
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Nobody has the name.
    Free,
    /// Taken; the position is that of its first descriptor or entry in the ring.
    Taken,
    /// Pushed as used; the position is the one behind it. In flight no more.
    Pushed,
    /// As `Pushed`, with bytes written, which the flags of a packed ring say.
    PushedWritten,
}

/// The state word of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) state: State,
    pub(super) attempts: u8,
    pub(super) position: u64,
}

impl Slot {
    #[inline]
    pub(super) const fn pack(self) -> u64 {
        let attempts = if self.attempts > ATTEMPTS_MAX { ATTEMPTS_MAX } else { self.attempts };
        (self.state as u64) << 62 | (attempts as u64) << POSITION_BITS | self.position
    }

    #[inline]
    pub(super) const fn unpack(word: u64) -> Self {
        let state = match word >> 62 {
            0 => State::Free,
            1 => State::Taken,
            2 => State::Pushed,
            _ => State::PushedWritten,
        };
        let attempts = (word >> POSITION_BITS & 63) as u8;
        Self { state, attempts, position: word & ((1 << POSITION_BITS) - 1) }
    }
}

/// A descriptor of a packed ring, as far as it must be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ring) struct Stored {
    pub(in crate::ring) addr: u64,
    pub(in crate::ring) len: u32,
    /// `WRITE` or `INDIRECT`.
    pub(in crate::ring) flags: u16,
}

/// Writes the whole log. The first word is zero from the first store to the last.
pub(super) fn format<M: LogMemory>(memory: &M, shape: Shape, used: u64, lost: u16) {
    memory.store(0, 0);
    for name in 0..shape.size {
        memory.store(shape.slot(name), 0);
    }
    memory.store(KIND, shape.kind());
    memory.store(START, used);
    memory.store(LOST, lost.into());
    memory.store(CHECKSUM, checksum([shape.kind(), used, lost.into()]));
    memory.store(PUBLISHED, used);
    memory.store(0, MAGIC);
}

/// Reads and checks the header; returns the published count and what was lost before the log began.
pub(super) fn open<M: LogMemory>(memory: &M, shape: Shape) -> Result<(u64, u16), LogError> {
    shape.check_room(memory)?;
    match memory.load(0) {
        MAGIC => {}
        0 => return Err(LogError::Absent),
        found => return Err(LogError::Magic { found }),
    }
    let (found, needed) = (memory.load(KIND), shape.kind());
    if found != needed {
        return Err(LogError::Kind { found, needed });
    }
    let (start, lost) = (memory.load(START), memory.load(LOST));
    let (found, needed) = (memory.load(CHECKSUM), checksum([shape.kind(), start, lost]));
    if found != needed {
        return Err(LogError::Checksum { found, needed });
    }
    let too_many = |what, count| LogError::Count { what, count };
    let count = u16::try_from(lost).ok().filter(|&lost| lost <= shape.size);
    let lost = count.ok_or(too_many("lost", lost))?;
    let published = memory.load(PUBLISHED);
    if published < start || published > POSITION_MAX {
        return Err(too_many("published", published));
    }
    Ok((published, lost))
}

/// FNV-1a over the words: against accidents, not against forgery.
fn checksum(words: [u64; 3]) -> u64 {
    words.iter().flat_map(|word| word.to_le_bytes()).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Writes everything of a packed slot but its state.
#[inline]
pub(super) fn store_part<M: LogMemory>(
    memory: &M,
    shape: Shape,
    name: u16,
    (id, count, next): (u16, u16, Option<u16>),
    part: &[Stored],
) {
    let at = shape.slot(name);
    // A name is less than 2^15, so that the value 0xffff is free for "none".
    let next = next.unwrap_or(u16::MAX);
    memory.store(at + 1, u64::from(id) | u64::from(count) << 16 | u64::from(next) << 32);
    for (at, stored) in (at + 2..).step_by(2).zip(part.iter().take(DESCRIPTORS)) {
        memory.store(at, stored.addr);
        memory.store(at + 1, u64::from(stored.len) | u64::from(stored.flags) << 32);
    }
}

/// Id, number of descriptors and next part of a packed slot.
#[expect(clippy::cast_possible_truncation, reason = "16 bits each, by shifting")]
pub(super) fn load_link<M: LogMemory>(memory: &M, shape: Shape, name: u16) -> (u16, u16, Option<u16>) {
    let word = memory.load(shape.slot(name) + 1);
    let next = Some((word >> 32) as u16).filter(|&next| next != u16::MAX);
    (word as u16, (word >> 16) as u16, next)
}

/// The descriptors of a packed slot; those beyond the last of the request are left over from another.
#[expect(clippy::cast_possible_truncation, reason = "32 and 16 bits, by shifting")]
pub(super) fn load_part<M: LogMemory>(memory: &M, shape: Shape, name: u16) -> [Stored; DESCRIPTORS] {
    [0, 1, 2].map(|i| {
        let at = shape.slot(name) + 2 + 2 * i;
        let word = memory.load(at + 1);
        Stored { addr: memory.load(at), len: word as u32, flags: (word >> 32) as u16 }
    })
}
