//! The reader of a mount and its watch.

use std::collections::HashMap;
use std::io::PipeWriter;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tracing::{debug, error, info, warn};
use vdpa_core::Errno;
use vdpa_sys::fuse::{BUFFER_SIZE, Connection, Operation, Request};
use vdpa_sys::uapi::fuse::{
    Attr, AttrOut, EntryOut, InHeader, IoctlIn, Kstatfs, OpenOut, ROOT_ID, ReadIn, ioctl_flags,
};
use zerocopy::IntoBytes;

use super::super::watchdog::{BEAT, FAREWELL};
use super::device::DeviceFile;
use super::is_past;
use super::lane::{Lane, Work};
use super::tree::{AddError, FileAttributes, NAME_MAX, Tree};

/// Everything the threads of one mount share.
#[derive(Debug)]
pub(super) struct Server {
    connection: Connection,
    tree: Mutex<Tree>,
    next_handle: AtomicU64,
    /// Every lane there is by node id, also of removed files: while one is open its thread holds it. Apart from
    /// the tree because a FORGET may overtake a RELEASE (`fuse_dev_do_read()` prefers it).
    lanes: Mutex<HashMap<u64, Weak<Lane>>>,
    timeout: Duration,
    wake: OwnedFd,
    ended: AtomicBool,
    end_lock: Mutex<()>,
    end_signal: Condvar,
}

impl Server {
    pub(super) fn new(connection: Connection, wake: OwnedFd, timeout: Duration) -> Arc<Self> {
        Arc::new(Self {
            connection,
            tree: Mutex::new(Tree::new()),
            next_handle: AtomicU64::new(1),
            lanes: Mutex::default(),
            timeout,
            wake,
            ended: AtomicBool::new(false),
            end_lock: Mutex::new(()),
            end_signal: Condvar::new(),
        })
    }

    pub(super) fn add(
        &self,
        name: &str,
        file: Arc<dyn DeviceFile>,
        attributes: FileAttributes,
    ) -> Result<(), AddError> {
        let lane = Lane::new(name, file, self.connection.clone());
        let weak = Arc::downgrade(&lane);
        let id = self.tree.lock().add(lane, attributes)?;
        self.lanes.lock().insert(id, weak);
        Ok(())
    }

    pub(super) fn remove(&self, name: &str) -> bool {
        // Names are valid for 0 s, so the kernel asks for it again at the next look-up.
        self.tree.lock().remove(name)
    }

    pub(super) fn attributes(&self, name: &str) -> Option<FileAttributes> {
        self.tree.lock().attributes(name)
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Stops the threads and releases what is open. Idempotent.
    pub(super) fn end(&self) {
        {
            let _guard = self.end_lock.lock();
            if self.ended.swap(true, Ordering::AcqRel) {
                return;
            }
        }
        self.end_signal.notify_all();
        if let Err(error) = rustix::io::write(&self.wake, &1u64.to_ne_bytes()) {
            warn!(%error, "cannot wake the FUSE reader");
        }
        for lane in self.live_lanes() {
            lane.end();
        }
    }

    /// Waits for the threads of devices, all together no longer than the request time-out.
    pub(super) fn wait_lanes(&self) {
        let deadline = Instant::now() + self.timeout;
        for lane in self.live_lanes() {
            if !lane.wait_idle(deadline) {
                error!(device = lane.name(), "the device hangs: its thread is left behind");
            }
        }
    }

    fn live_lanes(&self) -> Vec<Arc<Lane>> {
        let mut lanes = self.lanes.lock();
        lanes.retain(|_, lane| lane.strong_count() > 0);
        lanes.values().filter_map(Weak::upgrade).collect()
    }

    /// Starts the thread that answers for devices that hang.
    pub(super) fn spawn_watch(self: &Arc<Self>) -> std::io::Result<JoinHandle<()>> {
        let server = Arc::clone(self);
        let pause = (self.timeout / 8).clamp(Duration::from_millis(5), Duration::from_secs(1));
        thread::Builder::new().name("fuse-watch".into()).spawn(move || {
            let mut guard = server.end_lock.lock();
            while !server.has_ended() {
                server.end_signal.wait_for(&mut guard, pause);
                for lane in server.live_lanes() {
                    lane.scan(server.timeout);
                }
            }
        })
    }

    /// Starts the reader.
    pub(super) fn spawn_reader(
        self: &Arc<Self>,
        heartbeat: Option<PipeWriter>,
        interval: Duration,
    ) -> std::io::Result<JoinHandle<()>> {
        if let Some(pipe) = &heartbeat {
            // A watchdog that is stopped must not stop the reader.
            rustix::io::ioctl_fionbio(pipe, true)?;
        }
        let mut heart = Heart { pipe: heartbeat, interval, last: None };
        // Before anybody is told that the mount is there: a daemon that dies from now on leaves none behind.
        heart.beat();
        let server = Arc::clone(self);
        thread::Builder::new().name("fuse-reader".into()).spawn(move || {
            server.read(&mut heart);
            heart.say(FAREWELL);
            server.end();
        })
    }

    fn read(self: &Arc<Self>, heart: &mut Heart) {
        let mut buffer = vec![0; BUFFER_SIZE];
        while !self.has_ended() {
            heart.beat();
            let waited = self.connection.wait(Some(self.wake.as_fd()), heart.interval);
            let read = waited.and_then(|_| self.connection.read_request(&mut buffer));
            match read {
                Ok(None) => {}
                Ok(Some(len)) => match Request::decode(buffer.get(..len).unwrap_or_default()) {
                    Ok(request) => self.serve(&request),
                    Err(error) => {
                        error!(%error, "the kernel sent what is no FUSE request");
                        if let Some(unique) = error.unique() {
                            self.reply(unique, Err(Errno::IO));
                        }
                    }
                },
                Err(Errno::NODEV) => {
                    info!("the mount has ended");
                    return;
                }
                Err(errno) => {
                    error!(%errno, "the FUSE connection cannot be read");
                    return;
                }
            }
        }
    }

    /// Handles one request without blocking.
    fn serve(self: &Arc<Self>, request: &Request<'_>) {
        let header = &request.header;
        match &request.operation {
            Operation::Lookup { name } => self.lookup(header, name),
            Operation::Forget(forget) => self.tree.lock().forget(header.nodeid, forget.nlookup),
            Operation::BatchForget(forgets) => {
                let mut tree = self.tree.lock();
                forgets.iter().for_each(|one| tree.forget(one.nodeid, one.nlookup));
            }
            Operation::Getattr(_) => {
                let attr = self.tree.lock().attr(header.nodeid);
                self.reply_attr(header, attr);
            }
            Operation::Setattr(change) => {
                let attr = self.tree.lock().set_attr(header.nodeid, change);
                self.reply_attr(header, attr);
            }
            Operation::Open(open) => self.open(header, open.flags),
            Operation::Release(release) => self.release(header, release.fh),
            Operation::Ioctl { args, input } => self.ioctl(header, *args, input),
            Operation::Write { data, .. } => {
                self.hand_over(header, Work::Write { tid: header.pid, data: data.to_vec() });
            }
            Operation::Poll(_) => self.hand_over(header, Work::Poll),
            // vhost-vdpa queues nothing for reading (uapi-spec 1.10).
            Operation::Read(_) => self.reply(header.unique, Err(Errno::INVAL)),
            Operation::Opendir(_) => self.reply(header.unique, Ok(&[OpenOut::default().as_bytes()])),
            Operation::Readdir(args) => self.readdir(header, args),
            Operation::Releasedir(_) | Operation::Destroy => self.reply(header.unique, Ok(&[])),
            Operation::Statfs => self.statfs(header),
            // After ENOSYS the kernel sends none of these any more. Signals do not interrupt: as in the kernel's
            // vhost-vdpa every request ends by itself.
            Operation::Interrupt(_)
            | Operation::Flush(_)
            | Operation::Getxattr { .. }
            | Operation::Access(_) => {
                self.reply(header.unique, Err(Errno::NOSYS));
            }
            Operation::Init(_) => {
                warn!("a second INIT on one connection");
                self.reply(header.unique, Err(Errno::IO));
            }
            Operation::Unknown { opcode } => {
                debug!(opcode, "a request that is not known");
                self.reply(header.unique, Err(Errno::NOSYS));
            }
        }
    }

    fn lookup(&self, header: &InHeader, name: &[u8]) {
        let mut tree = self.tree.lock();
        let found = tree.lookup(name).filter(|_| header.nodeid == ROOT_ID);
        let Some(attr) = found else { return self.reply(header.unique, Err(Errno::NOENT)) };
        let entry = EntryOut { nodeid: attr.ino, attr, ..EntryOut::default() };
        // Counted only when the kernel has it, or the node would never be forgotten.
        if self.connection.reply(header.unique, Ok(&[entry.as_bytes()])).is_ok() {
            tree.remember(attr.ino);
        }
    }

    fn reply_attr(&self, header: &InHeader, attr: Option<Attr>) {
        let out = attr.map(|attr| AttrOut { attr, ..AttrOut::default() });
        match &out {
            Some(out) => self.reply(header.unique, Ok(&[out.as_bytes()])),
            None => self.reply(header.unique, Err(Errno::NOENT)),
        }
    }

    fn open(&self, header: &InHeader, flags: u32) {
        let Some(lane) = self.tree.lock().lane(header.nodeid) else {
            return self.reply(header.unique, Err(Errno::NOENT));
        };
        let fh = self.next_handle.fetch_add(1, Ordering::Relaxed);
        lane.push(header.unique, Work::Open { fh, flags });
    }

    fn release(&self, header: &InHeader, fh: u64) {
        self.reply(header.unique, Ok(&[]));
        if let Some(lane) = self.lane_of(header) {
            lane.push_release(fh);
        }
    }

    fn lane_of(&self, header: &InHeader) -> Option<Arc<Lane>> {
        self.lanes.lock().get(&header.nodeid)?.upgrade()
    }

    fn ioctl(&self, header: &InHeader, args: IoctlIn, input: &[u8]) {
        if args.flags & ioctl_flags::DIR != 0 {
            return self.reply(header.unique, Err(Errno::NOTTY));
        }
        self.hand_over(header, Work::Ioctl { tid: header.pid, args, input: input.to_vec() });
    }

    fn hand_over(&self, header: &InHeader, work: Work) {
        match self.lane_of(header) {
            Some(lane) => lane.push(header.unique, work),
            None => self.reply(header.unique, Err(Errno::BADF)),
        }
    }

    fn readdir(&self, header: &InHeader, args: &ReadIn) {
        if header.nodeid != ROOT_ID {
            return self.reply(header.unique, Err(Errno::from_raw(rustix::io::Errno::NOTDIR.raw_os_error())));
        }
        let list = self.tree.lock().list(args.offset, args.size as usize);
        self.reply(header.unique, Ok(&[&list]));
    }

    fn statfs(&self, header: &InHeader) {
        const BLOCK: u32 = 4096;
        let files = u64::try_from(self.tree.lock().len()).unwrap_or(u64::MAX);
        let out = Kstatfs { files, bsize: BLOCK, frsize: BLOCK, namelen: NAME_MAX, ..Kstatfs::default() };
        self.reply(header.unique, Ok(&[out.as_bytes()]));
    }

    fn reply(&self, unique: u64, answer: Result<&[&[u8]], Errno>) {
        if let Err(errno) = self.connection.reply(unique, answer) {
            debug!(unique, %errno, "an answer found nobody waiting");
        }
    }
}

/// Proof of life for the watchdog process.
struct Heart {
    pipe: Option<PipeWriter>,
    interval: Duration,
    last: Option<Instant>,
}

impl Heart {
    fn beat(&mut self) {
        if self.last.is_some_and(|last| !is_past(last, self.interval)) {
            return;
        }
        self.last = Some(Instant::now());
        self.say(BEAT);
    }

    fn say(&mut self, word: &[u8]) {
        let Some(pipe) = &self.pipe else { return };
        match rustix::io::write(pipe, word) {
            // A full pipe: the watchdog is slow, not we.
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(error) => {
                error!(%error, "the watchdog is gone: a daemon that stops will hold its clients");
                self.pipe = None;
            }
        }
    }
}
