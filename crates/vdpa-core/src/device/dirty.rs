//! The requests of dirty tracking: see [`crate::dirty`].

use std::sync::Arc;

use crate::device::Device;
use crate::dirty::{DirtyLimits, DirtyRange, DirtySink, DirtyTracking, Tracked, check_pages};
use crate::errno::Errno;
use crate::faults::{self, Fault};
use crate::host::Caller;
use crate::parent::{Dma, Parent};
use crate::types::{IotlbMsg, Result, iotlb_type};

impl<P: Parent> Device<P> {
    /// What can be tracked; `None` for a device that cannot track what it writes.
    pub fn dirty_limits(&self) -> Option<DirtyLimits> {
        self.dirty.as_ref().map(|dirty| dirty.limits())
    }

    /// What is being tracked; `None` when nothing is. For the management side too.
    pub fn dirty_tracked(&self) -> Option<Tracked> {
        self.dirty.as_ref()?.tracked()
    }

    /// Begins to track the pages that the device writes. Blocks until requests that were begun before are done.
    ///
    /// # Errors
    /// `EPERM` unless the caller is the owner; `EOPNOTSUPP` for a device that cannot; `EINVAL` for an address space that it does not
    /// have; those of [`DirtyTracking::start`].
    pub fn dirty_start(
        &mut self,
        caller: &dyn Caller<P::Host>,
        page_size: u64,
        ranges: &[DirtyRange],
        request: u64,
    ) -> Result<()> {
        let dirty = self.owned_dirty(caller)?;
        let count = self.parent.profile().address_spaces;
        if ranges.iter().any(|range| range.asid.0 >= count) {
            return Err(Errno::INVAL);
        }
        dirty.start(page_size, ranges, request)
    }

    /// Ends the tracking; nothing happens when nothing is tracked.
    ///
    /// # Errors
    /// As [`dirty_start`](Self::dirty_start); `EIO`.
    pub fn dirty_stop(&mut self, caller: &dyn Caller<P::Host>) -> Result<()> {
        self.owned_dirty(caller)?.stop()
    }

    /// Reports the dirty pages of a range, and with `clear` has them not dirty any more.
    ///
    /// # Errors
    /// As [`dirty_start`](Self::dirty_start); those of [`DirtyTracking::report`].
    pub fn dirty_report(
        &mut self,
        caller: &dyn Caller<P::Host>,
        of: DirtyRange,
        clear: bool,
        sink: DirtySink<'_>,
    ) -> Result<()> {
        self.owned_dirty(caller)?.report(of, clear || faults::is(Fault::DirtyKeepIgnored), sink)
    }

    /// Removes all mappings in a range and then reports the pages of it that are dirty: the device writes none of them after
    /// that. They are not dirty any more. Returns how many bytes were mapped. Blocks until requests that use the mappings are done.
    ///
    /// # Errors
    /// As [`dirty_report`](Self::dirty_report), and `EINVAL` for a range that has a part of a mapping: nothing has changed then.
    /// `EBUSY` inside a batch, where mappings end with the batch. An error of the sink that did not occur when it was
    /// first given bits: the mappings are removed then, and what it had not taken is still dirty.
    pub fn dirty_unmap(
        &mut self,
        caller: &dyn Caller<P::Host>,
        of: DirtyRange,
        sink: DirtySink<'_>,
    ) -> Result<u64> {
        let dirty = self.owned_dirty(caller)?;
        let page_size = dirty.tracked().ok_or(Errno::INVAL)?.page_size;
        check_pages(of.range, page_size)?;
        if self.batch.is_some() {
            return Err(Errno::BUSY);
        }
        let entries = self.tables.get(&of.asid).map(|table| table.overlapping(of.range)).unwrap_or_default();
        if entries.iter().any(|entry| !of.range.contains(entry.range)) {
            return Err(Errno::INVAL);
        }
        let bytes = entries.iter().map(|entry| entry.range.size()).fold(0, u64::saturating_add);
        let empty = entries.is_empty();
        if faults::is(Fault::DirtyUnmapForgets) {
            dirty.report(of, true, &mut |_| Ok(()))?;
        }
        // Most of it before anything is removed: what the sink refuses is known then.
        dirty.report(of, false, sink)?;
        if !empty {
            // A size of 2^64 is one of 0, which removes everything.
            let size = of.range.last().wrapping_sub(of.range.first()).wrapping_add(1);
            let msg = IotlbMsg {
                iova: of.range.first(),
                size,
                kind: iotlb_type::INVALIDATE,
                ..IotlbMsg::default()
            };
            self.invalidate(of.asid, &msg);
        }
        dirty.report(of, true, sink)?;
        Ok(bytes)
    }

    /// Ends the tracking because the client has closed the device, or a new one has opened it.
    pub fn dirty_forget(&mut self) {
        if let Some(dirty) = &self.dirty {
            // Without its thread the device writes nothing.
            let _ = dirty.stop();
        }
    }

    fn owned_dirty(&self, caller: &dyn Caller<P::Host>) -> Result<Arc<dyn DirtyTracking>> {
        self.ownership.check(caller)?;
        self.dirty.clone().ok_or(Errno::OPNOTSUPP)
    }
}

/// What tracks the pages that a parent writes.
pub(super) fn tracking<P: Parent>(parent: &mut P) -> Option<Arc<dyn DirtyTracking>> {
    match parent.dma() {
        Dma::SetMap(map) => map.dirty_tracking(),
        Dma::DmaMap(map) => map.dirty_tracking(),
        Dma::Platform => None,
    }
}
