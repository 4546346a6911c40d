//! What the daemon and a candidate ask for.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::process::{PidfdGetfdFlags, pidfd_getfd};
use vdpa_core::Errno;
use vdpa_sys::clock;

use super::process::Process;
use super::table::Entry;
use super::{Holder, HolderError, Program, RollBack};
use crate::protocol::{Kind, Message, Role};
use crate::socket::{self, Received, errno};

/// What an answer carries besides success.
enum Reply {
    Done,
    Fd(OwnedFd),
    Message(Message),
    /// Given by another program.
    None,
}

/// The next message of a process, and what to answer to bytes that are none.
fn next(process: &mut Process) -> Option<Received> {
    loop {
        match socket::receive(process.socket.as_ref()?, false) {
            Ok(Some(received)) => return Some(received),
            Ok(None) => process.socket = None,
            Err(Errno::AGAIN) => return None,
            // There is no number to answer, and what follows cannot be trusted: the daemon finds its socket closed.
            Err(errno) => {
                tracing::error!(pid = process.pid, %errno, "the daemon cannot be understood");
                process.socket = None;
            }
        }
    }
}

impl Holder {
    pub(super) fn serve_daemon(&mut self) -> Result<(), HolderError> {
        while let Some(Received { number, message, fds }) = next(&mut self.daemon) {
            if matches!(message, Message::Commit) {
                self.commit(number);
                continue;
            }
            let reply = self.answer(number, message, fds);
            self.reply(number, reply);
        }
        Ok(())
    }

    fn reply(&self, number: u32, reply: Result<Reply, Errno>) {
        let answer = |errno| Message::Answer { errno };
        match reply {
            Ok(Reply::Done) => self.daemon.send(number, &answer(0), &[]),
            Ok(Reply::Fd(fd)) => self.daemon.send(number, &answer(0), &[fd.as_fd()]),
            Ok(Reply::Message(message)) => self.daemon.send(number, &message, &[]),
            Ok(Reply::None) => {}
            Err(errno) => self.daemon.send(number, &answer(errno.raw()), &[]),
        }
    }

    fn answer(&mut self, number: u32, message: Message, fds: Vec<OwnedFd>) -> Result<Reply, Errno> {
        let mut fds = fds.into_iter();
        let mut one = || fds.next().ok_or(Errno::BADF);
        match message {
            Message::Hold { kind: Kind::Ring, .. } => return Err(Errno::INVAL),
            Message::Hold { key, kind, record } => {
                let entry = Entry { kind, record, fd: one()? };
                self.table.hold(key, entry, self.options.items_max, self.store.as_ref())?;
            }
            Message::HoldRing { key, number, record } => {
                let fd = pidfd_getfd(&self.daemon.pidfd, number, PidfdGetfdFlags::empty()).map_err(errno)?;
                let entry = Entry { kind: Kind::Ring, record, fd };
                self.table.hold(key, entry, self.options.items_max, None)?;
            }
            Message::Drop { key } => self.table.release(key, self.store.as_ref())?,
            Message::List { after } => {
                list(self, &self.daemon, number, after);
                return Ok(Reply::None);
            }
            Message::Ready => {
                self.daemon.ready = true;
                self.served = true;
                self.tell_manager();
                if let Some(signal) = self.stop_wanted {
                    self.daemon.signal(signal);
                } else if self.reload_wanted {
                    self.reload();
                }
            }
            Message::Stopping => {
                self.stopping = true;
                if let Some(store) = &self.store {
                    let _ = store.notify("STOPPING=1");
                }
            }
            Message::Prepare { args } => return self.prepare(program(one()?, &args)).map(Reply::Fd),
            Message::Abort => {
                let candidate = self.candidate.as_ref().ok_or(Errno::NOENT)?;
                self.why = RollBack::Asked;
                candidate.signal(rustix::process::Signal::KILL);
            }
            Message::Replace { args } => {
                self.replace(number, &program(one()?, &args))?;
                return Ok(Reply::None);
            }
            Message::AskStatus => return Ok(Reply::Message(Message::Status(self.now()))),
            Message::AskFullStatus => return Ok(Reply::Message(Message::FullStatus(self.now()))),
            _ => return Err(Errno::INVAL),
        }
        Ok(Reply::Done)
    }

    /// Starts a candidate; returns the daemon's end of the socket between the two.
    fn prepare(&mut self, program: Program) -> Result<OwnedFd, Errno> {
        if self.candidate.is_some() || self.leaving.is_some() || self.is_stopping() {
            return Err(Errno::BUSY);
        }
        if self.role == Role::Failed {
            return Err(Errno::CANCELED);
        }
        let (for_daemon, for_candidate) = socket::pair()?;
        let start = Message::Start { role: Role::Candidate, status: self.now(), crash: None };
        self.candidate = Some(Process::start(program, &start, Some(for_candidate))?);
        self.prepared_ns = clock::monotonic_ns();
        self.why = RollBack::Died;
        Ok(for_daemon)
    }

    /// The point of decision of an upgrade: until here the daemon goes on, from here the candidate is the daemon.
    fn commit(&mut self, number: u32) {
        let ready = self.candidate.take_if(|candidate| candidate.ready && !super::has_ended(candidate));
        let Some(candidate) = ready else {
            self.daemon.send(number, &Message::Answer { errno: Errno::CANCELED.raw() }, &[]);
            return;
        };
        let old = std::mem::replace(&mut self.daemon, candidate);
        self.status.upgrades += 1;
        self.status.generation += 1;
        self.role = Role::Daemon;
        (self.waiting, self.stopped) = (None, None);
        self.daemon.send(0, &Message::Committed, &[]);
        old.send(number, &Message::Answer { errno: 0 }, &[]);
        self.leaving = Some((old, clock::monotonic_ns()));
        self.tell_manager();
    }

    /// A candidate may say that it is ready, and look at what is held.
    pub(super) fn serve_candidate(&mut self) {
        while let Some(candidate) = self.candidate.as_mut() {
            let Some(Received { number, message, .. }) = next(candidate) else { return };
            match message {
                Message::Ready => {
                    candidate.ready = true;
                    candidate.send(number, &Message::Answer { errno: 0 }, &[]);
                    self.daemon.send(0, &Message::CandidateReady, &[]);
                }
                Message::AskFullStatus => {
                    let status = self.now();
                    if let Some(candidate) = &self.candidate {
                        candidate.send(number, &Message::FullStatus(status), &[]);
                    }
                }
                Message::List { after } => {
                    if let Some(candidate) = &self.candidate {
                        list(self, candidate, number, after);
                    }
                }
                _ => candidate.send(number, &Message::Answer { errno: Errno::PERM.raw() }, &[]),
            }
        }
    }
}

fn list(holder: &Holder, process: &Process, number: u32, after: Option<u64>) {
    let (items, fds, more): (_, Vec<BorrowedFd<'_>>, _) = holder.table.list(after);
    process.send(number, &Message::Items { more, items }, &fds);
}

fn program(file: OwnedFd, args: &[u8]) -> Program {
    let args = args.strip_suffix(&[0]).unwrap_or(args);
    Program { file: Arc::new(file), args: args.split(|&byte| byte == 0).map(<[u8]>::to_vec).collect() }
}
