//! Marks on open files: whether an open file is still in use, in any process or by the kernel on behalf of one that has died.
//!
//! A mark is a shared lock on one byte, of an open file description (`F_OFD_SETLK`, fcntl(2)). The kernel removes it when the
//! last reference to that open file is dropped, which every operation of an io_uring on it has until it has ended. Shared
//! locks exclude nobody, so that several processes can have a file open, each with a mark at another place; locks need not
//! lie within the file. What can write (`F_WRLCK`) cannot be locked there meanwhile, which is how a mark is found.
#![expect(unsafe_code, reason = "locks of open file descriptions are not in rustix")]

use std::os::fd::{AsFd, AsRawFd};

use vdpa_core::Errno;

use crate::errno;

/// Places from here on are for marks: no file is so large, and programs that lock bytes use small numbers.
pub const FIRST: u64 = 1 << 62;

/// Marks an open file at `place`, which lies between [`FIRST`] and [`i64::MAX`], both included.
///
/// # Errors
/// `EINVAL` for another place; `EAGAIN` when a program has locked that byte, or the whole file, for writing; `EBADF` for a
/// file that is not open for reading; those of the file system.
pub fn set(file: impl AsFd, place: u64) -> Result<(), Errno> {
    let lock = lock(place, libc::F_RDLCK)?;
    // SAFETY: the descriptor is open while it is borrowed, and the call reads the structure that it is given.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 { Ok(()) } else { Err(errno::last()) }
}

/// Removes the mark of an open file that is used on: by its process, which gives the file to another one.
///
/// # Errors
/// `EINVAL` for a place where no marks are; those of the file system.
pub fn clear(file: impl AsFd, place: u64) -> Result<(), Errno> {
    let lock = lock(place, libc::F_UNLCK)?;
    // SAFETY: as above.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 { Ok(()) } else { Err(errno::last()) }
}

/// Whether another open file is marked at `place`.
///
/// # Errors
/// `EINVAL` for a place where no marks are; those of the file system.
pub fn exists(file: impl AsFd, place: u64) -> Result<bool, Errno> {
    let mut lock = lock(place, libc::F_WRLCK)?;
    // SAFETY: as above; the call writes the structure, which is ours alone.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if result == 0 { Ok(i32::from(lock.l_type) != libc::F_UNLCK) } else { Err(errno::last()) }
}

/// A lock of this type on the byte at `place`.
fn lock(place: u64, kind: i32) -> Result<libc::flock64, Errno> {
    let start = i64::try_from(place).ok().filter(|_| place >= FIRST).ok_or(Errno::INVAL)?;
    let kind = i16::try_from(kind).map_err(|_| Errno::INVAL)?;
    // `l_pid` has to be 0 for these commands, and `l_whence` is SEEK_SET.
    Ok(libc::flock64 { l_type: kind, l_whence: 0, l_start: start, l_len: 1, l_pid: 0 })
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
