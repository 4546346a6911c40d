//! Dirty tracking: which pages of client memory a device has written.
//!
//! A client names ranges of I/O virtual addresses and a page size, and asks later which pages in them were written. Pages belong
//! to addresses and not to mappings: a page stays reported after its mapping was removed or given another address.
//!
//! | role | type |
//! |---|---|
//! | the bits, in memory that outlives the process | [`DirtyMap`] |
//! | what a device that can track offers | [`DirtyTracking`] |
//! | the log of a client that knows vhost's own (`VHOST_F_LOG_ALL`) | [`VhostLog`], in a [`BitLog`] |
//!
//! A bit is set *after* the bytes of its page were written and before the driver is told of them. So a page that a client copies
//! after it has taken its bit is either the newest, or is reported again.

mod map;
#[cfg(test)]
mod tests;
mod vhost_log;

use std::fmt::Debug;

pub use map::{DirtyMap, DirtyWords, MAP_WORDS};
pub use vhost_log::{BitLog, LOG_PAGE_SHIFT, VhostLog};

use crate::errno::Errno;
use crate::types::{Asid, IovaRange, Result};

/// The smallest page size, log2.
pub const PAGE_SHIFT_MIN: u32 = 12;
/// The largest page size, log2.
pub const PAGE_SHIFT_MAX: u32 = 30;
/// Pages of all ranges together at most: a bitmap of 256 MiB, the largest that VFIO takes.
pub const PAGES_MAX: u64 = 1 << 31;
/// Ranges at most.
pub const RANGES_MAX: u32 = 256;

/// What can be tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyLimits {
    /// A bit for each page size in bytes.
    pub page_sizes: u64,
    /// Pages of all ranges together, and so bits of the largest bitmap.
    pub pages: u64,
    /// Ranges.
    pub ranges: u32,
}

impl DirtyLimits {
    /// The limits of [`DirtyMap`].
    pub const MAP: Self = Self {
        page_sizes: (1 << (PAGE_SHIFT_MAX + 1)) - (1 << PAGE_SHIFT_MIN),
        pages: PAGES_MAX,
        ranges: RANGES_MAX,
    };
}

/// What a device says of its dirty tracking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyInfo {
    /// What can be tracked.
    pub limits: DirtyLimits,
    /// Bytes of a page of what is being tracked; `None` when nothing is.
    pub page_size: Option<u64>,
}

/// A range of addresses to be tracked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRange {
    /// Its address space.
    pub asid: Asid,
    /// Whole pages.
    pub range: IovaRange,
}

/// What is being tracked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracked {
    /// Bytes of a page.
    pub page_size: u64,
    /// In ascending order of address space and address.
    pub ranges: Vec<DirtyRange>,
}

/// A part of a bitmap: words that are not zero, by their index in the bitmap, in ascending order. Bit `n` of word `w` is page
/// `64 * w + n` of the range that was asked for.
pub type DirtyBits<'a> = &'a [(u64, u64)];

/// Takes the bits that were found, a part at a time. What it does not accept stays set.
pub type DirtySink<'a> = &'a mut dyn FnMut(DirtyBits<'_>) -> Result<()>;

/// A device that tracks which pages it writes. Called under the device's lock; a method may block until requests that are being
/// done have ended.
pub trait DirtyTracking: Debug + Send + Sync {
    /// What can be tracked.
    fn limits(&self) -> DirtyLimits;

    /// What is being tracked; `None` when nothing is.
    fn tracked(&self) -> Option<Tracked>;

    /// Begins to track `ranges`, of which no page is dirty. When it returns, every page that is written from now on will be
    /// reported, also by requests that the device had begun before.
    ///
    /// `request` is a number of the request, or 0. A process that is restored and told to begin for the same number again has begun
    /// already.
    ///
    /// # Errors
    /// `EBUSY` while ranges are tracked; `EINVAL` for a page size that is not offered, no range, a range that is not whole pages, two
    /// that overlap, or more pages than there may be; `E2BIG` for too many ranges; `ENOMEM`; `EIO`.
    fn start(&self, page_size: u64, ranges: &[DirtyRange], request: u64) -> Result<()>;

    /// Ends the tracking and forgets what was found. Does nothing when nothing is tracked.
    ///
    /// # Errors
    /// `EIO`.
    fn stop(&self) -> Result<()>;

    /// Reports the dirty pages of a range to `sink`, and with `clear` has them not dirty any more once `sink` has taken them.
    /// What a client can know of is reported: pages whose requests were answered before the call.
    ///
    /// # Errors
    /// `EINVAL` when a part of the range is not tracked, or it is not whole pages; those of `sink`, after which what it had not
    /// taken is still dirty.
    fn report(&self, of: DirtyRange, clear: bool, sink: DirtySink<'_>) -> Result<()>;

    /// Has what is written marked in a log of vhost, beside what is [tracked](Self::start); `None` for none. When it returns, everything
    /// that is written from now on will be marked there, also by requests that the device had begun before, and nothing is marked in
    /// another log any more.
    ///
    /// # Errors
    /// `EOPNOTSUPP` from a device without this; `EIO`.
    fn set_vhost_log(&self, _log: Option<VhostLog>) -> Result<()> {
        Err(Errno::OPNOTSUPP)
    }
}

/// Checks that a range is whole pages of `page_size`, a power of two.
///
/// # Errors
/// `EINVAL`.
pub fn check_pages(range: IovaRange, page_size: u64) -> Result<()> {
    let whole = range.first().is_multiple_of(page_size) && range.last() % page_size == page_size - 1;
    if whole { Ok(()) } else { Err(Errno::INVAL) }
}
