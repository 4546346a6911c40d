//! [`RequestQueue`]: the FUSE requests of one device in the order of arrival, and the thread that handles them.
//!
//! ```text
//!   reader --push--> queue --> thread --call--> DeviceFile
//!                      |          |
//!       check_timeout (reader) ---+--> EIO in place of a device that takes too long
//! ```
//! Both threads claim the [`ReplyToken`] of a request before they reply to it, so each request is answered exactly once.

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
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_sys::fuse::Connection;
use vdpa_sys::uapi::fuse::{IoctlIn, IoctlOut, OpenOut, PollOut, UNIQUE_RESEND, WriteOut, open_flags};
use zerocopy::IntoBytes;

use super::device::{Completed, DeviceFile, IoctlCall, IoctlReply, Opener};
use super::is_past;

/// The thread of a device that is not open ends after this time. A close that is followed by an open keeps the thread.
const IDLE_TIMEOUT: Duration = Duration::from_millis(500);
/// Stack of the thread, in bytes of virtual memory.
const STACK_BYTES: usize = 512 << 10;
/// Flags of the reply to OPEN: no file position (writes are messages), no page cache, no FLUSH at close.
const OPEN_FLAGS: u32 =
    open_flags::DIRECT_IO | open_flags::STREAM | open_flags::NONSEEKABLE | open_flags::NOFLUSH;

/// An operation on a device, which is a call of [`DeviceFile`].
#[derive(Debug)]
pub(super) enum DeviceOp {
    Open(Opener),
    Release { fh: u64 },
    Ioctl { tid: u32, args: IoctlIn, input: Vec<u8> },
    Write { fh: u64, tid: u32, data: Vec<u8> },
    Poll,
}

impl DeviceOp {
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

/// Number of requests of a connection that are in progress.
#[derive(Clone, Debug, Default)]
pub(super) struct RequestCount(Arc<AtomicUsize>);

impl RequestCount {
    pub(super) fn any(&self) -> bool {
        self.0.load(Ordering::Acquire) > 0
    }

    fn increment(&self) -> Self {
        self.0.fetch_add(1, Ordering::AcqRel);
        self.clone()
    }
}

/// The right to reply to one request, which exactly one thread claims.
#[derive(Debug)]
struct ReplyToken {
    unique: u64,
    since: Instant,
    claimed: AtomicBool,
    count: RequestCount,
}

impl Drop for ReplyToken {
    fn drop(&mut self) {
        self.count.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl ReplyToken {
    /// Claims the right to reply; `false` when another thread has claimed it.
    fn claim(&self) -> bool {
        !self.claimed.swap(true, Ordering::AcqRel)
    }
}

/// A request in the queue.
#[derive(Debug)]
struct QueuedRequest {
    /// `None` for a RELEASE that the reader has answered.
    token: Option<Arc<ReplyToken>>,
    op: DeviceOp,
}

impl QueuedRequest {
    const fn is_release(&self) -> bool {
        matches!(self.op, DeviceOp::Release { .. })
    }
}

/// The call that the thread is in.
struct Current {
    token: Option<Arc<ReplyToken>>,
    since: Instant,
    what: String,
}

#[derive(Default)]
struct State {
    requests: VecDeque<QueuedRequest>,
    current: Option<Current>,
    /// Handles of opens that have succeeded and were not released.
    opens: HashSet<u64>,
    /// Whether the thread runs.
    has_thread: bool,
    /// Whether the current call has exceeded the time-out.
    hung: bool,
    /// Whether the connection has ended.
    ended: bool,
}

impl State {
    /// Removes the requests that need a reply from the queue and returns them; releases stay.
    fn take_unanswered(&mut self) -> Vec<QueuedRequest> {
        let (refused, kept): (Vec<_>, Vec<_>) =
            self.requests.drain(..).partition(|request| request.token.is_some() && !request.is_release());
        self.requests = VecDeque::from(kept);
        refused
    }
}

/// The request queue of one device.
pub(super) struct RequestQueue {
    name: String,
    file: Arc<dyn DeviceFile>,
    connection: Connection,
    count: RequestCount,
    state: Mutex<State>,
    wake: Condvar,
    idle: Condvar,
}

impl RequestQueue {
    /// An empty queue without a thread. Requests in progress are counted in `count`.
    pub(super) fn new(
        name: &str,
        file: Arc<dyn DeviceFile>,
        connection: Connection,
        count: RequestCount,
    ) -> Arc<Self> {
        let (state, wake, idle) = (Mutex::default(), Condvar::new(), Condvar::new());
        Arc::new(Self { name: name.into(), file, connection, count, state, wake, idle })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Queues a request that needs a reply. Called by the reader; does not block.
    pub(super) fn push(self: &Arc<Self>, unique: u64, op: DeviceOp) {
        let count = self.count.increment();
        let token = ReplyToken { unique, since: Instant::now(), claimed: AtomicBool::new(false), count };
        self.enqueue(QueuedRequest { token: Some(Arc::new(token)), op });
    }

    /// Queues the release of `fh`, which the reader has answered. The kernel does not wait for it. If the reply were held back,
    /// an OPEN could overtake later releases, because they are background requests, of which the kernel limits the number.
    pub(super) fn push_release(self: &Arc<Self>, fh: u64) {
        self.enqueue(QueuedRequest { token: None, op: DeviceOp::Release { fh } });
    }

    fn enqueue(self: &Arc<Self>, request: QueuedRequest) {
        let mut state = self.state.lock();
        if (state.hung || state.ended) && request.token.is_some() && !request.is_release() {
            drop(state);
            return self.reject(&request);
        }
        state.requests.push_back(request);
        if state.has_thread {
            self.wake.notify_one();
            return;
        }
        let this = Arc::clone(self);
        let name: String = self.name.chars().take(15).collect();
        match thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || this.run()) {
            Ok(_) => state.has_thread = true,
            Err(source) => {
                error!(device = %self.name, %source, "cannot start the thread of a device");
                // Releases stay in the queue until the next request starts a thread; the others are rejected.
                let refused = state.take_unanswered();
                drop(state);
                refused.iter().for_each(|request| self.reject(request));
            }
        }
    }

    /// The device's thread: executes requests until the queue is idle or has ended.
    fn run(&self) {
        while let Some(request) = self.next() {
            self.execute(&request);
            let mut state = self.state.lock();
            state.current = None;
            if std::mem::take(&mut state.hung) {
                warn!(device = %self.name, request = request.op.describe(), "the device answers again");
            }
        }
    }

    /// The next request; `None` when the thread is to end.
    fn next(&self) -> Option<QueuedRequest> {
        let mut state = self.state.lock();
        loop {
            if let Some(request) = state.requests.pop_front() {
                let token = request.token.clone();
                let since = token.as_ref().map_or_else(Instant::now, |token| token.since);
                state.current = Some(Current { token, since, what: request.op.describe() });
                return Some(request);
            }
            let idle = state.ended
                || state.opens.is_empty() && self.wake.wait_for(&mut state, IDLE_TIMEOUT).timed_out();
            if idle && state.requests.is_empty() && (state.ended || state.opens.is_empty()) {
                state.has_thread = false;
                self.idle.notify_all();
                return None;
            }
            if !state.opens.is_empty() && state.requests.is_empty() {
                self.wake.wait(&mut state);
            }
        }
    }

    fn execute(&self, request: &QueuedRequest) {
        reach(CrashPoint::RequestBegun);
        if let Some(token) = &request.token {
            let (unique, resent) = (token.unique & !UNIQUE_RESEND, token.unique & UNIQUE_RESEND != 0);
            if let Some(completed) = self.file.begin_request(unique, resent) {
                return self.reply_completed(request, completed);
            }
            // A close cannot be refused: the device would be in use for ever. If processes die of it, there are too many crashes.
            if !request.is_release() && !self.file.may_begin(unique, resent) {
                return self.refuse(request);
            }
        }
        self.execute_op(request);
        self.file.request_ended();
    }

    /// Answers a request that is not begun again, since processes have died of it.
    fn refuse(&self, request: &QueuedRequest) {
        error!(device = %self.name, request = request.op.describe(), "processes have died with this request: it is not tried again");
        self.reply(request, Err(Errno::IO));
    }

    fn execute_op(&self, request: &QueuedRequest) {
        match &request.op {
            DeviceOp::Open(opener) => self.open(request, opener),
            DeviceOp::Release { fh } => {
                if self.state.lock().opens.remove(fh) {
                    self.release(*fh);
                }
                self.reply(request, Ok(&[]));
            }
            DeviceOp::Ioctl { tid, args, input } => {
                let (handle, tid, cmd, out_size) = (args.fh, *tid, args.cmd, args.out_size);
                let call = IoctlCall { handle, tid, cmd, arg: args.arg, input, out_size };
                self.reply_ioctl(
                    request,
                    args.out_size,
                    self.catch_panic(&request.op, || self.file.ioctl(&call)),
                );
                // A panic was logged.
                let _ = self.catch_panic(&request.op, || {
                    self.file.after_reply();
                    Ok(())
                });
            }
            DeviceOp::Write { fh, tid, data } => {
                let result = self.catch_panic(&request.op, || self.file.write(*fh, *tid, data));
                // vhost returns 72 for an IOTLB message of 40 bytes. FUSE cannot: fuse_send_write() makes the
                // caller's write fail with EIO when the reply exceeds what was written (tried on Linux 6.18).
                // A caller that writes 40 bytes gets its own length instead; clients write 72 bytes.
                let size = result.map(|size| size.min(u32::try_from(data.len()).unwrap_or(u32::MAX)));
                match size {
                    Ok(size) => self.reply(request, Ok(&[WriteOut { size, padding: 0 }.as_bytes()])),
                    Err(errno) => self.reply(request, Err(errno)),
                };
            }
            DeviceOp::Poll => {
                let revents = self.catch_panic(&request.op, || Ok(self.file.poll()));
                match revents {
                    Ok(revents) => self.reply(request, Ok(&[PollOut { revents, padding: 0 }.as_bytes()])),
                    Err(errno) => self.reply(request, Err(errno)),
                };
            }
        }
    }

    fn reply_ioctl(&self, request: &QueuedRequest, room: u32, result: Result<IoctlReply, Errno>) -> bool {
        match result {
            Ok(reply) if reply.out.len() > room as usize => {
                error!(device = %self.name, request = request.op.describe(), len = reply.out.len(), room,
                    "the device answers with more than the caller has room for");
                self.reply(request, Err(Errno::IO))
            }
            Ok(reply) => {
                let out = IoctlOut { result: reply.result, ..IoctlOut::default() };
                self.reply(request, Ok(&[out.as_bytes(), &reply.out]))
            }
            // The errno goes into the result: the header cannot carry ENOTSUPP (524).
            Err(errno) => {
                let out = IoctlOut { result: -errno.raw(), ..IoctlOut::default() };
                self.reply(request, Ok(&[out.as_bytes()]))
            }
        }
    }

    /// Replies to a request that an earlier process had executed.
    fn reply_completed(&self, request: &QueuedRequest, completed: Completed) {
        match completed {
            Completed::Open { handle } => {
                let out = OpenOut { fh: handle, open_flags: OPEN_FLAGS, backing_id: 0 };
                self.state.lock().opens.insert(handle);
                self.reply(request, Ok(&[out.as_bytes()]))
            }
            Completed::Ioctl(reply) => {
                let DeviceOp::Ioctl { tid, args, input } = &request.op else {
                    return self.reject(request);
                };
                let (handle, tid, cmd, out_size) = (args.fh, *tid, args.cmd, args.out_size);
                let call = IoctlCall { handle, tid, cmd, arg: args.arg, input, out_size };
                let reply = self.catch_panic(&request.op, || self.file.answer_again(&call, reply));
                self.reply_ioctl(request, out_size, reply)
            }
            Completed::Write(size) => self.reply(request, Ok(&[WriteOut { size, padding: 0 }.as_bytes()])),
            Completed::Release => {
                if let DeviceOp::Release { fh } = &request.op {
                    self.state.lock().opens.remove(fh);
                }
                self.reply(request, Ok(&[]))
            }
        };
    }

    /// Marks `handles` as open: for a device that was opened in a process that has died.
    pub(super) fn restore_opens(&self, handles: &[u64]) {
        self.state.lock().opens.extend(handles);
    }

    fn open(&self, request: &QueuedRequest, opener: &Opener) {
        let fh = opener.handle;
        match self.catch_panic(&request.op, || self.file.open(opener)) {
            Ok(()) => {
                let out = OpenOut { fh, open_flags: OPEN_FLAGS, backing_id: 0 };
                // Inserted before the reply, because the RELEASE may arrive at once. It is executed after this call.
                self.state.lock().opens.insert(fh);
                // When the reply was too late, or the connection was aborted meanwhile, no process has got the file and
                // the kernel sends no RELEASE.
                let ended = !self.reply(request, Ok(&[out.as_bytes()])) || self.state.lock().ended;
                if ended && self.state.lock().opens.remove(&fh) {
                    self.release(fh);
                }
            }
            Err(errno) => {
                self.reply(request, Err(errno));
            }
        }
    }

    fn release(&self, fh: u64) {
        let release = || {
            self.file.release(fh);
            Ok(())
        };
        // A panic was logged, and a release has no reply.
        let _ = self.catch_panic(&DeviceOp::Release { fh }, release);
    }

    /// Calls the device. A panic in it becomes `EIO`, so that other devices go on.
    fn catch_panic<T>(&self, op: &DeviceOp, call: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| {
            error!(device = %self.name, request = op.describe(), "the device panicked");
            Err(Errno::IO)
        })
    }

    /// Replies to a request, unless the reader has done so after a time-out; whether the reply reached the kernel.
    fn reply(&self, request: &QueuedRequest, reply: Result<&[&[u8]], Errno>) -> bool {
        let Some(token) = request.token.as_ref().filter(|token| token.claim()) else { return false };
        self.send(token, reply)
    }

    fn send(&self, token: &ReplyToken, reply: Result<&[&[u8]], Errno>) -> bool {
        reach(CrashPoint::ReplyReady);
        let sent = self.connection.reply(token.unique, reply);
        reach(CrashPoint::ReplySent);
        if let Err(errno) = sent {
            debug!(device = %self.name, unique = token.unique, %errno, "the kernel does not wait for this reply any more");
        }
        sent.is_ok()
    }

    /// Replies `EIO`.
    fn reject(&self, request: &QueuedRequest) {
        self.reply(request, Err(Errno::IO));
    }

    /// Replies `EIO` in place of the device when its current call takes longer than `timeout`, and to all requests that are
    /// queued behind it. The reader calls it periodically while a request is in progress.
    pub(super) fn check_timeout(&self, timeout: Duration) {
        let mut state = self.state.lock();
        let Some(current) = state.current.as_ref().filter(|current| is_past(current.since, timeout)) else {
            return;
        };
        let (what, token) = (current.what.clone(), current.token.clone());
        if let Some(token) = token.filter(|token| token.claim()) {
            self.send(&token, Err(Errno::IO));
        }
        if !std::mem::replace(&mut state.hung, true) {
            error!(device = %self.name, request = what, ?timeout,
                "the device hangs: its requests get EIO until this one returns");
        }
        let refused = state.take_unanswered();
        drop(state);
        refused.iter().for_each(|request| self.reject(request));
    }

    /// Whether the device is not open and no request is queued or in progress.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.state.lock();
        state.opens.is_empty() && state.requests.is_empty() && state.current.is_none()
    }

    /// The connection has ended: drops requests whose reply cannot be delivered any more, and releases all opens.
    pub(super) fn end(self: &Arc<Self>) {
        let mut state = self.state.lock();
        state.ended = true;
        state.requests.retain(|request| request.is_release());
        let opens: Vec<_> = state.opens.iter().copied().collect();
        drop(state);
        for fh in opens {
            self.push_release(fh);
        }
        self.wake.notify_one();
    }

    /// Blocks until the thread has ended, after [`RequestQueue::end`]; `false` when it has not at `deadline`.
    pub(super) fn wait_ended(&self, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        while state.has_thread {
            if self.idle.wait_until(&mut state, deadline).timed_out() {
                return !state.has_thread;
            }
        }
        true
    }
}

impl fmt::Debug for RequestQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RequestQueue").field("name", &self.name).finish_non_exhaustive()
    }
}
