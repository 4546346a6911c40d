//! The child processes of an orchestrator: a private daemon and a client.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command as Program, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use thiserror::Error;
use vdpa_sys::exec::terminate_with_parent;

use super::wire::{ClientConfig, Command, Event};
use vdpa_control::Front;

/// Time for a daemon to start and to stop.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for a client to stop.
const CLIENT_STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a process cannot be used.
#[derive(Debug, Error)]
pub enum ProcessError {
    /// It could not be started.
    #[error("cannot start {}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// It has ended, does not respond, or does not follow the protocol.
    #[error("the {who} {problem}")]
    Unusable {
        /// `daemon` or `client`.
        who: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A command could not be sent.
    #[error("cannot send a command to the client")]
    Send(#[source] io::Error),
}

/// A child process. A thread forwards its lines of output to a channel, so that waiting for one can time out.
#[derive(Debug)]
struct Process {
    who: &'static str,
    child: Child,
    lines: Receiver<String>,
}

impl Process {
    fn start(who: &'static str, program: &mut Program) -> Result<Self, ProcessError> {
        let spawned = program.stdout(Stdio::piped()).spawn();
        let mut child = spawned
            .map_err(|source| ProcessError::Start { program: program.get_program().into(), source })?;
        let (send, lines) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || forward(stdout, &send));
        }
        Ok(Self { who, child, lines })
    }

    fn line(&mut self, limit: Duration) -> Result<String, ProcessError> {
        let problem = match self.lines.recv_timeout(limit) {
            Ok(line) => return Ok(line),
            Err(RecvTimeoutError::Timeout) => format!("has written nothing for {} s", limit.as_secs()),
            Err(RecvTimeoutError::Disconnected) => match self.child.wait() {
                Ok(status) => format!("has ended ({status})"),
                Err(e) => format!("has ended ({e})"),
            },
        };
        Err(ProcessError::Unusable { who: self.who, problem })
    }

    /// Waits until every process that has the output open has ended. Returns whether that happened within `limit`.
    fn output_ends_within(&self, limit: Duration) -> bool {
        let begin = Instant::now();
        loop {
            match self.lines.recv_timeout(limit.saturating_sub(begin.elapsed())) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => return false,
            }
        }
    }

    /// Waits until it has ended, and kills it after `limit`.
    fn wait_or_kill(&mut self, limit: Duration) {
        let begin = Instant::now();
        while begin.elapsed() < limit {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn forward(stdout: ChildStdout, lines: &mpsc::Sender<String>) {
    for line in BufReader::new(stdout).lines() {
        let Ok(line) = line else { return };
        if lines.send(line).is_err() {
            return;
        }
    }
}

/// A daemon with a socket and a directory of its own. It is stopped when this is dropped, or when the thread that started it ends.
#[derive(Debug)]
pub struct PrivateDaemon {
    process: Process,
    socket: PathBuf,
}

impl PrivateDaemon {
    /// Starts `vdpad` and waits until it is ready. Its socket is in `directory`, and so are its device files unless they are
    /// character devices.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn start(vdpad: &Path, directory: &Path, front: Front) -> Result<Self, ProcessError> {
        Self::start_with(vdpad, directory, front, "warn", &[])
    }

    /// As [`start`](Self::start), with what it logs, and more arguments.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn start_with(
        vdpad: &Path,
        directory: &Path,
        front: Front,
        log: &str,
        args: &[&str],
    ) -> Result<Self, ProcessError> {
        let socket = directory.join("control.sock");
        let mut program = Program::new(vdpad);
        match front {
            Front::Cuse => program.args(["--front", "cuse"]),
            Front::Vduse => program.args(["--front", "vduse"]).arg("--dir").arg(directory.join("dev")),
            Front::Auto | Front::Fuse => program.arg("--dir").arg(directory.join("dev")),
        };
        program.arg("--socket").arg(&socket).args(["--log", log]).args(args).stdin(Stdio::null());
        let mut process = Process::start("daemon", terminate_with_parent(&mut program))?;
        while process.line(DAEMON_TIMEOUT)? != "ready" {}
        Ok(Self { process, socket })
    }

    /// Its control socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }
}

impl Drop for PrivateDaemon {
    fn drop(&mut self) {
        let pid = i32::try_from(self.process.child.id()).ok().and_then(Pid::from_raw);
        // Only while it is running: after it was waited for, its process id can be reused.
        if let (Some(pid), Ok(None)) = (pid, self.process.child.try_wait()) {
            let _ = kill_process(pid, Signal::TERM);
        }
        self.process.wait_or_kill(DAEMON_TIMEOUT);
    }
}

/// A client, over all processes that it consists of in turn. Dropping it stops the client.
#[derive(Debug)]
pub struct ClientProcess {
    /// The first process.
    process: Process,
    commands: Option<ChildStdin>,
    /// The present process, if it is not the first one.
    successor: Option<OwnedFd>,
}

impl ClientProcess {
    /// Starts the client. The descriptors that the configuration names must be inheritable.
    ///
    /// # Errors
    /// [`ProcessError::Start`].
    pub fn start(program: &Path, config: &ClientConfig) -> Result<Self, ProcessError> {
        let config = serde_json::to_string(config)
            .map_err(|e| ProcessError::Start { program: program.into(), source: e.into() })?;
        let mut program = Program::new(program);
        program.arg(config).stdin(Stdio::piped());
        let mut process = Process::start("client", &mut program)?;
        let commands = process.child.stdin.take();
        Ok(Self { process, commands, successor: None })
    }

    /// Sends a command.
    ///
    /// # Errors
    /// [`ProcessError::Send`].
    pub fn send(&mut self, command: Command) -> Result<(), ProcessError> {
        let line = serde_json::to_string(&command).map_err(|e| ProcessError::Send(e.into()))?;
        let closed = || ProcessError::Send(io::ErrorKind::BrokenPipe.into());
        writeln!(self.commands.as_ref().ok_or_else(closed)?, "{line}").map_err(ProcessError::Send)
    }

    /// Receives the next event.
    ///
    /// # Errors
    /// [`ProcessError::Unusable`] when there is none within `limit`, or the client has ended.
    pub fn event(&mut self, limit: Duration) -> Result<Event, ProcessError> {
        let line = self.process.line(limit)?;
        let event = serde_json::from_str(&line).map_err(|e| ProcessError::Unusable {
            who: "client",
            problem: format!("has sent \"{line}\": {e}"),
        })?;
        if let Event::Update { report, .. } = &event
            && report.successor != report.predecessor
        {
            // It cannot have ended yet. On kernels without pidfds it is not killed if it does not stop by itself.
            self.successor =
                Pid::from_raw(report.successor).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        }
        Ok(event)
    }

    /// Receives the next event that is not [`Event::Progress`], within `limit`.
    ///
    /// # Errors
    /// As [`event`](Self::event), and for [`Event::Failed`].
    pub fn response(&mut self, limit: Duration) -> Result<Event, ProcessError> {
        let begin = Instant::now();
        loop {
            match self.event(limit)? {
                Event::Progress(_) if begin.elapsed() < limit => {}
                Event::Progress(_) => {
                    let problem = format!("has not answered within {} s", limit.as_secs());
                    return Err(ProcessError::Unusable { who: "client", problem });
                }
                Event::Failed { error, .. } => {
                    return Err(ProcessError::Unusable {
                        who: "client",
                        problem: format!("has failed: {error}"),
                    });
                }
                event => return Ok(event),
            }
        }
    }
}

impl Drop for ClientProcess {
    fn drop(&mut self) {
        // The client stops at the end of its input.
        drop(self.commands.take());
        if !self.process.output_ends_within(CLIENT_STOP_TIMEOUT)
            && let Some(successor) = &self.successor
        {
            let _ = pidfd_send_signal(successor, Signal::KILL);
        }
        self.process.wait_or_kill(CLIENT_STOP_TIMEOUT);
    }
}
