//! A second process that aborts the device files of a server that has stopped, so that their clients do not hang.
//!
//! A client whose FUSE request was read and not answered waits uninterruptibly (`request_wait_answer()` in the kernel's
//! `fs/fuse/dev.c`). When one device hangs, [`DeviceFiles`](super::fuse::DeviceFiles) answers in its place. When the whole
//! server process is stopped, starved or deadlocked, the watchdog acts. It needs names only: a forced unmount aborts the
//! connection of a mount, and the file `abort` in sysfs that of a character device.
//!
//! The server calls [`spawn`] before it makes its first file, which starts a program as
//! `PROGRAM watchdog --source SOURCE --timeout SECONDS` with the read end of a pipe as standard input; usually that is the
//! server's own executable, which then calls [`run`]. The server passes the write end to
//! [`Options::heartbeat`](super::fuse::Options::heartbeat): [`DeviceFiles`](super::fuse::DeviceFiles) names over it what is to
//! be aborted, and sends heartbeats as long as its reader makes progress.
//!
//! The watchdog uses no system call but `umount2(2)` on a mount, because `stat` or `open` could hang there. It never has
//! `/dev/fuse` or `/dev/cuse` open, which would keep the files of a dead server alive.

pub(super) mod protocol;

use std::io::{self, PipeWriter};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{error, info, warn};
use vdpa_sys::fuse::{Connections, FS_TYPE, cuse, mounted_at, unmount};

use self::protocol::{Decoder, Message, Watched};
use super::fuse::source_of;

/// The time without a heartbeat after which the watchdog acts, for servers whose user does not choose one: 10 s.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why [`run`] has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The server stopped: no heartbeat came, or no request was answered, during the time-out. Its mounts and devices were
    /// aborted; the clients' system calls fail with `ECONNABORTED`.
    Fired,
    /// The server died. The mounts that it left behind were removed; its character devices ended with it.
    DaemonDied,
    /// The server ended in order, or ended before it had made a file. Nothing was aborted.
    Shutdown,
}

/// The server's handle of a running watchdog process. Dropping it closes the pipe, unless the pipe was
/// [taken](Self::take_heartbeat); the process ends when the pipe is closed, and is not waited for.
#[derive(Debug)]
pub struct Watchdog {
    child: Child,
    heartbeat: Option<PipeWriter>,
}

impl Watchdog {
    /// Takes the write end of the pipe, for [`Options::heartbeat`](super::fuse::Options::heartbeat) (`None` the second time).
    pub fn take_heartbeat(&mut self) -> Option<PipeWriter> {
        self.heartbeat.take()
    }

    /// The process id of the watchdog.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Blocks until the process has ended, which it does once the heartbeat pipe is closed everywhere: shut the
    /// [`DeviceFiles`](super::fuse::DeviceFiles) down first.
    ///
    /// # Errors
    /// Those of `waitpid(2)`.
    pub fn wait(mut self) -> io::Result<std::process::ExitStatus> {
        drop(self.heartbeat.take());
        self.child.wait()
    }
}

/// Starts `exe watchdog --source SOURCE --timeout SECONDS`; `exe` is to call [`run`] with the two values.
///
/// Called by the server before it makes its first mount or device, on any thread. `timeout` is the time without a heartbeat
/// after which the watchdog acts. It does nothing before the first heartbeat, which the reader sends once it serves.
///
/// # Errors
/// Those of `pipe2(2)` and of starting a process.
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

/// Runs the watchdog: reads heartbeats from `stdin` until they stop, and aborts what the server has made then.
///
/// Called by the program that [`spawn`] starts; blocks until the server has ended or was found to have stopped. Only mounts
/// whose source is `source` are removed: when the server has died, another one may have mounted at the same place.
///
/// # Errors
/// Those of `read(2)` and `poll(2)` on `stdin`, and `EINVAL` for a `timeout` that the kernel cannot represent. Nothing is
/// aborted then.
pub fn run(stdin: impl AsFd, source: &str, timeout: Duration) -> io::Result<Ended> {
    let mut bytes = [0; 4096];
    let mut decoder = Decoder::default();
    let mut monitor =
        Monitor { source, timeout, watched: Vec::new(), state: State::Unarmed, connections: None };
    loop {
        let time = monitor.poll_timeout().map(Timespec::try_from).transpose();
        let time = time.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let ready = match poll(&mut [PollFd::new(&stdin, PollFlags::IN)], time.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        if ready == 0 {
            if monitor.is_server_alive() {
                continue;
            }
            error!(?timeout, "the server's reader has stopped: aborting its mounts and devices");
            monitor.abort_all();
            return Ok(Ended::Fired);
        }
        let len = match rustix::io::read(&stdin, &mut bytes) {
            Ok(0) if !matches!(monitor.state, State::Unarmed) => {
                monitor.abort_all();
                return Ok(Ended::DaemonDied);
            }
            Ok(0) => return Ok(Ended::Shutdown),
            Ok(len) => len,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => continue,
            Err(error) => return Err(error.into()),
        };
        for message in decoder.read(bytes.get(..len).unwrap_or_default()) {
            match message {
                Message::Heartbeat => monitor.state = State::Active,
                Message::Idle => monitor.state = State::Idle { waiting_since: None },
                Message::Shutdown => return Ok(Ended::Shutdown),
                Message::Watch(one) => monitor.watched.push(one),
                Message::Unwatch(one) => monitor.watched.retain(|other| *other != one),
            }
        }
    }
}

/// The state of the watchdog.
struct Monitor<'a> {
    /// Source of the server's mounts.
    source: &'a str,
    timeout: Duration,
    /// The mounts and devices that the server has announced.
    watched: Vec<Watched>,
    state: State,
    /// Opened when the server is idle for the first time.
    connections: Option<Connections>,
}

/// What is known of the server.
#[derive(Clone, Copy, Debug)]
enum State {
    /// No heartbeat has arrived yet: the server has no files.
    Unarmed,
    /// A request is in progress: another heartbeat is due within the time-out.
    Active,
    /// The server sleeps until there is a request. `waiting_since` is when a request was first seen to wait.
    Idle { waiting_since: Option<Instant> },
}

impl Monitor<'_> {
    /// How long to wait for the next message; `None` is without limit.
    fn poll_timeout(&self) -> Option<Duration> {
        match self.state {
            State::Unarmed => None,
            State::Active => Some(self.timeout),
            State::Idle { .. } => Some(self.timeout / 4),
        }
    }

    /// Whether the server counts as alive although no message has arrived during [`poll_timeout`](Self::poll_timeout).
    fn is_server_alive(&mut self) -> bool {
        let State::Idle { waiting_since } = self.state else { return false };
        let waiting_since = self.has_unanswered_request().then(|| waiting_since.unwrap_or_else(Instant::now));
        self.state = State::Idle { waiting_since };
        waiting_since.is_none_or(|since| since.elapsed() < self.timeout)
    }

    /// Whether the kernel has a request for the server that is not answered.
    fn has_unanswered_request(&mut self) -> bool {
        if self.connections.is_none() {
            self.connections = Connections::open()
                .inspect_err(
                    |errno| warn!(%errno, "requests that wait cannot be seen while the server sleeps"),
                )
                .ok();
        }
        let waiting = |one: &Watched| match one {
            Watched::Mount(path) => self.connections.as_ref()?.waiting(path, self.source),
            Watched::Device { name, number } => cuse::waiting(name, *number),
        };
        self.watched.iter().filter_map(waiting).any(|count| count > 0)
    }

    fn abort_all(&self) {
        self.watched.iter().for_each(|one| abort(one, self.source));
    }
}

fn abort(watched: &Watched, source: &str) {
    match watched {
        Watched::Mount(path) => unmount_own(path, source),
        Watched::Device { name, number } => match cuse::abort(name, *number) {
            Ok(()) => info!(device = name, "aborted"),
            // The device has ended with the server's last descriptor of it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => warn!(device = name, %error, "the device could not be aborted"),
        },
    }
}

/// Removes the server's mount from `dir` when it is there, and no other.
fn unmount_own(dir: &Path, source: &str) {
    match mounted_at(dir) {
        Ok(Some(mounted)) if mounted.fs_type == FS_TYPE && mounted.source == source => match unmount(dir) {
            Ok(()) => info!(mount = %dir.display(), "unmounted"),
            Err(error) => warn!(%error, "the mount could not be removed"),
        },
        Ok(_) => {}
        Err(error) => warn!(%error, "cannot tell whether there is a mount left"),
    }
}
