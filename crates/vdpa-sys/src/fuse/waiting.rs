//! The kernel's count of unanswered requests of a connection.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use vdpa_core::Errno;

use super::mount::{FS_TYPE, mounted_at};
use crate::errno;

/// The kernel's list of FUSE connections (`fusectl`), in a mount that is not attached anywhere.
#[derive(Debug)]
pub struct Connections(OwnedFd);

impl Connections {
    /// Opens the list.
    ///
    /// # Errors
    /// `EPERM` outside of the first user namespace and without `CAP_SYS_ADMIN`; `ENODEV` from a kernel without it.
    pub fn open() -> Result<Self, Errno> {
        let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC).map_err(errno::from_rustix)?;
        fsconfig_create(&context).map_err(errno::from_rustix)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map(Self).map_err(errno::from_rustix)
    }

    /// Number of unanswered requests of the mount of `source` at `path`; `None` when it cannot be determined. Makes no request
    /// to the server of the mount.
    #[must_use]
    pub fn waiting(&self, path: &Path, source: &str) -> Option<u64> {
        let mounted = mounted_at(path).ok()??;
        let ours = mounted.fs_type == FS_TYPE && mounted.source == source;
        let file = format!("{}/waiting", ours.then_some(mounted.minor)?);
        let fd = rustix::fs::openat(&self.0, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let mut text = [0; 24];
        let len = rustix::io::read(fd, &mut text).ok()?;
        str::from_utf8(text.get(..len)?).ok()?.trim().parse().ok()
    }
}
