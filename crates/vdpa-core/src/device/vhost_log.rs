//! The log of vhost: `VHOST_F_LOG_ALL`, `VHOST_SET_LOG_BASE` and `VHOST_SET_LOG_FD`, for the attribute `vhost_log on`.
//!
//! The kernel's vhost-vdpa has none of them (uapi-spec 1.1). Here they do what they do on vhost-net: see [`VhostLog`]. What differs:
//! the log must be shared memory, since no other can be changed by another process without losing what a third one writes; and
//! it must have bits for everything that is mapped, since a bit that is nowhere would be a page that is not copied.

use std::sync::Arc;

use thiserror::Error;

use crate::device::{Device, EventOf};
use crate::dirty::{BitLog, LOG_PAGE_SHIFT, VhostLog};
use crate::errno::Errno;
use crate::features::Features;
use crate::host::{AddressSpace, Caller, Event, Host, MemoryObject};
use crate::parent::Parent;
use crate::types::{Asid, IovaRange, Result, VringAddr};

/// The flag of `VHOST_SET_VRING_ADDR` that has writes to the used ring logged.
pub(super) const VRING_F_LOG: u32 = 1;

/// Why a log was refused. Nothing has changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum VhostLogError {
    /// The caller is not the owner.
    #[error("the caller is not the owner of the device; after fork or exec call VHOST_NEW_OWNER first")]
    NotOwner,
    /// The log cannot be accessed.
    #[error("no readable and writable memory at {base:#x}: {errno}")]
    Unreachable {
        /// Address given.
        base: u64,
        /// What the platform reports.
        errno: Errno,
    },
    /// The log is in memory that only its process has.
    #[error(
        "the log at {base:#x} is private memory, whose bits another process cannot set without losing those that are set or taken at \
         the same time; map it shared (a memfd)"
    )]
    Private {
        /// Address given.
        base: u64,
    },
    /// The log has no bits for addresses that are mapped.
    #[error("the log has bits for {pages} pages, up to {:#x}, and {last:#x} is mapped", pages << LOG_PAGE_SHIFT)]
    Short {
        /// Pages that it has bits for.
        pages: u64,
        /// The last address that is mapped.
        last: u64,
    },
    /// The device cannot log.
    #[error("the device cannot log what it writes: {errno}")]
    Parent {
        /// What it reports.
        errno: Errno,
    },
}

impl VhostLogError {
    /// The error number of the request.
    #[must_use]
    pub const fn errno(self) -> Errno {
        match self {
            Self::NotOwner => Errno::PERM,
            Self::Unreachable { .. } | Self::Private { .. } | Self::Short { .. } => Errno::FAULT,
            Self::Parent { errno } => errno,
        }
    }
}

/// The log of a device, as its client has set it.
#[derive(Debug)]
pub(super) struct Log<H: Host> {
    pub(super) base: Option<LogBase<H::Memory>>,
    pub(super) event: Option<H::Event>,
    /// `VHOST_F_LOG_ALL` is in force.
    pub(super) all: bool,
}

/// Where the bits are.
#[derive(Clone, Debug)]
pub(super) struct LogBase<M> {
    /// Address in the owner when it was set.
    pub(super) uaddr: u64,
    pub(super) size: u64,
    pub(super) memory: M,
    pub(super) bits: Arc<dyn BitLog>,
}

impl<H: Host> Default for Log<H> {
    fn default() -> Self {
        Self { base: None, event: None, all: false }
    }
}

impl<H: Host> Log<H> {
    /// The log as the device marks it.
    fn target(&self) -> Option<VhostLog> {
        let base = self.base.as_ref()?;
        let signal =
            self.event.clone().map(|event| Arc::new(move || event.signal()) as Arc<dyn Fn() + Send + Sync>);
        Some(VhostLog { bits: Arc::clone(&base.bits), signal, all: self.all })
    }

    /// Pages that can be logged; `None` without a log.
    fn pages(&self) -> Option<u64> {
        self.base.as_ref().map(|base| base.bits.pages())
    }
}

impl<P: Parent> Device<P> {
    /// Features offered: those of the parent, and `VHOST_F_LOG_ALL` where the log is.
    pub fn offered_features(&self) -> Features {
        self.parent.profile().offered_features()
    }

    /// `VHOST_SET_LOG_BASE`: the log is at `uaddr` of the caller, and as long as the mapping there. Blocks as
    /// [`set_features`](Self::set_features) does.
    ///
    /// # Errors
    /// [`VhostLogError`].
    pub fn set_log_base(&mut self, caller: &dyn Caller<P::Host>, uaddr: u64) -> Result<(), VhostLogError> {
        let owner = self.ownership.check(caller).map_err(|_| VhostLogError::NotOwner)?;
        let unreachable = |errno| VhostLogError::Unreachable { base: uaddr, errno };
        let fragment = owner.resolve_mapping(uaddr).map_err(unreachable)?;
        let base = base_of(uaddr, fragment.size, fragment.memory);
        let base = base.ok_or(VhostLogError::Private { base: uaddr })?;
        if self.log.all {
            self.check_log(base.bits.pages())?;
        }
        let before = self.log.base.replace(base);
        self.tell_log().map_err(|errno| {
            self.log.base = before;
            VhostLogError::Parent { errno }
        })
    }

    /// `VHOST_SET_LOG_FD`; `None` unbinds.
    ///
    /// # Errors
    /// `EPERM`; `EIO`.
    pub fn set_log_event(&mut self, caller: &dyn Caller<P::Host>, event: Option<EventOf<P>>) -> Result<()> {
        self.ownership.check(caller)?;
        let before = std::mem::replace(&mut self.log.event, event);
        self.tell_log().inspect_err(|_| self.log.event = before)
    }

    /// Sets whether everything is logged that the device writes.
    pub(super) fn set_log_all(&mut self, all: bool) -> Result<(), VhostLogError> {
        if all && let Some(pages) = self.log.pages() {
            self.check_log(pages)?;
        }
        let before = std::mem::replace(&mut self.log.all, all);
        if before == all {
            return Ok(());
        }
        self.tell_log().map_err(|errno| {
            self.log.all = before;
            VhostLogError::Parent { errno }
        })
    }

    /// Ends the log, with the client that has set it.
    pub(super) fn forget_log(&mut self) {
        if self.log.base.is_some() {
            self.log = Log::default();
            // Without its thread the device writes nothing.
            let _ = self.tell_log();
        }
        self.log = Log::default();
    }

    /// Passes the log to what writes client memory.
    pub(super) fn tell_log(&self) -> Result<()> {
        match (&self.dirty, self.log.target()) {
            (Some(dirty), log) if self.parent.profile().vhost_log => dirty.set_vhost_log(log),
            (_, None) => Ok(()),
            (_, Some(_)) => Err(Errno::OPNOTSUPP),
        }
    }

    /// Checks that a log of so many pages has bits for everything that is mapped.
    fn check_log(&self, pages: u64) -> Result<(), VhostLogError> {
        let table = self.tables.get(&Asid(0));
        let last = table.and_then(|table| table.iter().next_back()).map(|entry| entry.range.last());
        match last.filter(|last| last >> LOG_PAGE_SHIFT >= pages) {
            Some(last) => Err(VhostLogError::Short { pages, last }),
            None => Ok(()),
        }
    }

    /// Pages that a mapping in `asid` must lie in; `None` when it may lie anywhere, since nothing or not all is logged.
    pub(super) fn logged_pages(&self, asid: Asid) -> Option<u64> {
        self.log.pages().filter(|_| self.log.all && asid == Asid(0))
    }

    /// Whether a used ring at a guest address can be logged.
    pub(super) fn can_log_ring(&self, addr: &VringAddr, bytes: u64) -> bool {
        let range = IovaRange::from_size(addr.log, bytes.max(1));
        let fits = |pages: u64| range.is_some_and(|range| range.last() >> LOG_PAGE_SHIFT < pages);
        addr.flags & VRING_F_LOG == 0 || self.log.pages().is_none_or(fits)
    }
}

/// Where the memory of a log lies.
pub(super) fn base_of<M: MemoryObject>(uaddr: u64, size: u64, memory: M) -> Option<LogBase<M>> {
    let bits = memory.bit_log().filter(|_| memory.is_shared())?;
    Some(LogBase { uaddr, size, memory, bits })
}
