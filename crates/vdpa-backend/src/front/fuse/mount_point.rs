//! Prepares directories and files to be mounted on, and cleans up after a mount. Removes the mounts of dead servers.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno as OsErrno;
use tracing::{info, warn};
use vdpa_sys::fuse::{Connections, FS_TYPE, fs_type_at, mounted_at, unmount};

use super::ServeError;

/// Type and permissions of the root of a mount over a file.
pub(super) const FILE_MODE: u32 = 0o100_600;

/// Prepares `dir` to be mounted on and returns its path without symbolic links: creates it when it is missing, and removes
/// the mount that a dead server has left there.
///
/// [`DeviceFiles::mount`](super::DeviceFiles::mount) does the same. A program calls this when it needs the path earlier.
/// Blocks at most 2 s for the answer of a server that has mounted there.
///
/// # Errors
/// [`ServeError::Served`] and [`ServeError::Hung`] when another server has mounted there; [`ServeError::Directory`] and
/// [`ServeError::Mount`].
pub fn prepare_dir(dir: &Path) -> Result<PathBuf, ServeError> {
    let failed = |source: std::io::Error| {
        // create_dir_all() reports that a path exists which is not a directory.
        let exists = source.kind() == ErrorKind::AlreadyExists;
        let source = if exists { OsErrno::NOTDIR.into() } else { source };
        ServeError::Directory { dir: dir.into(), source }
    };
    let target = below_true_parent(dir).map_err(failed)?;
    if fs_type_at(&target)?.as_deref() == Some(FS_TYPE) {
        remove_dead_mount(&target)?;
    }
    fs::create_dir_all(&target).map_err(failed)?;
    fs::canonicalize(&target).map_err(failed)
}

/// The path with its parent directory resolved, which is created when it is missing. No system call is made on the path itself:
/// it may be a dead or hanging mount.
fn below_true_parent(path: &Path) -> std::io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => {
            fs::create_dir_all(parent)?;
            Ok(fs::canonicalize(parent)?.join(name))
        }
        _ => Ok(absolute),
    }
}

/// Prepares `path` to be mounted over: removes the mount that a dead server has left there, and creates an empty file when
/// there is none. Returns the path without symbolic links, and whether the file was created.
///
/// # Errors
/// The reason, as a complete sentence.
pub(super) fn prepare_file(path: &Path) -> Result<(PathBuf, bool), String> {
    let failed =
        |error: &dyn std::fmt::Display| format!("cannot put a device file at {}: {error}", path.display());
    let target = below_true_parent(path).map_err(|error| failed(&error))?;
    if fs_type_at(&target).map_err(|error| failed(&error))?.as_deref() == Some(FS_TYPE) {
        remove_dead_mount(&target).map_err(|error| failed(&error))?;
    }
    match fs::symlink_metadata(&target) {
        Ok(meta) if meta.is_file() => Ok((target, false)),
        Ok(_) => {
            Err(failed(&"there is something else than a regular file; remove it or choose another path"))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let created = fs::OpenOptions::new().write(true).create_new(true).open(&target);
            created.map_err(|error| failed(&error))?;
            Ok((target, true))
        }
        Err(error) => Err(failed(&error)),
    }
}

/// Removes the file that was created for a mount, after the mount's end.
pub(super) fn remove_placeholder(path: &Path, created: bool) {
    if created && let Err(error) = fs::remove_file(path) {
        warn!(path = %path.display(), %error, "the file below a device file stays");
    }
}

/// Removes the mount of a server that has died; an error when the server is alive.
fn remove_dead_mount(target: &Path) -> Result<(), ServeError> {
    match probe(target) {
        Some(Err(OsErrno::NOTCONN | OsErrno::CONNABORTED)) => {
            info!(dir = %target.display(), "removing the mount of a server that has died");
            match unmount(target) {
                // The dead server's watchdog may have removed it meanwhile.
                Err(_) if fs_type_at(target)?.as_deref() != Some(FS_TYPE) => Ok(()),
                other => Ok(other?),
            }
        }
        Some(_) => Err(ServeError::Served { dir: target.into() }),
        None => Err(ServeError::Hung { dir: target.into() }),
    }
}

/// What is mounted at a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountState {
    /// Nothing of ours.
    None,
    /// A mount whose connection nobody has: every access fails with `ENOTCONN`.
    Dead,
    /// A mount whose connection some process has, though it may not serve it.
    Live,
}

/// What is mounted at `dir`, and its path without symbolic links. Creates the directory above it when that is missing. Blocks at most 2 s: a few milliseconds where `fusectl` can be mounted, as root
/// can, because a request that waits for a server is counted there.
///
/// # Errors
/// [`ServeError::Directory`], and [`ServeError::Mount`] when the table of mounts cannot be read.
pub fn mount_state(dir: &Path) -> Result<(PathBuf, MountState), ServeError> {
    /// For longer than it takes to refuse a request on a dead mount, which is counted too.
    const SETTLED: Duration = Duration::from_millis(20);
    let target =
        below_true_parent(dir).map_err(|source| ServeError::Directory { dir: dir.into(), source })?;
    let Some(mounted) = mounted_at(&target)?.filter(|mounted| mounted.fs_type == FS_TYPE) else {
        return Ok((target, MountState::None));
    };
    let connections = Connections::open().ok();
    let waits = || connections.as_ref().and_then(|all| all.waiting(&target, &mounted.source)) > Some(0);
    let Some(answer) = ask(&target) else { return Ok((target, MountState::Live)) };
    let begin = Instant::now();
    let mut since = None;
    while begin.elapsed() < PROBE_TIMEOUT {
        match answer.recv_timeout(Duration::from_millis(1)) {
            Ok(Err(OsErrno::NOTCONN | OsErrno::CONNABORTED)) => return Ok((target, MountState::Dead)),
            Ok(_) | Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        since = waits().then(|| since.unwrap_or_else(Instant::now));
        if since.is_some_and(|since| since.elapsed() > SETTLED) {
            break;
        }
    }
    Ok((target, MountState::Live))
}

/// Whether a mount of a server that has ended is at `dir`.
pub(super) fn is_stale(dir: &Path) -> bool {
    fs_type_at(dir).is_ok_and(|kind| kind.as_deref() == Some(FS_TYPE))
        && matches!(probe(dir), Some(Err(OsErrno::NOTCONN | OsErrno::CONNABORTED)))
}

/// How long a server may take to answer a STATFS.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// Sends a STATFS to the server of a mount; `None` when it does not answer in time.
fn probe(dir: &Path) -> Option<Result<(), OsErrno>> {
    ask(dir)?.recv_timeout(PROBE_TIMEOUT).ok()
}

/// Sends a STATFS to the server of a mount. `statfs(2)` may block without limit, so a thread of its own calls it, which stays behind
/// then. `None` when there can be no thread.
fn ask(dir: &Path) -> Option<mpsc::Receiver<Result<(), OsErrno>>> {
    let (send, receive) = mpsc::channel();
    let path = dir.to_path_buf();
    let prober = thread::Builder::new().name("mount-probe".into()).spawn(move || {
        // The receiver may have stopped waiting.
        let _ = send.send(rustix::fs::statfs(&path).map(drop));
    });
    prober.ok()?;
    Some(receive)
}
