//! [`Session`]: one FUSE connection to the kernel. It serves the directory of device files, a mount over a single file, or a
//! character device.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tracing::{debug, warn};
use vdpa_core::Errno;
use vdpa_sys::fuse::{Connection, Negotiated, Operation, Request};
use vdpa_sys::uapi::fuse::{
    Attr, AttrOut, EntryOut, InHeader, IoctlIn, Kstatfs, OpenOut, ROOT_ID, ReadIn, ioctl_flags,
};
use zerocopy::IntoBytes;

use super::attributes::{FileAttributes, SavedAttributes};
use super::device::{DeviceFile, Opener};
use super::request_queue::{DeviceOp, RequestCount, RequestQueue};
use super::tree::{AddError, NAME_MAX, Tree};
use crate::front::watchdog::protocol::Watched;

/// Where a connection appears in the file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// The mount over the directory of device files.
    Directory(PathBuf),
    /// A mount over one regular file.
    File {
        /// Path of the file: absolute, without symbolic links.
        path: PathBuf,
        /// Whether the file was created for the mount, and is removed after it.
        created: bool,
    },
    /// A character device.
    Device(super::cuse::Node),
}

impl Endpoint {
    /// A number that is the same in each process that serves it: FNV-1a of its path.
    pub(super) fn number(&self) -> u64 {
        let path = match self {
            Self::Directory(path) | Self::File { path, .. } => path.clone(),
            Self::Device(node) => node.path(),
        };
        path.as_os_str().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
    }

    /// What the watchdog is to abort.
    pub(super) fn watched(&self) -> Watched {
        match self {
            Self::Directory(path) | Self::File { path, .. } => Watched::Mount(path.clone()),
            Self::Device(node) => node.watched(),
        }
    }
}

/// A connection, as it was made.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) connection: Connection,
    pub(super) endpoint: Endpoint,
    pub(super) negotiated: Negotiated,
}

/// A connection with its names, nodes and devices.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) connection: Connection,
    pub(super) endpoint: Endpoint,
    pub(super) negotiated: Negotiated,
    tree: Mutex<Tree>,
    /// The request queue of each node id, also of removed files: while a file is open, its thread owns the queue. The tree
    /// cannot have them, because a FORGET may overtake a RELEASE (`fuse_dev_do_read()` prefers it).
    queues: Mutex<HashMap<u64, Weak<RequestQueue>>>,
    next_handle: AtomicU64,
    /// The state outlives this process. A RELEASE is answered when it was executed, so that the kernel sends it again to a
    /// successor.
    outlives: AtomicBool,
    closing: AtomicBool,
    count: RequestCount,
}

impl Session {
    fn new(link: Link, tree: Tree, count: RequestCount) -> Self {
        let Link { connection, endpoint, negotiated } = link;
        Self {
            connection,
            endpoint,
            negotiated,
            tree: Mutex::new(tree),
            queues: Mutex::default(),
            next_handle: AtomicU64::new(1),
            outlives: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            count,
        }
    }

    /// A session for an empty directory.
    pub(super) fn directory(connection: Connection, dir: PathBuf, negotiated: Negotiated) -> Arc<Self> {
        let link = Link { connection, endpoint: Endpoint::Directory(dir), negotiated };
        Arc::new(Self::new(link, Tree::new(), RequestCount::default()))
    }

    /// A session for one device, which is the node `id` of its connection.
    pub(super) fn one_file(link: Link, id: u64, name: &str, file: Arc<dyn DeviceFile>) -> Arc<Self> {
        let count = RequestCount::default();
        let queue = RequestQueue::new(name, file, link.connection.clone(), count.clone());
        let weak = Arc::downgrade(&queue);
        let tree = Tree::of_one_file(id, queue, FileAttributes::private());
        let session = Self::new(link, tree, count);
        session.queues.lock().insert(id, weak);
        Arc::new(session)
    }

    pub(super) fn add(
        &self,
        name: &str,
        file: Arc<dyn DeviceFile>,
        attributes: FileAttributes,
    ) -> Result<(), AddError> {
        let queue = RequestQueue::new(name, file, self.connection.clone(), self.count.clone());
        let weak = Arc::downgrade(&queue);
        let id = self.tree.lock().add(queue, attributes)?;
        self.queues.lock().insert(id, weak);
        Ok(())
    }

    /// Removes a name, which cannot be opened any more; whether it existed.
    pub(super) fn remove(&self, name: &str) -> bool {
        // The entry time-out is 0 s, so the kernel sends a LOOKUP for the next open.
        self.tree.lock().remove(name)
    }

    pub(super) fn attributes(&self, name: &str) -> Option<FileAttributes> {
        self.tree.lock().attributes(name)
    }

    /// Whether the session is closed deliberately: its end is no failure then.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Marks the session as closed deliberately.
    pub(super) fn set_closing(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// Whether no file of the session is open and no request is in progress.
    pub(super) fn is_idle(&self) -> bool {
        self.live_queues().iter().all(|queue| queue.is_idle())
    }

    /// Whether a request is in progress.
    pub(super) fn has_requests(&self) -> bool {
        self.count.any()
    }

    /// Whether the reader has to check the session periodically: a request is in progress, or the session is to be detached
    /// when its file is closed.
    pub(super) fn needs_timer(&self) -> bool {
        self.count.any() || self.is_closing()
    }

    /// The request queues that exist.
    pub(super) fn live_queues(&self) -> Vec<Arc<RequestQueue>> {
        let mut queues = self.queues.lock();
        queues.retain(|_, queue| queue.strong_count() > 0);
        queues.values().filter_map(Weak::upgrade).collect()
    }

    /// Handles one request: replies itself where no device is concerned, and queues it for the device's thread otherwise.
    /// Called by the reader; does not block.
    pub(super) fn serve(&self, request: &Request<'_>) {
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
                self.reply_attr(header, attr.ok_or(Errno::NOENT));
            }
            Operation::Setattr(change) => {
                let attr = self.tree.lock().set_attr(header.nodeid, change);
                self.reply_attr(header, attr);
            }
            Operation::Open(open) => self.open(header, open.flags),
            Operation::Release(release) => self.release(header, release.fh),
            Operation::Ioctl { args, input } => self.ioctl(header, *args, input),
            Operation::Write { args, data } => {
                let op = DeviceOp::Write { fh: args.fh, tid: header.pid, data: data.to_vec() };
                self.forward(header, op);
            }
            Operation::Poll(_) => self.forward(header, DeviceOp::Poll),
            // vhost-vdpa queues nothing for reading (uapi-spec 1.10).
            Operation::Read(_) => self.reply(header.unique, Err(Errno::INVAL)),
            Operation::Opendir(_) => self.reply(header.unique, Ok(&[OpenOut::default().as_bytes()])),
            Operation::Readdir(args) => self.readdir(header, args),
            Operation::Releasedir(_) | Operation::Destroy => self.reply(header.unique, Ok(&[])),
            Operation::Statfs => self.statfs(header),
            // After ENOSYS the kernel sends none of these any more. Signals interrupt no request: as in the kernel's
            // vhost-vdpa, every request ends by itself.
            Operation::Interrupt(_)
            | Operation::Flush(_)
            | Operation::Getxattr { .. }
            | Operation::Access(_) => {
                self.reply(header.unique, Err(Errno::NOSYS));
            }
            Operation::Init(_) | Operation::CuseInit(_) => {
                warn!("a second INIT on one connection");
                self.reply(header.unique, Err(Errno::IO));
            }
            Operation::Unknown { opcode } => {
                debug!(opcode, "unknown FUSE request");
                self.reply(header.unique, Err(Errno::NOSYS));
            }
        }
    }

    fn lookup(&self, header: &InHeader, name: &[u8]) {
        let mut tree = self.tree.lock();
        let found = tree.lookup(name).filter(|_| header.nodeid == ROOT_ID);
        let Some(attr) = found else { return self.reply(header.unique, Err(Errno::NOENT)) };
        let entry = EntryOut { nodeid: attr.ino, attr, ..EntryOut::default() };
        // Counted only when the kernel has received the reply. Otherwise no FORGET would come for it.
        if self.connection.reply(header.unique, Ok(&[entry.as_bytes()])).is_ok() {
            tree.count_lookup(attr.ino);
        }
    }

    fn reply_attr(&self, header: &InHeader, attr: Result<Attr, Errno>) {
        match attr.map(|attr| AttrOut { attr, ..AttrOut::default() }) {
            Ok(out) => self.reply(header.unique, Ok(&[out.as_bytes()])),
            Err(errno) => self.reply(header.unique, Err(errno)),
        }
    }

    fn open(&self, header: &InHeader, flags: u32) {
        let Some(queue) = self.tree.lock().queue(header.nodeid) else {
            return self.reply(header.unique, Err(Errno::NOENT));
        };
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        queue.push(header.unique, DeviceOp::Open(Opener { handle, uid: header.uid, tid: header.pid, flags }));
    }

    /// The state of this session is kept for a successor of this process, which is the `generation`-th to serve it.
    pub(super) fn outlive(&self, generation: u64) {
        self.outlives.store(true, Ordering::Release);
        // No handle of an earlier process is given out again.
        self.next_handle.fetch_max((generation << 40) | 1, Ordering::AcqRel);
    }

    /// Adds a device that an earlier process had served as the node `id`, with the handles that are open.
    pub(super) fn restore(
        &self,
        id: u64,
        name: &str,
        file: Arc<dyn DeviceFile>,
        attributes: FileAttributes,
        opens: &[u64],
    ) -> Result<(), AddError> {
        let queue = RequestQueue::new(name, file, self.connection.clone(), self.count.clone());
        queue.restore_opens(opens);
        let weak = Arc::downgrade(&queue);
        self.tree.lock().restore(id, queue, attributes)?;
        self.queues.lock().insert(id, weak);
        Ok(())
    }

    /// Marks `handles` of the only file as open, which an earlier process had served.
    pub(super) fn restore_opens(&self, handles: &[u64]) {
        self.live_queues().iter().for_each(|queue| queue.restore_opens(handles));
    }

    /// See [`Tree::save_attributes`]; for the directory without a name.
    pub(super) fn save_attributes(&self, name: Option<&str>, saved: SavedAttributes) -> Result<(), Errno> {
        let mut tree = self.tree.lock();
        let id = match name {
            Some(name) => tree.lookup(name.as_bytes()).ok_or(Errno::NOENT)?.ino,
            None => ROOT_ID,
        };
        tree.save_attributes(id, saved)
    }

    /// Asks the kernel to send again what an earlier process had read and not answered.
    pub(super) fn resend(&self) {
        if self.negotiated.has_resend()
            && let Err(errno) = self.connection.notify_resend()
        {
            warn!(endpoint = ?self.endpoint, %errno, "requests in progress at the end of the earlier process are lost");
        }
    }

    /// The node id of a name.
    pub(super) fn node(&self, name: &str) -> Option<u64> {
        self.tree.lock().lookup(name.as_bytes()).map(|attr| attr.ino)
    }

    fn release(&self, header: &InHeader, fh: u64) {
        if self.outlives.load(Ordering::Acquire)
            && let Some(queue) = self.queue_for(header)
        {
            return queue.push(header.unique, DeviceOp::Release { fh });
        }
        self.reply(header.unique, Ok(&[]));
        if let Some(queue) = self.queue_for(header) {
            queue.push_release(fh);
        }
    }

    fn queue_for(&self, header: &InHeader) -> Option<Arc<RequestQueue>> {
        self.queues.lock().get(&header.nodeid)?.upgrade()
    }

    fn ioctl(&self, header: &InHeader, args: IoctlIn, input: &[u8]) {
        if args.flags & ioctl_flags::DIR != 0 {
            return self.reply(header.unique, Err(Errno::NOTTY));
        }
        self.forward(header, DeviceOp::Ioctl { tid: header.pid, args, input: input.to_vec() });
    }

    fn forward(&self, header: &InHeader, op: DeviceOp) {
        match self.queue_for(header) {
            Some(queue) => queue.push(header.unique, op),
            // A device that was deleted, or that ended with a former process.
            None => self.reply(header.unique, Err(Errno::NODEV)),
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

    pub(super) fn reply(&self, unique: u64, answer: Result<&[&[u8]], Errno>) {
        if let Err(errno) = self.connection.reply(unique, answer) {
            debug!(unique, %errno, "the kernel does not wait for this reply any more");
        }
    }
}
