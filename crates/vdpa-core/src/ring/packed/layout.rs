//! The packed ring in memory (virtio 1.2 section 2.8), shared by both sides.

use crate::features::Features;
use crate::ring::layout::{AreaSizes, DESCRIPTOR, Descriptor};
use crate::ring::{Area, Fault, RingError};

/// Largest packed ring (virtio 1.2 section 2.8: "2^15").
pub(in crate::ring) const SIZE_MAX: u16 = 1 << 15;

/// `VIRTQ_DESC_F_AVAIL`: equals the driver's wrap counter in a descriptor it has made available.
const AVAIL: u16 = 1 << 7;
/// `VIRTQ_DESC_F_USED`: equals the device's wrap counter in a descriptor it has used.
const USED: u16 = 1 << 15;

/// Offset of the length in a descriptor; the id and the flags follow.
pub(in crate::ring) const LEN: usize = 8;
/// Offset of the flags in a descriptor.
pub(in crate::ring) const FLAGS: usize = 14;

/// Bytes of an event suppression structure.
const EVENT: usize = 4;
/// Offset of the position in an event suppression structure.
const EVENT_PLACE: usize = 0;
/// Offset of the flags in an event suppression structure.
const EVENT_FLAGS: usize = 2;
/// `RING_EVENT_FLAGS_ENABLE`.
const ENABLE: u16 = 0;
/// `RING_EVENT_FLAGS_DISABLE`.
const DISABLE: u16 = 1;
/// `RING_EVENT_FLAGS_DESC`: an event at the given descriptor, only with `RING_EVENT_IDX`.
const AT_DESCRIPTOR: u16 = 2;

/// Bytes of the areas of a packed ring of `size` entries: descriptors, driver and device event suppression.
#[must_use]
pub const fn area_sizes(size: u16) -> AreaSizes {
    AreaSizes { desc: DESCRIPTOR * size as usize, avail: EVENT, used: EVENT }
}

/// Checks size, features and areas of a ring.
pub(in crate::ring) fn check<A: Area>(
    size: u16,
    features: Features,
    desc: &A,
    driver: &A,
    device: &A,
) -> Result<(), RingError> {
    if size == 0 || size > SIZE_MAX {
        return Err(RingError::PackedSize { size });
    }
    if !features.has(Features::RING_PACKED) {
        return Err(RingError::NotPacked { features });
    }
    let sizes = area_sizes(size);
    for (name, area, needed) in [
        ("descriptor", desc, sizes.desc),
        ("driver event", driver, sizes.avail),
        ("device event", device, sizes.used),
    ] {
        if area.size() < needed {
            return Err(RingError::AreaSize { area: name, size: area.size(), needed });
        }
    }
    Ok(())
}

/// A position in the ring: a descriptor and its wrap counter (virtio 1.2 section 2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ring) struct Place {
    /// Less than the size of the ring, except in an event that the other side wrote.
    pub(in crate::ring) index: u16,
    pub(in crate::ring) wrap: bool,
}

impl Place {
    /// The position of both sides of a new ring.
    pub(in crate::ring) const START: Self = Self { index: 0, wrap: true };

    /// The position `count` descriptors later; at most one lap of `size`.
    #[inline]
    pub(in crate::ring) const fn forward(self, count: u16, size: u16) -> Self {
        // At most 2^16 - 1: an index is less than 2^15.
        let index = self.index + count;
        if index >= size {
            Self { index: index - size, wrap: !self.wrap }
        } else {
            Self { index, wrap: self.wrap }
        }
    }

    /// The position `count` descriptors earlier; at most one lap of `size`.
    #[inline]
    pub(in crate::ring) const fn back(self, count: u16, size: u16) -> Self {
        if count > self.index {
            Self { index: self.index + size - count, wrap: !self.wrap }
        } else {
            Self { index: self.index - count, wrap: self.wrap }
        }
    }

    /// Number of descriptors from `earlier` to this position: less than two laps, since the wrap counter has one bit.
    #[inline]
    pub(in crate::ring) const fn since(self, earlier: Self, size: u16) -> u32 {
        let lap = size as u32;
        let distance = self.index as u32 + 2 * lap - earlier.index as u32;
        let distance = if self.wrap == earlier.wrap { distance } else { distance + lap };
        distance % (2 * lap)
    }

    /// Descriptors from the start of the first lap, or of the second: what [`at`](Self::at) maps here.
    pub(in crate::ring) const fn count(self, size: u16) -> u64 {
        self.index as u64 + if self.wrap { 0 } else { size as u64 }
    }

    /// The place `count` descriptors behind [`START`](Self::START).
    #[expect(clippy::cast_possible_truncation, reason = "less than `size`")]
    pub(in crate::ring) const fn at(count: u64, size: u16) -> Self {
        let size = size as u64;
        Self { index: (count % size) as u16, wrap: (count / size).is_multiple_of(2) }
    }

    /// Whether `flags`, read here, are those of a used descriptor, or of one that was made available since it was used.
    pub(in crate::ring) const fn was_used(self, flags: u16) -> bool {
        (flags & USED != 0) == self.wrap
    }

    /// Offset of the descriptor in its area, in bytes.
    #[inline]
    pub(in crate::ring) const fn offset(self) -> usize {
        self.index as usize * DESCRIPTOR
    }

    /// Whether `flags` mark the descriptor at this position as available.
    #[inline]
    pub(in crate::ring) const fn is_available(self, flags: u16) -> bool {
        flags & (AVAIL | USED) == self.available()
    }

    /// Whether `flags` mark the descriptor at this position as used.
    #[inline]
    pub(in crate::ring) const fn is_used(self, flags: u16) -> bool {
        flags & (AVAIL | USED) == self.used()
    }

    /// The flags of an available descriptor at this position.
    #[inline]
    pub(in crate::ring) const fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// The flags of a used descriptor at this position.
    #[inline]
    pub(in crate::ring) const fn used(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }

    /// The flags of a descriptor at this position that is neither available nor used: those of the previous lap.
    #[inline]
    pub(in crate::ring) const fn idle(self) -> u16 {
        if self.wrap { 0 } else { AVAIL | USED }
    }

    /// The encoding of events and of saved states: the wrap counter is bit 15.
    pub(in crate::ring) const fn encode(self) -> u16 {
        self.index | (self.wrap as u16) << 15
    }

    /// The inverse of [`encode`](Self::encode).
    pub(in crate::ring) const fn decode(raw: u16) -> Self {
        Self { index: raw & 0x7fff, wrap: raw >> 15 == 1 }
    }
}

/// Splits the bytes of a descriptor; `next` of the result is the buffer id.
#[inline]
pub(in crate::ring) const fn parse(raw: [u8; DESCRIPTOR]) -> Descriptor {
    let Descriptor { addr, len, flags: id, next: flags } = Descriptor::parse(raw);
    Descriptor { addr, len, flags, next: id }
}

/// Joins what [`parse`] splits.
#[inline]
pub(in crate::ring) fn encode(descriptor: Descriptor) -> [u8; DESCRIPTOR] {
    let Descriptor { addr, len, flags, next: id } = descriptor;
    Descriptor { addr, len, flags: id, next: flags }.encode()
}

/// Whether the writer of the event suppression structure `area` wants an event for the move of the ring from `old` to
/// `new`. `old` is `None` if it is unknown: then the answer is yes unless events are disabled. Call it after a barrier.
#[inline]
pub(in crate::ring) fn wants_event<A: Area>(
    area: &A,
    event_idx: bool,
    size: u16,
    old: Option<Place>,
    new: Place,
) -> Result<bool, Fault> {
    // The flags are read before the position, since the other side writes the position first.
    match area.load_u16(EVENT_FLAGS)? & 3 {
        DISABLE => Ok(false),
        AT_DESCRIPTOR if event_idx => {
            let event = Place::decode(area.load_u16(EVENT_PLACE)?);
            Ok(old.is_none_or(|old| event.since(old, size) < new.since(old, size)))
        }
        // The value 3 is reserved. Superfluous events do no harm.
        _ => Ok(true),
    }
}

/// Requests an event when the ring reaches `at`, or all events without `RING_EVENT_IDX`.
#[inline]
pub(in crate::ring) fn ask_event<A: Area>(area: &A, event_idx: bool, at: Place) -> Result<(), Fault> {
    if !event_idx {
        return area.store_u16(EVENT_FLAGS, ENABLE);
    }
    area.store_u16(EVENT_PLACE, at.encode())?;
    area.store_u16(EVENT_FLAGS, AT_DESCRIPTOR)
}

/// Disables events.
#[inline]
pub(in crate::ring) fn refuse_events<A: Area>(area: &A) -> Result<(), Fault> {
    area.store_u16(EVENT_FLAGS, DISABLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_wrap_in_a_ring_of_any_size() {
        for size in [1, 2, 7, 8, SIZE_MAX] {
            let mut place = Place::START;
            for lap in 0..4 {
                assert_eq!(place, Place { index: 0, wrap: lap % 2 == 0 });
                let step = size.div_ceil(3);
                let there = place.forward(step, size);
                assert_eq!(there.since(place, size), u32::from(step));
                assert_eq!(place.since(there, size), 2 * u32::from(size) - u32::from(step));
                assert_eq!(there.back(step, size), place);
                place = place.forward(size, size);
                assert_eq!(place.back(size, size).since(place, size), u32::from(size));
            }
        }
    }

    #[test]
    fn flags_have_one_meaning_in_each_lap() {
        for wrap in [false, true] {
            let place = Place { index: 3, wrap };
            let later = Place { index: 3, wrap: !wrap };
            for (flags, available, used) in
                [(place.available(), true, false), (place.used(), false, true), (place.idle(), false, false)]
            {
                assert_eq!((place.is_available(flags), place.is_used(flags)), (available, used));
            }
            assert_eq!(
                later.idle(),
                place.used(),
                "the used flags of one lap are the idle flags of the next"
            );
        }
    }

    #[test]
    fn descriptors_are_those_of_the_specification() {
        let raw = encode(Descriptor { addr: 1, len: 0x0203_0405, flags: 0x0607, next: 0x0809 });
        assert_eq!(raw, [1, 0, 0, 0, 0, 0, 0, 0, 5, 4, 3, 2, 9, 8, 7, 6]);
        assert_eq!(parse(raw), Descriptor { addr: 1, len: 0x0203_0405, flags: 0x0607, next: 0x0809 });
        assert_eq!(area_sizes(7), AreaSizes { desc: 112, avail: 4, used: 4 });
    }
}
