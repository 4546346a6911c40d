//! [`SharedWords`]: 64-bit words in a memory file, for the in-flight logs that outlive a process.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals, fstat};
use vdpa_core::Errno;
use vdpa_core::dirty::DirtyWords;
use vdpa_core::ring::inflight::LogMemory;

use crate::mmap::{Prot, SharedMap};
use crate::{errno, memfd};

/// Bytes of a word.
const WORD: usize = size_of::<u64>();

/// 64-bit words of a shared memory file, or a [part](Self::slice) of them. A clone is the same words.
///
/// The file is sealed against shrinking, so no access can fault because another process has truncated it. Its pages get
/// memory when they are first used. Loads have acquire and stores release ordering; there is no fence.
#[derive(Clone, Debug)]
pub struct SharedWords {
    map: SharedMap,
    /// First word of the part.
    first: usize,
    words: usize,
}

impl SharedWords {
    /// Creates a memory file of `words` zero words, close-on-exec and sealed against shrinking, and maps it. `name` is
    /// for `/proc/PID/maps`.
    ///
    /// # Errors
    /// `EINVAL` without words; `EMFILE`, `ENOMEM`.
    pub fn create(name: &CStr, words: usize) -> Result<(OwnedFd, Self), Errno> {
        let bytes = words.checked_mul(WORD).filter(|&bytes| bytes > 0).ok_or(Errno::INVAL)?;
        let fd = memfd::create(name, bytes as u64, None)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK).map_err(errno::from_rustix)?;
        let map = Self::map(&fd)?;
        Ok((fd, map))
    }

    /// Maps a file that [`create`](Self::create) has made in this or another process.
    ///
    /// # Errors
    /// `EINVAL` for a file that has no whole word or is not sealed against shrinking, which includes one that is not a
    /// memory file; `ENOMEM`.
    pub fn map(fd: impl AsFd) -> Result<Self, Errno> {
        // Before the size is read: from here on it can only grow.
        if !fcntl_get_seals(&fd).map_err(errno::from_rustix)?.contains(SealFlags::SHRINK) {
            return Err(Errno::INVAL);
        }
        let bytes = usize::try_from(fstat(&fd).map_err(errno::from_rustix)?.st_size).unwrap_or(0);
        let words = bytes / WORD;
        if words == 0 {
            return Err(Errno::INVAL);
        }
        let map = SharedMap::map(fd, 0, words * WORD, Prot::RW, false)?;
        Ok(Self { map, first: 0, words })
    }

    /// The part of `words` words from word `first` on, in the same mapping; `None` if it is not within this one.
    #[must_use]
    pub fn slice(&self, first: usize, words: usize) -> Option<Self> {
        let end = first.checked_add(words)?;
        (end <= self.words).then(|| Self { map: self.map.clone(), first: self.first + first, words })
    }

    /// Offset of a word in the mapping.
    #[inline]
    fn offset(&self, word: usize) -> Option<usize> {
        (word < self.words).then(|| (self.first + word) * WORD)
    }
}

impl LogMemory for SharedWords {
    fn words(&self) -> usize {
        self.words
    }

    #[inline]
    fn load(&self, word: usize) -> u64 {
        // The mapping stores little-endian values; the words have the byte order of the machine.
        self.offset(word).and_then(|offset| self.map.load_u64(offset).ok()).map_or(0, u64::to_le)
    }

    #[inline]
    fn store(&self, word: usize, value: u64) {
        if let Some(offset) = self.offset(word) {
            // Cannot fail: the offset is within the mapping, which is readable, writable and not watched for truncation.
            let _ = self.map.store_u64(offset, u64::from_le(value));
        }
    }
}

impl DirtyWords for SharedWords {
    #[inline]
    fn set(&self, word: usize, bits: u64) -> u64 {
        let before = self.offset(word).and_then(|offset| self.map.set_bits(offset, u64::from_le(bits)).ok());
        before.map_or(0, u64::to_le)
    }

    #[inline]
    fn clear(&self, word: usize, bits: u64) -> u64 {
        let before =
            self.offset(word).and_then(|offset| self.map.clear_bits(offset, u64::from_le(bits)).ok());
        before.map_or(0, u64::to_le)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_of_a_file_are_the_same_words() {
        let (fd, words) = SharedWords::create(c"words", 100).unwrap();
        let other = SharedWords::map(&fd).unwrap();
        assert_eq!((words.words(), other.words()), (100, 100));
        words.store(99, 0x0102_0304_0506_0708);
        assert_eq!(other.load(99), 0x0102_0304_0506_0708);
        words.store(100, 1);
        assert_eq!(other.load(100), 0);
    }

    #[test]
    fn a_part_stays_within_its_words() {
        let (_fd, words) = SharedWords::create(c"words", 100).unwrap();
        let part = words.slice(10, 20).unwrap().slice(5, 15).unwrap();
        part.store(0, 7);
        part.store(15, 8);
        assert_eq!((words.load(15), words.load(30), part.load(15)), (7, 0, 0));
        assert!(words.slice(90, 11).is_none());
        assert!(words.slice(usize::MAX, 2).is_none());
        assert_eq!(words.slice(100, 0).unwrap().words(), 0);
    }

    #[test]
    fn a_file_that_can_shrink_is_refused() {
        let fd = memfd::create(c"words", 4096, None).unwrap();
        assert_eq!(SharedWords::map(&fd).unwrap_err(), Errno::INVAL);
        fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        assert_eq!(SharedWords::map(&fd).unwrap().words(), 512);
        assert_eq!(SharedWords::map(std::fs::File::open("/dev/null").unwrap()).unwrap_err(), Errno::INVAL);
        assert_eq!(SharedWords::create(c"words", 0).unwrap_err(), Errno::INVAL);
    }
}
