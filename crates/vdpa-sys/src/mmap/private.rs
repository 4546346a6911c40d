//! [`PrivateMap`]: memory of this process alone.

use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use vdpa_core::Errno;

use crate::errno;
use crate::stable::StableMemory;

/// Private, anonymous memory: it belongs to this process alone and ends with it. No file, so nothing of it can be handed over.
#[derive(Debug)]
pub struct PrivateMap {
    addr: usize,
    len: usize,
}

impl PrivateMap {
    /// `len` bytes of zeros, in whole pages.
    ///
    /// # Errors
    /// `ENOMEM`; `EINVAL` for `len` 0.
    pub fn new(len: usize) -> Result<Self, Errno> {
        let len = len.checked_next_multiple_of(rustix::param::page_size()).ok_or(Errno::INVAL)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without a wanted address the kernel picks one that is free, so nothing in use is replaced.
        let addr = unsafe { mmap_anonymous(ptr::null_mut(), len, prot, MapFlags::PRIVATE) }
            .map_err(errno::from_rustix)?;
        Ok(Self { addr: addr.expose_provenance(), len })
    }
}

impl Drop for PrivateMap {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and everything that accesses it holds this value.
        let result = unsafe { munmap(ptr::with_exposed_provenance_mut(self.addr), self.len) };
        debug_assert!(result.is_ok(), "unmapping what was mapped succeeds: {result:?}");
    }
}

// SAFETY: the mapping stays where it is until the value is dropped, and there is no way to get a reference to its bytes.
unsafe impl StableMemory for PrivateMap {
    fn base(&self) -> usize {
        self.addr
    }

    fn len(&self) -> usize {
        self.len
    }
}
