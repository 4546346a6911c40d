//! The queue of one device: requests in the order they came, answered by one thread.
//!
//! ```text
//!   reader --push--> queue --> thread --call--> DeviceFile
//!                      |          |
//!                 scan (reader) --+--> EIO in place of a device that takes too long
//! ```
//! Whoever answers takes the [`Ticket`] first, so each request is answered exactly once.

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tracing::{debug, error, warn};
use vdpa_core::Errno;
use vdpa_sys::fuse::Connection;
use vdpa_sys::uapi::fuse::{IoctlIn, IoctlOut, OpenOut, PollOut, WriteOut, open_flags};
use zerocopy::IntoBytes;

use super::device::{DeviceFile, IoctlCall, Opener};
use super::is_past;

/// A device that nobody has open keeps its thread this long, so that a close and open in a row do not start one
/// each time.
const LINGER: Duration = Duration::from_millis(500);
/// Virtual memory only; handlers of devices are shallow.
const STACK: usize = 512 << 10;
/// Of these bits: no file position (writes are messages), no page cache, no FLUSH at close.
const OPEN_FLAGS: u32 =
    open_flags::DIRECT_IO | open_flags::STREAM | open_flags::NONSEEKABLE | open_flags::NOFLUSH;

/// What a device is asked.
#[derive(Debug)]
pub(super) enum Work {
    Open(Opener),
    Release { fh: u64 },
    Ioctl { tid: u32, args: IoctlIn, input: Vec<u8> },
    Write { fh: u64, tid: u32, data: Vec<u8> },
    Poll,
}

impl Work {
    fn describe(&self) -> String {
        match self {
            Self::Open(_) => "open".into(),
            Self::Release { .. } => "release".into(),
            Self::Ioctl { args, .. } => format!("ioctl {:#010x}", args.cmd),
            Self::Write { data, .. } => format!("write of {} bytes", data.len()),
            Self::Poll => "poll".into(),
        }
    }
}

/// How many requests of a connection are being worked on.
#[derive(Clone, Debug, Default)]
pub(super) struct InProgress(Arc<AtomicUsize>);

impl InProgress {
    pub(super) fn any(&self) -> bool {
        self.0.load(Ordering::Acquire) > 0
    }

    fn one_more(&self) -> Self {
        self.0.fetch_add(1, Ordering::AcqRel);
        self.clone()
    }
}

/// The right to answer one request.
#[derive(Debug)]
struct Ticket {
    unique: u64,
    since: Instant,
    taken: AtomicBool,
    count: InProgress,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.count.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Ticket {
    /// Whether the caller is the one to answer.
    fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::AcqRel)
    }
}

#[derive(Debug)]
struct Job {
    /// `None` for what is answered already (RELEASE).
    ticket: Option<Arc<Ticket>>,
    work: Work,
}

/// The call the thread is in.
struct Current {
    ticket: Option<Arc<Ticket>>,
    since: Instant,
    what: String,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    current: Option<Current>,
    /// Successful opens that were not released.
    opens: HashSet<u64>,
    /// Whether there is a thread.
    running: bool,
    /// Whether the current call has been given up.
    hung: bool,
    /// Whether the mount is gone.
    ended: bool,
}

impl State {
    /// Takes the requests somebody waits for out of the queue.
    fn take_unanswered(&mut self) -> Vec<Job> {
        let (refused, kept): (Vec<_>, Vec<_>) = self.queue.drain(..).partition(|job| job.ticket.is_some());
        self.queue = VecDeque::from(kept);
        refused
    }
}

/// One device of the mount.
pub(super) struct Lane {
    name: String,
    file: Arc<dyn DeviceFile>,
    connection: Connection,
    count: InProgress,
    state: Mutex<State>,
    wake: Condvar,
    idle: Condvar,
}

impl Lane {
    /// Requests in progress are counted in `count`.
    pub(super) fn new(
        name: &str,
        file: Arc<dyn DeviceFile>,
        connection: Connection,
        count: InProgress,
    ) -> Arc<Self> {
        let (state, wake, idle) = (Mutex::default(), Condvar::new(), Condvar::new());
        Arc::new(Self { name: name.into(), file, connection, count, state, wake, idle })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Queues a request that has to be answered. Called by the reader; does not block.
    pub(super) fn push(self: &Arc<Self>, unique: u64, work: Work) {
        let count = self.count.one_more();
        let ticket = Ticket { unique, since: Instant::now(), taken: AtomicBool::new(false), count };
        self.queue(Job { ticket: Some(Arc::new(ticket)), work });
    }

    /// Queues the release of `fh`, which the reader has answered: the kernel waits for nothing, and holding its
    /// answer back would let an OPEN overtake later releases (they are background requests, of which the kernel
    /// limits the number).
    pub(super) fn push_release(self: &Arc<Self>, fh: u64) {
        self.queue(Job { ticket: None, work: Work::Release { fh } });
    }

    fn queue(self: &Arc<Self>, job: Job) {
        let mut state = self.state.lock();
        if (state.hung || state.ended) && job.ticket.is_some() {
            drop(state);
            return self.give_up(&job);
        }
        state.queue.push_back(job);
        if state.running {
            self.wake.notify_one();
            return;
        }
        let lane = Arc::clone(self);
        let name: String = self.name.chars().take(15).collect();
        match thread::Builder::new().name(name).stack_size(STACK).spawn(move || lane.run()) {
            Ok(_) => state.running = true,
            Err(source) => {
                error!(device = %self.name, %source, "cannot start the thread of a device");
                // What must reach the device waits for the next request; the rest is refused.
                let refused = state.take_unanswered();
                drop(state);
                refused.iter().for_each(|job| self.give_up(job));
            }
        }
    }

    /// The thread of the device.
    fn run(&self) {
        while let Some(job) = self.next() {
            self.perform(&job);
            let mut state = self.state.lock();
            state.current = None;
            if std::mem::take(&mut state.hung) {
                warn!(device = %self.name, request = job.work.describe(), "the device answers again");
            }
        }
    }

    /// The next job; `None` when the thread is to end.
    fn next(&self) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                let ticket = job.ticket.clone();
                let since = ticket.as_ref().map_or_else(Instant::now, |ticket| ticket.since);
                state.current = Some(Current { ticket, since, what: job.work.describe() });
                return Some(job);
            }
            let idle =
                state.ended || state.opens.is_empty() && self.wake.wait_for(&mut state, LINGER).timed_out();
            if idle && state.queue.is_empty() && (state.ended || state.opens.is_empty()) {
                state.running = false;
                self.idle.notify_all();
                return None;
            }
            if !state.opens.is_empty() && state.queue.is_empty() {
                self.wake.wait(&mut state);
            }
        }
    }

    fn perform(&self, job: &Job) {
        match &job.work {
            Work::Open(opener) => self.open(job, opener),
            Work::Release { fh } => {
                if self.state.lock().opens.remove(fh) {
                    self.release(*fh);
                }
            }
            Work::Ioctl { tid, args, input } => {
                let (handle, tid, cmd, out_size) = (args.fh, *tid, args.cmd, args.out_size);
                let call = IoctlCall { handle, tid, cmd, arg: args.arg, input, out_size };
                let result = self.guarded(&job.work, || self.file.ioctl(&call));
                match result {
                    Ok(reply) if reply.out.len() > args.out_size as usize => {
                        error!(device = %self.name, request = job.work.describe(), len = reply.out.len(), room = args.out_size,
                            "the device answers with more than the caller has room for");
                        self.answer(job, Err(Errno::IO));
                    }
                    Ok(reply) => {
                        let out = IoctlOut { result: reply.result, ..IoctlOut::default() };
                        self.answer(job, Ok(&[out.as_bytes(), &reply.out]));
                    }
                    // In the result and not in the header, which cannot carry ENOTSUPP (524).
                    Err(errno) => {
                        let out = IoctlOut { result: -errno.raw(), ..IoctlOut::default() };
                        self.answer(job, Ok(&[out.as_bytes()]));
                    }
                }
                // A panic has been logged.
                let _ = self.guarded(&job.work, || {
                    self.file.after_reply();
                    Ok(())
                });
            }
            Work::Write { fh, tid, data } => {
                let result = self.guarded(&job.work, || self.file.write(*fh, *tid, data));
                // vhost returns 72 for an IOTLB message of 40 bytes. FUSE cannot: fuse_send_write() makes the
                // caller's write fail with EIO when the answer exceeds what was written (tried on Linux 6.18).
                // Such a caller sees its own length instead; clients write 72 bytes.
                let size = result.map(|size| size.min(u32::try_from(data.len()).unwrap_or(u32::MAX)));
                match size {
                    Ok(size) => self.answer(job, Ok(&[WriteOut { size, padding: 0 }.as_bytes()])),
                    Err(errno) => self.answer(job, Err(errno)),
                };
            }
            Work::Poll => {
                let revents = self.guarded(&job.work, || Ok(self.file.poll()));
                match revents {
                    Ok(revents) => self.answer(job, Ok(&[PollOut { revents, padding: 0 }.as_bytes()])),
                    Err(errno) => self.answer(job, Err(errno)),
                };
            }
        }
    }

    fn open(&self, job: &Job, opener: &Opener) {
        let fh = opener.handle;
        match self.guarded(&job.work, || self.file.open(opener)) {
            Ok(()) => {
                let out = OpenOut { fh, open_flags: OPEN_FLAGS, backing_id: 0 };
                // Before the answer: its RELEASE may come at once, and is only seen after this call anyway.
                self.state.lock().opens.insert(fh);
                // Nobody got the file when the answer was too late, or the mount was aborted meanwhile: then no
                // RELEASE will come either.
                let ended = !self.answer(job, Ok(&[out.as_bytes()])) || self.state.lock().ended;
                if ended && self.state.lock().opens.remove(&fh) {
                    self.release(fh);
                }
            }
            Err(errno) => {
                self.answer(job, Err(errno));
            }
        }
    }

    fn release(&self, fh: u64) {
        let release = || {
            self.file.release(fh);
            Ok(())
        };
        // A panic has been logged and there is nobody to tell.
        let _ = self.guarded(&Work::Release { fh }, release);
    }

    /// Calls the device; a panic in it is its own failure and nobody else's.
    fn guarded<T>(&self, work: &Work, call: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
            error!(device = %self.name, request = work.describe(), "the device panicked");
            Err(Errno::IO)
        })
    }

    /// Answers, unless that was done in the device's place; whether the answer reached the kernel.
    fn answer(&self, job: &Job, answer: Result<&[&[u8]], Errno>) -> bool {
        let Some(ticket) = job.ticket.as_ref().filter(|ticket| ticket.take()) else { return false };
        self.send(ticket, answer)
    }

    fn send(&self, ticket: &Ticket, answer: Result<&[&[u8]], Errno>) -> bool {
        let sent = self.connection.reply(ticket.unique, answer);
        if let Err(errno) = sent {
            debug!(device = %self.name, unique = ticket.unique, %errno, "an answer found nobody waiting");
        }
        sent.is_ok()
    }

    fn give_up(&self, job: &Job) {
        self.answer(job, Err(Errno::IO));
    }

    /// Answers `EIO` in place of the device when its current call takes longer than `timeout`. Called again and
    /// again by the reader while a request is in progress.
    pub(super) fn scan(&self, timeout: Duration) {
        let mut state = self.state.lock();
        let Some(current) = state.current.as_ref().filter(|current| is_past(current.since, timeout)) else {
            return;
        };
        let (what, ticket) = (current.what.clone(), current.ticket.clone());
        if let Some(ticket) = ticket.filter(|ticket| ticket.take()) {
            self.send(&ticket, Err(Errno::IO));
        }
        if !std::mem::replace(&mut state.hung, true) {
            error!(device = %self.name, request = what, ?timeout,
                "the device hangs: its requests get EIO until this one returns");
        }
        let refused = state.take_unanswered();
        drop(state);
        refused.iter().for_each(|job| self.give_up(job));
    }

    /// Whether nobody has the device open and nothing is asked of it.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.state.lock();
        state.opens.is_empty() && state.queue.is_empty() && state.current.is_none()
    }

    /// The mount is gone: drops what nobody waits for and releases what is open.
    pub(super) fn end(self: &Arc<Self>) {
        let mut state = self.state.lock();
        state.ended = true;
        state.queue.retain(|job| job.ticket.is_none());
        let opens: Vec<_> = state.opens.iter().copied().collect();
        drop(state);
        for fh in opens {
            self.push_release(fh);
        }
        self.wake.notify_one();
    }

    /// Waits for the end of the thread, after [`Lane::end`]; whether it came.
    pub(super) fn wait_idle(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        while state.running {
            if self.idle.wait_until(&mut state, deadline).timed_out() {
                return !state.running;
            }
        }
        true
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("name", &self.name).finish_non_exhaustive()
    }
}
