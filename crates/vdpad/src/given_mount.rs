//! The mount of the directory of device files, made by another process than the daemon.
//!
//! A mount has to appear on the host, and takes `CAP_SYS_ADMIN`. A service that has both can do much more than serve devices. So the
//! service manager runs this program with all rights before the service and after it (`ExecStartPre=+`, `ExecStopPost=+`), for a moment,
//! and the service has neither that capability nor the host's view of the file system. The connection of the mount goes through the
//! manager's store, as after the death of both processes of the service.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::process::getppid;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use vdpa_backend::front::fuse::{MountState, ServeError, mount_state, prepare_dir};
use vdpa_backend::persist::items::program::{MOUNT, MOUNT_DIR, NEW_MOUNT};
use vdpa_backend::persist::{Kind, key};
use vdpa_core::Errno;
use vdpa_holder::fdstore::{self, Store};
use vdpa_sys::fuse::{HandshakeError, MountError, MountOptions, mount, unmount};

use crate::survival::text;

/// For the kernel's first request on the mount, and for the service manager to take it.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Why a mount was not made, or not ended.
#[derive(Debug, thiserror::Error)]
pub enum GivenMountError {
    /// Nobody is there to take it.
    #[error(
        "no service manager takes the mount: --mount make is for ExecStartPre= of a unit with NotifyAccess=exec and \
         FileDescriptorStoreMax="
    )]
    NoManager,
    /// The service manager does not take it.
    #[error("the service manager does not take the mount: {0}")]
    Manager(Errno),
    /// The view of the file system that the service manager has cannot be taken.
    #[error("cannot enter the mount namespace of the service manager")]
    Namespace(#[source] io::Error),
    /// Nothing is mounted over what a symbolic link names.
    #[error("cannot mount at {}: it has to be a directory, and no symbolic link", dir.display())]
    Place {
        /// The directory.
        dir: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// The directory cannot be used.
    #[error(transparent)]
    Directory(#[from] ServeError),
    /// The kernel does not make the mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The kernel does not use it.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// No memory for what is said of it.
    #[error("cannot keep where it is mounted: {0}")]
    Memory(Errno),
}

/// Enters the mount namespace of the process that has started this one, the service manager, where clients see the mount. systemd gives a
/// command with all rights (`+`) a mount namespace of its own too, if its service has one.
fn enter_namespace_of_manager() -> Result<(), GivenMountError> {
    // One outside of the PID namespace has no number; whoever starts this process so has prepared its view.
    let Some(parent) = getppid() else { return Ok(()) };
    let path = format!("/proc/{}/ns/mnt", parent.as_raw_pid());
    let namespace = |path: &str| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    let enter = || {
        if namespace(&path)? != namespace("/proc/self/ns/mnt")? {
            move_into_link_name_space(File::open(&path)?.as_fd(), Some(LinkNameSpaceType::Mount))?;
        }
        Ok(())
    };
    enter().map_err(GivenMountError::Namespace)
}

/// Removes the mount when it is not given to anybody.
struct Unmount<'a>(Option<&'a Path>);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.map(unmount) {
            tracing::warn!(%error, "the mount could not be removed");
        }
    }
}

/// Mounts at `dir` and gives the mount to the service manager, which passes it to the service (`--mount given`). Leaves a mount alone
/// whose connection somebody has: the manager, after both processes of the service have died. Needs root. Returns the path without
/// symbolic links, and whether it is a new mount. Call it before any thread is started. Blocks for at most 12 s, usually some milliseconds.
///
/// # Errors
/// [`GivenMountError`]; nothing is left mounted then.
pub fn make(dir: &Path) -> Result<(PathBuf, bool), GivenMountError> {
    let store = Store::from_env().map_err(GivenMountError::Manager)?.ok_or(GivenMountError::NoManager)?;
    enter_namespace_of_manager()?;
    let (target, state) = mount_state(dir)?;
    if state == MountState::Live {
        return Ok((target, false));
    }
    prepare_dir(dir)?;
    let dir = target;
    // The directory above may be the service's, which is not to choose what is covered: no symbolic link is followed, and what was
    // looked at is what is mounted on.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let place = rustix::fs::open(&dir, flags, Mode::empty())
        .map_err(|error| GivenMountError::Place { dir: dir.clone(), source: error.into() })?;
    let by_descriptor = PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()));
    let connection = mount(&by_descriptor, &MountOptions::default())?;
    let mut guard = Unmount(Some(&dir));
    let negotiated = connection.handshake(TIMEOUT)?.to_bytes();
    let path = text(&dir.to_string_lossy()).map_err(GivenMountError::Memory)?;
    let nothing = text("").map_err(GivenMountError::Memory)?;
    let items = [
        (NEW_MOUNT, Kind::Memory, nothing.as_fd(), &[][..]),
        (MOUNT_DIR, Kind::Memory, path.as_fd(), &[]),
        (MOUNT, Kind::Fuse, connection.as_fd(), &negotiated),
    ];
    for (item, kind, fd, record) in items {
        let name = fdstore::name(key(0, item), kind, record);
        let name = name.ok_or(GivenMountError::Manager(Errno::NAMETOOLONG))?;
        // Of a mount that has ended.
        store.remove(&name).map_err(GivenMountError::Manager)?;
        store.store(&name, fd).map_err(GivenMountError::Manager)?;
    }
    store.barrier(TIMEOUT).map_err(GivenMountError::Manager)?;
    guard.0 = None;
    drop(guard);
    Ok((dir, true))
}

/// Ends the mount at `dir`, after the service: clients get `ECONNABORTED`. With `restarts`, the service is started again and goes on
/// with a mount that lives; only a dead one is removed then. Returns whether there was one to end. Needs root. Call it before any
/// thread is started. Blocks at most 2 s.
///
/// # Errors
/// [`GivenMountError`].
pub fn end(dir: &Path, restarts: bool) -> Result<bool, GivenMountError> {
    enter_namespace_of_manager()?;
    match mount_state(dir)? {
        (_, MountState::None) => Ok(false),
        (_, MountState::Live) if restarts => Ok(false),
        (path, MountState::Live | MountState::Dead) => {
            unmount(&path)?;
            Ok(true)
        }
    }
}
