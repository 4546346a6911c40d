//! [`Timeline`]: completions per millisecond, in shared memory that outlives the image of the client.

use std::os::fd::{AsFd, OwnedFd};

use vdpa_core::Errno;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};

/// Width of a bucket, in ns.
pub const BUCKET_NS: u64 = 1_000_000;
/// One hour of milliseconds. The kernel allocates the memory as it is used.
const BUCKETS: usize = 3_600_000;
const LEN: usize = 8 + BUCKETS * 8;

/// Counts completions by the time at which the client saw them. Has one writer and any number of readers.
#[derive(Debug)]
pub struct Timeline {
    map: SharedMap,
    origin_ns: u64,
}

impl Timeline {
    /// Creates a timeline that begins at `origin_ns` (`CLOCK_MONOTONIC`).
    ///
    /// # Errors
    /// Those of memfd_create(2) and mmap(2).
    pub fn create(origin_ns: u64) -> Result<(Self, OwnedFd), Errno> {
        let fd = memfd::create(c"vdpa-load-timeline", LEN as u64, None)?;
        let map = SharedMap::map(&fd, 0, LEN, Prot::RW, false)?;
        map.store_u64(0, origin_ns).map_err(|_| Errno::FAULT)?;
        Ok((Self { map, origin_ns }, fd))
    }

    /// Opens the timeline that another process or image created.
    ///
    /// # Errors
    /// `EINVAL` for memory of another size; else those of mmap(2).
    pub fn open(fd: impl AsFd) -> Result<Self, Errno> {
        let size = rustix::fs::fstat(&fd).map_err(|e| Errno::from_raw(e.raw_os_error()))?.st_size;
        if usize::try_from(size) != Ok(LEN) {
            return Err(Errno::INVAL);
        }
        let map = SharedMap::map(&fd, 0, LEN, Prot::RW, false)?;
        let origin_ns = map.load_u64(0).map_err(|_| Errno::FAULT)?;
        Ok(Self { map, origin_ns })
    }

    /// Adds `completions` that were seen at `now_ns`. Ignores times outside the hour.
    pub fn record(&self, now_ns: u64, completions: u64) {
        if let Some(at) = self.offset(now_ns) {
            let before = self.map.load_u64(at).unwrap_or(0);
            let _ = self.map.store_u64(at, before + completions);
        }
    }

    /// When it begins, `CLOCK_MONOTONIC` in ns.
    #[must_use]
    pub const fn origin_ns(&self) -> u64 {
        self.origin_ns
    }

    /// Completions of each bucket from the origin to `until_ns`.
    #[must_use]
    pub fn counts(&self, until_ns: u64) -> Vec<u64> {
        let buckets = usize::try_from(until_ns.saturating_sub(self.origin_ns) / BUCKET_NS).unwrap_or(BUCKETS);
        (0..buckets.min(BUCKETS)).map(|at| self.map.load_u64(8 + at * 8).unwrap_or(0)).collect()
    }

    fn offset(&self, now_ns: u64) -> Option<usize> {
        let bucket = usize::try_from(now_ns.checked_sub(self.origin_ns)? / BUCKET_NS).ok()?;
        (bucket < BUCKETS).then_some(8 + bucket * 8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_millisecond_and_drops_what_is_outside() {
        let (writer, fd) = Timeline::create(5_000_000).unwrap();
        let reader = Timeline::open(&fd).unwrap();
        for (at, n) in [(5_000_000, 1), (5_999_999, 2), (7_000_000, 4), (4_999_999, 8), (u64::MAX, 8)] {
            writer.record(at, n);
        }
        assert_eq!(reader.counts(8_000_000), [3, 0, 4]);
        assert_eq!(reader.origin_ns(), 5_000_000);
        let other = memfd::create(c"other", 4096, None).unwrap();
        assert_eq!(Timeline::open(&other).unwrap_err(), Errno::INVAL);
    }
}
