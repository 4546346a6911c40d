//! The reader of all connections, which also answers in place of devices that hang.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::sync::Notify;
use tracing::{error, info, warn};
use vdpa_core::Errno;
use vdpa_sys::fuse::{BUFFER_SIZE, Request};

use super::is_past;
use super::request_queue::RequestQueue;
use super::session::{Endpoint, Session};
use crate::front::watchdog::protocol::{Message, WatchdogLink};

/// Everything the threads share.
#[derive(Debug)]
pub(super) struct Server {
    sessions: Mutex<Vec<Arc<Session>>>,
    /// Devices of connections that were let go, as long as their threads run.
    detached: Mutex<Vec<Weak<RequestQueue>>>,
    /// Counts the changes of `sessions`.
    changes: AtomicU64,
    pub(super) watchdog: WatchdogLink,
    timeout: Duration,
    wake: OwnedFd,
    ended: AtomicBool,
    /// Tells whoever waits for the end.
    ended_notify: Notify,
}

impl Server {
    pub(super) fn new(wake: OwnedFd, timeout: Duration, watchdog: WatchdogLink) -> Arc<Self> {
        Arc::new(Self {
            sessions: Mutex::default(),
            detached: Mutex::default(),
            changes: AtomicU64::new(0),
            watchdog,
            timeout,
            wake,
            ended: AtomicBool::new(false),
            ended_notify: Notify::new(),
        })
    }

    /// Serves one more connection.
    pub(super) fn attach(&self, session: Arc<Session>) {
        self.sessions.lock().push(session);
        self.changed();
    }

    /// Lets a connection go; its devices are released. It closes when the threads have seen that.
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
        self.watchdog.send(&Message::Unwatch(session.place.watched()));
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
        // Before the look: what comes between the two is not missed.
        let news = self.ended_notify.notified();
        if !self.has_ended() {
            news.await;
        }
    }

    /// Stops the threads and releases what is open. Idempotent.
    pub(super) fn end(&self) {
        if self.ended.swap(true, Ordering::AcqRel) {
            return;
        }
        self.ended_notify.notify_waiters();
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

    /// Lets go of the character devices that were removed while somebody had them open and nobody has now.
    fn detach_unused(&self) {
        for session in self.sessions() {
            if session.is_closing() && matches!(session.place, Endpoint::Device(_)) && session.is_idle() {
                self.detach(&session);
            }
        }
    }

    /// Starts the reader.
    pub(super) fn spawn_reader(self: &Arc<Self>) -> std::io::Result<JoinHandle<()>> {
        // Before anybody is told that files are there: a daemon that dies from now on leaves none behind.
        self.watchdog.heartbeat();
        let server = Arc::clone(self);
        thread::Builder::new().name("fuse-reader".into()).spawn(move || {
            server.read();
            server.end();
        })
    }

    fn read(&self) {
        let mut buffer = vec![0; BUFFER_SIZE];
        let mut sessions = Vec::new();
        let mut seen = None;
        let mut last_check = Instant::now();
        let check_interval = (self.timeout / 8).clamp(Duration::from_millis(5), Duration::from_secs(1));
        while !self.has_ended() {
            let changes = self.changes.load(Ordering::Acquire);
            if seen != Some(changes) {
                sessions = self.sessions();
                seen = Some(changes);
            }
            // With nothing in progress there is nothing to look after, and no reason to wake up before a request comes.
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

    /// Answers for devices that hang and lets go what is to go.
    fn check_devices(&self) {
        for queue in self.live_queues() {
            queue.check_timeout(self.timeout);
        }
        self.detach_unused();
    }

    /// Waits until some connections have something to say, or `limit` is over, or something has changed.
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
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Errno::from_raw(error.raw_os_error())),
        }
        if fds.pop().is_some_and(|wake| !wake.revents().is_empty()) {
            // Only to make it quiet; what has changed is last_check at next.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        let ready = sessions.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|(session, _)| session).collect())
    }

    /// A connection has ended. Without its directory, or a device that the administrator or the watchdog has aborted,
    /// the daemon is of no use any more and somebody can start another one.
    fn connection_ended(&self, session: &Arc<Session>, errno: Errno) {
        let expected = session.is_closing();
        if errno == Errno::NODEV {
            info!(place = ?session.place, expected, "a connection to the kernel has ended");
        } else {
            error!(place = ?session.place, %errno, "a connection to the kernel cannot be read");
        }
        self.detach(session);
        if expected {
            return;
        }
        match session.place {
            Endpoint::File { .. } => {
                warn!(place = ?session.place, "the mount was ended from outside; its device has no file now")
            }
            Endpoint::Directory(_) | Endpoint::Device(_) => self.end(),
        }
    }
}

/// Reads and serves one request, if there is one.
fn read_one(session: &Session, buffer: &mut [u8]) -> Result<(), Errno> {
    let Some(len) = session.connection.read_request(buffer)? else { return Ok(()) };
    match Request::decode(buffer.get(..len).unwrap_or_default()) {
        Ok(request) => session.serve(&request),
        Err(error) => {
            error!(%error, "the kernel sent what is no FUSE request");
            if let Some(unique) = error.unique() {
                session.reply(unique, Err(Errno::IO));
            }
        }
    }
    Ok(())
}
