//! A daemon process as its holder sees it.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};
use vdpa_core::Errno;
use vdpa_sys::signals::unblock_in_child;
use vdpa_sys::{clock, exec};

use super::{Program, STATE_ENV};
use crate::client::{SOCKET_ENV, VERSION_ENV};
use crate::progress::{Progress, Watched};
use crate::protocol::{End, Message, VERSION};
use crate::socket;

#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
    /// `None` after the process has closed its end.
    pub(super) socket: Option<OwnedFd>,
    pub(super) progress: OwnedFd,
    pub(super) watched: Watched,
    pub(super) program: Program,
    pub(super) started_ns: u64,
    pub(super) ready: bool,
    pub(super) hung: bool,
}

impl Process {
    /// Starts a program and sends it the start message.
    pub(super) fn start(program: Program, start: &Message, peer: Option<OwnedFd>) -> Result<Self, Errno> {
        let (ours, theirs) = socket::pair()?;
        let (progress, watched) = Progress::create()?;
        let mut command = Command::new(format!("/proc/self/fd/{}", program.file.as_raw_fd()));
        let mut args = program.args.iter().map(|arg| OsStr::from_bytes(arg));
        command.arg0(args.next().unwrap_or_default()).args(args);
        // What is meant for the main process of the service only.
        for name in [
            "NOTIFY_SOCKET",
            "LISTEN_PID",
            "LISTEN_FDS",
            "LISTEN_FDNAMES",
            "WATCHDOG_PID",
            "WATCHDOG_USEC",
            STATE_ENV,
        ] {
            command.env_remove(name);
        }
        command.env(SOCKET_ENV, theirs.as_raw_fd().to_string()).env(VERSION_ENV, VERSION.to_string());
        // Queued before the process runs, so that its first read does not wait.
        let fds: Vec<_> =
            [Some(progress.as_fd()), peer.as_ref().map(|peer| peer.as_fd())].into_iter().flatten().collect();
        socket::send(&ours, 0, start, &fds)?;
        let child = exec::spawn(unblock_in_child(&mut command), vec![theirs])
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(5)))?;
        let pid = i32::try_from(child.id()).map_err(|_| Errno::INVAL)?;
        // The id is valid until `waitid` below has collected the child.
        let id = Pid::from_raw(pid).ok_or(Errno::INVAL)?;
        let pidfd = pidfd_open(id, PidfdFlags::empty()).map_err(socket::errno)?;
        let started_ns = clock::monotonic_ns();
        Ok(Self {
            pid,
            pidfd,
            socket: Some(ours),
            progress,
            watched,
            program,
            started_ns,
            ready: false,
            hung: false,
        })
    }

    pub(super) fn signal(&self, signal: Signal) {
        if let Err(error) = pidfd_send_signal(&self.pidfd, signal) {
            tracing::debug!(pid = self.pid, %error, "the process cannot be signalled");
        }
    }

    /// Whether all its threads are stopped by a signal (SIGSTOP and the like, not by a debugger).
    pub(super) fn is_stopped(&self) -> bool {
        let look = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        matches!(waitid(WaitId::PidFd(self.pidfd.as_fd()), look), Ok(Some(status)) if status.stopped())
    }

    /// Collects the process, which has ended or is about to.
    pub(super) fn wait(&self) -> End {
        let heard_ns = clock::monotonic_ns();
        let status = loop {
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED) {
                Err(rustix::io::Errno::INTR) => {}
                result => break result.ok().flatten(),
            }
        };
        let mut end = End { hung: self.hung, heard_ns, pid: self.pid, ..End::default() };
        if let Some(status) = status {
            end.signal = status.terminating_signal().unwrap_or(0);
            end.status = status.exit_status().unwrap_or(0);
            end.core = status.dumped();
        }
        end
    }

    pub(super) fn kill(&self) -> End {
        self.signal(Signal::KILL);
        self.wait()
    }

    /// Sends an answer or event. A process that reads nothing is left to the detection of hangs.
    pub(super) fn send(&self, number: u32, message: &Message, fds: &[std::os::fd::BorrowedFd<'_>]) {
        if let Some(socket) = &self.socket
            && let Err(errno) = socket::send(socket, number, message, fds)
        {
            tracing::debug!(pid = self.pid, %errno, "a message did not reach the process");
        }
    }
}
