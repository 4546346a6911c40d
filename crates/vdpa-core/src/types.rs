//! Identifiers, ranges and permissions that all modules use.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::errno::Errno;
use crate::rules;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number! {
    /// An address-space identifier: which IOTLB table a mapping or a virtqueue group uses.
    Asid(u32)
}
number! {
    /// The index of a virtqueue, from 0.
    QueueIndex(u16)
}
number! {
    /// The index of a virtqueue group, from 0.
    GroupIndex(u32)
}

/// An inclusive range of I/O virtual addresses `[first, last]`, in bytes.
///
/// It is inclusive because the last byte of the 64-bit space can be mapped. `first <= last` always holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u64, u64)", into = "(u64, u64)")]
pub struct IovaRange {
    first: u64,
    last: u64,
}

impl IovaRange {
    /// The whole 64-bit space.
    pub const ALL: Self = Self { first: 0, last: u64::MAX };

    /// The range from `first` to `last`, both included; `None` when `first > last`.
    #[must_use]
    pub const fn new(first: u64, last: u64) -> Option<Self> {
        if first <= last { Some(Self { first, last }) } else { None }
    }

    /// The `size` bytes from `first`; `None` when `size` is 0 or the range would pass 2^64.
    #[must_use]
    pub const fn from_size(first: u64, size: u64) -> Option<Self> {
        match rules::last_byte(first, size) {
            Some(last) => Some(Self { first, last }),
            None => None,
        }
    }

    /// First byte.
    #[must_use]
    pub const fn first(self) -> u64 {
        self.first
    }

    /// Last byte.
    #[must_use]
    pub const fn last(self) -> u64 {
        self.last
    }

    /// Number of bytes; saturates at `u64::MAX` for the whole space.
    #[must_use]
    pub const fn size(self) -> u64 {
        (self.last - self.first).saturating_add(1)
    }

    /// Whether `other` lies inside this range.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// Whether the two share a byte.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

impl TryFrom<(u64, u64)> for IovaRange {
    type Error = String;

    fn try_from((first, last): (u64, u64)) -> Result<Self, String> {
        Self::new(first, last).ok_or_else(|| format!("range [{first:#x}, {last:#x}] ends before it begins"))
    }
}

impl From<IovaRange> for (u64, u64) {
    fn from(range: IovaRange) -> Self {
        (range.first, range.last)
    }
}

impl fmt::Debug for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, {:#x}]", self.first, self.last)
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What the device may do with a mapping: `VHOST_ACCESS_*`.
///
/// Like the kernel, this type stores any byte; only bits 0 (read) and 1 (write) have a meaning.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Perm(pub u8);

impl Perm {
    /// No access, which `VHOST_IOTLB_REMAP` requires.
    pub const NONE: Self = Self(0);
    /// The device may read.
    pub const RO: Self = Self(1);
    /// The device may write.
    pub const WO: Self = Self(2);
    /// The device may read and write.
    pub const RW: Self = Self(3);

    /// Whether the device may read.
    #[must_use]
    pub const fn read(self) -> bool {
        self.0 & 1 != 0
    }

    /// Whether the device may write.
    #[must_use]
    pub const fn write(self) -> bool {
        self.0 & 2 != 0
    }

    /// Whether it allows every access in `needed`.
    #[must_use]
    pub const fn allows(self, needed: Self) -> bool {
        self.0 & needed.0 & 3 == needed.0 & 3
    }
}

impl fmt::Debug for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("none"),
            1 => f.write_str("ro"),
            2 => f.write_str("wo"),
            3 => f.write_str("rw"),
            other => write!(f, "{other:#x}"),
        }
    }
}

/// One IOTLB message as a client writes it, without its version envelope.
///
/// Source: `struct vhost_iotlb_msg`. `kind` is a raw byte, because an unknown type is a separate error with its own place in
/// the order of checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct IotlbMsg {
    /// First I/O virtual address.
    pub iova: u64,
    /// Size in bytes.
    pub size: u64,
    /// Address in the caller's address space.
    pub uaddr: u64,
    /// Access for the device; must be [`Perm::NONE`] for REMAP.
    pub perm: Perm,
    /// Message type, `VHOST_IOTLB_*`: see [`iotlb_type`].
    pub kind: u8,
}

/// Message types of [`IotlbMsg::kind`].
pub mod iotlb_type {
    /// A miss, which other vhost devices send; vhost-vdpa refuses it.
    pub const MISS: u8 = 1;
    /// Map a range.
    pub const UPDATE: u8 = 2;
    /// Unmap every entry that overlaps a range.
    pub const INVALIDATE: u8 = 3;
    /// An access failure, which other vhost devices send; vhost-vdpa refuses it.
    pub const ACCESS_FAIL: u8 = 4;
    /// Begin a batch.
    pub const BATCH_BEGIN: u8 = 5;
    /// End a batch.
    pub const BATCH_END: u8 = 6;
    /// Set the address that an existing mapping has in the new owner.
    pub const REMAP: u8 = 7;
}

/// Addresses and size of one vring as the client sets them; all addresses are I/O virtual addresses.
///
/// Source: `struct vhost_vring_addr`, virtio 1.2 section 2.6 for the names of the areas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VringAddr {
    /// `VHOST_VRING_F_*`; only bit 0 (log) is known, and it has no effect.
    pub flags: u32,
    /// Descriptor area.
    pub desc: u64,
    /// Device area (used ring).
    pub used: u64,
    /// Driver area (available ring).
    pub avail: u64,
    /// Log address; stored only.
    pub log: u64,
}

/// Shorthand for results with an error number.
pub type Result<T, E = Errno> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_reach_the_last_byte() {
        let range = IovaRange::from_size(u64::MAX, 1).unwrap();
        assert_eq!((range.first(), range.last(), range.size()), (u64::MAX, u64::MAX, 1));
        assert!(IovaRange::from_size(u64::MAX, 2).is_none());
        assert!(IovaRange::from_size(0, 0).is_none());
        assert_eq!(IovaRange::ALL.size(), u64::MAX);
        assert!(round_trips(range));
    }

    fn round_trips(range: IovaRange) -> bool {
        IovaRange::try_from(<(u64, u64)>::from(range)) == Ok(range) && IovaRange::try_from((2, 1)).is_err()
    }

    #[test]
    fn perm_allows_only_what_it_has() {
        assert!(Perm::RW.allows(Perm::RO) && Perm::RW.allows(Perm::WO));
        assert!(!Perm::RO.allows(Perm::RW));
        assert!(Perm(7).allows(Perm::RW));
    }
}
