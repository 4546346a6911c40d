//! Arguments of raw requests, placed so that a device which writes too much gets a fault.
#![expect(unsafe_code, reason = "maps memory and copies into it by address")]

use std::ptr;

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use vdpa_core::Errno;

use crate::errno;

/// Bytes at the end of mapped memory, followed by a page without access.
#[derive(Debug)]
pub(crate) struct Fence {
    base: usize,
    span: usize,
    /// Where the page after them begins.
    end: usize,
    len: usize,
}

impl Fence {
    /// A copy of `bytes`.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn new(bytes: &[u8]) -> Result<Self, Errno> {
        let fence = Self::with_room(bytes.len())?;
        fence.copy_in(bytes);
        Ok(fence)
    }

    /// Room for up to `len` bytes.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn with_room(len: usize) -> Result<Self, Errno> {
        let page = rustix::param::page_size();
        let room = len.checked_next_multiple_of(page).ok_or(Errno::NOMEM)?;
        let span = room.checked_add(page).ok_or(Errno::NOMEM)?;
        // SAFETY: without a wanted address the kernel picks one that is free, so nothing in use is replaced.
        let base = unsafe { mmap_anonymous(ptr::null_mut(), span, ProtFlags::empty(), MapFlags::PRIVATE) }
            .map_err(errno::from_rustix)?;
        let fence = Self { base: base.expose_provenance(), span, end: base.expose_provenance() + room, len };
        if room > 0 {
            // SAFETY: the first `room` bytes are ours, mapped above, and nothing refers to them yet.
            unsafe { mprotect(base, room, MprotectFlags::READ | MprotectFlags::WRITE) }
                .map_err(errno::from_rustix)?;
        }
        Ok(fence)
    }

    /// Copies `bytes`, as far as there is room, to the end of the memory; returns their address. Does not allocate.
    pub(crate) fn copy_in(&self, bytes: &[u8]) -> usize {
        let len = self.len.min(bytes.len());
        let start = self.end - len;
        // SAFETY: the `len` bytes before `end` are accessible (see `with_room`), and nothing else refers to them.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), ptr::with_exposed_provenance_mut(start), len) };
        start
    }

    /// Copies out what [`copy_in`](Self::copy_in) put there for as many bytes. Does not allocate.
    pub(crate) fn copy_out(&self, bytes: &mut [u8]) {
        let len = self.len.min(bytes.len());
        // SAFETY: the `len` bytes before `end` are accessible (see `with_room`), and no call that writes them is
        // running.
        unsafe {
            ptr::copy_nonoverlapping(ptr::with_exposed_provenance(self.end - len), bytes.as_mut_ptr(), len);
        };
    }

    /// Address of the bytes given to [`new`](Self::new).
    pub(crate) fn start(&self) -> usize {
        self.end - self.len
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `with_room`, and no reference into it exists.
        let result = unsafe { munmap(ptr::with_exposed_provenance_mut(self.base), self.span) };
        debug_assert!(result.is_ok(), "unmapping what was mapped succeeds: {result:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_end_at_the_end_of_the_mapping() {
        let fence = Fence::new(&[1, 2, 3]).unwrap();
        assert!((fence.start() + 3).is_multiple_of(rustix::param::page_size()));
        let mut out = [0; 3];
        fence.copy_out(&mut out);
        assert_eq!(out, [1, 2, 3]);
        let room = Fence::with_room(8).unwrap();
        assert_eq!(room.copy_in(&[9; 20]), room.end - 8, "no more than there is room for");
        assert_eq!(room.copy_in(&[7, 8]), room.end - 2);
        room.copy_out(&mut out[..2]);
        assert_eq!(out, [7, 8, 3]);
    }
}
