//! The split ring in memory (virtio 1.2 section 2.7), shared by both sides.

use super::{Area, RingError};
use crate::features::Features;

/// Largest split ring (virtio 1.2 section 2.7: "2^15").
pub const SIZE_MAX: u16 = 1 << 15;

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR: usize = 16;

/// The chain continues at `next` (`VIRTQ_DESC_F_NEXT`).
pub(super) const NEXT: u16 = 1;
/// The device writes the buffer (`VIRTQ_DESC_F_WRITE`).
pub(super) const WRITE: u16 = 2;
/// The buffer is a table of descriptors (`VIRTQ_DESC_F_INDIRECT`).
pub(super) const INDIRECT: u16 = 4;

/// Offset of the flags in the available and in the used ring.
pub(super) const FLAGS: usize = 0;
/// Offset of the index in the available and in the used ring.
pub(super) const INDEX: usize = 2;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT` in the one, `VIRTQ_USED_F_NO_NOTIFY` in the other.
pub(super) const SUPPRESS: u16 = 1;

/// Bytes of the three areas of a split ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AreaSizes {
    /// Descriptor area.
    pub desc: usize,
    /// Driver area (available ring).
    pub avail: usize,
    /// Device area (used ring).
    pub used: usize,
}

/// Sizes of the areas of a split ring of `size` entries. Only with `RING_EVENT_IDX` (`event_idx`) both rings end with an
/// event index.
#[must_use]
pub const fn area_sizes(size: u16, event_idx: bool) -> AreaSizes {
    let entries = size as usize;
    let event = if event_idx { 2 } else { 0 };
    AreaSizes { desc: DESCRIPTOR * entries, avail: 4 + 2 * entries + event, used: 4 + 8 * entries + event }
}

/// Offset of entry `index` (free running) in the available ring.
#[inline]
pub(super) const fn avail_entry(size: u16, index: u16) -> usize {
    4 + 2 * (index & (size - 1)) as usize
}

/// Offset of entry `index` (free running) in the used ring.
#[inline]
pub(super) const fn used_entry(size: u16, index: u16) -> usize {
    4 + 8 * (index & (size - 1)) as usize
}

/// Offset of `used_event`, which ends the available ring.
#[inline]
pub(super) const fn used_event(size: u16) -> usize {
    4 + 2 * size as usize
}

/// Offset of `avail_event`, which ends the used ring.
#[inline]
pub(super) const fn avail_event(size: u16) -> usize {
    4 + 8 * size as usize
}

/// Whether moving an index from `old` to `new` passes `event`: `vring_need_event` (virtio 1.2 section 2.7.10.1).
#[inline]
pub(super) const fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Checks size, features and areas of a ring.
pub(super) fn check<A: Area>(
    size: u16,
    features: Features,
    desc: &A,
    avail: &A,
    used: &A,
) -> Result<(), RingError> {
    if !size.is_power_of_two() {
        return Err(RingError::Size { size });
    }
    if features.has(Features::RING_PACKED) {
        return Err(RingError::Features { features, unsupported: "RING_PACKED" });
    }
    let sizes = area_sizes(size, features.has(Features::RING_EVENT_IDX));
    for (name, area, needed) in
        [("descriptor", desc, sizes.desc), ("available", avail, sizes.avail), ("used", used, sizes.used)]
    {
        if area.size() < needed {
            return Err(RingError::AreaSize { area: name, size: area.size(), needed });
        }
    }
    Ok(())
}

/// One descriptor, read in one access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) addr: u64,
    pub(super) len: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

impl Descriptor {
    #[inline]
    pub(super) const fn parse(raw: [u8; DESCRIPTOR]) -> Self {
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = raw;
        Self {
            addr: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    #[inline]
    pub(super) fn encode(self) -> [u8; DESCRIPTOR] {
        let mut raw = [0; DESCRIPTOR];
        raw[..8].copy_from_slice(&self.addr.to_le_bytes());
        raw[8..12].copy_from_slice(&self.len.to_le_bytes());
        raw[12..14].copy_from_slice(&self.flags.to_le_bytes());
        raw[14..].copy_from_slice(&self.next.to_le_bytes());
        raw
    }

    #[inline]
    pub(super) fn read<A: Area>(table: &A, index: u16) -> Result<Self, super::Fault> {
        let mut raw = [0; DESCRIPTOR];
        table.read(usize::from(index) * DESCRIPTOR, &mut raw)?;
        Ok(Self::parse(raw))
    }

    /// Whether the buffer extends beyond the last address. An empty buffer never does.
    #[inline]
    pub(super) const fn wraps(&self) -> bool {
        wraps(self.addr, self.len)
    }
}

/// Whether `len` bytes from `addr` extend beyond the last address; never for `len` 0.
#[inline]
pub(super) const fn wraps(addr: u64, len: u32) -> bool {
    len > 0 && addr.checked_add(len as u64 - 1).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_have_the_sizes_of_the_specification() {
        assert_eq!(area_sizes(256, true), AreaSizes { desc: 4096, avail: 518, used: 2054 });
        assert_eq!(area_sizes(1, false), AreaSizes { desc: 16, avail: 6, used: 12 });
        assert_eq!(area_sizes(SIZE_MAX, true).used, 262_150);
    }

    #[test]
    fn events_are_passed_across_the_wrap() {
        assert!(need_event(5, 6, 5), "the event itself");
        assert!(!need_event(6, 6, 5), "the event is one later");
        assert!(!need_event(4, 6, 5), "the event was passed before");
        assert!(need_event(0xffff, 0, 0xffff));
        assert!(need_event(0xffff, 3, 0xfff0));
        assert!(!need_event(0xffff, 3, 0));
        assert!(!need_event(7, 7, 7), "no move");
    }

    #[test]
    fn descriptors_round_trip() {
        let descriptor = Descriptor { addr: 0x0102_0304_0506_0708, len: 0x090a_0b0c, flags: 3, next: 0x0d0e };
        let raw = descriptor.encode();
        assert_eq!(raw[0], 8, "little endian");
        assert_eq!(Descriptor::parse(raw), descriptor);
    }

    #[test]
    fn only_what_passes_the_last_byte_wraps() {
        let wraps = |addr, len| Descriptor { addr, len, flags: 0, next: 0 }.wraps();
        assert!(!wraps(u64::MAX, 1) && !wraps(u64::MAX, 0) && wraps(u64::MAX, 2));
    }
}
