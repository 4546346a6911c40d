//! Mappings that come as a whole table of memory objects, and not one by one from the owner's addresses.

use crate::device::dma::pages_to_pin;
use crate::device::{Device, IotlbError, MemoryOf};
use crate::errno::Errno;
use crate::host::{Caller, MemoryObject};
use crate::iotlb::Mapping;
use crate::parent::{Dma, Parent, PrivateMemory, Profile};
use crate::types::{Asid, IovaRange, Perm};

/// One mapping of a whole table: I/O virtual addresses, the access that the device gets, and the memory, whose first byte is the
/// first address.
pub type WholeMapping<M> = (IovaRange, Perm, M);

impl<P: Parent> Device<P> {
    /// As [`open`](Self::open), of a device that was just made and is not reset: its parent has logs of an earlier process, from which the
    /// queues that start go on. A reset would forget that.
    ///
    /// # Errors
    /// `EBUSY` while it is open.
    pub fn open_unreset(&mut self) -> Result<(), Errno> {
        if std::mem::replace(&mut self.opened, true) { Err(Errno::BUSY) } else { Ok(()) }
    }

    /// Replaces all mappings of `asid`, in a table with entries that need no addresses of the owner: a front end that gets the
    /// memory itself calls it (VDUSE: uapi-spec 6.4.2). Blocks until requests that use a removed mapping are completed. The owner's
    /// UPDATE and INVALIDATE work as before.
    ///
    /// # Errors
    /// See [`IotlbError`]; with `Parent` and `EOPNOTSUPP` for a parent that does not take whole tables. The table is as before then,
    /// or empty when the parent has refused it.
    pub fn replace_mappings(
        &mut self,
        caller: &dyn Caller<P::Host>,
        asid: Asid,
        mappings: Vec<WholeMapping<MemoryOf<P>>>,
    ) -> Result<(), IotlbError> {
        self.ownership.check(caller).map_err(|_| IotlbError::NotOwner)?;
        if !matches!(self.parent.dma(), Dma::SetMap(_)) {
            return Err(IotlbError::Parent { errno: Errno::OPNOTSUPP });
        }
        self.find_table(asid, true)?;
        let profile = self.parent.profile();
        let mappings = checked(profile, mappings)?;
        let pages = |range: IovaRange, memory: &MemoryOf<P>| pages_to_pin(profile, range.size(), memory);
        let added = mappings.iter().map(|(range, _, memory)| pages(*range, memory)).sum();
        let table = self.tables.get(&asid);
        let removed: u64 = table
            .into_iter()
            .flat_map(|table| table.iter())
            .map(|entry| pages(entry.range, &entry.memory))
            .sum();
        let (limit, what) = (profile.pin_limit.pages(caller.memlock_pages()), profile.pin_limit.name());
        let pinned = self.ownership.pinned_pages();
        let refused = |_| IotlbError::MemLock { pages: added, pinned, limit, what };
        self.ownership.charge(added, limit).map_err(refused)?;
        self.fill(asid, mappings);
        self.ownership.uncharge(removed);
        self.set_map(asid).map_err(|errno| {
            self.fill(asid, Vec::new());
            self.ownership.uncharge(added);
            // It has none of them, or those of before, which it is not to have either.
            let _ = self.set_map(asid);
            IotlbError::Parent { errno }
        })
    }

    /// Makes these the entries of the table of `asid`.
    fn fill(&mut self, asid: Asid, mappings: Vec<WholeMapping<MemoryOf<P>>>) {
        self.before_change(asid);
        let table = self.tables.entry(asid).or_default();
        table.remove_touching(0, u64::MAX);
        for (range, perm, memory) in mappings {
            let record = table.open_record(range);
            table.insert(Mapping { range, uaddr: 0, perm, memory, stale: false, record });
            table.close_record(record);
        }
    }
}

/// The mappings in the order of their addresses, if they are a table that this device can have.
fn checked<M: MemoryObject>(
    profile: &Profile,
    mut mappings: Vec<WholeMapping<M>>,
) -> Result<Vec<WholeMapping<M>>, IotlbError> {
    mappings.sort_by_key(|(range, ..)| range.first());
    let (entries, limit) = (mappings.len(), profile.max_iotlb_entries);
    if entries > limit {
        return Err(IotlbError::Full { entries, limit });
    }
    let mut before: Option<IovaRange> = None;
    for (range, _, memory) in &mappings {
        let (range, size) = (*range, range.size());
        if !profile.iova_range.contains(range) {
            return Err(IotlbError::OutOfRange { iova: range.first(), size, range: profile.iova_range });
        }
        if let Some(existing) = before.filter(|before| before.overlaps(range)) {
            return Err(IotlbError::Overlap { range, existing });
        }
        if !memory.is_shared() && profile.private_memory != PrivateMemory::Copy {
            return Err(IotlbError::Private { range, uaddr: 0, size });
        }
        before = Some(range);
    }
    Ok(mappings)
}
