//! A second process that frees the clients of a daemon that has stopped altogether.
//!
//! A client whose request was read and not answered waits uninterruptibly. Inside the daemon
//! [`DeviceFiles`](super::fuse::DeviceFiles) answers for a device that hangs; for a daemon that is stopped, starved or
//! deadlocked there is this process, which only needs names: a forced unmount aborts the connection of a mount, and the
//! file `abort` in sysfs that of a character device.
//!
//! The daemon starts itself again as `vdpad watchdog --source SOURCE --timeout S` with the read end of a pipe as
//! standard input, tells over it what there is to end, and writes to it as long as its reader makes progress. The watchdog
//! never touches a mount with anything but `umount2(2)`: `stat` or `open` there could hang itself. It never holds
//! `/dev/fuse` or `/dev/cuse`, which would keep a dead daemon's files alive.

use std::io::{self, PipeWriter};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{error, info, warn};
use vdpa_sys::fuse::{Connections, FS_TYPE, cuse, mounted_at, unmount};

use super::fuse::source_of;
use super::lifeline::{Guarded, Word, Words};

/// A heartbeat that is late by this makes the watchdog act, unless told otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a watchdog ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The heartbeat stopped for the time given; mounts and devices were ended by force.
    Fired,
    /// The daemon died; the mounts it left behind were removed. Its devices have gone with it.
    DaemonDied,
    /// The daemon ended everything itself, or never began. Nothing was touched.
    Shutdown,
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

/// Starts `exe watchdog --source SOURCE --timeout SECONDS`.
///
/// Called before the first mount or device is made. The watchdog does nothing before the first heartbeat, which the
/// reader sends once it serves.
///
/// # Errors
/// When the pipe or the process cannot be created.
pub fn spawn(exe: &Path, timeout: Duration) -> io::Result<Watchdog> {
    let (read, write) = io::pipe()?;
    let child = Command::new(exe)
        .arg("watchdog")
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
/// Only mounts whose source is `source` are ended: when the daemon has died and a new one has taken its place already,
/// there is nothing left to do.
///
/// # Errors
/// When `stdin` cannot be read or polled. Nothing is ended then.
pub fn run(stdin: impl AsFd, source: &str, timeout: Duration) -> io::Result<Ended> {
    let mut bytes = [0; 4096];
    let mut words = Words::default();
    let mut watch = Watch { source, timeout, guarded: Vec::new(), state: State::Unarmed, connections: None };
    loop {
        let time = watch.patience().map(Timespec::try_from).transpose();
        let time = time.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let ready = match poll(&mut [PollFd::new(&stdin, PollFlags::IN)], time.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        if ready == 0 {
            if watch.goes_on() {
                continue;
            }
            error!(?timeout, "the daemon's reader has stopped: ending its mounts and devices by force");
            watch.end_all();
            return Ok(Ended::Fired);
        }
        let len = match rustix::io::read(&stdin, &mut bytes) {
            Ok(0) if !matches!(watch.state, State::Unarmed) => {
                watch.end_all();
                return Ok(Ended::DaemonDied);
            }
            Ok(0) => return Ok(Ended::Shutdown),
            Ok(len) => len,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
            Err(error) => return Err(error.into()),
        };
        for word in words.read(bytes.get(..len).unwrap_or_default()) {
            match word {
                Word::Beat => watch.state = State::Beating,
                Word::Rest => watch.state = State::Resting { waiting_since: None },
                Word::Farewell => return Ok(Ended::Shutdown),
                Word::Guard(one) => watch.guarded.push(one),
                Word::Release(one) => watch.guarded.retain(|other| *other != one),
            }
        }
    }
}

/// What the watchdog knows.
struct Watch<'a> {
    source: &'a str,
    timeout: Duration,
    guarded: Vec<Guarded>,
    state: State,
    /// Opened at the first rest.
    connections: Option<Connections>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// No beat has come yet: there is nothing of this daemon.
    Unarmed,
    /// Another beat is due.
    Beating,
    /// The daemon sleeps until there is a request. Since when one has been seen to wait.
    Resting { waiting_since: Option<Instant> },
}

impl Watch<'_> {
    /// How long to wait for the next word; `None` for ever.
    fn patience(&self) -> Option<Duration> {
        match self.state {
            State::Unarmed => None,
            State::Beating => Some(self.timeout),
            State::Resting { .. } => Some(self.timeout / 4),
        }
    }

    /// Nothing has come in that time: whether the daemon is still taken to be alive.
    fn goes_on(&mut self) -> bool {
        let State::Resting { waiting_since } = self.state else { return false };
        let waiting_since = self.request_waits().then(|| waiting_since.unwrap_or_else(Instant::now));
        self.state = State::Resting { waiting_since };
        waiting_since.is_none_or(|since| since.elapsed() < self.timeout)
    }

    /// Whether the kernel has a request that was not answered.
    fn request_waits(&mut self) -> bool {
        if self.connections.is_none() {
            self.connections = Connections::open()
                .inspect_err(
                    |errno| warn!(%errno, "requests that wait cannot be seen while the daemon sleeps"),
                )
                .ok();
        }
        let waiting = |one: &Guarded| match one {
            Guarded::Mount(path) => self.connections.as_ref()?.waiting(path, self.source),
            Guarded::Device { name, number } => cuse::waiting(name, *number),
        };
        self.guarded.iter().filter_map(waiting).any(|count| count > 0)
    }

    fn end_all(&self) {
        self.guarded.iter().for_each(|one| end(one, self.source));
    }
}

fn end(guarded: &Guarded, source: &str) {
    match guarded {
        Guarded::Mount(path) => remove(path, source),
        Guarded::Device { name, number } => match cuse::abort(name, *number) {
            Ok(()) => info!(device = name, "aborted"),
            // It ends with the last descriptor of its daemon.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => warn!(device = name, %error, "the device could not be aborted"),
        },
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
