//! [`Server`]: the reader thread of all sessions. It also replies in place of devices that hang.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::Notify;
use tracing::{error, info, warn};
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_holder::progress;
use vdpa_sys::fuse::{BUFFER_SIZE, Operation, Request, RequestLog};

use super::is_past;
use super::request_queue::RequestQueue;
use super::session::{Endpoint, Session};
use crate::front::watchdog::protocol::{Message, WatchdogLink};

/// How often requests in progress are looked for during a pause.
const PAUSE_INTERVAL: Duration = Duration::from_micros(50);

/// Whether the reader reads requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Pause {
    /// It does.
    #[default]
    None,
    /// It is to stop.
    Wanted,
    /// It has stopped.
    Paused,
}

/// State that the reader thread shares with [`DeviceFiles`](super::DeviceFiles).
#[derive(Debug)]
pub(super) struct Server {
    sessions: Mutex<Vec<Arc<Session>>>,
    /// Request queues of detached sessions, whose threads may still run.
    detached: Mutex<Vec<Weak<RequestQueue>>>,
    /// Counts the changes of `sessions`.
    changes: AtomicU64,
    pub(super) watchdog: WatchdogLink,
    timeout: Duration,
    wake: OwnedFd,
    ended: AtomicBool,
    pause: Mutex<Pause>,
    /// The state in `pause` has changed.
    pause_changed: Condvar,
    /// Notifies waiters of [`ended`](Self::ended).
    ended_notify: Notify,
    /// Where requests are kept that the kernel does not send again to a successor.
    requests: OnceLock<Arc<RequestLog>>,
    /// Whether the kernel is asked to send requests again, where it can.
    resend: bool,
}

impl Server {
    pub(super) fn new(wake: OwnedFd, timeout: Duration, watchdog: WatchdogLink, resend: bool) -> Arc<Self> {
        Arc::new(Self {
            sessions: Mutex::default(),
            detached: Mutex::default(),
            changes: AtomicU64::new(0),
            watchdog,
            timeout,
            wake,
            ended: AtomicBool::new(false),
            pause: Mutex::default(),
            pause_changed: Condvar::new(),
            ended_notify: Notify::new(),
            requests: OnceLock::new(),
            resend,
        })
    }

    /// Adds a session to those that the reader serves.
    pub(super) fn attach(&self, session: Arc<Session>) {
        self.keep_requests_of(&session);
        self.sessions.lock().push(session);
        self.changed();
    }

    /// From now on the requests of all sessions are kept in `log` whose kernel does not send them again.
    pub(super) fn keep_requests(&self, log: Arc<RequestLog>) {
        let _ = self.requests.set(log);
        self.sessions().iter().for_each(|session| self.keep_requests_of(session));
    }

    pub(super) fn keeps_requests(&self) -> bool {
        self.requests.get().is_some()
    }

    fn keep_requests_of(&self, session: &Session) {
        if let Some(log) = self.requests.get()
            && !(self.resend && session.negotiated.has_resend())
        {
            session.connection.keep_requests(Arc::clone(log), session.endpoint.number());
        }
    }

    /// Has what an earlier process had read and not answered answered by this one. Before the reader is started.
    pub(super) fn resend(&self) {
        if let Some(log) = self.requests.get() {
            log.begin();
        }
        for session in self.sessions() {
            match session.connection.kept_requests() {
                Some(requests) => requests.iter().for_each(|request| serve(&session, request)),
                None => session.resend(),
            }
        }
    }

    /// Removes a session and releases its devices. The connection closes when the reader and the devices' threads have
    /// dropped it.
    pub(super) fn detach(&self, session: &Arc<Session>) {
        let queues = session.live_queues();
        {
            let mut detached = self.detached.lock();
            detached.retain(|queue| queue.strong_count() > 0);
            detached.extend(queues.iter().map(Arc::downgrade));
        }
        self.sessions.lock().retain(|other| !Arc::ptr_eq(other, session));
        self.changed();
        queues.iter().for_each(RequestQueue::end);
        self.watchdog.send(&Message::Unwatch(session.endpoint.watched()));
    }

    pub(super) fn sessions(&self) -> Vec<Arc<Session>> {
        self.sessions.lock().clone()
    }

    fn changed(&self) {
        self.changes.fetch_add(1, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        if let Err(error) = rustix::io::write(&self.wake, &1u64.to_ne_bytes()) {
            warn!(%error, "cannot wake the FUSE reader");
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Returns when it [has ended](Self::has_ended). Costs nothing until then.
    pub(super) async fn ended(&self) {
        // Registered before the check, so that an end between the two is not missed.
        let notified = self.ended_notify.notified();
        if !self.has_ended() {
            notified.await;
        }
    }

    /// Stops the threads and releases what is open. Idempotent.
    pub(super) fn end(&self) {
        if self.ended.swap(true, Ordering::AcqRel) {
            return;
        }
        self.ended_notify.notify_waiters();
        {
            let _pause = self.pause.lock();
            self.pause_changed.notify_all();
        }
        self.wake();
        for queue in self.live_queues() {
            queue.end();
        }
    }

    /// Waits for the threads of devices, all together no longer than the request time-out, and closes all connections.
    pub(super) fn close(&self) {
        let deadline = Instant::now() + self.timeout;
        let detached: Vec<_> = self.detached.lock().iter().filter_map(Weak::upgrade).collect();
        for queue in self.live_queues().into_iter().chain(detached) {
            if !queue.wait_ended(deadline) {
                error!(device = queue.name(), "the device hangs: its thread is left behind");
            }
        }
        self.sessions.lock().clear();
    }

    fn live_queues(&self) -> Vec<Arc<RequestQueue>> {
        self.sessions().iter().flat_map(|session| session.live_queues()).collect()
    }

    /// Detaches character devices that were removed while they were open and are closed now.
    fn detach_unused(&self) {
        for session in self.sessions() {
            if session.is_closing() && matches!(session.endpoint, Endpoint::Device(_)) && session.is_idle() {
                self.detach(&session);
            }
        }
    }

    /// Has the reader read no request any more, until [`unpause`](Self::unpause). When this returns none is in progress.
    ///
    /// # Errors
    /// `ETIMEDOUT` when one is still in progress after `timeout`; the reader goes on.
    pub(super) fn pause(&self, timeout: Duration) -> Result<(), Errno> {
        let deadline = Instant::now() + timeout;
        let mut pause = self.pause.lock();
        *pause = Pause::Wanted;
        self.wake();
        while *pause != Pause::Paused && !self.has_ended() {
            if self.pause_changed.wait_until(&mut pause, deadline).timed_out() {
                break;
            }
        }
        let paused = *pause == Pause::Paused;
        drop(pause);
        while paused && Instant::now() < deadline {
            if !self.sessions().iter().any(|session| session.has_requests()) {
                return Ok(());
            }
            thread::sleep(PAUSE_INTERVAL);
        }
        self.unpause();
        Err(Errno::TIMEDOUT)
    }

    /// Has the reader go on.
    pub(super) fn unpause(&self) {
        *self.pause.lock() = Pause::None;
        self.pause_changed.notify_all();
    }

    /// Blocks while the reader is to read nothing.
    fn stay_paused(&self) {
        let mut pause = self.pause.lock();
        while *pause != Pause::None && !self.has_ended() {
            *pause = Pause::Paused;
            self.pause_changed.notify_all();
            self.pause_changed.wait(&mut pause);
        }
    }

    /// Starts the reader.
    pub(super) fn spawn_reader(self: &Arc<Self>) -> std::io::Result<JoinHandle<()>> {
        // Before any caller learns of the files: this arms the watchdog, which removes them if the process dies.
        self.watchdog.heartbeat();
        let server = Arc::clone(self);
        thread::Builder::new().name("fuse-reader".into()).spawn(move || {
            server.read();
            server.end();
        })
    }

    fn read(&self) {
        let _watched = progress::watch();
        let mut buffer = vec![0; BUFFER_SIZE];
        let mut sessions = Vec::new();
        let mut seen = None;
        let mut last_check = Instant::now();
        let check_interval = (self.timeout / 8).clamp(Duration::from_millis(5), Duration::from_secs(1));
        while !self.has_ended() {
            self.stay_paused();
            let changes = self.changes.load(Ordering::Acquire);
            if seen != Some(changes) {
                sessions = self.sessions();
                seen = Some(changes);
            }
            // Without a request in progress nothing can time out: the reader sleeps until a request arrives.
            let idle = !sessions.iter().any(|session| session.needs_timer()) && self.watchdog.idle();
            if !idle {
                self.watchdog.heartbeat();
            }
            let ready =
                match self.wait(&sessions, (!idle).then(|| self.watchdog.interval().min(check_interval))) {
                    Ok(ready) => ready,
                    Err(errno) => {
                        error!(%errno, "requests cannot be waited for");
                        return;
                    }
                };
            for session in ready {
                if let Err(errno) = read_one(session, &mut buffer) {
                    self.connection_ended(session, errno);
                }
            }
            if is_past(last_check, check_interval) {
                last_check = Instant::now();
                self.check_devices();
            }
        }
    }

    /// Replies for devices that hang, and detaches sessions that are closed deliberately.
    fn check_devices(&self) {
        for queue in self.live_queues() {
            queue.check_timeout(self.timeout);
        }
        self.detach_unused();
    }

    /// Blocks until a connection has a request, `limit` has passed, or [`wake`](Self::wake) was called; returns the sessions
    /// with requests.
    fn wait<'a>(
        &self,
        sessions: &'a [Arc<Session>],
        limit: Option<Duration>,
    ) -> Result<Vec<&'a Arc<Session>>, Errno> {
        let limit = limit.map(Timespec::try_from).transpose().map_err(|_| Errno::INVAL)?;
        let mut fds: Vec<_> = sessions
            .iter()
            .map(|session| PollFd::from_borrowed_fd(session.connection.as_fd(), PollFlags::IN))
            .collect();
        fds.push(PollFd::new(&self.wake, PollFlags::IN));
        progress::idle();
        let ready = poll(&mut fds, limit.as_ref());
        progress::busy();
        match ready {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Errno::from_raw(error.raw_os_error())),
        }
        if fds.pop().is_some_and(|wake| !wake.revents().is_empty()) {
            // Clears the eventfd; the caller checks for changes next.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        let ready = sessions.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|(session, _)| session).collect())
    }

    /// Handles the end of a connection. When the administrator or the watchdog has ended the directory or a character device,
    /// the server ends, so that another one can be started in its place.
    fn connection_ended(&self, session: &Arc<Session>, errno: Errno) {
        let expected = session.is_closing();
        if errno == Errno::NODEV {
            info!(endpoint = ?session.endpoint, expected, "a connection to the kernel has ended");
        } else {
            error!(endpoint = ?session.endpoint, %errno, "a connection to the kernel cannot be read");
        }
        self.detach(session);
        if expected {
            return;
        }
        match session.endpoint {
            Endpoint::File { .. } => {
                warn!(endpoint = ?session.endpoint, "the mount was ended from outside; its device has no file now")
            }
            Endpoint::Directory(_) | Endpoint::Device(_) => self.end(),
        }
    }
}

/// Reads and serves one request, if there is one.
fn read_one(session: &Session, buffer: &mut [u8]) -> Result<(), Errno> {
    let Some(len) = session.connection.read_request(buffer)? else { return Ok(()) };
    reach(CrashPoint::RequestRead);
    serve(session, buffer.get(..len).unwrap_or_default());
    Ok(())
}

/// Serves one request.
fn serve(session: &Session, request: &[u8]) {
    match Request::decode(request) {
        Ok(request) => {
            session.serve(&request);
            if matches!(request.operation, Operation::Forget(_) | Operation::BatchForget(_)) {
                session.connection.request_done(request.header.unique);
            }
        }
        Err(error) => {
            error!(%error, "the kernel sent a malformed FUSE request");
            if let Some(unique) = error.unique() {
                session.reply(unique, Err(Errno::IO));
            }
        }
    }
}
