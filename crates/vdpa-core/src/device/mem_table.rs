//! `VHOST_SET_MEM_TABLE` where it maps memory: the attribute `mem_table on`.
//!
//! The kernel's vhost-vdpa stores a memory table and does nothing with it (uapi-spec 1.6a). Here the table can be what address space 0
//! maps. Only the difference reaches the parent: what is mapped to the same bytes stays as it is, pinned, and in use.

use thiserror::Error;

use crate::device::dma::{IotlbError, pages_to_pin, resolve, whole_pages};
use crate::device::{Device, MemoryOf};
use crate::dirty::LOG_PAGE_SHIFT;
use crate::errno::Errno;
use crate::host::{Caller, Fragment, MemoryObject};
use crate::iotlb::Mapping;
use crate::parent::{AddressMode, Dma, Parent};
use crate::rules;
use crate::types::{Asid, IotlbMsg, IovaRange, Perm, iotlb_type};

/// The address space that a memory table is of.
const SPACE: Asid = Asid(0);

/// A region of a memory table (`struct vhost_memory_region`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemRegion {
    /// First address for the device (`guest_phys_addr`).
    pub iova: u64,
    /// Size in bytes.
    pub size: u64,
    /// Address in the caller's address space.
    pub uaddr: u64,
}

/// Why a memory table was refused. Nothing has changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MemTableError {
    /// The caller is not the owner.
    #[error("the caller is not the owner of the device; after fork or exec call VHOST_NEW_OWNER first")]
    NotOwner,
    /// A batch of IOTLB messages is open.
    #[error("a batch of IOTLB messages is open for asid {asid}; end it first")]
    InBatch {
        /// Its address space.
        asid: Asid,
    },
    /// Two regions overlap.
    #[error("region {range} overlaps region {other}")]
    Overlap {
        /// A region.
        range: IovaRange,
        /// The region before it.
        other: IovaRange,
    },
    /// A region cannot be mapped.
    #[error("region of {} bytes at {:#x}: {error}", region.size, region.iova)]
    Region {
        /// The region.
        region: MemRegion,
        /// The reason.
        error: IotlbError,
    },
    /// The table as a whole cannot be mapped.
    #[error("{0}")]
    Table(IotlbError),
}

impl MemTableError {
    /// The error number of the request: as vhost's own, `EFAULT` for regions that cannot be.
    #[must_use]
    pub const fn errno(self) -> Errno {
        match self {
            Self::NotOwner => Errno::PERM,
            Self::InBatch { .. } => Errno::BUSY,
            Self::Region { error, .. } | Self::Table(error) => match error {
                IotlbError::MemLock { .. } | IotlbError::Parent { errno: Errno::NOMEM } => Errno::NOMEM,
                _ => Errno::FAULT,
            },
            Self::Overlap { .. } => Errno::FAULT,
        }
    }
}

/// A part of the address space that is to be mapped, and the memory that is behind it now.
#[derive(Debug)]
struct Wanted<M> {
    region: MemRegion,
    range: IovaRange,
    msg: IotlbMsg,
    fragments: Vec<(u64, Fragment<M>)>,
}

/// What is to be done with the table of the interface.
#[derive(Debug)]
struct Plan<M> {
    /// Entries that go.
    removed: Vec<Mapping<M>>,
    /// Entries that stay and get another address in the owner, or are stale.
    readdressed: Vec<Mapping<M>>,
    /// Parts of regions that nothing has mapped.
    added: Vec<Wanted<M>>,
    /// Entries that there will be.
    entries: usize,
}

impl<P: Parent> Device<P> {
    /// `VHOST_SET_MEM_TABLE` with `mem_table on`: address space 0 maps these regions, readable and writable, and nothing else.
    ///
    /// An entry stays, and with it its pin and its charge, when all of its bytes are mapped to the same bytes of the same objects, at
    /// whatever address of the owner. Takes effect completely or not at all. Blocks until no request uses what was removed.
    ///
    /// # Errors
    /// [`MemTableError`].
    pub fn set_mem_table(
        &mut self,
        caller: &dyn Caller<P::Host>,
        regions: &[MemRegion],
    ) -> Result<(), MemTableError> {
        self.ownership.check(caller).map_err(|_| MemTableError::NotOwner)?;
        if let Some(batch) = &self.batch {
            return Err(MemTableError::InBatch { asid: batch.asid });
        }
        let wanted = self.wanted(regions)?;
        let plan = self.plan(wanted)?;
        let before = self.tables.entry(SPACE).or_default().clone();
        let profile = self.parent.profile();
        if plan.entries > profile.max_iotlb_entries {
            let (entries, limit) = (before.len(), profile.max_iotlb_entries);
            return Err(MemTableError::Table(IotlbError::Full { entries, limit }));
        }
        let pages_of = |size, memory: &MemoryOf<P>| pages_to_pin(profile, size, memory);
        let fragments = plan.added.iter().flat_map(|part| &part.fragments);
        let added: u64 = fragments.map(|(_, piece)| pages_of(piece.size, &piece.memory)).sum();
        let removed: u64 = plan.removed.iter().map(|entry| pages_of(entry.range.size(), &entry.memory)).sum();
        // Only what is more: the pages of a region that is put elsewhere need not be free twice.
        let more = added.saturating_sub(removed);
        self.charge_for_table(caller, more)?;
        let ranges = self.change_table(&plan);
        self.remove_identity_map(SPACE);
        let told = self.tell_parent_table(&plan.removed, &ranges);
        if let Err(errno) = told {
            self.ownership.uncharge(more);
            // It takes another's place: whoever follows changes is given all of it.
            self.tables.insert(SPACE, before);
            if matches!(self.parent.dma(), Dma::SetMap(_)) {
                // The parent may have lost its table in the failing call, so it gets the previous one once more.
                let _ = self.set_map(SPACE);
            }
            return Err(MemTableError::Table(IotlbError::Parent { errno }));
        }
        self.ownership.uncharge(removed.saturating_sub(added));
        Ok(())
    }

    fn charge_for_table(&mut self, caller: &dyn Caller<P::Host>, pages: u64) -> Result<(), MemTableError> {
        let limit = self.parent.profile().pin_limit;
        let (limit, what) = (limit.pages(caller.memlock_pages()), limit.name());
        let pinned =
            self.ownership.owner().map_or(0, |owner| crate::host::AddressSpace::account(owner).pages());
        let charged = self.ownership.charge(pages, limit);
        charged.map_err(|_| MemTableError::Table(IotlbError::MemLock { pages, pinned, limit, what }))
    }

    /// The regions in order of their addresses, each with the memory behind it.
    fn wanted(&self, regions: &[MemRegion]) -> Result<Vec<Wanted<MemoryOf<P>>>, MemTableError> {
        let profile = self.parent.profile();
        let owner = self.ownership.owner().ok_or(MemTableError::NotOwner)?;
        let mut wanted = Vec::with_capacity(regions.len());
        for region in regions.iter().copied() {
            let failed = |error| MemTableError::Region { region, error };
            let MemRegion { iova, size, uaddr } = region;
            let beyond = IotlbError::OutOfRange { iova, size, range: profile.iova_range };
            let msg = IotlbMsg { iova, size, uaddr, perm: Perm::RW, kind: iotlb_type::UPDATE };
            let pages = profile.address_mode == AddressMode::PinnedPages;
            let msg = if pages { whole_pages(&msg) } else { Some(msg) }.ok_or(failed(beyond))?;
            let range = IovaRange::from_size(msg.iova, msg.size)
                .filter(|range| profile.iova_range.contains(*range))
                .ok_or(failed(beyond))?;
            let beyond = self.logged_pages(SPACE).filter(|pages| range.last() >> LOG_PAGE_SHIFT >= *pages);
            if let Some(pages) = beyond {
                return Err(failed(IotlbError::BeyondLog { range, pages }));
            }
            let fragments = resolve(owner, profile, range, &msg).map_err(failed)?;
            wanted.push(Wanted { region, range, msg, fragments });
        }
        wanted.sort_by_key(|region| region.range.first());
        let overlap = wanted.iter().zip(wanted.iter().skip(1)).find(|(a, b)| a.range.overlaps(b.range));
        match overlap {
            Some((other, this)) => Err(MemTableError::Overlap { range: this.range, other: other.range }),
            None => Ok(wanted),
        }
    }

    /// Compares what is mapped with what is wanted.
    fn plan(&mut self, wanted: Vec<Wanted<MemoryOf<P>>>) -> Result<Plan<MemoryOf<P>>, MemTableError> {
        let by_address = self.parent.profile().address_mode == AddressMode::OwnerAddresses;
        // Single mappings at addresses of the owner: there is no message that gives one another address.
        let fixed = by_address && matches!(self.parent.dma(), Dma::DmaMap(_));
        let (mut removed, mut readdressed, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        for entry in self.tables.get(&SPACE).into_iter().flat_map(crate::iotlb::Table::iter) {
            let at = wanted.partition_point(|part| part.range.last() < entry.range.first());
            let uaddr = wanted.get(at).and_then(|part| part.keeps(entry));
            match uaddr.filter(|uaddr| !fixed || *uaddr == entry.uaddr) {
                None => removed.push(entry.clone()),
                Some(uaddr) => {
                    kept.push(entry.range);
                    if uaddr != entry.uaddr || entry.stale {
                        readdressed.push(Mapping { uaddr, stale: false, ..entry.clone() });
                    }
                }
            }
        }
        let owner = self.ownership.owner().ok_or(MemTableError::NotOwner)?;
        let mut added = Vec::new();
        let mut entries = kept.len();
        for part in wanted {
            let gaps = gaps(part.range, &kept);
            if gaps == [part.range] {
                added.push(part);
                continue;
            }
            for range in gaps {
                let uaddr = part.msg.uaddr.wrapping_add(range.first() - part.range.first());
                let msg = IotlbMsg { iova: range.first(), size: range.size(), uaddr, ..part.msg };
                let failed = |error| MemTableError::Region { region: part.region, error };
                let fragments = resolve(owner, self.parent.profile(), range, &msg).map_err(failed)?;
                added.push(Wanted { region: part.region, range, msg, fragments });
            }
        }
        entries += added.iter().map(|part| part.fragments.len()).sum::<usize>();
        Ok(Plan { removed, readdressed, added, entries })
    }

    /// Changes the table of the interface; returns the ranges of the entries that are new.
    fn change_table(&mut self, plan: &Plan<MemoryOf<P>>) -> Vec<IovaRange> {
        let table = self.tables.entry(SPACE).or_default();
        for entry in &plan.removed {
            table.remove_touching(entry.range.first(), entry.range.last());
        }
        for entry in &plan.readdressed {
            drop(table.take_entry(entry.range.first()));
            table.insert(entry.clone());
        }
        let mut ranges = Vec::new();
        for part in &plan.added {
            ranges.extend(self.insert_fragments(SPACE, part.range, &part.msg, part.fragments.clone()));
        }
        ranges
    }

    /// Tells the parent: of everything at once, or of each entry. A parent of the latter kind has what it had after an error.
    fn tell_parent_table(
        &mut self,
        removed: &[Mapping<MemoryOf<P>>],
        added: &[IovaRange],
    ) -> Result<(), Errno> {
        let Some(table) = self.tables.get(&SPACE) else { return Ok(()) };
        // A reset may have dropped what the parent translates with.
        let parent = self.parent_tables.get(&SPACE).and_then(|parent| parent.other.as_ref());
        let has = |entry: &&Mapping<_>| parent.is_none_or(|parent| parent.get(entry.range.first()).is_some());
        let map = match self.parent.dma() {
            Dma::SetMap(map) => {
                let result = map.set_map(SPACE, table);
                self.parent_was_offered(SPACE, result);
                return result;
            }
            Dma::DmaMap(map) => map,
            Dma::Platform => return Ok(()),
        };
        removed.iter().for_each(|entry| map.dma_unmap(SPACE, entry.range));
        let mut done = 0;
        let result = added.iter().filter_map(|range| table.get(range.first())).try_for_each(|entry| {
            map.dma_map(SPACE, entry)?;
            done += 1;
            Ok(())
        });
        if result.is_err() {
            added.iter().take(done).for_each(|range| map.dma_unmap(SPACE, *range));
            // It had them a moment ago. If it refuses one now, no further fallback exists.
            for entry in removed.iter().filter(has) {
                let _ = map.dma_map(SPACE, entry);
            }
            return result;
        }
        self.parent_has_removed(SPACE, removed);
        self.parent_has_added(SPACE, added);
        Ok(())
    }
}

impl<M: MemoryObject> Wanted<M> {
    /// The address in the owner that an entry has in this part, if it maps the same bytes there.
    fn keeps(&self, entry: &Mapping<M>) -> Option<u64> {
        if !self.range.contains(entry.range) || entry.perm != self.msg.perm {
            return None;
        }
        let old = [(entry.range.first(), entry.range.last(), &entry.memory)];
        let new = self.fragments.iter().filter_map(|(offset, fragment)| {
            let at = IovaRange::from_size(self.range.first() + offset, fragment.size)?;
            Some((at.first(), at.last(), &fragment.memory))
        });
        rules::same_memory(old, new, |a, i, b, j| a.same_object(i, b, j))
            .then(|| self.msg.uaddr.wrapping_add(entry.range.first() - self.range.first()))
    }
}

/// The parts of `range` that none of `kept`, which are in order, has. None of those reaches beyond `range` if it begins in it.
fn gaps(range: IovaRange, kept: &[IovaRange]) -> Vec<IovaRange> {
    let from = kept.partition_point(|entry| entry.last() < range.first());
    let mut gaps = Vec::new();
    let mut at = Some(range.first());
    for entry in kept.iter().skip(from).take_while(|entry| entry.first() <= range.last()) {
        let before = entry.first().checked_sub(1);
        gaps.extend(at.zip(before).and_then(|(first, last)| IovaRange::new(first, last)));
        at = entry.last().checked_add(1);
    }
    gaps.extend(at.and_then(|first| IovaRange::new(first, range.last())));
    gaps
}
