//! Memory the device can reach.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vdpa_core::Errno;
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::{Asid, IovaRange, Perm};
use vdpa_sys::mmap::{MapArea, Prot, SharedMap};

use crate::error::{Error, RegionProblem};

const PAGE: u64 = vdpa_core::host::PAGE_SIZE;

/// What to map for the device.
#[derive(Debug)]
pub struct RegionSpec {
    /// Name by which it is found again, also by the next image. Unique in the session.
    pub name: String,
    /// The memory.
    pub backing: Backing,
    /// First I/O virtual address; a multiple of 4096.
    pub iova: u64,
    /// Bytes; a multiple of 4096.
    pub size: u64,
    /// What the device may do.
    pub perm: Perm,
    /// Whether all pages are allocated and mapped at once, so that no later access faults.
    pub populate: bool,
}

/// Where the bytes of a region are.
#[derive(Debug)]
pub enum Backing {
    /// A memory object (memfd, hugetlb or tmpfs file), mapped shared from its first byte by this library.
    /// The only kind that outlives an exec.
    Object(OwnedFd),
    /// Memory that the caller has mapped itself and keeps mapped at this address while the session lives.
    ///
    /// The library cannot map it again, so a session that has such a region cannot be updated by exec.
    Caller(u64),
}

/// One mapping: a piece of memory, its address for the device, and the same bytes for the driver.
#[derive(Debug)]
pub struct Region {
    name: String,
    range: IovaRange,
    perm: Perm,
    asid: Asid,
    memory: Mapped,
}

#[derive(Debug)]
enum Mapped {
    Object { fd: OwnedFd, map: SharedMap },
    Caller { uaddr: u64 },
}

impl Region {
    /// Maps `spec` into this process, but not yet for the device.
    pub(crate) fn new(spec: RegionSpec, usable: IovaRange) -> Result<Self, Error> {
        let RegionSpec { name, backing, iova, size, perm, populate } = spec;
        let range = match IovaRange::from_size(iova, size) {
            Some(range) if iova % PAGE == 0 && size % PAGE == 0 => range,
            _ => return Err(problem(&name, RegionProblem::Alignment { iova, size })),
        };
        if !usable.contains(range) {
            return Err(problem(&name, RegionProblem::OutOfRange { range, usable }));
        }
        let memory = match backing {
            Backing::Caller(uaddr) => Mapped::Caller { uaddr },
            Backing::Object(fd) => {
                let map = map_object(&name, fd.as_fd(), size, populate)?;
                Mapped::Object { fd, map }
            }
        };
        Ok(Self { name, range, perm, asid: Asid(0), memory })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// I/O virtual addresses.
    #[must_use]
    pub const fn range(&self) -> IovaRange {
        self.range
    }

    /// What the device may do.
    #[must_use]
    pub const fn perm(&self) -> Perm {
        self.perm
    }

    /// Address in this process.
    #[must_use]
    pub fn uaddr(&self) -> u64 {
        match &self.memory {
            Mapped::Object { map, .. } => map.addr() as u64,
            Mapped::Caller { uaddr } => *uaddr,
        }
    }

    /// The memory object; `None` for memory of the caller.
    #[must_use]
    pub fn object(&self) -> Option<BorrowedFd<'_>> {
        match &self.memory {
            Mapped::Object { fd, .. } => Some(fd.as_fd()),
            Mapped::Caller { .. } => None,
        }
    }

    /// `size` bytes from `offset`, for ring accesses of this process; `None` beyond the end and for memory of
    /// the caller.
    #[must_use]
    pub fn area(&self, offset: u64, size: u64) -> Option<MapArea> {
        self.map()?.area(usize::try_from(offset).ok()?, usize::try_from(size).ok()?).ok()
    }

    /// The region in this process; `None` for memory of the caller.
    #[must_use]
    pub const fn map(&self) -> Option<&SharedMap> {
        match &self.memory {
            Mapped::Object { map, .. } => Some(map),
            Mapped::Caller { .. } => None,
        }
    }
}

fn map_object(name: &str, fd: BorrowedFd<'_>, size: u64, populate: bool) -> Result<SharedMap, Error> {
    let object = rustix::fs::fstat(fd)
        .map_err(|e| Error::Request {
            request: "fstat of a memory object",
            source: Errno::from_raw(e.raw_os_error()),
        })?
        .st_size;
    let object = u64::try_from(object).unwrap_or(0);
    if object < size {
        return Err(problem(name, RegionProblem::Short { size, object }));
    }
    let len = usize::try_from(size).map_err(|_| problem(name, RegionProblem::Short { size, object }))?;
    SharedMap::map(fd, 0, len, Prot::RW, populate).map_err(Error::request("mmap of a memory object"))
}

pub(crate) fn problem(name: &str, problem: RegionProblem) -> Error {
    Error::Region { name: name.to_owned(), problem }
}

/// Maps `regions` for the device, in one batch if `batch`. All or nothing: what was mapped before a failure is
/// unmapped again.
pub(crate) fn map_all<D: VdpaOps>(ops: &D, regions: &[Region], batch: bool) -> Result<(), Error> {
    let result = in_batch(ops, batch, || {
        for region in regions {
            let (iova, size) = (region.range.first(), region.range.size());
            ops.dma_map(region.asid, iova, size, region.uaddr(), region.perm)
                .map_err(|source| Error::Map { name: region.name.clone(), range: region.range, source })?;
        }
        Ok(())
    });
    if result.is_err() {
        // INVALIDATE of a range that is not mapped succeeds, so all of them can be sent.
        for region in regions {
            let _ = ops.dma_unmap(region.asid, region.range.first(), region.range.size());
        }
    }
    result
}

/// Tells the device where each mapping is in this process, in one batch if `batch`.
pub(crate) fn remap_all<D: VdpaOps>(ops: &D, regions: &[Region], batch: bool) -> Result<(), Error> {
    in_batch(ops, batch, || {
        for region in regions {
            let (iova, size) = (region.range.first(), region.range.size());
            ops.dma_remap(region.asid, iova, size, region.uaddr()).map_err(|source| Error::Map {
                name: region.name.clone(),
                range: region.range,
                source,
            })?;
        }
        Ok(())
    })
}

/// Runs `messages` between BATCH_BEGIN and BATCH_END. The batch is ended in any case: a device whose batch
/// stays open would not act on later messages.
pub(crate) fn in_batch<D: VdpaOps>(
    ops: &D,
    batch: bool,
    messages: impl FnOnce() -> Result<(), Error>,
) -> Result<(), Error> {
    if !batch {
        return messages();
    }
    ops.batch_begin(Asid(0)).map_err(Error::request("VHOST_IOTLB_BATCH_BEGIN"))?;
    let result = messages();
    let end = ops.batch_end(Asid(0)).map_err(Error::request("VHOST_IOTLB_BATCH_END"));
    result.and(end)
}
