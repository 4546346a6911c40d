//! A second process that frees the clients of a daemon that has stopped altogether.
//!
//! A client whose request was read and not answered waits uninterruptibly. Inside the daemon
//! [`FuseFs`](super::fuse::FuseFs) answers for a device that hangs; for a daemon that is stopped, starved or
//! deadlocked there is this process, which only needs a path: a forced unmount aborts the connection.
//!
//! The daemon starts itself again as `vdpad watchdog --mount DIR --source SOURCE --timeout S` with the read end of a pipe as
//! standard input and writes to the pipe as long as its FUSE reader makes progress. The watchdog never touches the
//! mount with anything but `umount2(2)`: `stat` or `open` there could hang itself. It never holds `/dev/fuse`,
//! which would keep a dead daemon's mount alive.

use std::io::{self, PipeWriter};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{error, info, warn};
use vdpa_sys::fuse::{FS_TYPE, mounted_at, unmount};

use super::fuse::source_of;

/// A heartbeat that is late by this makes the watchdog act, unless told otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// What the reader writes while it is alive. The first one arms the watchdog: only then is there a mount of this
/// daemon, and not perhaps one of another daemon that made ours give up.
pub(super) const BEAT: &[u8] = b".";
/// What the reader writes last when its mount has ended in order, so that a mount made there since is left alone.
pub(super) const FAREWELL: &[u8] = b"q";

/// Why a watchdog ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The heartbeat stopped for the time given; the mount was ended by force.
    Fired,
    /// The daemon died; the mount it left behind was removed.
    DaemonDied,
    /// The daemon ended its mount itself, or never made one. Nothing was touched.
    Farewell,
}

/// A running watchdog process. Dropping it closes the pipe, upon which it ends.
#[derive(Debug)]
pub struct Watchdog {
    child: Child,
    heartbeat: Option<PipeWriter>,
}

impl Watchdog {
    /// Takes the pipe that [`Options::heartbeat`](super::fuse::Options::heartbeat) wants.
    pub fn take_heartbeat(&mut self) -> Option<PipeWriter> {
        self.heartbeat.take()
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end of the process, which comes when the heartbeat pipe has been closed.
    ///
    /// # Errors
    /// Those of `waitpid(2)`.
    pub fn wait(mut self) -> io::Result<std::process::ExitStatus> {
        drop(self.heartbeat.take());
        self.child.wait()
    }
}

/// Starts `exe watchdog --mount DIR --source SOURCE --timeout SECONDS`.
///
/// Called before the mount is made, with the directory that [`prepare_dir`](super::fuse::prepare_dir) returned. The
/// watchdog does nothing before the first heartbeat, which the reader sends once the mount is in service.
///
/// # Errors
/// When the pipe or the process cannot be created.
pub fn spawn(exe: &Path, dir: &Path, timeout: Duration) -> io::Result<Watchdog> {
    let (read, write) = io::pipe()?;
    let child = Command::new(exe)
        .arg("watchdog")
        .arg("--mount")
        .arg(dir)
        .arg("--source")
        .arg(source_of(std::process::id()))
        .arg("--timeout")
        .arg(timeout.as_secs_f64().to_string())
        .stdin(Stdio::from(read))
        .stdout(Stdio::null())
        .spawn()?;
    Ok(Watchdog { child, heartbeat: Some(write) })
}

/// The watchdog itself: reads heartbeats from `stdin` until they stop.
///
/// `dir` must be absolute and free of symbolic links, as the daemon mounted it. Only a mount whose source is `source`
/// is ended: when the daemon has died and a new one has taken its place already, there is nothing left to do.
///
/// # Errors
/// When `stdin` cannot be read or polled. The mount is left alone then.
pub fn run(stdin: impl AsFd, dir: &Path, source: &str, timeout: Duration) -> io::Result<Ended> {
    let time = Timespec::try_from(timeout).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut beats = [0; 4096];
    let mut armed = false;
    loop {
        let ready = match poll(&mut [PollFd::new(&stdin, PollFlags::IN)], armed.then_some(&time)) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        if ready == 0 {
            error!(mount = %dir.display(), ?timeout, "the daemon's FUSE reader has stopped: ending its mount by force");
            remove(dir, source);
            return Ok(Ended::Fired);
        }
        match rustix::io::read(&stdin, &mut beats) {
            Ok(0) if armed => {
                remove(dir, source);
                return Ok(Ended::DaemonDied);
            }
            Ok(0) => return Ok(Ended::Farewell),
            Ok(len) if beats.get(..len).is_some_and(|beats| beats.ends_with(FAREWELL)) => {
                return Ok(Ended::Farewell);
            }
            Ok(_) => armed = true,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes our mount from `dir` when it is there; never anybody else's.
fn remove(dir: &Path, source: &str) {
    match mounted_at(dir) {
        Ok(Some(mounted)) if mounted.fs_type == FS_TYPE && mounted.source == source => match unmount(dir) {
            Ok(()) => info!(mount = %dir.display(), "unmounted"),
            Err(error) => warn!(%error, "the mount could not be removed"),
        },
        Ok(_) => {}
        Err(error) => warn!(%error, "cannot tell whether there is a mount left"),
    }
}
