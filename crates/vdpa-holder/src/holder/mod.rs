//! The holder: keeps what must outlive the daemon, and keeps a daemon running.

mod counts;
mod manager;
mod process;
mod replace;
mod requests;
mod saved;
mod table;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use vdpa_core::Errno;
use vdpa_sys::clock;
use vdpa_sys::signals::SignalFd;
use vdpa_sys::thread_state::waits_for_others;

use crate::client::Held;
use crate::fdstore::{self, Store};
use crate::protocol::{End, Message, Role, RollBack, Status};
use crate::socket;
use counts::Counts;
use process::Process;
use table::{Entry, Table};

/// Access of fuzz targets to internals.
#[cfg(fuzzing)]
pub mod fuzzing {
    /// Reads `bytes` as what a holder leaves to the program that replaces it.
    ///
    /// # Panics
    /// If it is a state that has another form when it is written again.
    pub fn saved(bytes: &[u8]) {
        super::saved::fuzz(bytes);
    }
}

/// Environment variable with the number of the memory file that a replaced holder leaves to the new one.
const STATE_ENV: &str = "VDPA_HOLDER_STATE";
/// The first two end the daemon and the service, the last one has the daemon upgrade itself.
const SIGNALS: [Signal; 3] = [Signal::TERM, Signal::INT, Signal::HUP];

/// Limits. All times are upper bounds of what is tolerated, not delays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The holder kills a daemon of which a busy thread makes no progress for this long, which reads no request for this long,
    /// or which is stopped (SIGSTOP) for this long. `None`: never.
    pub hang: Option<Duration>,
    /// From the start of a process to its `Ready`.
    pub start: Duration,
    /// This many crashes within [`crash_window`](Self::crash_window) are tolerated; one more makes the next daemon's role
    /// [`Role::Failed`].
    pub crash_limit: usize,
    /// See [`crash_limit`](Self::crash_limit).
    pub crash_window: Duration,
    /// From the request for an upgrade to its commit; then the candidate is killed and the daemon goes on.
    pub upgrade: Duration,
    /// From the commit to the end of the old daemon; then it is killed.
    pub leave: Duration,
    /// Items held at most.
    pub items_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            hang: Some(Duration::from_secs(10)),
            start: Duration::from_secs(60),
            crash_limit: 5,
            crash_window: Duration::from_secs(60),
            upgrade: Duration::from_secs(60),
            leave: Duration::from_secs(10),
            items_max: 1 << 16,
        }
    }
}

/// A program: the open file, so that after a crash the very same one is started, whatever lies at its path by then.
#[derive(Clone, Debug)]
pub struct Program {
    /// The executable.
    pub file: Arc<OwnedFd>,
    /// Its arguments, the name first.
    pub args: Vec<Vec<u8>>,
}

/// How a service ended.
#[derive(Debug)]
pub enum Outcome {
    /// The daemon ended after it had said so, or exited before it ever served: its status is the service's.
    Stopped(End),
    /// The daemon of role [`Role::Failed`] ended as well. What was held is returned: what the daemons had made outside their
    /// processes is there still, mounts for example.
    GaveUp(End, Vec<Held>),
}

/// Why a service could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HolderError {
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was being done.
        action: &'static str,
        /// The reason.
        source: Errno,
    },
    /// The state that the last program of this process left cannot be understood.
    #[error("the state of the replaced holder is unusable: {what}")]
    State {
        /// What is wrong.
        what: &'static str,
    },
}

fn system(action: &'static str) -> impl Fn(Errno) -> HolderError {
    move |source| HolderError::System { action, source }
}

/// Runs a service until it ends. To be called by the main process while it has one thread.
///
/// After a [`Replace`](Message::Replace) the new program calls this again, with its own options; `program` is then the
/// one of later upgrades' roll-backs only: the daemon goes on.
///
/// # Errors
/// [`HolderError`]. Everything held is closed then, and the daemon finds its socket closed.
pub fn run(program: Program, options: Options) -> Result<Outcome, HolderError> {
    let limit = getrlimit(Resource::Nofile);
    // Without it less can be held, of which the daemon then hears.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let signals = SIGNALS.map(Signal::as_raw);
    let signals = SignalFd::new(&signals).map_err(system("receive signals"))?;
    let store = Store::from_env().map_err(system("reach the service manager"))?;
    let mut holder = match replace::inherited()? {
        Some(state) => Holder::resume(state, options, store),
        None => Holder::begin(program, options, store)?,
    };
    loop {
        holder.wait(&signals)?;
        if let Some(outcome) = holder.look_after(&signals)? {
            if holder.served {
                // The next start begins anew. Before the first `Ready` it may only have had wrong options.
                holder.table.forget(holder.store.as_ref());
            }
            return Ok(outcome);
        }
    }
}

#[derive(Debug)]
struct Holder {
    options: Options,
    store: Option<Store>,
    /// With a service manager.
    counts: Option<Counts>,
    table: Table,
    status: Status,
    daemon: Process,
    role: Role,
    candidate: Option<Process>,
    /// Daemons that have handed over and are to end.
    leaving: Option<(Process, u64)>,
    /// When the upgrade began.
    prepared_ns: u64,
    /// Why the candidate was killed.
    why: RollBack,
    stopping: bool,
    /// Whether a daemon has ever served.
    served: bool,
    /// When the last crashes were.
    crashes: Vec<u64>,
    /// Since when a request has waited without any progress.
    waiting: Option<u64>,
    /// Since when the daemon has been stopped (SIGSTOP).
    stopped: Option<u64>,
    /// When the daemon's progress was looked at last.
    looked_ns: u64,
    /// SIGHUP came while no daemon served.
    reload_wanted: bool,
    /// The signal that came to end the service, once it has served.
    stop_wanted: Option<Signal>,
    /// The service manager waits for the end of an upgrade.
    reloading: bool,
}

impl Holder {
    fn begin(program: Program, options: Options, store: Option<Store>) -> Result<Self, HolderError> {
        let mut table = Table::default();
        let mut counts = None;
        for restored in fdstore::restored().map_err(system("take descriptors of the service manager"))? {
            match restored.what {
                Ok((counts::KEY, ..)) => counts = Counts::open(restored.fd),
                // They are in its store already.
                Ok((key, kind, record)) => {
                    table.0.insert(key, Entry { kind, record, fd: restored.fd });
                }
                Err(name) => tracing::warn!(name, "an unknown descriptor of the service manager is closed"),
            }
        }
        let mut status = Status {
            pid: i32::try_from(std::process::id()).unwrap_or(0),
            since_ns: clock::monotonic_ns(),
            generation: 1,
            stored: store.is_some(),
            ..Status::default()
        };
        if let Some(counts) = &counts {
            counts.continue_in(&mut status);
            counts.save(&status);
        } else if let Some(store) = &store {
            counts = Some(Counts::create(store).map_err(system("make the memory for its counts"))?);
        }
        let start = Message::Start { role: Role::Daemon, status: table.count_in(status), crash: None };
        let daemon = Process::start(program, &start, None).map_err(system("start the daemon"))?;
        Ok(Self {
            options,
            store,
            counts,
            table,
            status,
            daemon,
            role: Role::Daemon,
            candidate: None,
            leaving: None,
            prepared_ns: 0,
            why: RollBack::Died,
            stopping: false,
            served: false,
            crashes: Vec::new(),
            waiting: None,
            stopped: None,
            looked_ns: 0,
            reload_wanted: false,
            stop_wanted: None,
            reloading: false,
        })
    }

    /// Sleeps until a process or a signal wants attention, or a time is up.
    fn wait(&self, signals: &SignalFd) -> Result<(), HolderError> {
        let time = self.next_look().map(|time| Timespec::try_from(time).unwrap_or_default());
        // Those that are not there are taken by the signals once more.
        let mut fds = [(); 6].map(|()| PollFd::new(signals, PollFlags::IN));
        let candidate = self.candidate.as_ref();
        let sources = [
            Some(self.daemon.pidfd.as_fd()),
            self.daemon.socket.as_ref().map(|fd| fd.as_fd()),
            candidate.map(|process| process.pidfd.as_fd()),
            candidate.and_then(|process| process.socket.as_ref()).map(|fd| fd.as_fd()),
            self.leaving.as_ref().map(|(process, _)| process.pidfd.as_fd()),
        ];
        for (slot, source) in fds.iter_mut().skip(1).zip(sources) {
            if let Some(fd) = source {
                *slot = PollFd::from_borrowed_fd(fd, PollFlags::IN);
            }
        }
        match poll(&mut fds, time.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(system("wait")(socket::errno(error))),
        }
    }

    /// The time to the next deadline or look at the daemon's progress.
    fn next_look(&self) -> Option<Duration> {
        let now = clock::monotonic_ns();
        let left =
            |since: u64, time: Duration| time.saturating_sub(Duration::from_nanos(now.saturating_sub(since)));
        let daemon = if self.daemon.ready {
            self.options.hang.map(|hang| hang / 4)
        } else {
            Some(left(self.daemon.started_ns, self.options.start))
        };
        let upgrade = self.candidate.as_ref().map(|_| left(self.prepared_ns, self.options.upgrade));
        let leaving = self.leaving.as_ref().map(|&(_, since)| left(since, self.options.leave));
        let watchdog = self.store.as_ref().and_then(|store| store.watchdog_left(now));
        [daemon, upgrade, leaving, watchdog].into_iter().flatten().min()
    }

    fn look_after(&mut self, signals: &SignalFd) -> Result<Option<Outcome>, HolderError> {
        while let Some(number) = signals.next_signal() {
            if number == Signal::HUP.as_raw() {
                self.reload();
                continue;
            }
            if let Some(signal) = SIGNALS.into_iter().find(|signal| signal.as_raw() == number) {
                self.stop(signal);
            }
        }
        // What a process has said counts, also when it has ended since.
        self.serve_candidate();
        self.serve_daemon()?;
        self.look_at_candidate();
        self.look_at_leaving();
        self.look_for_hang();
        self.store.iter().for_each(|store| store.feed(clock::monotonic_ns()));
        if !has_ended(&self.daemon) {
            return Ok(None);
        }
        self.serve_daemon()?;
        if !has_ended(&self.daemon) {
            // It had committed an upgrade before it ended.
            return Ok(None);
        }
        let end = self.daemon.wait();
        self.daemon_ended(end)
    }

    /// The daemon has ended: as it said it would, or by a crash, after which there is another one.
    fn daemon_ended(&mut self, end: End) -> Result<Option<Outcome>, HolderError> {
        if let Some(candidate) = self.candidate.take() {
            // It depends on a daemon that hands over.
            candidate.kill();
        }
        if let Some((process, _)) = self.leaving.take() {
            process.kill();
        }
        if self.stopping || self.has_stopped(end) {
            return Ok(Some(Outcome::Stopped(end)));
        }
        manager::log_crash(&end);
        if self.role == Role::Failed {
            return Ok(Some(Outcome::GaveUp(end, self.table.take())));
        }
        let window = u64::try_from(self.options.crash_window.as_nanos()).unwrap_or(u64::MAX);
        self.crashes.retain(|&at| end.heard_ns.saturating_sub(at) < window);
        self.crashes.push(end.heard_ns);
        self.role = if self.crashes.len() > self.options.crash_limit { Role::Failed } else { Role::Daemon };
        self.status.crashes += 1;
        self.status.generation += 1;
        (self.waiting, self.stopped) = (None, None);
        let start = Message::Start { role: self.role, status: self.now(), crash: Some(end) };
        let program = self.daemon.program.clone();
        self.daemon = Process::start(program, &start, None).map_err(system("start the daemon again"))?;
        self.tell_manager();
        Ok(None)
    }

    /// The status as of now.
    fn now(&self) -> Status {
        self.table.count_in(Status { role: self.role, ..self.status })
    }

    fn look_at_candidate(&mut self) {
        let Some(candidate) = &self.candidate else { return };
        let late = clock::monotonic_ns().saturating_sub(self.prepared_ns) >= nanos(self.options.upgrade);
        if late && !has_ended(candidate) {
            self.why = RollBack::Deadline;
            candidate.signal(Signal::KILL);
        } else if has_ended(candidate) {
            let end = candidate.wait();
            self.candidate = None;
            self.daemon.send(0, &Message::RolledBack { why: self.why, end }, &[]);
            let End { pid, signal, status, .. } = end;
            tracing::warn!(pid, signal, status, why = ?self.why, "no upgrade: the candidate has ended, the daemon goes on");
            if self.reloading {
                self.tell_manager();
            }
        }
    }

    fn look_at_leaving(&mut self) {
        let Some((process, since)) = &self.leaving else { return };
        if has_ended(process) {
            process.wait();
            self.leaving = None;
        } else if clock::monotonic_ns().saturating_sub(*since) >= nanos(self.options.leave) {
            process.signal(Signal::KILL);
        }
    }

    /// Kills a daemon that makes no progress; its end is seen as any other.
    fn look_for_hang(&mut self) {
        let now = clock::monotonic_ns();
        let stalled = if self.daemon.ready {
            let Some(hang) = self.options.hang else { return };
            // A holder that was stopped itself, as with the whole service, knows nothing of the time.
            if now.saturating_sub(self.looked_ns) > nanos(hang) / 2 {
                self.daemon.watched.forget();
                (self.waiting, self.stopped) = (None, None);
            }
            self.looked_ns = now;
            let waits = self.table.request_waits();
            let progress = self.daemon.watched.total_changed();
            self.waiting = self.waiting.filter(|_| !progress).or(Some(now)).filter(|_| waits);
            // Its threads may all have slept, and what it has to do is not to be seen from here: kicks, for example.
            self.stopped = self.stopped.or(Some(now)).filter(|_| self.daemon.is_stopped());
            let since = self.waiting.into_iter().chain(self.stopped).min();
            let waited = since.map_or(0, |since| now.saturating_sub(since));
            // A client can have a thread wait for a page of its memory for ever, and must not be able to end the daemon.
            let pid = self.daemon.pid;
            let thread = self.daemon.watched.stalled(now, nanos(hang), |tid| waits_for_others(pid, tid));
            thread.is_some() || waited >= nanos(hang)
        } else {
            now.saturating_sub(self.daemon.started_ns) >= nanos(self.options.start)
        };
        if stalled && !self.daemon.hung {
            // First: whoever reads the log may be the one that hangs.
            self.daemon.hung = true;
            self.daemon.signal(Signal::KILL);
            tracing::error!(pid = self.daemon.pid, "the daemon makes no progress and is killed");
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn has_ended(process: &Process) -> bool {
    let mut fds = [PollFd::new(&process.pidfd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}
