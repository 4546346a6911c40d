//! The socket file: its owner, and who may connect.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use vdpa_core::Errno;

use vdpa_control::api::CtlError;

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
}

impl ControlSocket {
    /// Binds it to `path`, with mode 0600. The socket of a daemon that has ended is replaced. Clients can connect from then on.
    ///
    /// # Errors
    /// [`BindError`]; a socket on which a daemon listens is [`BindError::InUse`].
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let (listener, file) = bind(path)?;
        Ok(Self { listener, file })
    }

    /// As [`bind`](Self::bind), also where a daemon listens on it, which this one goes on for.
    ///
    /// # Errors
    /// [`BindError`], but not [`BindError::InUse`].
    pub fn rebind(path: &Path) -> Result<Self, BindError> {
        let (listener, file) = rebind(path)?;
        Ok(Self { listener, file })
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
    pub fn adopt(path: &Path, fd: OwnedFd, record: &[u8]) -> Result<Self, BindError> {
        let failed = |source| BindError::Io { step: "go on with", path: path.into(), source };
        let listener = UnixListener::from(fd);
        let found = fs::symlink_metadata(path).map_err(failed)?;
        if self::record(identity(&found)) != *record {
            return Err(failed(io::ErrorKind::AddrNotAvailable.into()));
        }
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self { listener, file: SocketFile { path: path.into(), identity: identity(&found) } })
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

/// Binds a non-blocking listener to `path`, with mode 0600. Creates the directory if there is none.
pub(super) fn bind(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    check_not_in_use(path)?;
    rebind(path)
}

/// As [`bind`], whether or not somebody listens on it.
pub(super) fn rebind(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
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
    let finish = || {
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let identity = identity(&fs::symlink_metadata(&temporary)?);
        fs::rename(&temporary, path)?;
        Ok(identity)
    };
    match finish() {
        Ok(identity) => Ok((listener, SocketFile { path: path.into(), identity })),
        Err(source) => {
            // An error of this cleanup is ignored: the first error is the one to report.
            let _ = fs::remove_file(&temporary);
            Err(failed("put in place", path)(source))
        }
    }
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

/// Checks that the peer may use the control API: only root and the daemon's user may.
///
/// The mode of the socket file says the same, but can be changed by others; this check cannot.
pub(super) fn authorised(stream: &tokio::net::UnixStream) -> Result<(), CtlError> {
    let peer = stream.peer_cred().map_err(|error| {
        CtlError::new(Errno::PERM, format!("the credentials of the caller are unknown: {error}"))
    })?;
    let own = rustix::process::geteuid().as_raw();
    if permitted(peer.uid(), own) {
        return Ok(());
    }
    tracing::warn!(uid = peer.uid(), pid = peer.pid(), "control connection refused");
    Err(CtlError::new(Errno::PERM, "Operation not permitted")
        .with_hint(format!("Only root and the daemon's user (uid {own}) may use the control socket.")))
}

const fn permitted(caller: u32, own: u32) -> bool {
    caller == 0 || caller == own
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_and_the_own_user_are_permitted() {
        assert!(permitted(0, 1000) && permitted(1000, 1000) && permitted(0, 0));
        assert!(!permitted(1000, 0) && !permitted(1001, 1000));
    }

    #[test]
    fn a_stale_socket_is_replaced_and_one_in_use_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/control.sock");
        let (listener, file) = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert!(matches!(bind(&path), Err(BindError::InUse { .. })));
        drop(listener);
        let (_listener, second) = bind(&path).unwrap();
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
        let first = ControlSocket::bind(&path).unwrap();
        let fd = || first.as_fd().try_clone_to_owned().unwrap();
        let waiting = UnixStream::connect(&path).unwrap();
        let second = ControlSocket::adopt(&path, fd(), &first.record()).unwrap();
        let (served, _) = second.listener.accept().unwrap();
        drop(served);
        drop(waiting);
        assert!(ControlSocket::adopt(&dir.path().join("other.sock"), fd(), &first.record()).is_err());
        fs::remove_file(&path).unwrap();
        assert!(ControlSocket::adopt(&path, fd(), &first.record()).is_err());
        let other = UnixListener::bind(dir.path().join("new")).unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        assert!(ControlSocket::adopt(&path, fd(), &first.record()).is_err(), "another socket lies there");
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
        assert!(matches!(bind(&path), Err(BindError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
