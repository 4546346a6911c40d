//! The processes an orchestrator starts: a private daemon and a tenant.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command as Program, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use thiserror::Error;
use vdpa_sys::exec::end_with_starter;

use super::wire::{Command, Event, TenantConfig};
use vdpa_control::Front;

/// How long a daemon may take to start and to stop.
const DAEMON_LIMIT: Duration = Duration::from_secs(30);
/// How long a tenant may take to stop.
const TENANT_LIMIT: Duration = Duration::from_secs(2);

/// Why a process cannot be used.
#[derive(Debug, Error)]
pub enum PeerError {
    /// It does not start.
    #[error("cannot start {}", program.display())]
    Start {
        /// What was to be started.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It ended or said nothing that makes sense.
    #[error("the {who} {problem}")]
    Unusable {
        /// `daemon` or `tenant`.
        who: &'static str,
        /// What happened.
        problem: String,
    },
    /// It stopped listening.
    #[error("the tenant does not take commands any more")]
    Deaf(#[source] io::Error),
}

/// A child whose lines of output arrive in a channel, so that waiting for one has a limit.
#[derive(Debug)]
struct Process {
    who: &'static str,
    child: Child,
    lines: Receiver<String>,
}

impl Process {
    fn start(who: &'static str, program: &mut Program) -> Result<Self, PeerError> {
        let spawned = program.stdout(Stdio::piped()).spawn();
        let mut child =
            spawned.map_err(|source| PeerError::Start { program: program.get_program().into(), source })?;
        let (send, lines) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || forward(stdout, &send));
        }
        Ok(Self { who, child, lines })
    }

    fn line(&mut self, limit: Duration) -> Result<String, PeerError> {
        let problem = match self.lines.recv_timeout(limit) {
            Ok(line) => return Ok(line),
            Err(RecvTimeoutError::Timeout) => format!("has said nothing for {} s", limit.as_secs()),
            Err(RecvTimeoutError::Disconnected) => match self.child.wait() {
                Ok(status) => format!("has ended ({status})"),
                Err(e) => format!("has ended ({e})"),
            },
        };
        Err(PeerError::Unusable { who: self.who, problem })
    }

    /// Waits until nobody is left who could say something; whether that is so within `limit`.
    fn is_silent_within(&self, limit: Duration) -> bool {
        let begin = Instant::now();
        loop {
            match self.lines.recv_timeout(limit.saturating_sub(begin.elapsed())) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) => return false,
            }
        }
    }

    /// Waits for the end, and enforces it after `limit`.
    fn end(&mut self, limit: Duration) {
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

/// A daemon with a socket and a directory of its own. Dropping it ends it, and so does the end of the thread that has
/// started it.
#[derive(Debug)]
pub struct PrivateDaemon {
    process: Process,
    socket: PathBuf,
}

impl PrivateDaemon {
    /// Starts `vdpad` in `directory` and waits until it serves; its device files are there as well, unless they are
    /// character devices.
    ///
    /// # Errors
    /// [`PeerError`].
    pub fn start(vdpad: &Path, directory: &Path, front: Front) -> Result<Self, PeerError> {
        let socket = directory.join("control.sock");
        let mut program = Program::new(vdpad);
        match front {
            Front::Cuse => program.args(["--front", "cuse"]),
            Front::Auto | Front::Fuse => program.arg("--dir").arg(directory.join("dev")),
        };
        program.arg("--socket").arg(&socket).args(["--log", "warn"]).stdin(Stdio::null());
        let mut process = Process::start("daemon", end_with_starter(&mut program))?;
        while process.line(DAEMON_LIMIT)? != "ready" {}
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
        // Not after it was waited for: the number could be somebody else's.
        if let (Some(pid), Ok(None)) = (pid, self.process.child.try_wait()) {
            let _ = kill_process(pid, Signal::TERM);
        }
        self.process.end(DAEMON_LIMIT);
    }
}

/// A tenant, whichever process is it. Dropping it ends it.
#[derive(Debug)]
pub struct TenantProcess {
    /// The first one.
    process: Process,
    commands: Option<ChildStdin>,
    /// The present one, if it is not the first.
    successor: Option<OwnedFd>,
}

impl TenantProcess {
    /// Starts `vdpa-tenant` with descriptors that the configuration names and that are inheritable.
    ///
    /// # Errors
    /// [`PeerError::Start`].
    pub fn start(program: &Path, config: &TenantConfig) -> Result<Self, PeerError> {
        let config = serde_json::to_string(config)
            .map_err(|e| PeerError::Start { program: program.into(), source: e.into() })?;
        let mut program = Program::new(program);
        program.arg(config).stdin(Stdio::piped());
        let mut process = Process::start("tenant", &mut program)?;
        let commands = process.child.stdin.take();
        Ok(Self { process, commands, successor: None })
    }

    /// Says something to it.
    ///
    /// # Errors
    /// [`PeerError::Deaf`].
    pub fn tell(&mut self, command: Command) -> Result<(), PeerError> {
        let line = serde_json::to_string(&command).map_err(|e| PeerError::Deaf(e.into()))?;
        let closed = || PeerError::Deaf(io::ErrorKind::BrokenPipe.into());
        writeln!(self.commands.as_ref().ok_or_else(closed)?, "{line}").map_err(PeerError::Deaf)
    }

    /// Its next event.
    ///
    /// # Errors
    /// [`PeerError::Unusable`] when there is none within `limit`, or the tenant has ended.
    pub fn event(&mut self, limit: Duration) -> Result<Event, PeerError> {
        let line = self.process.line(limit)?;
        let event = serde_json::from_str(&line)
            .map_err(|e| PeerError::Unusable { who: "tenant", problem: format!("says \"{line}\": {e}") })?;
        if let Event::Update { report, .. } = &event
            && report.successor != report.predecessor
        {
            // It listens and cannot have ended. Without a pidfd (ancient kernels) it is only asked to end, later.
            self.successor =
                Pid::from_raw(report.successor).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        }
        Ok(event)
    }

    /// Its next event that is not about progress. `limit` is for each event.
    ///
    /// # Errors
    /// As [`event`](Self::event); also when the tenant says that it has failed.
    pub fn answer(&mut self, limit: Duration) -> Result<Event, PeerError> {
        let begin = Instant::now();
        loop {
            match self.event(limit)? {
                Event::Progress(_) if begin.elapsed() < limit => {}
                Event::Progress(_) => {
                    let problem = format!("has not answered within {} s", limit.as_secs());
                    return Err(PeerError::Unusable { who: "tenant", problem });
                }
                Event::Failed { error, .. } => {
                    return Err(PeerError::Unusable {
                        who: "tenant",
                        problem: format!("has failed: {error}"),
                    });
                }
                event => return Ok(event),
            }
        }
    }
}

impl Drop for TenantProcess {
    fn drop(&mut self) {
        // The end of its input is the sign to stop.
        drop(self.commands.take());
        if !self.process.is_silent_within(TENANT_LIMIT)
            && let Some(successor) = &self.successor
        {
            let _ = pidfd_send_signal(successor, Signal::KILL);
        }
        self.process.end(TENANT_LIMIT);
    }
}
