//! Replaces the running daemon by another program: both sides.
//!
//! ```text
//!  daemon                            candidate
//!    | serves                          | takes what is held, reads journals, opens disks, maps memory, makes the devices
//!    | serves                          | says that it is ready, or why not
//!    | accepts no more connections on the control socket
//!    | stops reading requests of files |
//!    | parks its threads               |
//!    | says so, and commits: the holder decides
//!    | answers the command             | takes the rings over, serves; restores what has changed meanwhile
//!    | ends                            | serves the control socket, which both have
//! ```
//! Until the decision the daemon goes on, whatever happens. The two share the io_urings with the memory that is pinned in them, the
//! logs of requests in flight and the journals, so there is nothing to send: what a stopped daemon leaves is what a dead one does.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;
use vdpa_control::api::{CtlError, UpgradeRequest};
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_holder::client::Event;
use vdpa_holder::protocol::{End, RollBack};
use vdpa_sys::clock::monotonic_ns;

use super::{HeldDevices, Survival};
use crate::bus::Bus;
use crate::control::{Paused, Pauser};

/// How long the candidate may take to say that it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(20);
/// How long to wait for the end of the daemon before this one, if an upgrade follows another one at once.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for a candidate to decide, when the holder has ended at the commit.
const DECISION_TIMEOUT: Duration = Duration::from_secs(5);
/// What a daemon says when it serves no more, before it commits.
const STOPPED: &[u8] = b"\0";
/// What a candidate says first. One of a version that does not say it knows nothing of a control socket that is held.
const HELLO: &[u8] = b"\x01";
/// What a candidate says when it is the daemon. Before that it may say why it cannot be.
const GOES_ON: &[u8] = b"\0";
/// Bytes of the longest reason.
const REASON_MAX: usize = 4096;

/// The holder has ended.
const PIPE: Errno = Errno::from_raw(rustix::io::Errno::PIPE.raw_os_error());

/// Why a candidate does not take over.
#[derive(Debug, Error)]
pub enum TakeOverError {
    /// The holder refused something.
    #[error("cannot speak with the holder: {0}")]
    Holder(Errno),
    /// This program cannot serve a device as it is.
    #[error("cannot take over a device: {0}")]
    Device(String),
    /// There is nothing that could be taken over.
    #[error("no device files of the daemon are held")]
    NoFiles,
    /// The daemon goes on.
    #[error("the daemon goes on: {0:?}")]
    NotNeeded(Event),
    /// The threads cannot go on. The devices are restored by another process.
    #[error("the devices cannot be served: {0}")]
    Serve(Errno),
}

impl Survival {
    /// Replaces this process as the daemon. When this returns without an error the next daemon serves, and this process does nothing
    /// any more but to answer; it ends soon. Blocks until the candidate is ready. `stop` stops serving, and `go_on` goes on if there
    /// is no upgrade after all.
    ///
    /// # Errors
    /// This process goes on. The errno of opening or starting the program; `EBUSY` during another upgrade; `ECANCELED` when the
    /// candidate has ended, `ETIMEDOUT` when it was not ready in time; those of `stop`.
    pub(crate) fn upgrade(
        &self,
        request: &UpgradeRequest,
        stop: impl FnOnce() -> Result<(), CtlError>,
        go_on: impl FnOnce(),
    ) -> Result<(), CtlError> {
        let _one = self
            .upgrading
            .try_lock()
            .ok_or_else(|| CtlError::new(Errno::BUSY, "an upgrade is in progress"))?;
        let path = request.binary.clone().map_or_else(own_program, Ok)?;
        if !path.is_absolute() {
            return Err(CtlError::new(Errno::INVAL, "binary is not an absolute path")
                .with_hint("A path such as /usr/bin/vdpad is right."));
        }
        let program = File::open(&path).map_err(|error| {
            let errno = Errno::from_raw(error.raw_os_error().unwrap_or(Errno::IO.raw()));
            CtlError::new(errno, format!("cannot open {}: {error}", path.display()))
        })?;
        let args: Vec<Vec<u8>> = std::env::args_os().map(OsStringExt::into_vec).collect();
        let args: Vec<&[u8]> = args.iter().map(Vec::as_slice).collect();
        self.forget_events();
        let deadline = Instant::now() + LEAVE_TIMEOUT;
        let peer = loop {
            match self.client.lock().prepare_upgrade(program.as_fd(), &args) {
                Err(Errno::BUSY) if Instant::now() < deadline => {}
                result => break result,
            }
            thread::sleep(Duration::from_millis(5));
        };
        let peer = peer.map_err(|errno| {
            CtlError::new(errno, format!("cannot start {}: {errno}", path.display()))
                .with_hint("It must be a program that can be executed, for example the next vdpad.")
        })?;
        tracing::info!(program = %path.display(), dry_run = request.dry_run, "upgrade: the candidate is started");
        reach(CrashPoint::UpgradePrepared);
        self.wait_until_ready(&path, &peer)?;
        let is_early = !has_said_hello(&peer);
        reach(CrashPoint::UpgradeReady);
        if request.dry_run {
            return self.abort();
        }
        // Started before the commit, after which nothing may fail.
        let (committed, commit) = channel::<Option<Paused>>();
        let leave = move || {
            if let Ok(paused) = commit.recv() {
                // Every request in progress gets its answer, the one for this upgrade too.
                paused.into_iter().for_each(Paused::finish);
                // Nothing of this process may change any more: no destructors.
                std::process::exit(0);
            }
        };
        if let Err(error) = thread::Builder::new().name("upgrade".into()).spawn(leave) {
            self.abort()?;
            return Err(CtlError::new(Errno::AGAIN, format!("no thread for the upgrade: {error}")));
        }
        // From here on who connects is served by the next daemon.
        let paused = self.pauser.get().map(Pauser::pause);
        let begin = Instant::now();
        if let Err(error) = stop() {
            self.abort()?;
            return Err(error);
        }
        tracing::debug!(time = ?begin.elapsed(), "upgrade: this process has stopped to serve");
        let aside =
            is_early.then(|| self.control_path.get().and_then(|path| Aside::move_file(path))).flatten();
        say(&peer, STOPPED);
        reach(CrashPoint::CommitBegun);
        match self.commit(&peer) {
            Ok(()) => {
                reach(CrashPoint::Committed);
                aside.into_iter().for_each(Aside::remove);
                let _ = committed.send(paused);
                Ok(())
            }
            Err(error) => {
                go_on();
                Err(error)
            }
        }
    }

    /// The decision. When this returns without an error the candidate is the daemon.
    fn commit(&self, peer: &OwnedFd) -> Result<(), CtlError> {
        let mut client = self.client.lock();
        // The holder answers nothing after the commit, and requests that are in progress then want to know it.
        let status = client.status().unwrap_or(self.start.status);
        let committed = client.commit_upgrade();
        if committed.is_ok() {
            let _ = self.last_status.set(status);
        }
        drop(client);
        match committed {
            Ok(()) => Ok(()),
            // The holder has ended: it may have told the candidate before, which then says so, and ends otherwise.
            Err(errno) if errno == PIPE && goes_on(peer, DECISION_TIMEOUT) => Ok(()),
            Err(errno) => Err(CtlError::new(errno, "the candidate has ended at the last moment")
                .with_hint("The daemon goes on; see its log.")),
        }
    }

    fn wait_until_ready(&self, path: &Path, peer: &OwnedFd) -> Result<(), CtlError> {
        match self.next_event(READY_TIMEOUT) {
            Ok(Event::CandidateReady) => Ok(()),
            Ok(event) => Err(CtlError::new(Errno::CANCELED, refusal(event, &reason(peer)))
                .with_hint(format!("The daemon goes on. {} must be a vdpad; see the log.", path.display()))),
            Err(errno) => {
                self.abort()?;
                Err(CtlError::new(errno, "the candidate has not become ready")
                    .with_hint("The daemon goes on."))
            }
        }
    }

    /// Ends the candidate, and waits for its end.
    fn abort(&self) -> Result<(), CtlError> {
        let failed = |errno| CtlError::new(errno, "the candidate cannot be ended");
        self.client.lock().abort_upgrade().map_err(failed)?;
        // It may have become ready just before.
        while self.next_event(READY_TIMEOUT).map_err(failed)? == Event::CandidateReady {}
        Ok(())
    }

    /// What became of an earlier candidate, if nobody has asked.
    fn forget_events(&self) {
        let mut client = self.client.lock();
        while matches!(client.next_event(false), Ok(Event::CandidateReady | Event::RolledBack { .. })) {}
    }

    /// The holder's next event. Other threads may use the holder meanwhile.
    fn next_event(&self, timeout: Duration) -> Result<Event, Errno> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.client.lock().next_event(false) {
                Err(Errno::AGAIN) if Instant::now() < deadline => {}
                Err(Errno::AGAIN) => return Err(Errno::TIMEDOUT),
                result => return result,
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// For a candidate: makes the devices, says that it is ready, and serves them when this process is the daemon. The old one has
    /// stopped by then.
    ///
    /// # Errors
    /// The old daemon goes on, and this process is to end.
    pub(crate) fn take_over(&self, bus: &Bus, devices: HeldDevices) -> Result<(), TakeOverError> {
        reach(CrashPoint::CandidateBegun);
        let prepared = bus.prepare(devices).map_err(TakeOverError::Device)?;
        reach(CrashPoint::CandidateChecked);
        {
            let mut client = self.client.lock();
            client.ready().map_err(TakeOverError::Holder)?;
            reach(CrashPoint::CandidateReady);
            match client.next_event(true).map_err(TakeOverError::Holder)? {
                Event::Committed => {}
                event => return Err(TakeOverError::NotNeeded(event)),
            }
        }
        reach(CrashPoint::CommitReceived);
        let begin = Instant::now();
        *self.phases.lock() = vec![("", monotonic_ns())];
        self.say(GOES_ON);
        // A daemon of an earlier version does not say that it has stopped: it ends.
        self.peer.lock().as_ref().map_or(Ok(()), wait_until_stopped).map_err(TakeOverError::Holder)?;
        bus.take_over(prepared, || self.devices()).map_err(TakeOverError::Serve)?;
        reach(CrashPoint::TakenOver);
        tracing::info!(generation = self.generation(), time = ?begin.elapsed(), "this program goes on for the daemon before it");
        Ok(())
    }

    /// For a candidate that cannot take over: tells the daemon why.
    pub(crate) fn refuse(&self, error: &TakeOverError) {
        let text = vdpa_core::error::chain(error).to_string();
        self.say(text.as_bytes().get(..REASON_MAX).unwrap_or(text.as_bytes()));
    }

    /// For a candidate: tells the daemon that it is of this version or a later one. Of no effect in a daemon.
    pub(super) fn say_hello(&self) {
        self.say(HELLO);
    }

    /// For a candidate: tells the daemon something.
    fn say(&self, bytes: &[u8]) {
        if let Some(peer) = &*self.peer.lock() {
            say(peer, bytes);
        }
    }
}

/// Tells the other side of an upgrade something, if it listens.
fn say(peer: &OwnedFd, bytes: &[u8]) {
    if let Err(error) = rustix::net::send(peer, bytes, rustix::net::SendFlags::NOSIGNAL) {
        tracing::debug!(%error, "the other process does not listen");
    }
}

/// Waits until the daemon before this one has stopped to serve, or has ended.
fn wait_until_stopped(peer: &OwnedFd) -> Result<(), Errno> {
    loop {
        match rustix::io::read(peer, &mut [0; 1]) {
            // It has ended without having read what this process had said, which takes the place of what it had said.
            Ok(_) | Err(rustix::io::Errno::CONNRESET) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Errno::from_raw(error.raw_os_error())),
        }
    }
}

/// The control socket, moved aside for a candidate of a version that makes one of its own and refuses to start where there is one.
/// Moved back when this is dropped.
struct Aside {
    path: PathBuf,
    aside: PathBuf,
}

impl Aside {
    fn move_file(path: &Path) -> Option<Self> {
        let aside = path.with_extension("former");
        match std::fs::rename(path, &aside) {
            Ok(()) => Some(Self { path: path.to_owned(), aside }),
            Err(error) => {
                tracing::warn!(%error, "the control socket stays where it is: the other program may not start");
                None
            }
        }
    }

    /// It is not needed any more.
    fn remove(self) {
        let _ = std::fs::remove_file(&self.aside);
        std::mem::forget(self);
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        if let Err(error) = std::fs::rename(&self.aside, &self.path) {
            tracing::error!(%error, aside = %self.aside.display(), "the control socket is not where it was");
        }
    }
}

/// Whether the first message of a candidate that is ready is [`HELLO`].
fn has_said_hello(peer: &OwnedFd) -> bool {
    let mut text = [0; HELLO.len() + 1];
    let received = rustix::net::recv(peer, &mut text[..], rustix::net::RecvFlags::DONTWAIT);
    received.is_ok_and(|(len, _)| text.get(..len) == Some(HELLO))
}

/// Whether the candidate says that it is the daemon.
fn goes_on(peer: &OwnedFd, timeout: Duration) -> bool {
    let Ok(timeout) = rustix::time::Timespec::try_from(timeout) else { return false };
    let mut fds = [rustix::event::PollFd::new(peer, rustix::event::PollFlags::IN)];
    let said = rustix::event::poll(&mut fds, Some(&timeout)).is_ok_and(|ready| ready > 0);
    let mut byte = [1];
    said && rustix::io::read(peer, &mut byte).is_ok_and(|len| byte.get(..len) == Some(GOES_ON))
}

/// What a candidate that has ended has said.
fn reason(peer: &OwnedFd) -> String {
    if !has_said_hello(peer) {
        return String::new();
    }
    let mut text = vec![0; REASON_MAX];
    let len =
        rustix::net::recv(peer, &mut text[..], rustix::net::RecvFlags::DONTWAIT).map_or(0, |(len, _)| len);
    String::from_utf8_lossy(text.get(..len).unwrap_or_default()).into_owned()
}

/// The path of the running program. Another file may be there by now.
fn own_program() -> Result<PathBuf, CtlError> {
    let path = std::fs::read_link("/proc/self/exe").map_err(|error| {
        CtlError::new(Errno::NOENT, format!("the path of this program is unknown: {error}"))
    })?;
    let text = path.to_string_lossy();
    Ok(text.strip_suffix(" (deleted)").map_or_else(|| path.clone(), PathBuf::from))
}

fn refusal(event: Event, reason: &str) -> String {
    match event {
        Event::RolledBack { why: RollBack::Died, end: End { signal: 0, .. } } if !reason.is_empty() => {
            format!("the candidate has refused: {reason}")
        }
        Event::RolledBack { why: RollBack::Died, end: End { signal: 0, status, .. } } => {
            format!("the candidate has refused with exit status {status}")
        }
        Event::RolledBack { why: RollBack::Died, end: End { signal, .. } } => {
            format!("the candidate has died by signal {signal}")
        }
        Event::RolledBack { why, .. } => format!("the candidate was ended: {why:?}"),
        event => format!("the holder said {event:?}"),
    }
}
