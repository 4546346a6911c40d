//! IOTLB messages: their checks, UPDATE and INVALIDATE.

use thiserror::Error;

use crate::device::batch::Batch;
use crate::device::{Device, MemoryOf};
use crate::dirty::LOG_PAGE_SHIFT;
use crate::errno::Errno;
use crate::faults::{self, Fault};
use crate::host::{AddressSpace, Caller, Fragment, MemoryObject, PAGE_SIZE};
use crate::iotlb::{Mapping, RecordId};
use crate::parent::{AddressMode, Dma, Parent, PrivateMemory, Profile};
use crate::types::{Asid, IotlbMsg, IovaRange, Perm, Result, iotlb_type};

/// Why an IOTLB message was refused. The client gets [`errno`](Self::errno), which is nearly always `EFAULT`; the details
/// are for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum IotlbError {
    /// UPDATE of size 0: the only refusal for which the client gets `EINVAL`.
    #[error("UPDATE of 0 bytes at {iova:#x}; size must be at least 1")]
    EmptyUpdate {
        /// Address given.
        iova: u64,
    },
    /// The caller is not the owner.
    #[error("the caller is not the owner of the device; after fork or exec call VHOST_NEW_OWNER first")]
    NotOwner,
    /// The address space does not exist.
    #[error("asid {asid} is beyond the device's {count} address spaces")]
    NoSuchAsid {
        /// Asid given.
        asid: Asid,
        /// Address spaces of the device.
        count: u32,
    },
    /// The address space was never used.
    #[error("nothing was ever mapped in asid {asid}")]
    NoTable {
        /// Asid given.
        asid: Asid,
    },
    /// A batch is open for another address space.
    #[error("message for asid {asid} inside a batch for asid {batch}")]
    OtherBatch {
        /// Asid given.
        asid: Asid,
        /// Asid of the open batch.
        batch: Asid,
    },
    /// A message type that clients may not send.
    #[error("IOTLB message type {kind} is not one a client may send")]
    UnknownType {
        /// Type given.
        kind: u8,
    },
    /// The range is outside the addresses that the device can use.
    #[error("{size:#x} bytes at {iova:#x} are outside the device's range {range}")]
    OutOfRange {
        /// Address given.
        iova: u64,
        /// Size given.
        size: u64,
        /// The device's range.
        range: IovaRange,
    },
    /// The range overlaps an existing mapping.
    #[error("{range} overlaps the mapping {existing}; INVALIDATE it first")]
    Overlap {
        /// Range given.
        range: IovaRange,
        /// The first entry that it overlaps.
        existing: IovaRange,
    },
    /// The table is full.
    #[error("the table already has {entries} entries, the limit is {limit}")]
    Full {
        /// Number of entries.
        entries: usize,
        /// Limit.
        limit: usize,
    },
    /// Everything that the device writes is to be logged, and the log has no bits for the range.
    #[error("{range} is beyond the {pages} pages that the log has bits for; set a longer one first")]
    BeyondLog {
        /// Range given.
        range: IovaRange,
        /// Pages of the log.
        pages: u64,
    },
    /// The caller's memory cannot be accessed.
    #[error("no accessible memory at user address {uaddr:#x}, {size:#x} bytes, for {range}: {errno}")]
    Unreachable {
        /// Range given.
        range: IovaRange,
        /// Address given.
        uaddr: u64,
        /// Size given.
        size: u64,
        /// What the platform reports.
        errno: Errno,
    },
    /// Memory that only its process can access, for a device that has to map it.
    #[error(
        "{size:#x} bytes at user address {uaddr:#x}, for {range}, are private memory, which this device cannot map; map a file \
         or a memfd as shared (QEMU: -object memory-backend-memfd,share=on)"
    )]
    Private {
        /// Range given.
        range: IovaRange,
        /// Address of the first private byte.
        uaddr: u64,
        /// Size of the private piece.
        size: u64,
    },
    /// The pages would exceed the limit on pinned pages.
    #[error("pinning {pages} more pages exceeds {what}: {pinned} pinned of {limit}")]
    MemLock {
        /// Pages needed.
        pages: u64,
        /// Pages charged already.
        pinned: u64,
        /// Limit in pages.
        limit: u64,
        /// Name of the limit.
        what: &'static str,
    },
    /// The parent refused.
    #[error("the device refused the mapping: {errno}")]
    Parent {
        /// What it reports.
        errno: Errno,
    },
    /// REMAP with a permission or without a size.
    #[error("REMAP needs perm 0 and a size, got perm {perm:#x} and {size:#x} bytes")]
    RemapArguments {
        /// Permission given.
        perm: u8,
        /// Size given.
        size: u64,
    },
    /// The device does not offer REMAP.
    #[error("the device does not use owner addresses and does not offer VHOST_IOTLB_REMAP")]
    RemapNotOffered,
    /// REMAP of a range that is not one mapping.
    #[error("{size:#x} bytes at {iova:#x} are neither a whole UPDATE nor one fragment of it")]
    RemapNoMatch {
        /// Address given.
        iova: u64,
        /// Size given.
        size: u64,
    },
    /// REMAP to memory that is not the mapped object.
    #[error(
        "user address {uaddr:#x} is not the memory object mapped at {range}; REMAP must name the same memory"
    )]
    RemapOtherObject {
        /// The mapping.
        range: IovaRange,
        /// Address given.
        uaddr: u64,
    },
}

impl IotlbError {
    /// The error number of the client's `write` (uapi-spec 2.2).
    #[must_use]
    pub const fn errno(self) -> Errno {
        match self {
            Self::EmptyUpdate { .. } => Errno::INVAL,
            _ => Errno::FAULT,
        }
    }
}

impl<P: Parent> Device<P> {
    /// One IOTLB message, checked in the kernel's order (uapi-spec 2.2 to 2.6). `asid` is 0 for version-1
    /// messages and where IOTLB_ASID was not acknowledged: the front end decides that. Blocks until requests that use
    /// a removed mapping are completed.
    ///
    /// # Errors
    /// See [`IotlbError`].
    pub fn iotlb(
        &mut self,
        caller: &dyn Caller<P::Host>,
        asid: Asid,
        msg: &IotlbMsg,
    ) -> Result<(), IotlbError> {
        if msg.kind == iotlb_type::UPDATE && msg.size == 0 && !faults::is(Fault::UpdateEmptyErrno) {
            return Err(IotlbError::EmptyUpdate { iova: msg.iova });
        }
        self.ownership.check(caller).map_err(|_| IotlbError::NotOwner)?;
        self.find_table(asid, matches!(msg.kind, iotlb_type::UPDATE | iotlb_type::BATCH_BEGIN))?;
        match msg.kind {
            iotlb_type::UPDATE => self.update(caller, asid, msg),
            iotlb_type::INVALIDATE => {
                self.invalidate(asid, msg);
                Ok(())
            }
            iotlb_type::BATCH_BEGIN => {
                self.begin_batch(asid);
                Ok(())
            }
            iotlb_type::BATCH_END => self.end_batch(asid),
            iotlb_type::REMAP => {
                let result = self.remap(asid, msg);
                if result.is_err() && faults::is(Fault::RemapNoRollback) {
                    self.invalidate(asid, msg);
                }
                result
            }
            kind => Err(IotlbError::UnknownType { kind }),
        }
    }

    /// Number of bytes of `range` that are not mapped to shared memory: private memory, which can only be copied, and unmapped
    /// bytes, since devices that do not copy leave private memory unmapped.
    pub fn private_bytes(&self, asid: Asid, range: IovaRange) -> u64 {
        let overlapping = self.tables.get(&asid).map(|table| table.overlapping(range)).unwrap_or_default();
        let shared = overlapping.iter().filter(|entry| entry.memory.is_shared());
        let part = |entry: &&Mapping<MemoryOf<P>>| {
            entry.range.last().min(range.last()) - entry.range.first().max(range.first()) + 1
        };
        range.size() - shared.map(part).sum::<u64>()
    }

    /// Checks that the table of `asid` exists or may be created, and that no batch is open for another one (uapi-spec 2.3).
    pub(super) fn find_table(&mut self, asid: Asid, create: bool) -> Result<(), IotlbError> {
        let count = self.parent.profile().address_spaces;
        if create {
            if asid.0 >= count {
                return Err(IotlbError::NoSuchAsid { asid, count });
            }
            self.tables.entry(asid).or_default();
        }
        match &self.batch {
            Some(batch) if batch.asid != asid => Err(IotlbError::OtherBatch { asid, batch: batch.asid }),
            _ if !self.tables.contains_key(&asid) => Err(IotlbError::NoTable { asid }),
            _ => Ok(()),
        }
    }

    fn update(&mut self, caller: &dyn Caller<P::Host>, asid: Asid, msg: &IotlbMsg) -> Result<(), IotlbError> {
        let all = IotlbMsg { perm: Perm::RW, ..*msg };
        let msg = if faults::is(Fault::UpdateIgnoresPermission) { &all } else { msg };
        let profile = self.parent.profile();
        let beyond = IotlbError::OutOfRange { iova: msg.iova, size: msg.size, range: profile.iova_range };
        IovaRange::from_size(msg.iova, msg.size)
            .filter(|range| profile.iova_range.contains(*range))
            .ok_or(beyond)?;
        let msg = &if profile.address_mode == AddressMode::PinnedPages {
            whole_pages(msg).ok_or(beyond)?
        } else {
            *msg
        };
        let range = IovaRange::from_size(msg.iova, msg.size).ok_or(beyond)?;
        if faults::is(Fault::UpdateReplaces) {
            self.tables.entry(asid).or_default().remove_touching(range.first(), range.last());
        }
        let table = self.tables.get(&asid).ok_or(IotlbError::NoTable { asid })?;
        if let Some(existing) = table.overlapping(range).first() {
            return Err(IotlbError::Overlap { range, existing: existing.range });
        }
        let owner = self.ownership.owner().ok_or(IotlbError::NotOwner)?;
        let fragments = resolve(owner, profile, range, msg)?;
        if let Some(pages) = self.logged_pages(asid).filter(|pages| range.last() >> LOG_PAGE_SHIFT >= *pages)
        {
            return Err(IotlbError::BeyondLog { range, pages });
        }
        let limit = profile.max_iotlb_entries - usize::from(faults::is(Fault::TableLimit));
        let entries = table.len().max(self.batch.as_ref().map_or(0, Batch::entries_after_failure));
        if entries + fragments.len() > limit {
            return Err(IotlbError::Full { entries, limit: profile.max_iotlb_entries });
        }
        let pages = fragments.iter().map(|(_, piece)| pages_to_pin(profile, piece.size, &piece.memory)).sum();
        let (limit, what) = (profile.pin_limit.pages(caller.memlock_pages()), profile.pin_limit.name());
        let pinned = owner.account().pages();
        self.ownership.charge(pages, limit).map_err(|_| IotlbError::MemLock {
            pages,
            pinned,
            limit,
            what,
        })?;
        let added = self.insert_fragments(asid, range, msg, fragments);
        self.tell_parent_added(asid, range, &added).map_err(|errno| {
            self.ownership.uncharge(pages);
            IotlbError::Parent { errno }
        })
    }

    /// Adds resolved fragments to the table as one record; returns their ranges.
    pub(super) fn insert_fragments(
        &mut self,
        asid: Asid,
        range: IovaRange,
        msg: &IotlbMsg,
        fragments: Vec<(u64, Fragment<MemoryOf<P>>)>,
    ) -> Vec<IovaRange> {
        self.before_change(asid);
        let table = self.tables.entry(asid).or_default();
        let record = table.open_record(range);
        let mut added = Vec::with_capacity(fragments.len());
        for mapping in mappings(range, msg, record, fragments) {
            added.push(mapping.range);
            table.insert(mapping);
        }
        table.close_record(record);
        if let Some(batch) = &mut self.batch {
            batch.updated(table, &added, self.parent.profile().max_iotlb_entries);
        }
        added
    }

    /// Passes new entries to the parent. If it refuses them, removes them from the table and from the parent.
    fn tell_parent_added(&mut self, asid: Asid, range: IovaRange, added: &[IovaRange]) -> Result<()> {
        if !added.is_empty() && !self.waits_for_end() {
            self.remove_identity_map(asid);
        }
        let Some(table) = self.tables.get_mut(&asid) else { return Ok(()) };
        let offers = self.batch.is_none() && !added.is_empty();
        let result = match self.parent.dma() {
            Dma::SetMap(map) if offers => {
                let result = map.set_map(asid, table);
                self.parent_was_offered(asid, result);
                result
            }
            Dma::SetMap(_) | Dma::Platform => Ok(()),
            Dma::DmaMap(map) => {
                let mut done = Ok(());
                for (i, range) in added.iter().enumerate() {
                    let Some(entry) = table.get(range.first()) else { continue };
                    if let Err(error) = map.dma_map(asid, entry) {
                        added[..i].iter().for_each(|&range| map.dma_unmap(asid, range));
                        done = Err(error);
                        break;
                    }
                }
                if done.is_ok() {
                    self.parent_has_added(asid, added);
                }
                done
            }
        };
        if result.is_err()
            && let Some(table) = self.tables.get_mut(&asid)
        {
            table.remove_touching(range.first(), range.last());
            if let Dma::SetMap(map) = self.parent.dma() {
                // The parent may have lost its table in the failing call, so it gets the previous one once more.
                let again = map.set_map(asid, table);
                self.parent_was_offered(asid, again);
            }
        }
        result
    }

    /// Removes every entry that the range touches. Never fails once the table exists, and calls a `set_map` parent even when
    /// nothing was mapped (uapi-spec 2.5).
    pub(super) fn invalidate(&mut self, asid: Asid, msg: &IotlbMsg) {
        // Wraps on purpose, as in the kernel: size 0 and sums beyond 2^64 have the effects of uapi-spec 2.5.
        let last = msg.iova.wrapping_add(msg.size).wrapping_sub(1);
        self.before_change(asid);
        let Some(table) = self.tables.get_mut(&asid) else { return };
        let within = |entry: &Mapping<_>| msg.iova <= entry.range.first() && entry.range.last() <= last;
        if faults::is(Fault::InvalidateWithin) && !table.iter().any(within) {
            return;
        }
        let removed = table.remove_touching(msg.iova, last);
        if let Some(batch) = &mut self.batch {
            let limit = self.parent.profile().max_iotlb_entries;
            batch.invalidated(table, (msg.iova, last), &removed, limit);
        }
        if faults::is(Fault::InvalidateUnheard) {
            return;
        }
        let tells = match self.parent.dma() {
            Dma::SetMap(_) => self.batch.is_none(),
            Dma::DmaMap(_) | Dma::Platform => !removed.is_empty(),
        };
        if tells {
            self.remove_identity_map(asid);
        }
        let Some(table) = self.tables.get(&asid) else { return };
        match self.parent.dma() {
            Dma::SetMap(map) if self.batch.is_none() => {
                let result = map.set_map(asid, table);
                self.parent_was_offered(asid, result);
            }
            Dma::DmaMap(map) => {
                removed.iter().for_each(|entry| map.dma_unmap(asid, entry.range));
                self.parent_has_removed(asid, &removed);
            }
            Dma::SetMap(_) | Dma::Platform => {}
        }
        let profile = self.parent.profile();
        let pages =
            removed.iter().map(|entry| pages_to_pin(profile, entry.range.size(), &entry.memory)).sum();
        if !faults::is(Fault::ChargeKept) {
            self.ownership.uncharge(pages);
        }
    }

    /// Passes the present table of `asid` to a `set_map` parent.
    pub(super) fn set_map(&mut self, asid: Asid) -> Result<()> {
        if matches!(self.parent.dma(), Dma::SetMap(_)) {
            self.remove_identity_map(asid);
        }
        match (self.parent.dma(), self.tables.get(&asid)) {
            (Dma::SetMap(map), Some(table)) => {
                let result = map.set_map(asid, table);
                self.parent_was_offered(asid, result);
                result
            }
            _ => Ok(()),
        }
    }
}

/// Resolves the memory of a request and applies the device's policy for private memory. Returns each fragment with its
/// offset in the request.
#[expect(clippy::type_complexity, reason = "an offset and a fragment, used in two places")]
pub(super) fn resolve<A: AddressSpace>(
    owner: &A,
    profile: &Profile,
    range: IovaRange,
    msg: &IotlbMsg,
) -> Result<Vec<(u64, Fragment<A::Memory>)>, IotlbError> {
    let perm = msg.perm;
    let fragments = owner.resolve(msg.uaddr, msg.size, perm).map_err(|errno| IotlbError::Unreachable {
        range,
        uaddr: msg.uaddr,
        size: msg.size,
        errno,
    })?;
    let mut offset = 0;
    let mut kept = Vec::with_capacity(fragments.len());
    for fragment in fragments {
        let at = offset;
        offset += fragment.size;
        if !fragment.memory.is_shared() && profile.private_memory == PrivateMemory::Refuse {
            return Err(IotlbError::Private {
                range,
                uaddr: msg.uaddr.wrapping_add(at),
                size: fragment.size,
            });
        }
        if fragment.memory.is_shared() || profile.private_memory == PrivateMemory::Copy {
            kept.push((at, fragment));
        }
    }
    debug_assert_eq!(offset, msg.size, "fragments must cover the request");
    Ok(kept)
}

/// Creates the table entries of one record from resolved fragments.
pub(super) fn mappings<M>(
    range: IovaRange,
    msg: &IotlbMsg,
    record: RecordId,
    fragments: Vec<(u64, Fragment<M>)>,
) -> impl Iterator<Item = Mapping<M>> {
    let (uaddr, perm) = (msg.uaddr, msg.perm);
    fragments.into_iter().filter_map(move |(offset, fragment)| {
        let range = IovaRange::from_size(range.first() + offset, fragment.size)?;
        let uaddr = uaddr.wrapping_add(offset);
        Some(Mapping { range, uaddr, perm, memory: fragment.memory, stale: false, record })
    })
}

/// Extends a request to whole pages. As in the kernel, the page offset of the user address is dropped, so data is shifted
/// unless both addresses have the same page offset (uapi-spec 3.3). `None` when the pages extend beyond 2^64.
pub(super) fn whole_pages(msg: &IotlbMsg) -> Option<IotlbMsg> {
    let offset = msg.iova % PAGE_SIZE;
    let size = msg.size.checked_add(offset)?.checked_next_multiple_of(PAGE_SIZE)?;
    Some(IotlbMsg { iova: msg.iova - offset, size, uaddr: msg.uaddr - msg.uaddr % PAGE_SIZE, ..*msg })
}

/// Number of pages that `size` bytes of `memory` charge to the owner; 0 unless the device pins.
pub(super) fn pages_to_pin<M: MemoryObject>(profile: &Profile, size: u64, memory: &M) -> u64 {
    match profile.address_mode {
        AddressMode::Pinned => memory.pin_pages(),
        AddressMode::PinnedPages => size / PAGE_SIZE,
        AddressMode::OwnerAddresses | AddressMode::Objects => 0,
    }
}
