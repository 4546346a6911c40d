//! Recognises the open file of a device after an exec, without a request to the device.

use std::os::fd::AsFd;

use rustix::fs::{AtFlags, StatxFlags, makedev, statx};
use vdpa_core::types::IovaRange;

use crate::device::DeviceFile;
use crate::session::Session;
use crate::state::v2;

/// Device number and inode of a file. `AT_STATX_DONT_SYNC` takes them from the inode in memory, so a FUSE server gets no
/// request.
fn identity(fd: impl AsFd) -> Option<(u64, u64)> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = statx(fd, c"", flags, StatxFlags::INO).ok()?;
    Some((makedev(stat.stx_dev_major, stat.stx_dev_minor), stat.stx_ino))
}

/// The record by which the next image recognises the device file of `session`, with what the device offers. A device whose
/// file has no identity gets a record that matches no file.
pub(super) fn describe<D: DeviceFile>(session: &Session<D>) -> v2::DeviceFile {
    let (ops, setup) = session.parts();
    // No file has inode 0.
    let (dev, inode) = identity(ops.fd()).unwrap_or((0, 0));
    v2::DeviceFile {
        dev,
        inode,
        backend_features: setup.offered.0,
        iova_first: setup.iova_range.first(),
        iova_last: setup.iova_range.last(),
    }
}

impl v2::DeviceFile {
    /// Whether `fd` refers to this file.
    pub(super) fn is(&self, fd: impl AsFd) -> bool {
        self.inode != 0 && identity(fd) == Some((self.dev, self.inode))
    }

    /// I/O virtual addresses that the device can translate; `None` for a record that is not a range.
    pub(super) fn iova_range(&self) -> Option<IovaRange> {
        IovaRange::new(self.iova_first, self.iova_last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_known_again_by_any_descriptor_and_another_is_not() {
        let file = tempfile::tempfile().unwrap();
        let (dev, inode) = identity(&file).unwrap();
        let known = v2::DeviceFile { dev, inode, backend_features: 0, iova_first: 0, iova_last: 9 };
        assert!(known.is(&file) && known.is(file.try_clone().unwrap()));
        assert!(!known.is(tempfile::tempfile().unwrap()));
        assert!(!v2::DeviceFile { inode: 0, ..known.clone() }.is(&file));
        assert!(v2::DeviceFile { iova_first: 10, ..known }.iova_range().is_none());
    }
}
