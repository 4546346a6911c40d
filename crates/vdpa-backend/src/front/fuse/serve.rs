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

use super::super::lifeline::{Lifeline, Word};
use super::channel::{Channel, Place};
use super::is_past;
use super::lane::Lane;

/// Everything the threads share.
#[derive(Debug)]
pub(super) struct Server {
    channels: Mutex<Vec<Arc<Channel>>>,
    /// Devices of connections that were let go, as long as their threads run.
    leaving: Mutex<Vec<Weak<Lane>>>,
    /// Counts the changes of `channels`.
    changes: AtomicU64,
    pub(super) lifeline: Lifeline,
    timeout: Duration,
    wake: OwnedFd,
    ended: AtomicBool,
    /// Tells whoever waits for the end.
    end_news: Notify,
}

impl Server {
    pub(super) fn new(wake: OwnedFd, timeout: Duration, lifeline: Lifeline) -> Arc<Self> {
        Arc::new(Self {
            channels: Mutex::default(),
            leaving: Mutex::default(),
            changes: AtomicU64::new(0),
            lifeline,
            timeout,
            wake,
            ended: AtomicBool::new(false),
            end_news: Notify::new(),
        })
    }

    /// Serves one more connection.
    pub(super) fn attach(&self, channel: Arc<Channel>) {
        self.channels.lock().push(channel);
        self.changed();
    }

    /// Lets a connection go; its devices are released. It closes when the threads have seen that.
    pub(super) fn detach(&self, channel: &Arc<Channel>) {
        let lanes = channel.live_lanes();
        {
            let mut leaving = self.leaving.lock();
            leaving.retain(|lane| lane.strong_count() > 0);
            leaving.extend(lanes.iter().map(Arc::downgrade));
        }
        self.channels.lock().retain(|other| !Arc::ptr_eq(other, channel));
        self.changed();
        lanes.iter().for_each(Lane::end);
        self.lifeline.say(&Word::Release(channel.place.guarded()));
    }

    pub(super) fn channels(&self) -> Vec<Arc<Channel>> {
        self.channels.lock().clone()
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
        let news = self.end_news.notified();
        if !self.has_ended() {
            news.await;
        }
    }

    /// Stops the threads and releases what is open. Idempotent.
    pub(super) fn end(&self) {
        if self.ended.swap(true, Ordering::AcqRel) {
            return;
        }
        self.end_news.notify_waiters();
        self.wake();
        for lane in self.live_lanes() {
            lane.end();
        }
    }

    /// Waits for the threads of devices, all together no longer than the request time-out, and closes all connections.
    pub(super) fn close(&self) {
        let deadline = Instant::now() + self.timeout;
        let leaving: Vec<_> = self.leaving.lock().iter().filter_map(Weak::upgrade).collect();
        for lane in self.live_lanes().into_iter().chain(leaving) {
            if !lane.wait_idle(deadline) {
                error!(device = lane.name(), "the device hangs: its thread is left behind");
            }
        }
        self.channels.lock().clear();
    }

    fn live_lanes(&self) -> Vec<Arc<Lane>> {
        self.channels().iter().flat_map(|channel| channel.live_lanes()).collect()
    }

    /// Lets go of the character devices that were removed while somebody had them open and nobody has now.
    fn sweep(&self) {
        for channel in self.channels() {
            if channel.is_retired() && matches!(channel.place, Place::Device(_)) && channel.is_idle() {
                self.detach(&channel);
            }
        }
    }

    /// Starts the reader.
    pub(super) fn spawn_reader(self: &Arc<Self>) -> std::io::Result<JoinHandle<()>> {
        // Before anybody is told that files are there: a daemon that dies from now on leaves none behind.
        self.lifeline.beat();
        let server = Arc::clone(self);
        thread::Builder::new().name("fuse-reader".into()).spawn(move || {
            server.read();
            server.end();
        })
    }

    fn read(&self) {
        let mut buffer = vec![0; BUFFER_SIZE];
        let mut channels = Vec::new();
        let mut seen = None;
        let mut looked = Instant::now();
        let pause = (self.timeout / 8).clamp(Duration::from_millis(5), Duration::from_secs(1));
        while !self.has_ended() {
            let changes = self.changes.load(Ordering::Acquire);
            if seen != Some(changes) {
                channels = self.channels();
                seen = Some(changes);
            }
            // With nothing in progress there is nothing to look after, and no reason to wake up before a request comes.
            let rests = !channels.iter().any(|channel| channel.wants_watching()) && self.lifeline.rest();
            if !rests {
                self.lifeline.beat();
            }
            let ready = match self.wait(&channels, (!rests).then(|| self.lifeline.interval().min(pause))) {
                Ok(ready) => ready,
                Err(errno) => {
                    error!(%errno, "requests cannot be waited for");
                    return;
                }
            };
            for channel in ready {
                if let Err(errno) = read_one(channel, &mut buffer) {
                    self.lost(channel, errno);
                }
            }
            if is_past(looked, pause) {
                looked = Instant::now();
                self.look();
            }
        }
    }

    /// Answers for devices that hang and lets go what is to go.
    fn look(&self) {
        for lane in self.live_lanes() {
            lane.scan(self.timeout);
        }
        self.sweep();
    }

    /// Waits until some connections have something to say, or `limit` is over, or something has changed.
    fn wait<'a>(
        &self,
        channels: &'a [Arc<Channel>],
        limit: Option<Duration>,
    ) -> Result<Vec<&'a Arc<Channel>>, Errno> {
        let limit = limit.map(Timespec::try_from).transpose().map_err(|_| Errno::INVAL)?;
        let mut fds: Vec<_> = channels
            .iter()
            .map(|channel| PollFd::from_borrowed_fd(channel.connection.as_fd(), PollFlags::IN))
            .collect();
        fds.push(PollFd::new(&self.wake, PollFlags::IN));
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Errno::from_raw(error.raw_os_error())),
        }
        if fds.pop().is_some_and(|wake| !wake.revents().is_empty()) {
            // Only to make it quiet; what has changed is looked at next.
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        let ready = channels.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|(channel, _)| channel).collect())
    }

    /// A connection has ended. Without its directory, or a device that the administrator or the watchdog has aborted,
    /// the daemon is of no use any more and somebody can start another one.
    fn lost(&self, channel: &Arc<Channel>, errno: Errno) {
        let wanted = channel.is_retired();
        if errno == Errno::NODEV {
            info!(place = ?channel.place, wanted, "a connection to the kernel has ended");
        } else {
            error!(place = ?channel.place, %errno, "a connection to the kernel cannot be read");
        }
        self.detach(channel);
        if wanted {
            return;
        }
        match channel.place {
            Place::File { .. } => {
                warn!(place = ?channel.place, "the mount was ended from outside; its device has no file now")
            }
            Place::Directory(_) | Place::Device(_) => self.end(),
        }
    }
}

/// Reads and serves one request, if there is one.
fn read_one(channel: &Channel, buffer: &mut [u8]) -> Result<(), Errno> {
    let Some(len) = channel.connection.read_request(buffer)? else { return Ok(()) };
    match Request::decode(buffer.get(..len).unwrap_or_default()) {
        Ok(request) => channel.serve(&request),
        Err(error) => {
            error!(%error, "the kernel sent what is no FUSE request");
            if let Some(unique) = error.unique() {
                channel.reply(unique, Err(Errno::IO));
            }
        }
    }
    Ok(())
}
