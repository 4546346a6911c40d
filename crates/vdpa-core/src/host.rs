//! The platform interface of the core: address spaces, memory objects and events.
//!
//! The core makes no system calls; it calls these traits. On Linux `vdpa-sys` implements them; in tests `testing` does.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::dirty::BitLog;
use crate::errno::Errno;
use crate::ring::Fault;
use crate::types::{Perm, Result};

/// Size of a page in bytes: the unit of pinned memory and of its limit.
pub const PAGE_SIZE: u64 = 4096;

/// The types of one platform.
pub trait Host: Clone + Debug + 'static {
    /// An address space that can own a device.
    type AddressSpace: AddressSpace<Memory = Self::Memory>;
    /// A piece of client memory that the device can access.
    type Memory: MemoryObject;
    /// An event: kick, call or config interrupt (an eventfd on Linux).
    type Event: Event;
}

/// A reference to an address space, by which a caller can be compared with the owner and the owner's memory can be found.
///
/// An owner is an address space and not a process: all threads of a process have the same one, while a forked child and the
/// image after an exec have others (uapi-spec 0.1).
pub trait AddressSpace: Clone + Debug + Send + Sync + 'static {
    /// See [`Host::Memory`].
    type Memory: MemoryObject;

    /// Finds the memory behind `[uaddr, uaddr + size)`, in address order and without gaps.
    ///
    /// Called for `UPDATE` and `REMAP` with `size > 0`. May block in system calls, but never waits for the device.
    ///
    /// # Errors
    /// `EFAULT` for a hole, for memory whose protection forbids what `perm` asks for, and when the address
    /// space no longer exists.
    fn resolve(&self, uaddr: u64, size: u64, perm: Perm) -> Result<Vec<Fragment<Self::Memory>>>;

    /// Finds the memory from `uaddr` to the end of the mapping (VMA) that has it, which must be readable and writable. Called for
    /// `SET_LOG_BASE`; as [`resolve`](Self::resolve) otherwise.
    ///
    /// # Errors
    /// `EFAULT`, as of [`resolve`](Self::resolve), and on a platform that has no such memory.
    fn resolve_mapping(&self, _uaddr: u64) -> Result<Fragment<Self::Memory>> {
        Err(Errno::FAULT)
    }

    /// The account that pinned pages of this address space are charged to, shared by all its devices.
    fn account(&self) -> &PinAccount;

    /// The whole address space as one piece of memory whose offsets are its addresses. For devices with an identity map
    /// before the first mapping (uapi-spec 6.1). `None` if the platform does not support it: nothing is mapped then.
    fn whole(&self) -> Option<Self::Memory> {
        None
    }
}

/// A contiguous part of a resolved range, which the kernel has as one VMA.
#[derive(Clone, Debug)]
pub struct Fragment<M> {
    /// Size in bytes.
    pub size: u64,
    /// The memory; its first byte is the first byte of the fragment.
    pub memory: M,
}

/// A piece of client memory, at least as long as its fragment.
pub trait MemoryObject: Clone + Debug + Send + Sync + 'static {
    /// Whether it is a shared mapping of a memory object, which survives an exec of its owner. Private memory is accessed by
    /// copying and ends with the address space.
    fn is_shared(&self) -> bool;

    /// Number of pages that a pinning device pins for this piece; 0 for memory that cannot be pinned.
    fn pin_pages(&self) -> u64;

    /// Whether the byte at `offset` and the byte at `other_offset` of `other` are the same: same object, same offset in it. False for private memory unless it is the same address space and address.
    fn same_object(&self, offset: u64, other: &Self, other_offset: u64) -> bool;

    /// The memory as a [log of vhost](crate::dirty::BitLog); `None` for memory whose bits cannot be changed while other processes
    /// change others of them.
    fn bit_log(&self) -> Option<Arc<dyn BitLog>> {
        None
    }
}

/// Memory that can be accessed by copying. Separate from [`MemoryObject`], since the core itself never reads client data.
pub trait Bytes: MemoryObject {
    /// Copies `buf.len()` bytes from `offset` into `buf`.
    ///
    /// # Errors
    /// [`Fault`] with an offset, beyond the end or when the memory no longer exists; `buf` may be partly overwritten.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Fault>;

    /// Copies `data` to `offset`.
    ///
    /// # Errors
    /// As [`read`](Self::read), and [`Fault`] for memory that is not writable.
    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault>;
}

/// An event that the driver waits for.
pub trait Event: Clone + Debug + Send + Sync + 'static {
    /// Signals it. Never blocks.
    fn signal(&self);
}

/// The process on whose behalf an operation runs.
pub trait Caller<H: Host> {
    /// Whether the caller runs in the address space `owner`. False after the caller has replaced it by an exec.
    fn is(&self, owner: &H::AddressSpace) -> bool;

    /// A reference to the caller's address space that outlasts the call, for a caller that becomes the owner.
    ///
    /// # Errors
    /// What the platform reports when the caller cannot be examined (`EPERM`, `ENOMEM`).
    fn address_space(&self) -> Result<H::AddressSpace>;

    /// The caller's soft `RLIMIT_MEMLOCK`, in pages.
    fn memlock_pages(&self) -> u64;
}

/// Number of pages pinned for one address space by all its devices, as the kernel's `mm->pinned_vm` counts them.
#[derive(Debug, Default)]
pub struct PinAccount(AtomicU64);

impl PinAccount {
    /// Number of pages charged now.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Charges `pages` if the total stays within `limit`.
    ///
    /// # Errors
    /// `ENOMEM` when the total would exceed `limit`; nothing is charged then.
    pub fn charge(&self, pages: u64, limit: u64) -> Result<()> {
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
                now.checked_add(pages).filter(|&total| pages == 0 || total <= limit)
            })
            .map(drop)
            .map_err(|_| Errno::NOMEM)
    }

    /// Reverts a charge of `pages`.
    pub fn uncharge(&self, pages: u64) {
        let before = self.0.fetch_sub(pages, Ordering::Relaxed);
        debug_assert!(before >= pages, "uncharged {pages} of {before} pages");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_refuses_charges_beyond_the_limit_and_keeps_earlier_ones() {
        let account = PinAccount::default();
        account.charge(10, 10).unwrap();
        assert_eq!(account.charge(1, 10), Err(Errno::NOMEM));
        assert_eq!(account.pages(), 10);
        account.charge(0, 5).unwrap();
        account.uncharge(10);
        assert_eq!(account.pages(), 0);
    }
}
