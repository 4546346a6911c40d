//! The socket file: its owner, and who may connect.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{XattrFlags, lsetxattr};

use super::caller::Access;

/// Why the control socket could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A daemon listens on it.
    #[error("{} is in use by a running vdpad; stop that one or choose another path with --socket", path.display())]
    InUse {
        /// Path of the socket.
        path: PathBuf,
    },
    /// The path exists and is not a socket.
    #[error("{} exists and is not a socket; remove it or choose another path with --socket", path.display())]
    NotASocket {
        /// Path of the file.
        path: PathBuf,
    },
    /// This process may not give the socket to a group.
    #[error("cannot give {} to group {group}; make the user of vdpad its member (SupplementaryGroups= in the unit)", path.display())]
    Group {
        /// Path of the socket.
        path: PathBuf,
        /// The group.
        group: u32,
        /// `EPERM`: neither is this process its member nor has it `CAP_CHOWN`.
        #[source]
        source: io::Error,
    },
    /// The system refused a step.
    #[error("cannot {step} {}", path.display())]
    Io {
        /// The step that failed.
        step: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// The error of the system call.
        #[source]
        source: io::Error,
    },
}

/// The socket on which the control API is served.
#[derive(Debug)]
pub struct ControlSocket {
    pub(super) listener: UnixListener,
    pub(super) file: SocketFile,
    pub(super) access: Access,
}

impl ControlSocket {
    /// Binds it to `path`, for the user of this process and the groups of `access`: with mode 0600, or 0660. The socket of a daemon that
    /// has ended is replaced. Clients can connect from then on.
    ///
    /// # Errors
    /// [`BindError`]; a socket on which a daemon listens is [`BindError::InUse`].
    pub fn bind(path: &Path, access: Access) -> Result<Self, BindError> {
        let (listener, file) = bind(path, access)?;
        Ok(Self { listener, file, access })
    }

    /// As [`bind`](Self::bind), also where a daemon listens on it, which this one goes on for.
    ///
    /// # Errors
    /// [`BindError`], but not [`BindError::InUse`].
    pub fn rebind(path: &Path, access: Access) -> Result<Self, BindError> {
        let (listener, file) = rebind(path, access)?;
        Ok(Self { listener, file, access })
    }

    /// Which file it is, for [`adopt`](Self::adopt).
    #[must_use]
    pub fn record(&self) -> [u8; 16] {
        record(self.file.identity)
    }

    /// Goes on with the socket of an earlier process, if that file, which `record` names, still lies at `path`: connections that
    /// wait in it are served.
    ///
    /// # Errors
    /// [`BindError::Io`] when something else lies at `path`.
    pub fn adopt(path: &Path, fd: OwnedFd, record: &[u8], access: Access) -> Result<Self, BindError> {
        let failed = |source| BindError::Io { step: "go on with", path: path.into(), source };
        let listener = UnixListener::from(fd);
        let found = fs::symlink_metadata(path).map_err(failed)?;
        if self::record(identity(&found)) != *record {
            return Err(failed(io::ErrorKind::AddrNotAvailable.into()));
        }
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { listener, file: SocketFile { path: path.into(), identity: identity(&found) }, access })
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// The socket file of this daemon. Dropping it removes the file, unless another file has replaced it.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == self.identity);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the control socket");
        }
    }
}

fn record((device, inode): (u64, u64)) -> [u8; 16] {
    (u128::from(device) << 64 | u128::from(inode)).to_le_bytes()
}

fn identity(file: &fs::Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// Binds a non-blocking listener to `path`. Creates the directory if there is none.
fn bind(path: &Path, access: Access) -> Result<(UnixListener, SocketFile), BindError> {
    check_not_in_use(path)?;
    rebind(path, access)
}

/// As [`bind`], whether or not somebody listens on it.
fn rebind(path: &Path, access: Access) -> Result<(UnixListener, SocketFile), BindError> {
    check_is_socket(path)?;
    let failed = |step, path: &Path| {
        let path = path.to_path_buf();
        move |source| BindError::Io { step, path, source }
    };
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(failed("create", directory))?;
    }
    // The socket has a temporary name until its mode is set, and is then renamed: others cannot connect in between, and there is
    // always a socket at `path` while a stale one is replaced.
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let temporary = PathBuf::from(name);
    let listener = UnixListener::bind(&temporary).map_err(failed("bind", &temporary))?;
    let place = || {
        listener.set_nonblocking(true)?;
        let identity = identity(&fs::symlink_metadata(&temporary)?);
        fs::rename(&temporary, path)?;
        Ok(identity)
    };
    let opened = open_to(&temporary, access).map_err(|source| match access.admins.or(access.readers) {
        Some(group) if source.kind() == io::ErrorKind::PermissionDenied => {
            BindError::Group { path: path.into(), group, source }
        }
        _ => failed("give to its groups", path)(source),
    });
    match opened.and_then(|()| place().map_err(failed("put in place", path))) {
        Ok(identity) => Ok((listener, SocketFile { path: path.into(), identity })),
        Err(error) => {
            // An error of this cleanup is ignored: the first error is the one to report.
            let _ = fs::remove_file(&temporary);
            Err(error)
        }
    }
}

/// Lets its user connect to the socket at `path`, and the groups of `access`, and nobody else.
fn open_to(path: &Path, access: Access) -> io::Result<()> {
    let group = access.admins.or(access.readers);
    // Before others may connect.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    if group.is_some() {
        chown(path, None, group)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    }
    if let (Some(_), Some(readers)) = (access.admins, access.readers) {
        lsetxattr(path, c"system.posix_acl_access", &acl_with(readers), XattrFlags::empty())?;
    }
    Ok(())
}

/// An access control list that lets the user, the group and one more group of a file read and write it (include/uapi/linux/posix_acl_xattr.h).
fn acl_with(group: u32) -> Vec<u8> {
    const VERSION: u32 = 2;
    const READ_WRITE: u16 = 6;
    const NO_ID: u32 = u32::MAX;
    // User, group, one more group, the most that groups get, others.
    let entries = [
        (0x1, READ_WRITE, NO_ID),
        (0x4, READ_WRITE, NO_ID),
        (0x8, READ_WRITE, group),
        (0x10, READ_WRITE, NO_ID),
        (0x20, 0, NO_ID),
    ];
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(u16::to_le_bytes(tag));
        bytes.extend(u16::to_le_bytes(permissions));
        bytes.extend(u32::to_le_bytes(id));
    }
    bytes
}

/// Whether there is a socket at `path`, or nothing.
fn check_is_socket(path: &Path) -> Result<bool, BindError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(BindError::Io { step: "examine", path: path.into(), source }),
        Ok(found) if !found.file_type().is_socket() => Err(BindError::NotASocket { path: path.into() }),
        Ok(_) => Ok(true),
    }
}

fn check_not_in_use(path: &Path) -> Result<(), BindError> {
    if !check_is_socket(path)? {
        return Ok(());
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(BindError::InUse { path: path.into() }),
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
            tracing::info!(path = %path.display(), "replacing the control socket of a daemon that has ended");
            Ok(())
        }
        Err(source) => Err(BindError::Io { step: "examine", path: path.into(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_one_in_use_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/control.sock");
        let (listener, file) = bind(&path, Access::default()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert!(matches!(bind(&path, Access::default()), Err(BindError::InUse { .. })));
        drop(listener);
        let (_listener, second) = bind(&path, Access::default()).unwrap();
        drop(file);
        assert!(path.exists(), "the first daemon removed the socket of the second");
        drop(second);
        assert!(!path.exists());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn a_socket_is_continued_where_it_lies_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let first = ControlSocket::bind(&path, Access::default()).unwrap();
        let fd = || first.as_fd().try_clone_to_owned().unwrap();
        let waiting = UnixStream::connect(&path).unwrap();
        let second = ControlSocket::adopt(&path, fd(), &first.record(), Access::default()).unwrap();
        let (served, _) = second.listener.accept().unwrap();
        drop(served);
        drop(waiting);
        assert!(
            ControlSocket::adopt(&dir.path().join("other.sock"), fd(), &first.record(), Access::default())
                .is_err()
        );
        fs::remove_file(&path).unwrap();
        assert!(ControlSocket::adopt(&path, fd(), &first.record(), Access::default()).is_err());
        let other = UnixListener::bind(dir.path().join("new")).unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        assert!(
            ControlSocket::adopt(&path, fd(), &first.record(), Access::default()).is_err(),
            "another socket lies there"
        );
        drop(second);
        drop(first);
        assert!(path.exists(), "the socket of another daemon was removed");
        drop(other);
    }

    #[test]
    fn a_file_in_the_way_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path, Access::default()), Err(BindError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
