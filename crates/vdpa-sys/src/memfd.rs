//! Memory files: shared memory, and data for another process or for the next image of this one.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use thiserror::Error;
use vdpa_core::Errno;

use crate::errno;

/// Size of the pages of a hugetlb memory file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePage {
    /// The system's default size.
    Default,
    /// 2 MiB.
    Mib2,
    /// 1 GiB.
    Gib1,
}

/// Why a memory file could not be read whole.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The file is larger than the caller accepts.
    #[error("the file has {size} bytes, at most {limit} are accepted")]
    TooLarge {
        /// Bytes it has.
        size: u64,
        /// Bytes accepted.
        limit: usize,
    },
    /// The file was truncated meanwhile.
    #[error("the file ended after {read} of {size} bytes")]
    Truncated {
        /// Size at the beginning, in bytes.
        size: usize,
        /// Bytes that could be read.
        read: usize,
    },
    /// A system call failed.
    #[error("cannot read the file: {0}")]
    Io(Errno),
}

/// Creates a memory file of `size` bytes, close-on-exec and sealable (not sealable with huge pages on
/// old kernels).
///
/// # Errors
/// `EMFILE`, `ENOMEM`; `EINVAL` for a size that is not a multiple of the huge page size; `ENODEV` without such pages.
pub fn create(name: &CStr, size: u64, huge: Option<HugePage>) -> Result<OwnedFd, Errno> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    flags |= match huge {
        None => MemfdFlags::empty(),
        Some(HugePage::Default) => MemfdFlags::HUGETLB,
        Some(HugePage::Mib2) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        Some(HugePage::Gib1) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let fd = memfd_create(name, flags).map_err(errno::from_rustix)?;
    ftruncate(&fd, size).map_err(errno::from_rustix)?;
    Ok(fd)
}

/// Creates a memory file with these bytes and seals it, so that no process can change it.
///
/// # Errors
/// `EMFILE`, `ENOMEM`.
pub fn sealed(name: &CStr, bytes: &[u8]) -> Result<OwnedFd, Errno> {
    let fd = create(name, 0, None)?;
    let mut left = bytes;
    while !left.is_empty() {
        match rustix::io::write(&fd, left) {
            Ok(written) => left = left.get(written..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(errno::from_rustix(error)),
        }
    }
    fcntl_add_seals(&fd, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)
        .map_err(errno::from_rustix)?;
    Ok(fd)
}

/// Reads a whole file, without regard to its position.
///
/// # Errors
/// [`ReadError`].
pub fn read_all(fd: impl AsFd, limit: usize) -> Result<Vec<u8>, ReadError> {
    let stat = rustix::fs::fstat(&fd).map_err(|error| ReadError::Io(errno::from_rustix(error)))?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let size = usize::try_from(size)
        .ok()
        .filter(|&size| size <= limit)
        .ok_or(ReadError::TooLarge { size, limit })?;
    let mut bytes = vec![0; size];
    let mut read = 0;
    while let Some(rest) = bytes.get_mut(read..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pread(&fd, rest, read as u64) {
            Ok(0) => return Err(ReadError::Truncated { size, read }),
            Ok(count) => read += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(ReadError::Io(errno::from_rustix(error))),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sealed_bytes_can_be_read_and_not_changed() {
        let fd = sealed(c"state", b"twelve bytes").unwrap();
        assert_eq!(read_all(&fd, 12).unwrap(), b"twelve bytes");
        assert!(matches!(read_all(&fd, 11), Err(ReadError::TooLarge { size: 12, limit: 11 })));
        assert!(rustix::io::pwrite(&fd, b"x", 0).is_err());
        assert!(ftruncate(&fd, 0).is_err());
    }
}
