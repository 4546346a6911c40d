// SPDX-License-Identifier: GPL-2.0-only

//! Translation tables (drivers/vhost/iotlb.c), and what their mappings keep alive.

use super::gen;
use super::memory::{Origin, PinnedRun};
use core::marker::PhantomData;
use core::ptr::NonNull;
use kernel::error::{code::EINVAL, code::ENOMEM, to_result, Result};
use kernel::sync::{Arc, ArcBorrow};

/// What backs a mapping.
pub(crate) enum Memory {
    /// Pinned pages; the device uses their physical address.
    Pinned(PinnedRun),
    /// A file that the owner has mapped at this address; the device uses the address or the file.
    Shared(u64, Arc<Origin>),
}

/// A mapping outside a table.
pub(crate) struct Mapping {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) perm: u32,
    pub(crate) memory: Memory,
}

impl Mapping {
    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        self.last.wrapping_sub(self.first).wrapping_add(1)
    }
}

/// A mapping in a table.
pub(crate) struct Entry<'a> {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) addr: u64,
    pub(crate) perm: u32,
    /// `None` for pinned pages.
    pub(crate) origin: Option<ArcBorrow<'a, Origin>>,
}

/// A table with all that its mappings keep.
pub(crate) struct Iotlb {
    raw: NonNull<gen::vhost_iotlb>,
    limit: u32,
}

// SAFETY: The table is owned by this value.
unsafe impl Send for Iotlb {}

impl Iotlb {
    /// An empty table for up to `limit` mappings.
    pub(crate) fn new(limit: u32) -> Result<Self> {
        // SAFETY: Takes any number.
        let raw = unsafe { gen::vhost_iotlb_alloc(limit, 0) };
        Ok(Self { raw: NonNull::new(raw).ok_or(ENOMEM)?, limit })
    }

    /// For parents that take whole tables.
    pub(super) fn as_raw(&self) -> *mut gen::vhost_iotlb {
        self.raw.as_ptr()
    }

    /// Number of mappings.
    pub(crate) fn len(&self) -> u32 {
        // SAFETY: Exists as long as `self`, which nobody else writes to.
        unsafe { (*self.raw.as_ptr()).nmaps }
    }

    pub(crate) fn limit(&self) -> u32 {
        self.limit
    }

    /// Adds a mapping; on an error it is dropped, with what it keeps.
    pub(crate) fn insert(&mut self, mapping: Mapping) -> Result {
        // Linux would split this one in two, which then share what they keep.
        if mapping.first == 0 && mapping.last == u64::MAX {
            return Err(EINVAL);
        }
        let (addr, opaque) = match &mapping.memory {
            Memory::Pinned(run) => (run.address(), core::ptr::null_mut()),
            Memory::Shared(addr, origin) => (*addr, Arc::as_ptr(origin).cast_mut().cast()),
        };
        // SAFETY: The table exists and is not used by others. What `opaque` points to is kept below.
        to_result(unsafe {
            gen::vhost_iotlb_add_range_ctx(self.as_raw(), mapping.first, mapping.last, addr, mapping.perm, opaque)
        })?;
        // From here on the table keeps it.
        core::mem::forget(mapping.memory);
        Ok(())
    }

    /// Removes the first mapping that overlaps the range.
    pub(crate) fn remove_first(&mut self, first: u64, last: u64) -> Option<Mapping> {
        // SAFETY: The table exists and is not used by others.
        let raw = NonNull::new(unsafe { gen::vhost_iotlb_itree_first(self.as_raw(), first, last) })?;
        // SAFETY: A mapping of the table.
        let map = unsafe { raw.as_ref() };
        let memory = match NonNull::new(map.opaque) {
            // SAFETY: `insert` has forgotten a run of these pages, and the mapping is freed below.
            None => Memory::Pinned(unsafe { PinnedRun::from_mapping(map.addr, map.size, map.perm) }),
            // SAFETY: `insert` has forgotten a reference to it, and the mapping is freed below.
            Some(origin) => Memory::Shared(map.addr, unsafe { Arc::from_raw(origin.as_ptr().cast::<Origin>().cast_const()) }),
        };
        let mapping = Mapping { first: map.start, last: map.last, perm: map.perm, memory };
        // SAFETY: A mapping of the table, which is not used after this.
        unsafe { gen::vhost_iotlb_map_free(self.as_raw(), raw.as_ptr()) };
        Some(mapping)
    }

    /// Puts a mapping by address in the place of the one with exactly its range, which is returned. `None`, and nothing
    /// changed, if there is none. Allocates nothing.
    pub(crate) fn swap(&mut self, mapping: Mapping) -> Option<Mapping> {
        let Memory::Shared(addr, origin) = mapping.memory else { return None };
        // SAFETY: The table exists and is not used by others.
        let mut raw = NonNull::new(unsafe { gen::vhost_iotlb_itree_first(self.as_raw(), mapping.first, mapping.last) })?;
        // SAFETY: A mapping of the table, which is borrowed exclusively.
        let map = unsafe { raw.as_mut() };
        let previous = NonNull::new(map.opaque)?;
        if (map.start, map.last) != (mapping.first, mapping.last) {
            return None;
        }
        let old_addr = core::mem::replace(&mut map.addr, addr);
        let old_perm = core::mem::replace(&mut map.perm, mapping.perm);
        map.opaque = Arc::into_raw(origin).cast_mut().cast();
        // SAFETY: `insert` or this function has forgotten a reference to it, which the table gives up here.
        let origin = unsafe { Arc::from_raw(previous.as_ptr().cast::<Origin>().cast_const()) };
        Some(Mapping { first: map.start, last: map.last, perm: old_perm, memory: Memory::Shared(old_addr, origin) })
    }

    /// The mappings that overlap the range, in ascending order.
    pub(crate) fn overlapping(&self, first: u64, last: u64) -> Overlapping<'_> {
        // SAFETY: The table exists and does not change as long as it is borrowed.
        let next = unsafe { gen::vhost_iotlb_itree_first(self.as_raw(), first, last) };
        Overlapping { next, first, last, _table: PhantomData }
    }

    /// A table of its own with those mappings for which `keep` is true. Only for mappings by address: pins are not shared.
    pub(crate) fn copy_if(&self, mut keep: impl FnMut(&Entry<'_>) -> bool) -> Result<Self> {
        let mut copy = Self::new(self.limit)?;
        for entry in self.overlapping(0, u64::MAX) {
            if keep(&entry) {
                copy.insert(entry.to_mapping().ok_or(EINVAL)?)?;
            }
        }
        Ok(copy)
    }
}

impl Entry<'_> {
    /// Another mapping of the same memory; `None` for pinned pages.
    pub(crate) fn to_mapping(&self) -> Option<Mapping> {
        let origin: Arc<Origin> = self.origin?.into();
        Some(Mapping { first: self.first, last: self.last, perm: self.perm, memory: Memory::Shared(self.addr, origin) })
    }
}

impl Drop for Iotlb {
    fn drop(&mut self) {
        while self.remove_first(0, u64::MAX).is_some() {}
        // SAFETY: Allocated by `new`, empty, and not used by others.
        unsafe { gen::vhost_iotlb_free(self.as_raw()) };
    }
}

/// See [`Iotlb::overlapping`].
pub(crate) struct Overlapping<'a> {
    next: *mut gen::vhost_iotlb_map,
    first: u64,
    last: u64,
    _table: PhantomData<&'a Iotlb>,
}

impl<'a> Iterator for Overlapping<'a> {
    type Item = Entry<'a>;

    fn next(&mut self) -> Option<Entry<'a>> {
        // SAFETY: A mapping of the table, which does not change as long as it is borrowed.
        let map = unsafe { self.next.as_ref() }?;
        // SAFETY: As above.
        self.next = unsafe { gen::vhost_iotlb_itree_next(self.next, self.first, self.last) };
        let origin = NonNull::new(map.opaque);
        Some(Entry {
            first: map.start,
            last: map.last,
            addr: map.addr,
            perm: map.perm,
            // SAFETY: `Iotlb::insert` has forgotten a reference to it, which lives as long as the mapping.
            origin: origin.map(|origin| unsafe { ArcBorrow::from_raw(origin.as_ptr().cast::<Origin>().cast_const()) }),
        })
    }
}
