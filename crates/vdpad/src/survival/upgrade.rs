//! Replaces the running daemon by another program: both sides.
//!
//! The daemon has the holder start the program as a candidate, which checks what is held and says that it is ready. Until then the
//! daemon goes on, whatever happens. Then the daemon commits and ends at once; the candidate waits for that end and restores the
//! devices as after a crash. What the daemon was doing is found in journals and logs, so there is nothing to stop and nothing to send.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use thiserror::Error;
use vdpa_control::api::{CtlError, UpgradeRequest};
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::error::chain;
use vdpa_holder::client::{Client, Event};
use vdpa_holder::protocol::{End, RollBack};
use vdpa_sys::clock::monotonic_ns;

use vdpa_backend::persist::{DeviceLog, split_key};

use super::{IDENTITY, Identity, Survival, read};
use crate::control::Pauser;
use crate::devices::mgmt_devices;

/// How long the candidate may take to say that it is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(20);

/// Why a candidate does not take over.
#[derive(Debug, Error)]
pub enum TakeOverError {
    /// The holder refused something.
    #[error("cannot speak with the holder: {0}")]
    Holder(Errno),
    /// The device was added by a program that knows more.
    #[error("cannot take over a device: {0}")]
    Device(String),
    /// The daemon goes on.
    #[error("the daemon goes on: {0:?}")]
    NotNeeded(Event),
}

impl Survival {
    /// Replaces this process as the daemon, soon after this returns. Blocks until the candidate is ready.
    ///
    /// # Errors
    /// This process goes on. The errno of opening or starting the program; `EBUSY` during another upgrade; `ECANCELED` when the
    /// candidate has ended, `ETIMEDOUT` when it was not ready in time.
    pub(crate) fn upgrade(&self, request: &UpgradeRequest) -> Result<(), CtlError> {
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
        let peer = self.client.lock().prepare_upgrade(program.as_fd(), &args).map_err(|errno| {
            CtlError::new(errno, format!("cannot start {}: {errno}", path.display()))
                .with_hint("It must be a program that can be executed, for example the next vdpad.")
        })?;
        tracing::info!(program = %path.display(), dry_run = request.dry_run, "upgrade: the candidate is started");
        reach(CrashPoint::UpgradePrepared);
        self.wait_until_ready(&path)?;
        reach(CrashPoint::UpgradeReady);
        if request.dry_run {
            return self.abort();
        }
        let client = Arc::clone(&self.client);
        let pauser = self.pauser.get().cloned();
        let commit = move || commit(&client, pauser.as_ref(), &peer);
        match thread::Builder::new().name("upgrade".into()).spawn(commit) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.abort()?;
                Err(CtlError::new(Errno::AGAIN, format!("no thread for the upgrade: {error}")))
            }
        }
    }

    fn wait_until_ready(&self, path: &Path) -> Result<(), CtlError> {
        match self.next_event(READY_TIMEOUT) {
            Ok(Event::CandidateReady) => Ok(()),
            Ok(event) => Err(CtlError::new(Errno::CANCELED, refusal(event))
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

    /// For a candidate: checks that it can read the journal of every held device and has its management device, says so, and waits until this process is the daemon and
    /// the old one has ended.
    ///
    /// # Errors
    /// The old daemon goes on, and this process is to end.
    pub fn take_over(&mut self) -> Result<(), TakeOverError> {
        let mut client = self.client.lock();
        reach(CrashPoint::CandidateBegun);
        let peer = client.take_peer().ok_or(TakeOverError::Holder(Errno::BADF))?;
        for held in client.list().map_err(TakeOverError::Holder)? {
            let (device, item) = split_key(held.key);
            if device == 0 {
                continue;
            }
            DeviceLog::check(&held).map_err(|error| TakeOverError::Device(chain(&error)))?;
            if item == IDENTITY {
                check(held.fd).map_err(TakeOverError::Device)?;
            }
        }
        reach(CrashPoint::CandidateChecked);
        client.ready().map_err(TakeOverError::Holder)?;
        reach(CrashPoint::CandidateReady);
        match client.next_event(true).map_err(TakeOverError::Holder)? {
            Event::Committed => {}
            event => return Err(TakeOverError::NotNeeded(event)),
        }
        reach(CrashPoint::CommitReceived);
        // The last thread of the old daemon closes the other end. None of them runs from then on.
        wait_for_end(&peer).map_err(TakeOverError::Holder)?;
        reach(CrashPoint::OldEnded);
        self.start.status = client.status().map_err(TakeOverError::Holder)?;
        drop(client);
        *self.phases.lock() = vec![("", monotonic_ns())];
        tracing::info!(generation = self.generation(), "this program goes on for the daemon before it");
        Ok(())
    }
}

/// Ends this process in favour of the candidate.
fn commit(client: &Mutex<Client>, pauser: Option<&Pauser>, _peer: &OwnedFd) {
    // Every request in progress gets its answer, the one for this upgrade too. Later ones wait in the socket.
    let _paused = pauser.map(Pauser::pause);
    // Locked to the end: to the holder this process is not the daemon any more.
    let mut client = client.lock();
    reach(CrashPoint::CommitBegun);
    match client.commit_upgrade() {
        #[expect(clippy::exit, reason = "no state of this process may change any more")]
        Ok(()) => {
            reach(CrashPoint::Committed);
            std::process::exit(0)
        }
        Err(errno) => tracing::error!(%errno, "no upgrade: the candidate has ended at the last moment"),
    }
}

fn wait_for_end(peer: &OwnedFd) -> Result<(), Errno> {
    loop {
        match rustix::io::read(peer, &mut [0; 1]) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Errno::from_raw(error.raw_os_error())),
        }
    }
}

/// Whether this program can make the device again.
fn check(fd: OwnedFd) -> Result<(), String> {
    let text = read(fd).ok_or("what it is cannot be read")?;
    let Identity { request, .. } = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let known = mgmt_devices().iter().any(|mgmt| mgmt.describe().handle() == request.mgmtdev);
    if known {
        Ok(())
    } else {
        Err(format!("{} needs the management device {}", request.name, request.mgmtdev))
    }
}

/// The path of the running program. Another file may be there by now.
fn own_program() -> Result<PathBuf, CtlError> {
    let path = std::fs::read_link("/proc/self/exe").map_err(|error| {
        CtlError::new(Errno::NOENT, format!("the path of this program is unknown: {error}"))
    })?;
    let text = path.to_string_lossy();
    Ok(text.strip_suffix(" (deleted)").map_or_else(|| path.clone(), PathBuf::from))
}

fn refusal(event: Event) -> String {
    match event {
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
