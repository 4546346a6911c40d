//! Marks on open files: whether an open file is still in use, in any process or by the kernel on behalf of one that has died.
//!
//! A mark is a shared lock on one byte, of an open file description (`F_OFD_SETLK`, fcntl(2)). The kernel removes it when the
//! last reference to that open file is dropped, which every operation of an io_uring on it has until it has ended. Shared
//! locks exclude nobody, so that several processes can have a file open, each with a mark at another place; locks need not
//! lie within the file. What can write (`F_WRLCK`) cannot be locked there meanwhile, which is how a mark is found.

use std::os::fd::AsFd;

use vdpa_core::Errno;

use crate::ofd::{self, Lock};

/// Places from here on are for marks: no file is so large, and programs that lock bytes use small numbers.
pub const FIRST: u64 = 1 << 62;

/// Marks an open file at `place`, which lies between [`FIRST`] and [`i64::MAX`], both included.
///
/// # Errors
/// `EINVAL` for another place; `EAGAIN` when a program has locked that byte, or the whole file, for writing; `EBADF` for a
/// file that is not open for reading; those of the file system.
pub fn set(file: impl AsFd, place: u64) -> Result<(), Errno> {
    ofd::set(file, Lock::Shared, checked(place)?, 1)
}

/// Removes the mark of an open file that is used on: by its process, which gives the file to another one.
///
/// # Errors
/// `EINVAL` for a place where no marks are; those of the file system.
pub fn clear(file: impl AsFd, place: u64) -> Result<(), Errno> {
    ofd::set(file, Lock::Unlocked, checked(place)?, 1)
}

/// Whether another open file is marked at `place`.
///
/// # Errors
/// `EINVAL` for a place where no marks are; those of the file system.
pub fn exists(file: impl AsFd, place: u64) -> Result<bool, Errno> {
    ofd::is_excluded(file, Lock::Exclusive, checked(place)?, 1)
}

/// `place`, if marks may be there.
fn checked(place: u64) -> Result<u64, Errno> {
    if place >= FIRST { Ok(place) } else { Err(Errno::INVAL) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_mark_lasts_as_long_as_the_open_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::open(file.path()).unwrap();
        let (first, second) = (open(), open());
        set(&first, FIRST).unwrap();
        assert_eq!(exists(&first, FIRST), Ok(false), "its own");
        assert_eq!(exists(&second, FIRST), Ok(true));
        assert_eq!(exists(&second, FIRST + 1), Ok(false));
        // Another one does not exclude it, nor does it exclude what locks the whole file in the other way.
        set(&second, FIRST + 1).unwrap();
        rustix::fs::flock(open(), rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        let copy = first.try_clone().unwrap();
        drop(first);
        assert_eq!(exists(&second, FIRST), Ok(true), "the same open file");
        drop(copy);
        assert_eq!(exists(&second, FIRST), Ok(false));
        assert_eq!(exists(open(), FIRST + 1), Ok(true));
        clear(&second, FIRST + 1).unwrap();
        assert_eq!(exists(open(), FIRST + 1), Ok(false));
    }

    #[test]
    fn other_places_are_refused() {
        let file = tempfile::tempfile().unwrap();
        for place in [0, FIRST - 1, 1 << 63, u64::MAX] {
            assert_eq!(set(&file, place), Err(Errno::INVAL));
            assert_eq!(exists(&file, place), Err(Errno::INVAL));
        }
        set(&file, i64::MAX.unsigned_abs()).unwrap();
    }
}
