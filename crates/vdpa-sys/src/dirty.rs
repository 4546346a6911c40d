//! [`DirtyMemory`]: the memory of a device's dirty pages.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, SealFlags, SeekFrom, fallocate, fcntl_add_seals, seek};
use vdpa_core::Errno;
use vdpa_core::dirty::{DirtyMap, DirtyRange, DirtySink, MAP_WORDS, Tracked};
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
    /// Pages are tracked: a copy of what the map says, which costs less to look at.
    on: AtomicBool,
}

impl DirtyMemory {
    /// Memory for a device of which nothing is tracked.
    ///
    /// # Errors
    /// `EMFILE`, `ENFILE`, `ENOMEM`.
    pub fn create() -> Result<Self> {
        let fd = memfd::create(c"vdpa-dirty", BYTES, None)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK).map_err(errno::from_rustix)?;
        Ok(Self { fd, map: OnceLock::new(), on: AtomicBool::new(false) })
    }

    /// The memory of another process, which has died or is being replaced. What it tracked is tracked on.
    ///
    /// # Errors
    /// `EINVAL` for memory of another kind or version; `ENOMEM`.
    pub fn reopen(fd: OwnedFd) -> Result<Self> {
        let memory = Self { fd, map: OnceLock::new(), on: AtomicBool::new(false) };
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
        self.on.store(on, Ordering::SeqCst);
        Ok(())
    }

    /// Whether pages are tracked.
    #[inline]
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Marks the pages of `len` bytes from `iova` that are tracked. To be called when they were written, and before the driver is told.
    #[inline]
    pub fn mark(&self, asid: Asid, iova: u64, len: u64) {
        if self.is_on()
            && let Some(map) = self.map.get()
        {
            map.mark(asid, iova, len);
        }
    }

    /// What is tracked.
    #[must_use]
    pub fn tracked(&self) -> Option<Tracked> {
        self.map.get().filter(|_| self.is_on()).and_then(DirtyMap::tracked)
    }

    /// The number of the request that has begun the tracking, if there is tracking.
    #[must_use]
    pub fn request(&self) -> Option<u64> {
        self.map.get().filter(|_| self.is_on()).map(DirtyMap::request)
    }

    /// Begins to track. Nobody [marks](Self::mark) before it returns.
    ///
    /// # Errors
    /// As [`DirtyTracking::start`](vdpa_core::dirty::DirtyTracking::start).
    pub fn start(&self, page_size: u64, ranges: &[DirtyRange], request: u64) -> Result<()> {
        if self.is_on() {
            return Err(Errno::BUSY);
        }
        let map = self.map()?;
        // What a process has left that died while it stopped.
        self.zero()?;
        map.start(page_size, ranges, request)?;
        self.on.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// No page is marked by a call that begins from now on. [`forget`](Self::forget) follows.
    pub fn stop_marking(&self) {
        self.on.store(false, Ordering::SeqCst);
    }

    /// Ends the tracking, and gives the memory of the bits back. Nobody is marking.
    ///
    /// # Errors
    /// Those of fallocate(2).
    pub fn forget(&self) -> Result<()> {
        self.on.store(false, Ordering::SeqCst);
        let Some(map) = self.map.get() else { return Ok(()) };
        map.stop();
        self.zero()
    }

    /// As [`DirtyMap::report`].
    ///
    /// # Errors
    /// As there.
    pub fn report(&self, of: DirtyRange, clear: bool, sink: DirtySink<'_>) -> Result<()> {
        self.map.get().filter(|_| self.is_on()).ok_or(Errno::INVAL)?.report(of, clear, sink)
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
