//! What the shell plugs into the core: address spaces, memory objects and events.
//!
//! The core never asks an operating system for anything; it asks these traits. On Linux they are implemented
//! by `vdpad` on top of `vdpa-sys`; in tests by `testing`.

use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::errno::Errno;
use crate::ring::Fault;
use crate::types::{Perm, Result};

/// Bytes of a page: the unit of pinning and of its limit.
pub const PAGE_SIZE: u64 = 4096;

/// The family of types one platform brings along.
pub trait Host: Clone + Debug + 'static {
    /// An address space that can own a device.
    type AddressSpace: AddressSpace<Memory = Self::Memory>;
    /// A piece of client memory the device can reach.
    type Memory: MemoryObject;
    /// An event: kick, call or config interrupt (an eventfd on Linux).
    type Event: Event;
}

/// An address space, held so that it can be recognised later and its memory be found.
///
/// Identity is the address space and not the process: the threads of one process are one, a forked child and
/// the image after an exec are others (uapi-spec 0.1).
pub trait AddressSpace: Clone + Debug + Send + Sync + 'static {
    /// See [`Host::Memory`].
    type Memory: MemoryObject;

    /// Finds the memory behind `[uaddr, uaddr + size)`, in address order and without gaps.
    ///
    /// Called by `UPDATE` and `REMAP` with `size > 0`; may block on system calls but not on the device.
    ///
    /// # Errors
    /// `EFAULT` for a hole, for memory whose protection forbids what `perm` asks for, and when the address
    /// space no longer exists.
    fn resolve(&self, uaddr: u64, size: u64, perm: Perm) -> Result<Vec<Fragment<Self::Memory>>>;

    /// The account that pinned pages of this address space are charged to, shared by all its devices.
    fn account(&self) -> &PinAccount;

    /// The whole address space as one piece of memory whose offsets are its addresses, for devices that pass
    /// addresses through before anything is mapped (uapi-spec 6.1). `None` where the platform has no such thing:
    /// nothing is mapped then.
    fn whole(&self) -> Option<Self::Memory> {
        None
    }
}

/// One run of a resolved range: what the kernel would see as one VMA.
#[derive(Clone, Debug)]
pub struct Fragment<M> {
    /// Bytes.
    pub size: u64,
    /// The memory; its first byte is the first byte of the fragment.
    pub memory: M,
}

/// A piece of client memory, at least as long as the fragment it came with.
pub trait MemoryObject: Clone + Debug + Send + Sync + 'static {
    /// Whether other processes see the same bytes (a shared mapping of a memory object), so that it survives
    /// the exec of its owner. Private memory is reached by copying and dies with the address space.
    fn is_shared(&self) -> bool;

    /// Pages that a pinning device pins for this piece, 0 for what cannot be pinned.
    fn pin_pages(&self) -> u64;

    /// Whether the byte at `offset` here and the one at `other_offset` in `other` are the same byte: the same
    /// object at the same place. False for private memory unless it is the same address space and address.
    fn same_object(&self, offset: u64, other: &Self, other_offset: u64) -> bool;
}

/// Memory that can be reached by copying. Separate from [`MemoryObject`], since the device itself never looks inside.
pub trait Bytes: MemoryObject {
    /// Copies out from `offset`.
    ///
    /// # Errors
    /// [`Fault`] with an offset, beyond the end or when the memory is gone; `buf` may have been changed in part.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Fault>;

    /// Copies in at `offset`.
    ///
    /// # Errors
    /// As [`read`](Self::read), and where the memory may not be written.
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault>;
}

/// An event another party waits for.
pub trait Event: Clone + Debug + Send + Sync + 'static {
    /// Signals it. Never blocks.
    fn signal(&self);
}

/// The process on whose behalf an operation runs.
pub trait Caller<H: Host> {
    /// Whether the caller lives in `owner`. False once that address space has been replaced by an exec.
    fn is(&self, owner: &H::AddressSpace) -> bool;

    /// A lasting handle on the caller's address space, for the process that becomes the owner.
    ///
    /// # Errors
    /// What the platform reports when the caller cannot be examined (`EPERM`, `ENOMEM`).
    fn address_space(&self) -> Result<H::AddressSpace>;

    /// The caller's soft `RLIMIT_MEMLOCK`, in pages.
    fn memlock_pages(&self) -> u64;
}

/// Pages pinned on behalf of one address space, over all its devices: the place of the kernel's `pinned_vm`.
#[derive(Debug, Default)]
pub struct PinAccount(AtomicU64);

impl PinAccount {
    /// Pages charged now.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Charges `pages` if the total stays within `limit`.
    ///
    /// # Errors
    /// `ENOMEM` when it would not; nothing is charged then.
    pub fn charge(&self, pages: u64, limit: u64) -> Result<()> {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
                now.checked_add(pages).filter(|&total| pages == 0 || total <= limit)
            })
            .map(drop)
            .map_err(|_| Errno::NOMEM)
    }

    /// Takes back a charge of `pages`.
    pub fn uncharge(&self, pages: u64) {
        let before = self.0.fetch_sub(pages, Ordering::Relaxed);
        debug_assert!(before >= pages, "uncharged {pages} of {before} pages");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_refuses_what_exceeds_the_limit_and_keeps_the_rest() {
        let account = PinAccount::default();
        account.charge(10, 10).unwrap();
        assert_eq!(account.charge(1, 10), Err(Errno::NOMEM));
        assert_eq!(account.pages(), 10);
        account.charge(0, 5).unwrap();
        account.uncharge(10);
        assert_eq!(account.pages(), 0);
    }
}
