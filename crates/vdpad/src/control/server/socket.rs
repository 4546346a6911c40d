//! The socket file: its owner, and who may connect.

use std::fs;
use std::io;
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

fn identity(file: &fs::Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// Binds a non-blocking listener to `path`, with mode 0600. Creates the directory if there is none.
pub(super) fn bind(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    check_not_in_use(path)?;
    replace(path)
}

/// As [`bind`], although a daemon may listen there: whoever connects from then on reaches this one.
pub(super) fn replace(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
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

fn check_not_in_use(path: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::Io { step: "examine", path: path.into(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket { path: path.into() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(BindError::InUse { path: path.into() }),
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
            tracing::info!(path = %path.display(), "replacing the control socket of a daemon that has ended");
            Ok(())
        }
        Err(error) => Err(failed(error)),
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
    fn a_file_in_the_way_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path), Err(BindError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
