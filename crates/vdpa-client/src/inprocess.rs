//! Devices inside this process that can be opened, handed over and taken over like device files.
//!
//! For examples, and for tests of programs that use updates: they need no daemon, kernel module or privileges. A memfd
//! represents the open file, so an update passes real descriptors. A [`SimulatedProcess`] represents a process; each open
//! and each take-over creates a new one. An exec cannot be simulated, since the devices end with the process image.
//!
//! A driver that hands its disk over with a request in flight, and the successor that reaps the completion:
//!
//! ```
//! use std::os::unix::net::UnixStream;
//! use std::thread;
//!
//! use vdpa_client::device::Device;
//! use vdpa_client::inprocess::{self, SimulatedProcess};
//! use vdpa_client::state::{Section, Sections};
//! use vdpa_client::update::{Devices, Incoming, Plan, Strategy, Via};
//! use vdpa_core::blk::{RequestHeader, kind};
//! use vdpa_core::features::Features;
//! use vdpa_core::inprocess::{InProcess, Node};
//! use vdpa_core::ring::Buffer;
//! use vdpa_core::testing::RamBlk;
//! use vdpa_core::types::{Perm, QueueIndex};
//! use vdpa_sys::guest::LinuxHost;
//! use vdpa_sys::memfd;
//!
//! type Disk = InProcess<RamBlk<LinuxHost>, SimulatedProcess>;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let node = Node::new(RamBlk::on_host(64));
//! inprocess::publish("disk", &node);
//!
//! let mut session = Device::<Disk>::open("disk")?.negotiate(Features::NONE)?;
//! session.map_memfd("ram", memfd::create(c"ram", 0x4000, None)?, 0x10_0000, 0x4000, Perm::RW)?;
//! session.add_queue(QueueIndex(0), 16, "ram", 0)?;
//! session.start()?;
//! let ram = session.region("ram").and_then(|region| region.map()).cloned().ok_or("not mapped")?;
//! ram.write(0x2000, &RequestHeader { kind: kind::IN, ioprio: 0, sector: 0 }.encode())?;
//! let at = |offset: u64, len| Buffer { iova: 0x10_0000 + offset, len };
//! let queue = session.queue_mut(QueueIndex(0))?;
//! queue.submit(&[at(0x2000, 16)], &[at(0x3000, 512), at(0x2010, 1)], 7)?;
//! queue.notify()?;
//!
//! // The successor, normally another process, waits at the other end of a socket.
//! let (ours, theirs) = UnixStream::pair()?;
//! let successor = thread::spawn(move || {
//!     Incoming::<Disk>::receive(theirs)?.understands(&[("my-driver", 1..=2)])?.take_over()
//! });
//! let devices = Devices::one("disk", session);
//! let plan = Plan::new().section(Section::new("my-driver", 2, b"anything".to_vec()));
//! let prepared = plan.prepare(&devices, Via::HandOver(ours))?;
//! // This device uses addresses of its owner, so it has to be suspended for a moment.
//! assert_eq!(prepared.strategy("disk"), Some(Strategy::Resume));
//! let departed = prepared.switch(devices, Sections::new()).map_err(|failed| failed.error)?;
//! println!("{}", departed.report);
//!
//! let mut restored = successor.join().map_err(|_| "the successor has panicked")??;
//! assert_eq!(restored.sections.take("my-driver").map(|s| s.payload), Some(b"anything".to_vec()));
//! node.with(|device| device.parent_mut().serve()); // A device file would handle the kick itself.
//! let session = restored.devices.get_mut("disk").ok_or("no disk")?;
//! let done = session.queue_mut(QueueIndex(0))?.reap()?.ok_or("not completed")?;
//! assert_eq!(done.token, 7);
//! # Ok(())
//! # }
//! ```

use std::any::Any;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use vdpa_core::Errno;
use vdpa_core::host::Caller;
use vdpa_core::inprocess::{InProcess, Node, WeakFile};
use vdpa_core::parent::Parent;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::memfd;
use vdpa_sys::process::{OwnerSpace, ThisProcess};

use crate::device::DeviceFile;

/// A simulated process. It can become the owner of a device that another simulated process owns.
#[derive(Clone, Debug)]
pub struct SimulatedProcess {
    process: ThisProcess,
    id: u64,
    /// Id of the process that became the owner last.
    owner: Arc<AtomicU64>,
    /// The memfd that represents the open file; its inode identifies it.
    file: Arc<OwnedFd>,
}

impl SimulatedProcess {
    fn new(owner: Arc<AtomicU64>, file: OwnedFd) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        Self { process: ThisProcess::default(), id, owner, file: Arc::new(file) }
    }
}

impl Caller<LinuxHost> for SimulatedProcess {
    fn is(&self, owner: &OwnerSpace) -> bool {
        self.owner.load(Ordering::Relaxed) == self.id && self.process.is(owner)
    }

    fn address_space(&self) -> Result<OwnerSpace, Errno> {
        let space = self.process.address_space()?;
        // Only SET_OWNER and NEW_OWNER ask for the address space, so the caller becomes the owner.
        self.owner.store(self.id, Ordering::Relaxed);
        Ok(space)
    }

    fn memlock_pages(&self) -> u64 {
        self.process.memlock_pages()
    }
}

/// Devices by path, and open files by the inode of their memfd, for any type of parent.
#[derive(Default)]
struct Tables {
    nodes: HashMap<PathBuf, Box<dyn Any + Send>>,
    files: HashMap<u64, Box<dyn Any + Send>>,
}

static TABLES: LazyLock<Mutex<Tables>> = LazyLock::new(Mutex::default);

struct Open<P: Parent> {
    file: WeakFile<P>,
    owner: Arc<AtomicU64>,
}

fn with_tables<T>(action: impl FnOnce(&mut Tables) -> T) -> T {
    action(&mut TABLES.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Registers a device under `path`, for [`DeviceFile::open`]. Replaces an earlier device of that path.
pub fn publish<P>(path: impl Into<PathBuf>, node: &Node<P>)
where
    P: Parent<Host = LinuxHost> + Send + 'static,
{
    with_tables(|tables| tables.nodes.insert(path.into(), Box::new(node.clone())));
}

fn inode(fd: impl AsFd) -> Result<u64, Errno> {
    rustix::fs::fstat(fd).map(|stat| stat.st_ino).map_err(|e| Errno::from_raw(e.raw_os_error()))
}

impl<P> DeviceFile for InProcess<P, SimulatedProcess>
where
    P: Parent<Host = LinuxHost> + Send + 'static,
{
    fn fd(&self) -> BorrowedFd<'_> {
        self.caller().file.as_fd()
    }

    fn open(path: &Path) -> Result<Self, Errno> {
        let node = with_tables(|tables| {
            tables.nodes.get(path).and_then(|node| node.downcast_ref::<Node<P>>()).cloned()
        });
        let token = memfd::create(c"device-of-this-process", 0, None)?;
        let inode = inode(&token)?;
        let process = SimulatedProcess::new(Arc::default(), token);
        let owner = Arc::clone(&process.owner);
        let device = node.ok_or(Errno::NOENT)?.open(process)?;
        let open = Open { file: device.downgrade(), owner };
        with_tables(|tables| tables.files.insert(inode, Box::new(open)));
        Ok(device)
    }

    fn from_fd(fd: OwnedFd) -> Result<Self, Errno> {
        let inode = inode(&fd)?;
        let known = with_tables(|tables| {
            let open = tables.files.get(&inode)?.downcast_ref::<Open<P>>()?;
            Some((open.file.upgrade(())?, Arc::clone(&open.owner)))
        });
        let (device, owner) = known.ok_or(Errno::BADF)?;
        Ok(device.for_caller(SimulatedProcess::new(owner, fd)))
    }
}
