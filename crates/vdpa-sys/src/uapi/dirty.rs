//! The requests of dirty tracking, which are of this project: which pages of client memory a device has written.
//!
//! | request | argument | what it does |
//! |---|---|---|
//! | `VDPA_DIRTY_INFO` | [`DirtyInfo`] | what can be tracked, and whether something is |
//! | `VDPA_DIRTY_START` | [`DirtyStart`], [`DirtyRange`]s | begins to track |
//! | `VDPA_DIRTY_STOP` | [`DirtyStop`] | ends it, and forgets |
//! | `VDPA_DIRTY_GET` | [`DirtyGet`] | sets the bits of dirty pages in a bitmap of the caller |
//! | `VDPA_DIRTY_UNMAP` | [`DirtyGet`] | removes all mappings of a range, then the same for its pages |
//!
//! The kernel's vhost-vdpa answers them as every request that it does not know. A client looks at the backend feature first
//! (`VHOST_BACKEND_F_DIRTY_LOG`). The numbers are in the table of [`live`](super::live).
//!
//! An argument begins with its size (`argsz`) and with flags. Its size is not in the number of the request. So it can grow at
//! its end: a server takes the fields that it knows, and those of a later version only if a flag says that they count. A flag that a
//! server does not know is `EINVAL`; so is an `argsz` below that of the first version.

use vdpa_core::Errno;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::ioctl::io;
use crate::uapi::vhost::VHOST_VIRTIO;

/// Number of `VDPA_DIRTY_INFO`, unless configured otherwise; those of the others follow.
pub const NUMBER: u8 = 0xe0;

/// The requests, in the order of their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Request {
    /// `VDPA_DIRTY_INFO`: any process that has the device open.
    Info = 0,
    /// `VDPA_DIRTY_START`: the owner, as all that follow.
    Start = 1,
    /// `VDPA_DIRTY_STOP`.
    Stop = 2,
    /// `VDPA_DIRTY_GET`.
    Get = 3,
    /// `VDPA_DIRTY_UNMAP`.
    Unmap = 4,
}

impl Request {
    /// All requests.
    pub const ALL: [Self; 5] = [Self::Info, Self::Start, Self::Stop, Self::Get, Self::Unmap];

    /// The ioctl, where `VDPA_DIRTY_INFO` has the number `first` (`_IO`).
    #[must_use]
    pub const fn number(self, first: u8) -> u32 {
        io(VHOST_VIRTIO, first.wrapping_add(self as u8))
    }

    /// The request of an ioctl.
    #[must_use]
    pub fn of(ioctl: u32, first: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|request| request.number(first) == ioctl)
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Info => "VDPA_DIRTY_INFO",
            Self::Start => "VDPA_DIRTY_START",
            Self::Stop => "VDPA_DIRTY_STOP",
            Self::Get => "VDPA_DIRTY_GET",
            Self::Unmap => "VDPA_DIRTY_UNMAP",
        }
    }
}

/// Flag of [`DirtyInfo`], from the server: pages are being tracked.
pub const INFO_TRACKING: u32 = 1;
/// Flag of [`DirtyGet`], for `VDPA_DIRTY_GET`: the pages stay dirty.
pub const GET_KEEP: u32 = 1;

/// Argument of `VDPA_DIRTY_INFO`. The server fills in what fits into `argsz`, and sets `argsz` to the size that it knows.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DirtyInfo {
    /// Bytes of the argument.
    pub argsz: u32,
    /// From the client 0; from the server [`INFO_TRACKING`] or 0.
    pub flags: u32,
    /// A bit for each page size in bytes; the lowest is the smallest.
    pub page_sizes: u64,
    /// Pages of all ranges together, and so bits of the largest bitmap.
    pub max_pages: u64,
    /// Ranges of one START at most.
    pub max_ranges: u32,
    /// 0.
    pub reserved: u32,
    /// The page size of what is being tracked; 0 when nothing is.
    pub page_size: u64,
}

/// Argument of `VDPA_DIRTY_START`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DirtyStart {
    /// Bytes of the argument.
    pub argsz: u32,
    /// 0.
    pub flags: u32,
    /// Bytes of a page, of those in [`DirtyInfo::page_sizes`].
    pub page_size: u64,
    /// Number of ranges.
    pub num_ranges: u32,
    /// 0.
    pub reserved: u32,
    /// Address of an array of [`DirtyRange`].
    pub ranges: u64,
}

/// A range to be tracked.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DirtyRange {
    /// First I/O virtual address, a multiple of the page size.
    pub iova: u64,
    /// Bytes, a multiple of the page size and not 0.
    pub length: u64,
    /// Address space.
    pub asid: u32,
    /// 0.
    pub reserved: u32,
}

/// Argument of `VDPA_DIRTY_STOP`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DirtyStop {
    /// Bytes of the argument.
    pub argsz: u32,
    /// 0.
    pub flags: u32,
}

/// Argument of `VDPA_DIRTY_GET` and `VDPA_DIRTY_UNMAP`.
///
/// Bit `n` of the bitmap, bit `n % 64` of its word `n / 64`, is the page `n` pages behind `iova`. Words are in the byte order of the
/// machine. Bits are set and never cleared, so a client zeros the bitmap before it asks.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DirtyGet {
    /// Bytes of the argument.
    pub argsz: u32,
    /// For GET [`GET_KEEP`] or 0, for UNMAP 0.
    pub flags: u32,
    /// First I/O virtual address, a multiple of the page size.
    pub iova: u64,
    /// Bytes, a multiple of the page size and not 0. After UNMAP: how many were mapped.
    pub length: u64,
    /// Address space.
    pub asid: u32,
    /// 0.
    pub reserved: u32,
    /// The page size with which the tracking was begun.
    pub page_size: u64,
    /// Bytes of the bitmap: a multiple of 8, and at least a bit for each page.
    pub bitmap_size: u64,
    /// Address of the bitmap.
    pub bitmap: u64,
}

const _: () = {
    assert!(size_of::<DirtyInfo>() == 40);
    assert!(size_of::<DirtyStart>() == 32);
    assert!(size_of::<DirtyRange>() == 24);
    assert!(size_of::<DirtyStop>() == 8);
    assert!(size_of::<DirtyGet>() == 56);
    assert!(std::mem::offset_of!(DirtyGet, length) == 16);
};

/// An argument that begins with its size and flags.
pub trait Sized32: FromBytes + IntoBytes + Immutable {
    /// Bytes of the first version.
    const MIN: u32;
    /// Flags that a client may set.
    const FLAGS: u32;

    /// Its size and flags.
    fn head(&self) -> (u32, u32);

    /// One of this version.
    #[must_use]
    fn new() -> Self;
}

macro_rules! sized {
    ($($name:ident, $flags:expr;)*) => {
        $(
            impl Sized32 for $name {
                #[expect(clippy::cast_possible_truncation, reason = "less than 100")]
                const MIN: u32 = size_of::<$name>() as u32;
                const FLAGS: u32 = $flags;

                fn head(&self) -> (u32, u32) {
                    (self.argsz, self.flags)
                }

                fn new() -> Self {
                    Self { argsz: Self::MIN, ..Self::new_zeroed() }
                }
            }
        )*
    };
}

sized! {
    DirtyInfo, 0;
    DirtyStart, 0;
    DirtyStop, 0;
    DirtyGet, GET_KEEP;
}

/// Decodes an argument of which `bytes` are the first ones, as many as its first version has.
///
/// # Errors
/// `EINVAL` for an `argsz` below the first version, or an unknown flag; `EFAULT` for too few bytes.
pub fn decode<T: Sized32>(bytes: &[u8]) -> Result<T, Errno> {
    let (value, _) = T::read_from_prefix(bytes).map_err(|_| Errno::FAULT)?;
    let (argsz, flags) = value.head();
    if argsz < T::MIN || flags & !T::FLAGS != 0 { Err(Errno::INVAL) } else { Ok(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_of_other_versions() {
        let argument = DirtyGet { flags: GET_KEEP, iova: 0x1000, ..DirtyGet::new() };
        assert_eq!(decode(argument.as_bytes()), Ok(argument));
        let later = DirtyGet { argsz: 4096, ..argument };
        assert_eq!(decode(&[later.as_bytes(), &[7; 64]].concat()), Ok(later), "of a later version");
        for wrong in [DirtyGet { argsz: 55, ..argument }, DirtyGet { argsz: 0, ..argument }] {
            assert_eq!(decode::<DirtyGet>(wrong.as_bytes()), Err(Errno::INVAL));
        }
        for flags in [2, 3, 1 << 31] {
            assert_eq!(decode::<DirtyGet>(DirtyGet { flags, ..argument }.as_bytes()), Err(Errno::INVAL));
        }
        assert_eq!(decode::<DirtyStop>(&[8, 0, 0, 0]), Err(Errno::FAULT));
        assert_eq!(decode::<DirtyStop>(DirtyStop::new().as_bytes()), Ok(DirtyStop { argsz: 8, flags: 0 }));
    }

    #[test]
    fn numbers_follow_the_first() {
        for request in Request::ALL {
            assert_eq!(Request::of(request.number(0xe0), 0xe0), Some(request));
        }
        assert_eq!(Request::Unmap.number(NUMBER), 0xafe4);
        assert_eq!(Request::of(0xafe5, NUMBER), None);
    }
}
