//! Mapping memory for the device of a session.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::features::BackendFeatures;
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::{IovaRange, Perm};
use vdpa_sys::eventfd::EventFd;

use super::Session;
use crate::dma::{Backing, Nameless, Piece, Region, RegionSpec, check_part, map_all, problem, remap_all};
use crate::error::{Error, RegionProblem};
use crate::memory::Memory;

impl<D: VdpaOps<Event = EventFd>> Session<D> {
    /// Maps a memory object for the device, and into this process.
    ///
    /// # Errors
    /// [`Error::Region`], [`Error::Request`]; [`Error::Map`] when the device refuses; [`Error::Memlock`] when that is because of
    /// `RLIMIT_MEMLOCK`.
    pub fn map_memfd(
        &mut self,
        name: &str,
        fd: OwnedFd,
        iova: u64,
        size: u64,
        perm: Perm,
    ) -> Result<(), Error> {
        let backing = Backing::Object(fd);
        self.map(vec![RegionSpec { name: name.to_owned(), backing, iova, size, perm, populate: false }])
    }

    /// Maps a part of memory that other regions or devices share: `size` bytes from byte `offset` of it on.
    ///
    /// # Errors
    /// As [`map_memfd`](Self::map_memfd).
    pub fn map_memory(
        &mut self,
        name: &str,
        memory: &Arc<Memory>,
        offset: u64,
        iova: u64,
        size: u64,
        perm: Perm,
    ) -> Result<(), Error> {
        let backing = Backing::Memory(Arc::clone(memory), offset);
        self.map(vec![RegionSpec { name: name.to_owned(), backing, iova, size, perm, populate: false }])
    }

    /// Maps several regions, in one batch if the device can. All or nothing.
    ///
    /// # Errors
    /// As [`map_memfd`](Self::map_memfd).
    pub fn map(&mut self, specs: Vec<RegionSpec>) -> Result<(), Error> {
        let before = self.setup.regions.list().len();
        self.setup.generation += 1;
        let added = specs
            .into_iter()
            .try_for_each(|spec| self.setup.add_region(spec))
            .and_then(|()| map_all(&self.ops, self.setup.regions.pieces_from(before), self.setup.batch()));
        added.map_err(|error| {
            let error = error.explain(self.setup.pinned());
            self.setup.regions.truncate(before);
            error
        })
    }

    /// Unmaps a region. The caller makes sure that it holds no ring and that no request in flight uses it. Blocks until the
    /// device does not access it any more.
    ///
    /// # Errors
    /// [`Error::Region`] for an unknown name; [`Error::Request`].
    pub fn unmap(&mut self, name: &str) -> Result<(), Error> {
        let region = self.setup.regions.get(name).ok_or_else(|| problem(name, RegionProblem::Unknown))?;
        self.ops
            .dma_unmap(vdpa_core::types::Asid(0), region.range().first(), region.range().size())
            .map_err(Error::request("VHOST_IOTLB_INVALIDATE"))?;
        self.setup.generation += 1;
        self.setup.regions.remove(name);
        Ok(())
    }

    /// Says that a region is mapped at another address of this process from now on: `memory` is another mapping of the same object.
    /// The device accesses the same pages as before, so it may run. Sends `VHOST_IOTLB_REMAP` where the device uses addresses of its
    /// owner; any other has nothing to be told. The old mapping must exist until this returns. A prepared update has to be
    /// prepared again.
    ///
    /// # Errors
    /// [`Error::Region`] for an unknown name, and when `memory` is not the same part of the same object; [`Error::Map`] when the
    /// device refuses, which changes nothing.
    pub fn remap(&mut self, name: &str, memory: &Arc<Memory>) -> Result<(), Error> {
        let region = self.setup.regions.get(name).ok_or_else(|| problem(name, RegionProblem::Unknown))?;
        if !region.memory().is_same_object(memory) {
            return Err(problem(name, RegionProblem::OtherObject));
        }
        if self.setup.backend.has(BackendFeatures::IOTLB_REMAP) {
            let uaddr = memory.uaddr().saturating_add(region.offset());
            let piece = Piece { uaddr, ..region.piece() };
            remap_all(&self.ops, std::iter::once(piece), false)?;
        }
        self.setup.generation += 1;
        self.setup.regions.set_memory(name, memory);
        Ok(())
    }

    /// Puts other memory behind a region: `memory` from byte `offset` on, at the same addresses, with the same access. By one
    /// `VHOST_IOTLB_REMAP`, so that the addresses are mapped all the while: a request has either memory, and when this returns no request
    /// uses the old one any more. For shadow rings: what is in the region is not copied, so suspend the device, copy, call this,
    /// and resume. A prepared update has to be prepared again.
    ///
    /// The device must allow it: those of `vdpad` do with `verify_remap off`.
    ///
    /// # Errors
    /// [`Error::Region`] for an unknown name, a part that `memory` does not have, and a region that
    /// [holds a ring](RegionProblem::HoldsRing) that this program drives, whose driver would go on in the old memory; [`Error::Request`] with
    /// `EOPNOTSUPP` when the device does not offer `IOTLB_REMAP`; [`Error::Map`] when it refuses, which changes nothing.
    pub fn remap_to(&mut self, name: &str, memory: &Arc<Memory>, offset: u64) -> Result<(), Error> {
        let region = self.setup.regions.get(name).ok_or_else(|| problem(name, RegionProblem::Unknown))?;
        let range = region.range();
        check_part(name, memory, offset, range.size())?;
        let rings = self.setup.queues.iter().map(|slot| &slot.vring);
        let areas = rings.flat_map(|vring| vring.areas(self.setup.features).map(|area| (vring.index, area)));
        if let Some((queue, (area, at))) = areas.into_iter().find(|(_, (_, at))| at.overlaps(range)) {
            return Err(problem(name, RegionProblem::HoldsRing { queue, area, iova: at.first() }));
        }
        if !self.setup.backend.has(BackendFeatures::IOTLB_REMAP) {
            return Err(Error::request("VHOST_IOTLB_REMAP")(Errno::OPNOTSUPP));
        }
        let piece = Piece { uaddr: memory.uaddr().saturating_add(offset), ..region.piece() };
        remap_all(&self.ops, std::iter::once(piece), false)?;
        self.setup.generation += 1;
        self.setup.regions.set_part(name, memory, offset);
        Ok(())
    }

    /// Maps `size` bytes from byte `offset` of `memory` at `iova`, without a name. For mappings that a guest's virtual IOMMU
    /// makes, many in a second: one request, and a prepared update stays valid if it knows the memory. It does when the memory
    /// was in use when it was described.
    ///
    /// # Errors
    /// As [`map_memfd`](Self::map_memfd); errors name the memory.
    pub fn map_at(
        &mut self,
        memory: &Arc<Memory>,
        offset: u64,
        iova: u64,
        size: u64,
        perm: Perm,
    ) -> Result<(), Error> {
        let mapping = Nameless { memory: Arc::clone(memory), offset, size, perm };
        self.setup.regions.push_nameless(iova, mapping, self.setup.iova_range)?;
        let uaddr = memory.uaddr().saturating_add(offset);
        let mapped = map_all(
            &self.ops,
            std::iter::once(Piece { name: memory.name(), iova, size, uaddr, perm }),
            false,
        );
        mapped.map_err(|error| {
            let error = error.explain(self.setup.pinned());
            self.setup.regions.remove_nameless(iova);
            error
        })
    }

    /// Unmaps what [`map_at`](Self::map_at) has mapped at exactly this range. As [`unmap`](Self::unmap) otherwise.
    ///
    /// # Errors
    /// [`Error::Region`] when there is no such mapping; [`Error::Request`].
    pub fn unmap_at(&mut self, iova: u64, size: u64) -> Result<(), Error> {
        let there = self.setup.regions.nameless().get(&iova);
        let Some(mapping) = there.filter(|mapping| mapping.size == size) else {
            let range = IovaRange::from_size(iova, size).unwrap_or(IovaRange::ALL);
            return Err(problem("", RegionProblem::NotMapped { range }));
        };
        self.ops
            .dma_unmap(vdpa_core::types::Asid(0), iova, mapping.size)
            .map_err(Error::request("VHOST_IOTLB_INVALIDATE"))?;
        self.setup.regions.remove_nameless(iova);
        Ok(())
    }

    /// Number of mappings without a name.
    #[must_use]
    pub fn mappings(&self) -> usize {
        self.setup.regions.nameless().len()
    }

    /// Maps guest memory of the crate `vm-memory`: each region at the I/O virtual address that is its guest address, under the
    /// name `guest@ADDRESS`. It stays mapped in this process where it is.
    ///
    /// # Errors
    /// As [`map_memfd`](Self::map_memfd); [`RegionProblem::NoFile`] for a region without a file.
    #[cfg(feature = "vm-memory")]
    pub fn map_guest_memory<B: vm_memory::bitmap::Bitmap + Send + Sync + 'static>(
        &mut self,
        memory: &vm_memory::GuestMemoryMmap<B>,
        perm: Perm,
    ) -> Result<(), Error> {
        use vm_memory::{Address as _, GuestMemoryBackend as _, GuestMemoryRegion as _};
        let spec = |region: &vm_memory::GuestRegionMmap<B>| {
            let (iova, size) = (region.start_addr().raw_value(), region.len());
            let name = format!("guest@{iova:#x}");
            let backing = Backing::Memory(Memory::from_guest_region(&name, region)?, 0);
            Ok(RegionSpec { name, backing, iova, size, perm, populate: false })
        };
        let specs: Result<Vec<_>, Error> = memory.iter().map(spec).collect();
        self.map(specs?)
    }

    /// A region by its name.
    #[must_use]
    pub fn region(&self, name: &str) -> Option<&Region> {
        self.setup.regions.get(name)
    }

    /// All regions, in the order in which they were mapped.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        self.setup.regions.list()
    }
}
