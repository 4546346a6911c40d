//! Locks on bytes of an open file description (`F_OFD_SETLK`, fcntl(2)): they belong to the open file, not to a process, and last until
//! its last descriptor is closed, whoever has it.
#![expect(unsafe_code, reason = "locks of open file descriptions are not in rustix")]

use std::os::fd::{AsFd, AsRawFd};

use vdpa_core::Errno;

use crate::errno;

/// What is done to bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// Others may lock them in the same way.
    Shared,
    /// Nobody else may lock them.
    Exclusive,
    /// They are not locked any more.
    Unlocked,
}

/// Locks `len` bytes from `start` on, or unlocks them. Does not wait.
///
/// # Errors
/// `EAGAIN` or `EACCES` when another open file has a lock that excludes it; `EINVAL` for what cannot be locked; `EBADF` for a file that
/// is not open for reading (shared) or writing (exclusive); those of the file system.
pub(crate) fn set(file: impl AsFd, lock: Lock, start: u64, len: u64) -> Result<(), Errno> {
    let lock = request(lock, start, len)?;
    // SAFETY: the descriptor is open while it is borrowed, and the call reads the structure that it is given.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == 0 { Ok(()) } else { Err(errno::last()) }
}

/// Whether another open file, or a process, has a lock on these bytes that excludes `lock`.
///
/// # Errors
/// `EINVAL`; those of the file system.
pub(crate) fn is_excluded(file: impl AsFd, lock: Lock, start: u64, len: u64) -> Result<bool, Errno> {
    let mut lock = request(lock, start, len)?;
    // SAFETY: as above; the call writes the structure, which is ours alone.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    if result == 0 { Ok(i32::from(lock.l_type) != libc::F_UNLCK) } else { Err(errno::last()) }
}

fn request(lock: Lock, start: u64, len: u64) -> Result<libc::flock64, Errno> {
    let kind = match lock {
        Lock::Shared => libc::F_RDLCK,
        Lock::Exclusive => libc::F_WRLCK,
        Lock::Unlocked => libc::F_UNLCK,
    };
    let kind = i16::try_from(kind).map_err(|_| Errno::INVAL)?;
    let offset = |value: u64| i64::try_from(value).map_err(|_| Errno::INVAL);
    // `l_pid` has to be 0 for these commands, and `l_whence` is SEEK_SET.
    Ok(libc::flock64 { l_type: kind, l_whence: 0, l_start: offset(start)?, l_len: offset(len)?, l_pid: 0 })
}
