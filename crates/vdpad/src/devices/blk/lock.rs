//! The locks by which a disk and its neighbours respect each other: flock(2), and the byte ranges of QEMU
//! ([`image_lock`]).

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno as SysErrno;
use vdpa_control::api::CtlError;
use vdpa_core::Errno;
use vdpa_sys::image_lock::{self, Access};
use vdpa_sys::open_mark;

use super::options::Options;
use crate::devices::busy;

/// The locks of a disk.
///
/// flock(2) is of the open file that requests use: it ends when nothing of a process that has died is in flight, so the next process of
/// this disk waits for it. The locks of QEMU's scheme are of that file too, and of an open file of their own, which the holder keeps:
/// neighbours respect them also while one process follows the other. A [passed](super::passed) file is the same in all processes, so all
/// its locks are kept.
#[derive(Clone, Debug)]
pub(super) struct Locks {
    access: Access,
    /// Place of the mark of a disk whose flock(2) others may have at the same time.
    mark: Option<u64>,
    /// The open file of QEMU's locks; `None` if it could not be opened.
    bytes: Option<Arc<OwnedFd>>,
    /// A former process had it, and neighbours are not to get between.
    kept: bool,
    /// Each process of this disk has the same open file.
    passed: bool,
}

impl Locks {
    /// For the disk on `file`; not locked yet. `kept` is the open file of QEMU's locks of a former process.
    pub(super) fn new(file: &File, options: &Options, mark: Option<u64>, kept: Option<Arc<OwnedFd>>) -> Self {
        let access = match (options.read_only, options.shared) {
            (true, _) => Access::Read,
            (false, true) => Access::SharedWrite,
            (false, false) => Access::Write,
        };
        // The same file by its descriptor: another one may lie at the path by now.
        let own = || File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file)));
        let was_kept = kept.is_some();
        let own = || if options.passed { file.try_clone() } else { own() };
        let bytes = kept.or_else(|| match own() {
            Ok(file) => Some(Arc::new(file.into())),
            Err(error) => {
                tracing::warn!(%error, "a disk is locked by flock only, which QEMU does not see");
                None
            }
        });
        let mark = mark.filter(|_| access != Access::Write && !options.passed);
        Self { access, mark, bytes, kept: was_kept, passed: options.passed }
    }

    /// The open file of QEMU's locks, to be kept for the next process.
    pub(super) const fn bytes(&self) -> Option<&Arc<OwnedFd>> {
        self.bytes.as_ref()
    }

    /// Locks the file for this process. Retries for a second: a daemon that was killed keeps its locks until the kernel has torn down
    /// its io_uring, which happens asynchronously, since operations may be in flight until then.
    ///
    /// # Errors
    /// `EBUSY` when it stays locked by another one; nothing is locked then.
    pub(super) fn take(&self, file: impl AsFd) -> Result<(), Errno> {
        #[cfg(feature = "crash-points")]
        if std::env::var_os("VDPA_NO_FENCE").is_some() {
            // For the test that shows what happens then.
            return Ok(());
        }
        busy::wait(|_| true, || self.try_take(&file)).inspect_err(|_| self.release(&file))
    }

    fn try_take(&self, file: &impl AsFd) -> Result<(), Errno> {
        let operation = match self.access {
            Access::Write => FlockOperation::NonBlockingLockExclusive,
            Access::Read | Access::SharedWrite => FlockOperation::NonBlockingLockShared,
        };
        match flock(file, operation) {
            Ok(()) => {}
            Err(SysErrno::WOULDBLOCK) => return Err(Errno::BUSY),
            // Some network file systems have none.
            Err(error @ (SysErrno::NOLCK | SysErrno::NOSYS | SysErrno::OPNOTSUPP)) => {
                tracing::warn!(%error, "a disk cannot be locked by flock");
            }
            Err(error) => return Err(Errno::from_raw(error.raw_os_error())),
        }
        if let Some(bytes) = &self.bytes {
            match image_lock::take(bytes, self.access) {
                Ok(()) => {}
                Err(Errno::BUSY) => return Err(Errno::BUSY),
                Err(errno) => {
                    tracing::warn!(%errno, "a disk is locked by flock only, which QEMU does not see")
                }
            }
        }
        if !is_alone(file, self.mark) {
            return Err(Errno::BUSY);
        }
        // Where others write too, the mark tells of requests in flight, and the size stays changeable.
        if self.bytes.is_some()
            && self.access != Access::SharedWrite
            && let Err(errno) = image_lock::add(file, self.access)
        {
            tracing::debug!(%errno, "requests in flight do not keep a disk locked for QEMU");
        }
        Ok(())
    }

    /// Lets the next process of this disk lock the file. QEMU's locks stay: the next process has their open file.
    pub(super) fn give_away(&self, file: impl AsFd) {
        // The next process has the same open file, and with it all its locks.
        if !self.passed {
            self.unlock(file);
        }
    }

    fn unlock(&self, file: impl AsFd) {
        let unmarked = self.mark.map_or(Ok(()), |mark| open_mark::clear(&file, mark));
        // Where there are none, none were set.
        let _ = image_lock::release(&file);
        let unlocked = flock(&file, FlockOperation::Unlock);
        if let Err(error) = unlocked.map_err(|error| Errno::from_raw(error.raw_os_error())).and(unmarked) {
            tracing::warn!("a disk stays locked: {error}");
        }
    }

    /// Lets everybody lock the file.
    fn release(&self, file: impl AsFd) {
        if !(self.passed && self.kept) {
            self.unlock(file);
        }
        if let Some(bytes) = self.bytes.as_ref().filter(|_| !self.kept) {
            // They end with the open file at the latest.
            let _ = image_lock::release(bytes);
        }
    }

    /// Whether the size of the file may be changed: nobody who shares it needs it as it is.
    pub(super) fn may_resize(&self) -> bool {
        // Nobody else has the others.
        self.access != Access::SharedWrite
            || self.bytes.as_ref().is_none_or(|bytes| image_lock::may_resize(bytes).unwrap_or(true))
    }
}

/// Marks the file for the next process that serves this disk, if it has no mark of the former one any more.
fn is_alone(file: &impl AsFd, mark: Option<u64>) -> bool {
    let Some(mark) = mark else { return true };
    match open_mark::exists(file, mark) {
        Ok(false) => open_mark::set(file, mark).is_ok(),
        _ => false,
    }
}

/// The error for a file that others have locked.
pub(super) fn refusal(path: &std::path::Path, file: &File) -> CtlError {
    let path = path.display();
    let own = std::process::id();
    let holders = holders(file);
    let what = if holders.iter().any(|(pid, _)| *pid == own) {
        format!("{path} is in use by another device of this daemon")
    } else if holders.is_empty() {
        format!("{path} is locked by another program")
    } else {
        let names: Vec<_> = holders.iter().map(|(pid, name)| format!("{name} (pid {pid})")).collect();
        format!("{path} is in use by {}", names.join(", "))
    };
    CtlError::new(Errno::BUSY, what).with_hint(
        "A disk has one writer, or readers only (readonly on), or writers that all share it (shared on).",
    )
}

/// Processes that have a lock on the file, with their names, as far as the kernel shows them to this one.
fn holders(file: &File) -> Vec<(u32, String)> {
    let Ok(meta) = file.metadata() else { return Vec::new() };
    let (major, minor) = (rustix::fs::major(meta.dev()), rustix::fs::minor(meta.dev()));
    let inode = format!(" {major:02x}:{minor:02x}:{} ", meta.ino());
    let names = |dir: &str| {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<_>>()
    };
    let has_lock = |path: String| {
        // Lines such as "lock:  1: OFDLCK ADVISORY READ -1 fe:00:4711 100 100".
        std::fs::read_to_string(path)
            .is_ok_and(|info| info.lines().any(|line| line.starts_with("lock:") && line.contains(&inode)))
    };
    let pids = names("/proc").into_iter().filter_map(|name| name.parse::<u32>().ok());
    pids.filter(|pid| {
        let infos = format!("/proc/{pid}/fdinfo");
        names(&infos).into_iter().any(|fd| has_lock(format!("{infos}/{fd}")))
    })
    .map(|pid| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        (pid, name.trim_end().escape_default().to_string())
    })
    .collect()
}
