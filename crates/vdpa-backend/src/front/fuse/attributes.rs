//! Attributes of device files, and what keeps them for a successor of this process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::{getegid, geteuid};
use vdpa_core::Errno;
use vdpa_sys::memfd;
use vdpa_sys::uapi::fuse::{Attr, SetattrIn, setattr_valid};

/// Permission bits of a mode.
pub(super) const PERMISSIONS: u32 = 0o7777;

/// Mode and owner of a device file, which decide who may open it; the kernel checks them (`default_permissions`). `chmod` and
/// `chown` change them; they last as long as the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileAttributes {
    /// Permission bits, `0o7777`.
    pub mode: u32,
    /// Owner, in the user namespace of this process.
    pub uid: u32,
    /// Group, in the user namespace of this process.
    pub gid: u32,
}

impl FileAttributes {
    /// Mode 0600, owned by the effective user and group of this process.
    #[must_use]
    pub fn private() -> Self {
        Self { mode: 0o600, uid: geteuid().as_raw(), gid: getegid().as_raw() }
    }
}

/// A memory file with the attributes of a device file. Each change is written to it before the client that makes it has its
/// answer, so that whoever holds a copy of the descriptor has the attributes after a crash.
#[derive(Debug)]
pub struct SavedAttributes(OwnedFd);

/// Bytes of a record: version, mode, owner, group, then times of access, modification and change in seconds and ns.
const RECORD: usize = 52;
const VERSION: u32 = 1;

impl SavedAttributes {
    /// A file without attributes.
    ///
    /// # Errors
    /// `EMFILE`, `ENOMEM`.
    pub fn create() -> Result<Self, Errno> {
        memfd::create(c"vdpa-attributes", 0, None).map(Self)
    }

    /// The file of an earlier process.
    #[must_use]
    pub const fn open(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Writes the attributes. A process that is killed meanwhile has written all or nothing: the record lies in one page.
    pub(super) fn write(&self, attr: &Attr) -> Result<(), Errno> {
        let mut bytes = [0; RECORD];
        let words =
            [VERSION, attr.mode & PERMISSIONS, attr.uid, attr.gid].into_iter().flat_map(u32::to_le_bytes);
        let seconds = [attr.atime, attr.mtime, attr.ctime].into_iter().flat_map(u64::to_le_bytes);
        let parts = [attr.atimensec, attr.mtimensec, attr.ctimensec].into_iter().flat_map(u32::to_le_bytes);
        bytes.iter_mut().zip(words.chain(seconds).chain(parts)).for_each(|(to, from)| *to = from);
        match rustix::io::pwrite(&self.0, &bytes, 0) {
            Ok(RECORD) => Ok(()),
            Ok(_) => Err(Errno::IO),
            Err(error) => Err(Errno::from_raw(error.raw_os_error())),
        }
    }

    /// Takes over what was written; false if that is nothing that this program knows.
    pub(super) fn read(&self, attr: &mut Attr) -> bool {
        let mut bytes = [0; RECORD];
        if rustix::io::pread(&self.0, &mut bytes, 0) != Ok(RECORD) {
            return false;
        }
        let word = |at: usize| {
            bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u32::from_le_bytes(*word))
        };
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        if word(0) != VERSION {
            return false;
        }
        attr.mode = attr.mode & !PERMISSIONS | word(4) & PERMISSIONS;
        (attr.uid, attr.gid) = (word(8), word(12));
        (attr.atime, attr.mtime, attr.ctime) = (long(16), long(24), long(32));
        (attr.atimensec, attr.mtimensec, attr.ctimensec) = (word(40), word(44), word(48));
        true
    }
}

impl AsFd for SavedAttributes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Applies a `chmod`, `chown` or `utimes` that the kernel has allowed. A size (from `O_TRUNC` or `truncate`) is ignored, as a
/// character device does.
pub(super) fn change(attr: &mut Attr, change: &SetattrIn) {
    let has = |bit| change.valid & bit != 0;
    let (now, now_ns) = now();
    if has(setattr_valid::MODE) {
        attr.mode = attr.mode & !PERMISSIONS | change.mode & PERMISSIONS;
    }
    if has(setattr_valid::UID) {
        attr.uid = change.uid;
    }
    if has(setattr_valid::GID) {
        attr.gid = change.gid;
    }
    if has(setattr_valid::ATIME_NOW) {
        (attr.atime, attr.atimensec) = (now, now_ns);
    } else if has(setattr_valid::ATIME) {
        (attr.atime, attr.atimensec) = (change.atime, change.atimensec);
    }
    if has(setattr_valid::MTIME_NOW) {
        (attr.mtime, attr.mtimensec) = (now, now_ns);
    } else if has(setattr_valid::MTIME) {
        (attr.mtime, attr.mtimensec) = (change.mtime, change.mtimensec);
    }
    (attr.ctime, attr.ctimensec) = (now, now_ns);
}

/// The time as attributes have it: seconds and ns since 1970.
pub(super) fn now() -> (u64, u32) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (now.as_secs(), now.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let saved = SavedAttributes::create().unwrap();
        let kept = Attr { mode: 0o100_600, uid: 7, mtime: 1, ..Attr::default() };
        let mut attr = kept;
        assert!(!saved.read(&mut attr), "nothing was written");
        let written = Attr {
            mode: 0o100_640,
            uid: u32::MAX - 1,
            gid: 36,
            atime: u64::MAX,
            mtime: 1 << 40,
            ctime: 3,
            atimensec: 4,
            mtimensec: 5,
            ctimensec: 999_999_999,
            ..Attr::default()
        };
        saved.write(&written).unwrap();
        let copy = SavedAttributes::open(saved.as_fd().try_clone_to_owned().unwrap());
        assert!(copy.read(&mut attr));
        assert_eq!(attr, written);
        rustix::io::pwrite(&saved, &2_u32.to_le_bytes(), 0).unwrap();
        attr = kept;
        assert!(!copy.read(&mut attr) && attr == kept, "another version");
    }
}
