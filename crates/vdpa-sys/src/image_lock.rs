//! Locks on a disk image by QEMU's scheme, which programs that use disk images respect: bytes 100 + n of the file stand for
//! permissions that a program uses, bytes 200 + n for those that it does not share. All these locks are shared ones of the open file
//! (F_OFD_SETLK), so they never wait for each other; whoever opens an image sets its own and then looks for those of
//! others that exclude it. Of two programs that do so at the same time at least one gives up.
//!
//! A program that locks the whole file exclusively is excluded too, in both orders.

use std::os::fd::AsFd;

use vdpa_core::Errno;

use crate::ofd::{self, Lock};

/// The byte of the first permission that is used.
const USED: u64 = 100;
/// The byte of the first permission that is not shared.
const NOT_SHARED: u64 = 200;

/// Numbers of the permissions.
const CONSISTENT_READ: u64 = 0;
const WRITE: u64 = 1;
const RESIZE: u64 = 3;

/// How an image is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is read; nobody may change it.
    Read,
    /// It is written; others may read it if they accept that (`qemu-img info -U`), and nobody else may write it.
    Write,
    /// It is written, and others may write it too (QEMU's `share-rw=on`).
    SharedWrite,
}

impl Access {
    const fn used(self) -> &'static [u64] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write | Self::SharedWrite => &[CONSISTENT_READ, WRITE],
        }
    }

    const fn not_shared(self) -> &'static [u64] {
        match self {
            Self::Read | Self::Write => &[WRITE, RESIZE],
            Self::SharedWrite => &[RESIZE],
        }
    }
}

/// Locks an image, if nobody uses it in a way that excludes this one. `file` is open for reading. The locks last until the open file is
/// closed by all who have it. Does not wait.
///
/// # Errors
/// `EBUSY` when another program has the image; it is not locked then. Those of a file system that has no such locks, such as `EINVAL`,
/// `ENOLCK` and `EOPNOTSUPP`.
pub fn take(file: impl AsFd, access: Access) -> Result<(), Errno> {
    let taken = try_take(&file, access);
    if taken.is_err() {
        let _ = release(&file);
    }
    taken
}

/// Adds the locks of another open file of this process to `file`, without a look at those of others: they last as long as either.
///
/// # Errors
/// `EBUSY` when another program has locked the file exclusively; those of the file system.
pub fn add(file: impl AsFd, access: Access) -> Result<(), Errno> {
    let own = access.used().iter().map(|bit| USED + bit);
    for byte in own.chain(access.not_shared().iter().map(|bit| NOT_SHARED + bit)) {
        ofd::set(&file, Lock::Shared, byte, 1).map_err(|errno| match errno {
            Errno::AGAIN | Errno::ACCESS => Errno::BUSY,
            other => other,
        })?;
    }
    Ok(())
}

fn try_take(file: &impl AsFd, access: Access) -> Result<(), Errno> {
    add(file, access)?;
    let others = access.used().iter().map(|bit| NOT_SHARED + bit);
    for byte in others.chain(access.not_shared().iter().map(|bit| USED + bit)) {
        if ofd::is_excluded(file, Lock::Exclusive, byte, 1)? {
            return Err(Errno::BUSY);
        }
    }
    Ok(())
}

/// Removes the locks.
///
/// # Errors
/// Those of the file system.
pub fn release(file: impl AsFd) -> Result<(), Errno> {
    ofd::set(&file, Lock::Unlocked, USED, NOT_SHARED + RESIZE + 1 - USED)
}

/// Whether the size of an image that is [locked](take) may be changed: nobody else needs it as it is.
///
/// # Errors
/// Those of the file system.
pub fn may_resize(file: impl AsFd) -> Result<bool, Errno> {
    ofd::is_excluded(file, Lock::Exclusive, NOT_SHARED + RESIZE, 1).map(|excluded| !excluded)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use Access::{Read, SharedWrite, Write};

    #[test]
    fn who_excludes_whom() {
        for (first, second, expected) in [
            (Read, Read, Ok(())),
            (Read, Write, Err(Errno::BUSY)),
            (Read, SharedWrite, Err(Errno::BUSY)),
            (Write, Read, Err(Errno::BUSY)),
            (Write, Write, Err(Errno::BUSY)),
            (Write, SharedWrite, Err(Errno::BUSY)),
            (SharedWrite, Read, Err(Errno::BUSY)),
            (SharedWrite, Write, Err(Errno::BUSY)),
            (SharedWrite, SharedWrite, Ok(())),
        ] {
            let file = tempfile::NamedTempFile::new().unwrap();
            let open = || File::open(file.path()).unwrap();
            let (one, other) = (open(), open());
            take(&one, first).unwrap();
            assert_eq!(take(&other, second), expected, "{first:?}, then {second:?}");
            // One that was refused has left nothing.
            drop(one);
            assert_eq!(take(open(), Write).is_ok(), expected.is_err());
        }
    }

    #[test]
    fn locks_last_as_long_as_the_open_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::open(file.path()).unwrap();
        let one = open();
        take(&one, Write).unwrap();
        take(&one, Write).unwrap();
        assert_eq!(may_resize(&one), Ok(true), "its own locks do not matter");
        let copy = one.try_clone().unwrap();
        drop(one);
        assert_eq!(take(open(), Write), Err(Errno::BUSY));
        assert_eq!(may_resize(open()), Ok(false));
        release(&copy).unwrap();
        take(open(), Write).unwrap();
    }

    /// A request that is in flight has the file longer than the process that has looked.
    #[test]
    fn added_locks_last_longer() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::open(file.path()).unwrap();
        let (one, in_flight) = (open(), open());
        take(&one, Write).unwrap();
        add(&in_flight, Write).unwrap();
        drop(one);
        assert_eq!(take(open(), Write), Err(Errno::BUSY));
        drop(in_flight);
        take(open(), Write).unwrap();
    }

    #[test]
    fn a_lock_on_the_whole_file_excludes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (one, whole) = (open(), open());
        ofd::set(&whole, Lock::Exclusive, 0, 0).unwrap();
        assert_eq!(take(&one, Read), Err(Errno::BUSY));
        drop(whole);
        take(&one, Read).unwrap();
        assert!(ofd::set(open(), Lock::Exclusive, 0, 0).is_err());
    }
}
