//! [`DirtyMemory`]: the memory of a device's dirty pages.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use parking_lot::RwLock;
use rustix::fs::{FallocateFlags, SealFlags, SeekFrom, fallocate, fcntl_add_seals, seek};
use vdpa_core::Errno;
use vdpa_core::dirty::{DirtyMap, DirtyRange, DirtySink, MAP_WORDS, Tracked, VhostLog};
use vdpa_core::types::{Asid, Result};

use crate::shared_words::SharedWords;
use crate::{errno, memfd};

/// Bytes of the memory file. It takes memory for what is dirty, and address space once something is tracked.
const BYTES: u64 = (MAP_WORDS * size_of::<u64>()) as u64;

/// A [`DirtyMap`] in a memory file, which another process can hold as well, so that a page that was marked stays marked when this
/// process dies. Shared by whoever writes client memory and whoever asks what was written.
#[derive(Debug)]
pub struct DirtyMemory {
    fd: OwnedFd,
    /// Mapped once something is tracked.
    map: OnceLock<DirtyMap<SharedWords>>,
    /// What is to be marked, of [`TRACKED`], [`RINGS`] and [`LOGGED`]: one word, because it is looked at for each request.
    on: AtomicU8,
    /// The log of a client that knows vhost's.
    log: RwLock<Option<VhostLog>>,
    /// Something was marked in it since its client was told.
    marked: AtomicBool,
}

/// Pages are tracked: a copy of what the map says.
const TRACKED: u8 = 1;
/// There is a log, in which rings are marked whose addresses say so.
const RINGS: u8 = 2;
/// Buffers of requests are marked in it.
const LOGGED: u8 = 4;

impl DirtyMemory {
    /// Memory for a device of which nothing is tracked.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn create() -> Result<Self> {
        let fd = memfd::create(c"vdpa-dirty", BYTES, None)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK).map_err(errno::from_rustix)?;
        Ok(Self::of(fd))
    }

    fn of(fd: OwnedFd) -> Self {
        let (log, marked) = (RwLock::new(None), AtomicBool::new(false));
        Self { fd, map: OnceLock::new(), on: AtomicU8::new(0), log, marked }
    }

    fn set_on(&self, what: u8, on: bool) {
        if on {
            self.on.fetch_or(what, Ordering::SeqCst);
        } else {
            self.on.fetch_and(!what, Ordering::SeqCst);
        }
    }

    fn tracks(&self) -> bool {
        self.on.load(Ordering::Relaxed) & TRACKED != 0
    }

    /// The memory of another process, which has died or is being replaced. What it tracked is tracked on.
    ///
    /// # Errors
    /// `EINVAL` for memory of another kind or version; `ENOMEM`.
    pub fn reopen(fd: OwnedFd) -> Result<Self> {
        let memory = Self::of(fd);
        memory.refresh()?;
        if let Some(map) = memory.map.get() {
            memory.find_all(map)?;
        }
        Ok(memory)
    }

    /// Looks whether pages are tracked, where another process may have changed that.
    ///
    /// # Errors
    /// As [`reopen`](Self::reopen).
    pub fn refresh(&self) -> Result<()> {
        let mut header = [0; 16];
        let read = rustix::io::pread(&self.fd, &mut header, 0).map_err(errno::from_rustix)?;
        if read < header.len() {
            return Err(Errno::INVAL);
        }
        let (words, _) = header.as_chunks::<8>();
        let word = |index: usize| words.get(index).map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        let on = DirtyMap::<SharedWords>::is_started([word(0), word(1)]);
        if on {
            self.map()?;
        }
        self.set_on(TRACKED, on);
        Ok(())
    }

    /// Whether something is to be marked: pages are tracked, or there is a log of vhost.
    #[inline]
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed) != 0
    }

    /// Whether it must be known of each request what it writes.
    #[must_use]
    pub fn is_of_requests(&self) -> bool {
        self.on.load(Ordering::Relaxed) & (TRACKED | LOGGED) != 0
    }

    /// Sets the log of vhost; `None` for none. A page that is being marked meanwhile is marked in either.
    pub fn set_vhost_log(&self, log: Option<VhostLog>) {
        let all = log.as_ref().is_some_and(|log| log.all);
        let mut place = self.log.write();
        self.set_on(RINGS, log.is_some());
        self.set_on(LOGGED, all);
        *place = log;
    }

    /// Marks the pages of `len` bytes from `iova` that are tracked. To be called when they were written, and before the driver is told.
    #[inline]
    pub fn mark(&self, asid: Asid, iova: u64, len: u64) {
        let on = self.on.load(Ordering::Relaxed);
        if on & TRACKED != 0
            && let Some(map) = self.map.get()
        {
            map.mark(asid, iova, len);
        }
        if on & LOGGED != 0 {
            self.log(|log| log.mark_data(asid, iova, len));
        }
    }

    /// Marks `len` bytes of a ring from `iova` on, which is at `logged` for the log of vhost if that is to have it.
    #[inline]
    pub fn mark_ring(&self, asid: Asid, iova: u64, logged: Option<u64>, len: u64) {
        let on = self.on.load(Ordering::Relaxed);
        if on & TRACKED != 0
            && let Some(map) = self.map.get()
        {
            map.mark(asid, iova, len);
        }
        if on & RINGS != 0
            && let Some(addr) = logged
        {
            self.log(|log| log.mark_ring(asid, addr, len));
        }
    }

    fn log(&self, mark: impl FnOnce(&VhostLog) -> bool) {
        if let Some(log) = &*self.log.read()
            && mark(log)
        {
            self.marked.store(true, Ordering::Relaxed);
        }
    }

    /// Tells the client of the log what was marked since it was told last.
    #[inline]
    pub fn signal_log(&self) {
        if self.on.load(Ordering::Relaxed) & RINGS != 0 && self.marked.swap(false, Ordering::Relaxed) {
            // Signalled without the lock, since a client can make it block.
            let signal = self.log.read().as_ref().and_then(|log| log.signal.clone());
            signal.into_iter().for_each(|signal| signal());
        }
    }

    /// What is tracked.
    #[must_use]
    pub fn tracked(&self) -> Option<Tracked> {
        self.map.get().filter(|_| self.tracks()).and_then(DirtyMap::tracked)
    }

    /// The number of the request that has begun the tracking, if there is tracking.
    #[must_use]
    pub fn request(&self) -> Option<u64> {
        self.map.get().filter(|_| self.tracks()).map(DirtyMap::request)
    }

    /// Begins to track. Nobody [marks](Self::mark) before it returns.
    ///
    /// # Errors
    /// As [`DirtyTracking::start`](vdpa_core::dirty::DirtyTracking::start).
    pub fn start(&self, page_size: u64, ranges: &[DirtyRange], request: u64) -> Result<()> {
        if self.tracks() {
            return Err(Errno::BUSY);
        }
        let map = self.map()?;
        // What a process has left that died while it stopped.
        self.zero()?;
        map.start(page_size, ranges, request)?;
        self.set_on(TRACKED, true);
        Ok(())
    }

    /// No page of the map is marked by a call that begins from now on. [`forget`](Self::forget) follows.
    pub fn stop_marking(&self) {
        self.set_on(TRACKED, false);
    }

    /// Ends the tracking, and gives the memory of the bits back. Nobody is marking.
    ///
    /// # Errors
    /// Those of fallocate(2).
    pub fn forget(&self) -> Result<()> {
        self.set_on(TRACKED, false);
        let Some(map) = self.map.get() else { return Ok(()) };
        map.stop();
        self.zero()
    }

    /// As [`DirtyMap::report`].
    ///
    /// # Errors
    /// As there.
    pub fn report(&self, of: DirtyRange, clear: bool, sink: DirtySink<'_>) -> Result<()> {
        self.map.get().filter(|_| self.tracks()).ok_or(Errno::INVAL)?.report(of, clear, sink)
    }

    fn map(&self) -> Result<&DirtyMap<SharedWords>> {
        if let Some(map) = self.map.get() {
            return Ok(map);
        }
        let map = DirtyMap::new(SharedWords::map(&self.fd)?)?;
        Ok(self.map.get_or_init(|| map))
    }

    /// Makes all words 0.
    fn zero(&self) -> Result<()> {
        fallocate(&self.fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, BYTES)
            .map_err(errno::from_rustix)
    }

    /// Has the map look at all words that have memory.
    fn find_all(&self, map: &DirtyMap<SharedWords>) -> Result<()> {
        const WORD: u64 = size_of::<u64>() as u64;
        let mut at = 0;
        loop {
            let from = match seek(&self.fd, SeekFrom::Data(at)) {
                Err(rustix::io::Errno::NXIO) => return Ok(()),
                from => from.map_err(errno::from_rustix)?,
            };
            at = seek(&self.fd, SeekFrom::Hole(from)).map_err(errno::from_rustix)?;
            let word = |byte: u64| usize::try_from(byte / WORD).map_err(|_| Errno::INVAL);
            map.find(word(from)?, word(at)?);
        }
    }
}

impl AsFd for DirtyMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests;
