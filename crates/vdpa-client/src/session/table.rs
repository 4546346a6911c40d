//! The memory of a session as a table, of which only the difference is sent.

use vdpa_core::features::BackendFeatures;
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::{Asid, IovaRange, QueueIndex};
use vdpa_sys::eventfd::EventFd;

use super::{Session, Setup};
use crate::dma::{Difference, MemoryChange, Regions, TableRegion, apply, problem, writable_bytes};
use crate::error::{Error, RegionProblem};

impl<D: VdpaOps<Event = EventFd>> Session<D> {
    /// Makes `table` the regions of this session: those that are not in it are unmapped, those that are new are mapped, and what is the
    /// same is not touched: it stays mapped and pinned, and requests that use it go on. A region is the same when it has the same
    /// addresses, access and bytes of the same memory, whatever its name is. One that grows or shrinks is unmapped and mapped.
    /// [Mappings without names](Self::map_at) stay.
    ///
    /// All or nothing: what was done before a failure is taken back. The messages are one batch if the device can, and a device that
    /// takes whole tables has either table at any time. Any other, and one that does not offer `IOTLB_BATCH`, has a part of the change
    /// for a moment, in which requests on what is being changed may fail. Blocks until no request uses what is unmapped, and while
    /// memory is pinned. A prepared update has to be prepared again.
    ///
    /// Where the device uses addresses of its owner and a region is mapped at another address of this process, the device is told by
    /// `VHOST_IOTLB_REMAP`. The old mapping must exist until this returns.
    ///
    /// # Errors
    /// [`Error::Region`] for a table that cannot be: a region that is misaligned, outside of what the device can address or of its
    /// memory, has a name or addresses of another one, or no longer [holds a ring](RegionProblem::HoldsRing);
    /// [`Error::Map`] and [`Error::Memlock`] with the region that the device refuses; [`Error::Request`] when it refuses the end of the
    /// batch; [`Error::Lost`] when the roll-back fails as well.
    pub fn set_memory(&mut self, table: &[TableRegion]) -> Result<MemoryChange, Error> {
        let new = Regions::of_table(table, self.setup.iova_range)?;
        new.check_beside(&self.setup.regions)?;
        self.setup.check_rings(&new)?;
        let old = &self.setup.regions;
        let difference = Difference::of(old.list(), new.list());
        let change = difference.change(old.list(), new.list());
        let remaps = self.setup.backend.has(BackendFeatures::IOTLB_REMAP);
        let steps = difference.steps(old.list(), new.list(), remaps);
        let sent = apply(&steps, self.setup.batch(), |message| self.ops.iotlb(Asid(0), message));
        self.setup.generation += 1;
        match sent {
            Ok(()) => {
                self.setup.regions.set_list(new);
                Ok(change)
            }
            Err(failed) => {
                let error = failed.error.explain(self.setup.pinned_with(&new));
                if failed.lost.is_empty() {
                    return Err(error);
                }
                self.setup.regions.remove_all(&failed.lost);
                Err(Error::Lost { names: failed.lost, source: Box::new(error) })
            }
        }
    }
}

impl Setup {
    /// Bytes that would be pinned with these regions in place of those that there are.
    fn pinned_with(&self, regions: &Regions) -> u64 {
        let nameless = self.regions.nameless().iter().map(|(&iova, mapping)| mapping.piece(iova));
        writable_bytes(regions.pieces().chain(nameless))
    }

    /// Checks that every ring is in the same memory with these regions.
    fn check_rings(&self, new: &Regions) -> Result<(), Error> {
        for vring in self.vrings() {
            for (area, range) in vring.areas(self.features) {
                self.check_area(vring.index, area, range, new)?;
            }
        }
        Ok(())
    }

    fn check_area(
        &self,
        queue: QueueIndex,
        area: &'static str,
        range: IovaRange,
        new: &Regions,
    ) -> Result<(), Error> {
        let mut at = range.first();
        loop {
            // What is not in a region is in a mapping without a name, which stays.
            let last = match self.regions.at(at) {
                None => at,
                Some(old) => match new.at(at).filter(|new| old.is_same_byte_at(at, new)) {
                    Some(new) => old.range().last().min(new.range().last()),
                    None => {
                        return Err(problem(old.name(), RegionProblem::HoldsRing { queue, area, iova: at }));
                    }
                },
            };
            // The next page, where another region may begin.
            let last = last.max(at | (vdpa_core::host::PAGE_SIZE - 1));
            match last.checked_add(1).filter(|next| *next <= range.last()) {
                Some(next) => at = next,
                None => return Ok(()),
            }
        }
    }
}
