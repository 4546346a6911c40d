//! The places for mounts: created, cleared of what a dead daemon has left there, tidied up.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::io::Errno as OsErrno;
use tracing::{info, warn};
use vdpa_sys::fuse::{FS_TYPE, fs_type_at, unmount};

use super::ServeError;

/// Type and permissions of the root of a mount over a file.
pub(super) const FILE_MODE: u32 = 0o100_600;

/// Makes `dir` ready to be mounted on and returns its true path: creates it when it is missing and removes what a
/// daemon that died left mounted there. [`DeviceFiles::mount`](super::DeviceFiles::mount) does this too; separately it serves those who need the
/// true path before.
///
/// # Errors
/// [`ServeError::Served`], [`ServeError::Hung`], [`ServeError::Directory`] and [`ServeError::Mount`].
pub fn prepare_dir(dir: &Path) -> Result<PathBuf, ServeError> {
    let failed = |source: std::io::Error| {
        // Of something that is no directory, making it says that it exists.
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

/// The path with its directory resolved, which is created when it is missing. What the path itself is stays untouched: it may
/// be a dead or hanging mount.
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

/// Makes `path` ready for a mount over a single file: its true path, and whether the file was created here. What a daemon
/// that died left mounted there is removed.
///
/// # Errors
/// What is wrong, in whole.
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

/// Removes the file that was created for a mount, after its end.
pub(super) fn remove_placeholder(path: &Path, created: bool) {
    if created && let Err(error) = fs::remove_file(path) {
        warn!(path = %path.display(), %error, "the file below a device file stays");
    }
}

/// Removes a dead mount of ours.
fn remove_dead_mount(target: &Path) -> Result<(), ServeError> {
    match probe(target) {
        Some(Err(OsErrno::NOTCONN | OsErrno::CONNABORTED)) => {
            info!(dir = %target.display(), "removing the mount of a daemon that is gone");
            match unmount(target) {
                // Its watchdog may have been faster.
                Err(_) if fs_type_at(target)?.as_deref() != Some(FS_TYPE) => Ok(()),
                other => Ok(other?),
            }
        }
        Some(_) => Err(ServeError::Served { dir: target.into() }),
        None => Err(ServeError::Hung { dir: target.into() }),
    }
}

pub(super) fn is_stale(dir: &Path) -> bool {
    fs_type_at(dir).is_ok_and(|kind| kind.as_deref() == Some(FS_TYPE))
        && matches!(probe(dir), Some(Err(OsErrno::NOTCONN | OsErrno::CONNABORTED)))
}

/// Asks the server of a mount for a sign of life; `None` when there is no answer. The question may block for ever,
/// so it is asked by a thread that is left behind then.
fn probe(dir: &Path) -> Option<Result<(), OsErrno>> {
    const TIMEOUT: Duration = Duration::from_secs(2);
    let (send, receive) = mpsc::channel();
    let path = dir.to_path_buf();
    let prober = thread::Builder::new().name("mount-probe".into()).spawn(move || {
        // The other side may have stopped waiting.
        let _ = send.send(rustix::fs::statfs(&path).map(drop));
    });
    prober.ok()?;
    receive.recv_timeout(TIMEOUT).ok()
}
