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
use super::table::{Entry, Table};
use super::{Holder, HolderError, Options, Program, Role, RollBack, STATE_ENV, Status, Store};
use crate::progress::Watched;
use crate::protocol::{ARGUMENTS_MAX, In, Kind, Message, Out};

/// "VHLD" and the version of the format.
const MAGIC: u64 = 0x2_444c_4856;
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
        if self.candidate.is_some() || self.leaving.is_some() || self.stopping {
            return Err(Errno::BUSY);
        }
        let state = memfd::sealed(c"vdpa-holder", &self.encode(number).ok_or(crate::socket::PIPE)?)?;
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

    fn encode(&self, number: u32) -> Option<Vec<u8>> {
        let mut out = Out(Vec::new());
        out.u64(MAGIC);
        out.u32(number);
        out.u32(self.role as u32);
        out.u32(self.served.into());
        out.status(&Status { replaced: self.status.replaced + 1, ..self.now() });
        out.u32(u32::try_from(self.crashes.len()).ok()?);
        self.crashes.iter().for_each(|&at| out.u64(at));
        let daemon = &self.daemon;
        out.i32(daemon.pid);
        for fd in [&daemon.pidfd, daemon.socket.as_ref()?, &daemon.progress, &*daemon.program.file] {
            out.i32(fd.as_raw_fd());
        }
        out.u64(daemon.started_ns);
        out.u32(daemon.ready.into());
        out.i32(self.counts.as_ref().map_or(-1, Counts::number));
        let args: Vec<u8> = daemon.program.args.join(&0);
        out.bytes(&args);
        for (&key, entry) in &self.table.0 {
            out.u64(key);
            out.u32(entry.kind as u32);
            out.i32(entry.fd.as_raw_fd());
            out.bytes(&entry.record);
        }
        Some(out.0)
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
    decode(&mut In(&bytes)).ok_or(wrong("its content is not of this version")).map(Some)
}

fn decode(input: &mut In<'_>) -> Option<State> {
    (input.u64()? == MAGIC).then_some(())?;
    let number = input.u32()?;
    let role = if input.u32()? == Role::Failed as u32 { Role::Failed } else { Role::Daemon };
    let served = input.bool()?;
    let status = input.status()?;
    let crashes = (0..input.u32()?).map(|_| input.u64()).collect::<Option<Vec<_>>>()?;
    let pid = input.i32()?;
    let (pidfd, socket) = (take(input.i32()?)?, take(input.i32()?)?);
    let (progress, file) = (take(input.i32()?)?, take(input.i32()?)?);
    let (started_ns, ready) = (input.u64()?, input.bool()?);
    let counts = input.i32()?;
    let counts = if counts < 0 { None } else { Some(Counts::open(take(counts)?)?) };
    let args = input.bytes(ARGUMENTS_MAX)?.split(|&byte| byte == 0).map(<[u8]>::to_vec).collect();
    let daemon = Process {
        pid,
        pidfd,
        socket: Some(socket),
        watched: Watched::from_fd(&progress).ok()?,
        progress,
        program: Program { file: Arc::new(file), args },
        started_ns,
        ready,
        hung: false,
    };
    let mut table = Table::default();
    while !input.0.is_empty() {
        let (key, kind) = (input.u64()?, Kind::from_number(input.u32()?)?);
        let fd = take(input.i32()?)?;
        table.0.insert(key, Entry { kind, record: input.record()?, fd });
    }
    Some(State { number, role, served, status, crashes, daemon, counts, table })
}

fn take(number: RawFd) -> Option<OwnedFd> {
    inherit::take(number).ok()
}
