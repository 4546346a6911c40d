//! Replacing the program of the holder, in place: same process, same descriptors.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_sys::exec::{self, set_close_on_exec};
use vdpa_sys::{inherit, memfd};

use super::counts::Counts;
use super::process::Process;
use super::saved::{Saved, SavedDaemon};
use super::table::{Entry, Table};
use super::{Holder, HolderError, Options, Program, Role, RollBack, STATE_ENV, Status, Store};
use crate::progress::Watched;
use crate::protocol::{Item, Message};

const STATE_MAX: usize = 64 << 20;

/// What the last program of this process left.
#[derive(Debug)]
pub(super) struct State {
    number: u32,
    role: Role,
    served: bool,
    status: Status,
    crashes: Vec<u64>,
    daemon: Process,
    counts: Option<Counts>,
    table: Table,
}

impl Holder {
    /// Replaces the program; returns only when that failed, and then everything is as before.
    pub(super) fn replace(&mut self, number: u32, program: &Program) -> Result<(), Errno> {
        if self.candidate.is_some() || self.leaving.is_some() || self.is_stopping() {
            return Err(Errno::BUSY);
        }
        let saved = self.saved(number).ok_or(crate::socket::PIPE)?;
        let state = memfd::sealed(c"vdpa-holder", &saved.encode())?;
        let string = |bytes: &[u8]| CString::new(bytes).map_err(|_| Errno::INVAL);
        let args = program.args.iter().map(|arg| string(arg)).collect::<Result<Vec<_>, _>>()?;
        let mut env = std::env::vars_os()
            .filter(|(name, _)| name != STATE_ENV)
            .map(|(name, value)| string(&[&name.into_vec(), &b"="[..], &value.into_vec()].concat()))
            .collect::<Result<Vec<_>, _>>()?;
        env.push(string(format!("{STATE_ENV}={}", state.as_raw_fd()).as_bytes())?);
        let kept: Vec<_> = self.descriptors().chain([state.as_fd()]).collect();
        let keep = |close| kept.iter().try_for_each(|fd| set_close_on_exec(fd, close));
        let result =
            keep(false).and_then(|()| exec::execve(exec::Program::Fd(program.file.as_fd()), &args, &env));
        keep(true)?;
        match result {
            Ok(never) => match never {},
            Err(errno) => Err(errno),
        }
    }

    fn descriptors(&self) -> impl Iterator<Item = std::os::fd::BorrowedFd<'_>> {
        let daemon = &self.daemon;
        let own = [&daemon.pidfd, &daemon.progress, &*daemon.program.file].map(AsFd::as_fd);
        let held = self.table.0.values().map(|entry| entry.fd.as_fd());
        let counts = self.counts.as_ref().map(AsFd::as_fd);
        own.into_iter().chain(daemon.socket.as_ref().map(AsFd::as_fd)).chain(counts).chain(held)
    }

    /// What the new program needs; `None` if the daemon has closed its socket.
    fn saved(&self, number: u32) -> Option<Saved> {
        let Process { pid, pidfd, socket, progress, program, started_ns, ready, .. } = &self.daemon;
        let items = self.table.0.iter().map(|(&key, Entry { kind, record, fd })| Item {
            key,
            kind: *kind,
            number: fd.as_raw_fd(),
            record: record.clone(),
        });
        Some(Saved {
            number,
            role: self.role,
            served: self.served,
            status: Status { replaced: self.status.replaced + 1, ..self.now() },
            crashes: self.crashes.clone(),
            daemon: SavedDaemon {
                pid: *pid,
                pidfd: pidfd.as_raw_fd(),
                socket: socket.as_ref()?.as_raw_fd(),
                progress: progress.as_raw_fd(),
                file: program.file.as_raw_fd(),
                started_ns: *started_ns,
                ready: *ready,
                args: program.args.join(&0),
            },
            counts: self.counts.as_ref().map_or(-1, Counts::number),
            items: items.collect(),
        })
    }

    /// Goes on where the last program of this process was, and answers the request that replaced it.
    pub(super) fn resume(state: State, options: Options, store: Option<Store>) -> Self {
        let State { number, role, served, status, crashes, daemon, counts, table } = state;
        daemon.send(number, &Message::Answer { errno: 0 }, &[]);
        Self {
            options,
            status: Status { stored: store.is_some(), ..status },
            store,
            counts,
            table,
            daemon,
            role,
            candidate: None,
            leaving: None,
            prepared_ns: 0,
            why: RollBack::Died,
            stopping: false,
            served,
            crashes,
            waiting: None,
            stopped: None,
            looked_ns: 0,
            reload_wanted: false,
            stop_wanted: None,
            reloading: false,
        }
    }
}

/// The state in the memory file that the environment names, if it does.
pub(super) fn inherited() -> Result<Option<State>, HolderError> {
    let wrong = |what| HolderError::State { what };
    let Some(number) = std::env::var_os(STATE_ENV) else { return Ok(None) };
    let number = number.to_str().and_then(|text| text.parse().ok()).ok_or(wrong("no number"))?;
    let fd = inherit::take(number).map_err(|_| wrong("no memory file"))?;
    let bytes = memfd::read_all(fd, STATE_MAX).map_err(|_| wrong("it cannot be read"))?;
    let saved = Saved::decode(&bytes).ok_or(wrong("its content is not of this version"))?;
    take_all(saved).ok_or(wrong("it names a descriptor that was not inherited")).map(Some)
}

/// Takes the descriptors of a state; `None` if one of them is not there.
fn take_all(saved: Saved) -> Option<State> {
    let Saved { number, role, served, status, crashes, daemon, counts, items } = saved;
    let progress = take(daemon.progress)?;
    let daemon = Process {
        pid: daemon.pid,
        pidfd: take(daemon.pidfd)?,
        socket: Some(take(daemon.socket)?),
        watched: Watched::from_fd(&progress).ok()?,
        progress,
        program: Program {
            file: Arc::new(take(daemon.file)?),
            args: daemon.args.split(|&byte| byte == 0).map(<[u8]>::to_vec).collect(),
        },
        started_ns: daemon.started_ns,
        ready: daemon.ready,
        hung: false,
    };
    let counts = if counts < 0 { None } else { Some(Counts::open(take(counts)?)?) };
    let mut table = Table::default();
    for Item { key, kind, number, record } in items {
        table.0.insert(key, Entry { kind, record, fd: take(number)? });
    }
    Some(State { number, role, served, status, crashes, daemon, counts, table })
}

fn take(number: RawFd) -> Option<OwnedFd> {
    inherit::take(number).ok()
}
