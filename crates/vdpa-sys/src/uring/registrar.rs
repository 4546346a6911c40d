//! Buffers and files registered with a ring.
#![expect(unsafe_code, reason = "registered buffers are given to the kernel by address")]

use std::fmt;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use io_uring::IoUring;
use vdpa_core::Errno;

use super::ring::errno;
use super::{File, IoVec, MemorySet};

/// Changes the registered buffers and files of a ring, from any thread, even while its worker blocks in the ring.
///
/// The kernel serialises registration with submission by a lock of the ring; registering pins pages and takes
/// about 20 us per MiB of 4 KiB pages (0.3 us per MiB of huge ones) during which the worker cannot submit. A
/// submitted request keeps its buffer or file even if the slot changes. A queued request uses the content that the slot has
/// when it is submitted.
#[derive(Clone)]
pub struct Registrar {
    /// `None` for threads, with which nothing can be registered.
    pub(super) ring: Option<Arc<IoUring>>,
    pub(super) files: Arc<Mutex<Files>>,
}

/// Free slots of the registered files.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// Slots that were freed.
    free: Vec<u32>,
    /// From this slot on, slots were never used.
    fresh: u32,
    /// Slots reserved with the ring: none until the first file.
    reserved: u32,
}

impl Files {
    /// Slots of a ring whose files are registered by [`Registrar::add_file`].
    const SLOTS: u32 = 1024;
}

/// A file registered with a ring. Dropping it empties the slot, which another file may then use.
///
/// Drop it only if no queued request refers to it; otherwise [retire](Self::retire) it, since such a request would use another
/// file. Submitted requests keep the file.
pub struct FileSlot {
    registrar: Registrar,
    slot: u32,
    /// Whether the slot may be used again.
    again: bool,
}

impl FileSlot {
    /// The file for a request.
    #[must_use]
    pub const fn file(&self) -> File {
        File::Registered(self.slot)
    }

    /// Number of its slot.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.slot
    }

    /// Empties the slot for good. Queued requests that refer to it fail with `EBADF`.
    pub fn retire(mut self) {
        self.again = false;
    }
}

impl Drop for FileSlot {
    fn drop(&mut self) {
        // A slot that cannot be emptied is not used again.
        if self.registrar.set_file(self.slot, None).is_ok() && self.again {
            lock(&self.registrar.files).free.push(self.slot);
        }
    }
}

impl fmt::Debug for FileSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FileSlot").field(&self.slot).finish()
    }
}

fn lock(files: &Mutex<Files>) -> MutexGuard<'_, Files> {
    files.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registrar {
    /// Makes room for `slots` buffers (1 to 16384), all empty. Once per ring.
    ///
    /// # Errors
    /// `EBUSY` when it was done before, `EINVAL` for a number out of range or a kernel before 5.19.
    pub fn reserve_buffers(&self, slots: u32) -> Result<(), Errno> {
        self.ring()?.submitter().register_buffers_sparse(slots).map_err(|error| errno(&error))
    }

    /// Pins `iovec`, at most 1 GiB inside one mapping of `memory`, as buffer `slot`; replaces what was there.
    ///
    /// The pages stay pinned until the slot is replaced or emptied, or the ring is closed, even if the mapping is
    /// removed. Populate the mapping first: pinning page by page is five times as slow.
    ///
    /// # Errors
    /// `EFAULT` for bytes outside of `memory`, or that cannot be accessed for writing; `ENOMEM` when
    /// `RLIMIT_MEMLOCK` forbids it; `EOPNOTSUPP` for memory that cannot be pinned (file systems other than tmpfs
    /// and hugetlbfs); `EINVAL` for a slot out of range.
    pub fn set_buffer(&self, slot: u16, iovec: IoVec, memory: &MemorySet) -> Result<(), Errno> {
        if !memory.covers(iovec) {
            return Err(Errno::FAULT);
        }
        self.update_buffer(slot, iovec)
    }

    /// Empties buffer `slot`; its pages are unpinned when the last request that uses them has completed.
    ///
    /// # Errors
    /// `EINVAL` for a slot out of range, `ENXIO` when no buffers were reserved.
    pub fn clear_buffer(&self, slot: u16) -> Result<(), Errno> {
        self.update_buffer(slot, IoVec { addr: 0, len: 0 })
    }

    /// Whether anything can be registered: not where threads carry the requests out.
    #[must_use]
    pub const fn is_available(&self) -> bool {
        self.ring.is_some()
    }

    fn ring(&self) -> Result<&IoUring, Errno> {
        self.ring.as_deref().ok_or(Errno::OPNOTSUPP)
    }

    fn update_buffer(&self, slot: u16, iovec: IoVec) -> Result<(), Errno> {
        let ring = self.ring()?;
        let iov =
            [libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(iovec.addr), iov_len: iovec.len }];
        // SAFETY: the range is empty, or lies inside a `StableMemory`, which allows the kernel to access it at any
        // time and which exists during this call; after it the kernel holds references to the pages and does not
        // use the address. Pages that stay pinned when the mapping is gone are never given out by anybody else.
        unsafe { ring.submitter().register_buffers_update(slot.into(), &iov, None) }
            .map_err(|error| errno(&error))
    }

    /// Makes room for `slots` registered files, all empty. Once per ring.
    ///
    /// # Errors
    /// As for [`Registrar::reserve_buffers`].
    pub fn reserve_files(&self, slots: u32) -> Result<(), Errno> {
        self.ring()?.submitter().register_files_sparse(slots).map_err(|error| errno(&error))
    }

    /// Registers a file in a free slot, which saves the kernel the lookup and reference count per request. Do not combine it
    /// with [`Registrar::reserve_files`].
    ///
    /// # Errors
    /// `ENFILE` when all slots are taken; as for [`Registrar::reserve_buffers`].
    pub fn add_file(&self, file: &OwnedFd) -> Result<FileSlot, Errno> {
        let slot = {
            let mut files = lock(&self.files);
            if files.reserved == 0 {
                self.reserve_files(Files::SLOTS)?;
                files.reserved = Files::SLOTS;
            }
            match files.free.pop() {
                Some(slot) => slot,
                None if files.fresh < files.reserved => {
                    files.fresh += 1;
                    files.fresh - 1
                }
                None => return Err(Errno::from_raw(libc::ENFILE)),
            }
        };
        // Dropped again, with an empty slot, if that fails.
        let slot = FileSlot { registrar: self.clone(), slot, again: true };
        self.set_file(slot.slot, Some(file)).map(|()| slot)
    }

    /// Puts a file into a slot, or empties it. The kernel holds the open file, so the descriptor may be closed.
    ///
    /// # Errors
    /// `EINVAL` for a slot out of range, `ENXIO` when no files were reserved, `EBADF` for a ring's own descriptor.
    pub fn set_file(&self, slot: u32, file: Option<&OwnedFd>) -> Result<(), Errno> {
        const EMPTY: i32 = -1;
        let fd = file.map_or(EMPTY, AsRawFd::as_raw_fd);
        self.ring()?.submitter().register_files_update(slot, &[fd]).map(drop).map_err(|error| errno(&error))
    }
}

impl fmt::Debug for Registrar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ring = self.ring.as_ref().map(AsRawFd::as_raw_fd);
        f.debug_struct("Registrar").field("ring", &ring).finish()
    }
}
