//! Address spaces that own devices.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::fs::OFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use vdpa_core::Errno;
use vdpa_core::host::PinAccount;

use crate::errno;
use crate::guest::{LinuxHost, ObjectFile, ObjectKey};
use crate::process::{Caller, Random};

/// An address space, held by descriptors that are bound to it and not to a process id. Clones share it.
#[derive(Clone, Debug)]
pub struct OwnerSpace(Arc<Space>);

#[derive(Debug)]
struct Space {
    record: SpaceRecord,
    fds: SpaceFds,
    account: PinAccount,
    /// The thread that was last seen in it, for lookups that need a thread id.
    thread: AtomicI32,
    /// Whether it is that of this process, in which a device may only write memory that was made for it.
    own: AtomicBool,
    /// Open files of its memory objects, so that mappings of one object share a descriptor.
    objects: Mutex<HashMap<ObjectKey, Weak<ObjectFile>>>,
}

/// The saved state of an [`OwnerSpace`], without its descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceRecord {
    /// Id of the process that used it when it was adopted.
    pub pid: i32,
    /// Address of its random bytes.
    pub random_addr: u64,
}

/// The descriptors that hold an address space. They stay valid across an exec of this process.
#[derive(Debug)]
pub struct SpaceFds {
    /// A pidfd of the process; becomes readable when it ends.
    pub pidfd: OwnedFd,
    /// `/proc/TID/mem`, open for reading and writing.
    pub mem: OwnedFd,
    /// `/proc/TID/maps`.
    pub maps: OwnedFd,
}

impl OwnerSpace {
    fn hold(caller: &Caller) -> Result<Self, Errno> {
        let pid = caller.pid()?;
        let pidfd = pidfd_open(Pid::from_raw(pid).ok_or(errno::SRCH)?, PidfdFlags::empty())
            .map_err(errno::from_rustix)?;
        let fds = SpaceFds {
            pidfd,
            mem: caller.open_proc("mem", OFlags::RDWR)?,
            maps: caller.open_proc("maps", OFlags::RDONLY)?,
        };
        let record = SpaceRecord { pid, random_addr: caller.random_addr()? };
        Ok(Self::new(record, fds, caller.tid()))
    }

    fn new(record: SpaceRecord, fds: SpaceFds, thread: i32) -> Self {
        Self(Arc::new(Space {
            record,
            fds,
            account: PinAccount::default(),
            thread: AtomicI32::new(thread),
            own: AtomicBool::new(false),
            objects: Mutex::default(),
        }))
    }

    /// Whether a process still uses it. False for good once its last process has made an exec or ended.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.random().is_some()
    }

    /// Id of the process that used it when it was adopted. For display; a process may have left it since.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.0.record.pid
    }

    /// The state that a later image of this process needs for [`Spaces::restore`], together with [`fds`](Self::fds).
    #[must_use]
    pub fn record(&self) -> SpaceRecord {
        self.0.record
    }

    /// The descriptors that hold it.
    #[must_use]
    pub fn fds(&self) -> &SpaceFds {
        &self.0.fds
    }

    /// Whether both are the same address space.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Its present random bytes; `None` when no process uses it.
    ///
    /// They are read each time: if a program changes its own bytes, both sides of the comparison see the change.
    pub(crate) fn random(&self) -> Option<Random> {
        let addr = self.0.record.random_addr;
        let mut bytes = [0; 16];
        let read = rustix::io::pread(&self.0.fds.mem, &mut bytes[..], addr).ok()?;
        (read == bytes.len()).then_some(Random { addr, bytes })
    }

    /// Whether a device in this process has it from [`ThisProcess`].
    pub(crate) fn is_own(&self) -> bool {
        self.0.own.load(Ordering::Relaxed)
    }

    pub(crate) fn set_last_thread(&self, tid: i32) {
        self.0.thread.store(tid, Ordering::Relaxed);
    }

    /// Thread ids by which `/proc` may show it: the thread last seen, the process, then its other threads.
    pub(crate) fn threads(&self) -> impl Iterator<Item = i32> + use<> {
        let (thread, pid) = (self.0.thread.load(Ordering::Relaxed), self.pid());
        let others = std::iter::once_with(move || std::fs::read_dir(format!("/proc/{pid}/task")))
            .flatten()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        [thread, pid].into_iter().chain(others)
    }

    pub(crate) fn mem(&self) -> BorrowedFd<'_> {
        self.0.fds.mem.as_fd()
    }

    pub(crate) fn maps(&self) -> BorrowedFd<'_> {
        self.0.fds.maps.as_fd()
    }

    pub(crate) fn pin_account(&self) -> &PinAccount {
        &self.0.account
    }

    /// The open file of an object; calls `open` if no mapping uses it yet.
    pub(crate) fn object(
        &self,
        key: ObjectKey,
        open: impl FnOnce() -> Result<OwnedFd, Errno>,
    ) -> Result<Arc<ObjectFile>, Errno> {
        let mut objects = self.0.objects.lock();
        if let Some(file) = objects.get(&key).and_then(Weak::upgrade) {
            return Ok(file);
        }
        let file = Arc::new(ObjectFile::new(open()?));
        objects.retain(|_, file| file.strong_count() > 0);
        objects.insert(key, Arc::downgrade(&file));
        Ok(file)
    }
}

/// A registry of the address spaces in use, each once, so that all devices of one owner charge one account. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Spaces(Arc<Mutex<Vec<Weak<Space>>>>);

impl Spaces {
    /// An empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The address space of `caller`: the one already in use, or a new one.
    ///
    /// # Errors
    /// `EPERM` or `EACCES` without the right to examine the caller; `ESRCH`; `EMFILE`.
    pub fn adopt(&self, caller: &Caller) -> Result<OwnerSpace, Errno> {
        let mut spaces = self.0.lock();
        spaces.retain(|space| space.strong_count() > 0);
        if let Some(space) =
            spaces.iter().filter_map(Weak::upgrade).map(OwnerSpace).find(|space| caller.is(space))
        {
            return Ok(space);
        }
        let space = OwnerSpace::hold(caller)?;
        spaces.push(Arc::downgrade(&space.0));
        Ok(space)
    }

    /// Restores an address space that an earlier image of this process used. Call it once for each.
    #[must_use]
    pub fn restore(&self, record: SpaceRecord, fds: SpaceFds) -> OwnerSpace {
        let space = OwnerSpace::new(record, fds, record.pid);
        self.0.lock().push(Arc::downgrade(&space.0));
        space
    }

    /// Number of address spaces in use.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.lock().iter().filter(|space| space.strong_count() > 0).count()
    }

    /// Whether none is in use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A caller, with the registry for its address space.
#[derive(Clone, Copy, Debug)]
pub struct ProcessCaller<'a> {
    /// The caller.
    pub caller: &'a Caller,
    /// The registry.
    pub spaces: &'a Spaces,
}

impl vdpa_core::host::Caller<LinuxHost> for ProcessCaller<'_> {
    fn is(&self, owner: &OwnerSpace) -> bool {
        self.caller.is(owner)
    }

    fn address_space(&self) -> Result<OwnerSpace, Errno> {
        self.spaces.adopt(self.caller)
    }

    fn memlock_pages(&self) -> u64 {
        self.caller.memlock_pages()
    }
}

/// Makes the calling thread the caller, for a device in its own process
/// ([`vdpa_core::inprocess`]). Such a device reaches the memory of [`SharedMap`](crate::mmap::SharedMap)s and no other.
#[derive(Clone, Debug, Default)]
pub struct ThisProcess {
    spaces: Spaces,
}

impl ThisProcess {
    fn caller(&self) -> Result<Caller, Errno> {
        Caller::new(rustix::thread::gettid().as_raw_nonzero().get())
    }
}

impl vdpa_core::host::Caller<LinuxHost> for ThisProcess {
    fn is(&self, owner: &OwnerSpace) -> bool {
        self.caller().is_ok_and(|caller| caller.is(owner))
    }

    fn address_space(&self) -> Result<OwnerSpace, Errno> {
        let space = self.spaces.adopt(&self.caller()?)?;
        space.0.own.store(true, Ordering::Relaxed);
        Ok(space)
    }

    fn memlock_pages(&self) -> u64 {
        self.caller().map_or(0, |caller| caller.memlock_pages())
    }
}
