//! Memory that the device can access: regions and their mappings.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::{Asid, IovaRange, Perm};
use vdpa_sys::mmap::{MapArea, SharedMap};

use crate::error::{Error, RegionProblem};
use crate::memory::Memory;

mod difference;

pub(crate) use difference::{Difference, apply};
pub use difference::{MemoryChange, TableRegion};

const PAGE: u64 = vdpa_core::host::PAGE_SIZE;

/// What to map for the device.
#[derive(Debug)]
pub struct RegionSpec {
    /// Name of the region, unique in the session. The next image finds it by this name.
    pub name: String,
    /// The memory.
    pub backing: Backing,
    /// First I/O virtual address; a multiple of 4096.
    pub iova: u64,
    /// Bytes; a multiple of 4096.
    pub size: u64,
    /// Access for the device.
    pub perm: Perm,
    /// Whether all pages are allocated and mapped at once, so that no later access faults. Only for [`Backing::Object`].
    pub populate: bool,
}

/// Where the bytes of a region are. Both own what they stand for: there is no region of an address alone, since the device
/// would write whatever is there.
///
/// Memory that the caller has mapped is [`Memory::from_mapping`], memory without an object [`Memory::anonymous`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Backing {
    /// A memory object (memfd, hugetlb or tmpfs file), mapped shared from its first byte by this library.
    Object(OwnedFd),
    /// A part of memory that several regions or devices share, beginning at this byte offset.
    Memory(Arc<Memory>, u64),
}

/// One mapping: a part of a memory, its I/O virtual addresses, and its address in this process.
#[derive(Debug)]
pub struct Region {
    name: String,
    range: IovaRange,
    perm: Perm,
    memory: Arc<Memory>,
    offset: u64,
}

impl Region {
    /// Maps `spec` into this process, but not yet for the device.
    pub(crate) fn new(spec: RegionSpec, usable: IovaRange) -> Result<Self, Error> {
        let RegionSpec { name, backing, iova, size, perm, populate } = spec;
        let range = checked_range(&name, iova, size, usable)?;
        let (memory, offset) = match backing {
            Backing::Object(fd) => (Memory::map(&name, fd, 0, size, populate)?, 0),
            Backing::Memory(memory, offset) => (memory, offset),
        };
        check_part(&name, &memory, offset, size)?;
        Ok(Self { name, range, perm, memory, offset })
    }

    /// Whether the byte at `iova` is the same byte in both, which have it.
    pub(crate) fn is_same_byte_at(&self, iova: u64, other: &Self) -> bool {
        let offset = |region: &Self| region.offset.saturating_add(iova - region.range.first());
        self.memory.is_same_byte(offset(self), &other.memory, offset(other))
    }

    /// A region of a table, which is not yet mapped for the device.
    pub(crate) fn of_table(region: &TableRegion, usable: IovaRange) -> Result<Self, Error> {
        let TableRegion { name, memory, offset, iova, size, perm } = region;
        let range = checked_range(name, *iova, *size, usable)?;
        check_part(name, memory, *offset, *size)?;
        let (name, memory) = (name.clone(), Arc::clone(memory));
        Ok(Self { name, range, perm: *perm, memory, offset: *offset })
    }

    pub(crate) fn piece(&self) -> Piece<'_> {
        let (iova, size) = (self.range.first(), self.range.size());
        Piece { name: &self.name, iova, size, uaddr: self.uaddr(), perm: self.perm }
    }

    /// Name of the region.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// I/O virtual addresses.
    #[must_use]
    pub const fn range(&self) -> IovaRange {
        self.range
    }

    /// Access for the device.
    #[must_use]
    pub const fn perm(&self) -> Perm {
        self.perm
    }

    /// Address in this process.
    #[must_use]
    pub fn uaddr(&self) -> u64 {
        self.memory.uaddr().saturating_add(self.offset)
    }

    /// The memory that the region is a part of.
    #[must_use]
    pub const fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Offset of the region in its memory, in bytes.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// The memory object; `None` for memory without one.
    #[must_use]
    pub fn object(&self) -> Option<BorrowedFd<'_>> {
        self.memory.object().map(|(fd, _)| fd)
    }

    /// `size` bytes from `offset` of this region, for ring accesses of this process; `None` beyond the end.
    #[must_use]
    pub fn area(&self, offset: u64, size: u64) -> Option<MapArea> {
        let end = offset.checked_add(size)?;
        let at = self.offset.checked_add(offset)?;
        if end > self.range.size() {
            return None;
        }
        self.map()?.area(usize::try_from(at).ok()?, usize::try_from(size).ok()?).ok()
    }

    /// The whole memory of which this region is a part, [from its offset on](Self::offset), in this process; `None` in a
    /// successor that has not mapped it yet.
    #[must_use]
    pub fn map(&self) -> Option<&SharedMap> {
        self.memory.as_map()
    }
}

/// The regions of a session in the order in which they were mapped, found by name and by address.
#[derive(Debug, Default)]
pub(crate) struct Regions {
    list: Vec<Region>,
    by_name: HashMap<String, usize>,
    /// By first address.
    by_iova: BTreeMap<u64, usize>,
    /// Mappings without a name, by first address.
    nameless: BTreeMap<u64, Nameless>,
}

/// A mapping without a name, as a virtual IOMMU makes and removes many of.
#[derive(Debug)]
pub(crate) struct Nameless {
    pub(crate) memory: Arc<Memory>,
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) perm: Perm,
}

impl Nameless {
    pub(crate) fn piece(&self, iova: u64) -> Piece<'_> {
        let uaddr = self.memory.uaddr().saturating_add(self.offset);
        Piece { name: self.memory.name(), iova, size: self.size, uaddr, perm: self.perm }
    }
}

/// One mapping as a device is told of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece<'a> {
    pub(crate) name: &'a str,
    pub(crate) iova: u64,
    pub(crate) size: u64,
    pub(crate) uaddr: u64,
    pub(crate) perm: Perm,
}

impl Piece<'_> {
    fn failed(&self, source: Errno) -> Error {
        let range = IovaRange::from_size(self.iova, self.size).unwrap_or(IovaRange::ALL);
        Error::Map { name: self.name.to_owned(), range, source }
    }
}

/// Bytes of these mappings that the device may write.
pub(crate) fn writable_bytes<'a>(pieces: impl Iterator<Item = Piece<'a>>) -> u64 {
    let writable = pieces.filter(|piece| piece.perm.write());
    writable.map(|piece| piece.size).fold(0, u64::saturating_add)
}

/// The later end of two ranges, of which either may be missing.
trait MaxByLast {
    fn max_by_last(self, other: Self) -> Option<u64>;
}

impl MaxByLast for Option<IovaRange> {
    fn max_by_last(self, other: Self) -> Option<u64> {
        self.into_iter().chain(other).map(IovaRange::last).max()
    }
}

impl Regions {
    pub(crate) fn list(&self) -> &[Region] {
        &self.list
    }

    /// The regions from number `from` on.
    pub(crate) fn pieces_from(&self, from: usize) -> impl Iterator<Item = Piece<'_>> + Clone {
        self.list.iter().skip(from).map(Region::piece)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Region> {
        self.list.get(*self.by_name.get(name)?)
    }

    /// The region with the greatest first address up to `iova`.
    fn below(&self, iova: u64) -> Option<&Region> {
        self.by_iova.range(..=iova).next_back().and_then(|(_, &at)| self.list.get(at))
    }

    /// Whether regions or mappings without names have every byte of `range`.
    pub(crate) fn cover(&self, range: IovaRange) -> bool {
        let mut next = range.first();
        loop {
            let region = self.below(next).map(Region::range);
            let nameless = self.nameless_below(next).map(|(range, _)| range);
            let Some(last) = region.max_by_last(nameless).filter(|&last| last >= next) else { return false };
            match last.checked_add(1) {
                Some(after) if after <= range.last() => next = after,
                _ => return true,
            }
        }
    }

    fn nameless_below(&self, iova: u64) -> Option<(IovaRange, &Nameless)> {
        let (&first, nameless) = self.nameless.range(..=iova).next_back()?;
        Some((IovaRange::from_size(first, nameless.size)?, nameless))
    }

    /// The name of what overlaps `range`.
    fn overlapping(&self, range: IovaRange) -> Option<String> {
        if let Some(region) = self.below(range.last()).filter(|r| r.range().overlaps(range)) {
            return Some(region.name().to_owned());
        }
        let (other, _) = self.nameless_below(range.last()).filter(|(other, _)| other.overlaps(range))?;
        Some(format!("without a name at {other}"))
    }

    /// Adds a mapping without a name.
    pub(crate) fn push_nameless(
        &mut self,
        iova: u64,
        mapping: Nameless,
        usable: IovaRange,
    ) -> Result<(), Error> {
        let name = mapping.memory.name();
        let range = checked_range(name, iova, mapping.size, usable)?;
        check_part(name, &mapping.memory, mapping.offset, mapping.size)?;
        if let Some(other) = self.overlapping(range) {
            return Err(problem(name, RegionProblem::Overlap { other }));
        }
        self.nameless.insert(iova, mapping);
        Ok(())
    }

    /// Removes a mapping without a name.
    pub(crate) fn remove_nameless(&mut self, iova: u64) {
        self.nameless.remove(&iova);
    }

    pub(crate) const fn nameless(&self) -> &BTreeMap<u64, Nameless> {
        &self.nameless
    }

    /// All mappings: first the regions in the order in which they were mapped, then those without a name.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Piece<'_>> + Clone {
        self.list.iter().map(Region::piece).chain(self.nameless.iter().map(|(&iova, n)| n.piece(iova)))
    }

    pub(crate) fn push(&mut self, region: Region) -> Result<(), Error> {
        if self.by_name.contains_key(region.name()) {
            return Err(problem(region.name(), RegionProblem::Exists));
        }
        if let Some(other) = self.overlapping(region.range()) {
            return Err(problem(region.name(), RegionProblem::Overlap { other }));
        }
        let at = self.list.len();
        self.by_name.insert(region.name().to_owned(), at);
        self.by_iova.insert(region.range().first(), at);
        self.list.push(region);
        Ok(())
    }

    /// The regions of a table, without what they are mapped beside.
    pub(crate) fn of_table(table: &[TableRegion], usable: IovaRange) -> Result<Self, Error> {
        let mut regions = Self::default();
        table.iter().try_for_each(|region| regions.push(Region::of_table(region, usable)?))?;
        Ok(regions)
    }

    /// Checks that no region overlaps a mapping without a name of `other`.
    pub(crate) fn check_beside(&self, other: &Self) -> Result<(), Error> {
        for region in &self.list {
            let beside = other.nameless_below(region.range.last());
            if let Some((range, _)) = beside.filter(|(range, _)| range.overlaps(region.range)) {
                let other = format!("without a name at {range}");
                return Err(problem(&region.name, RegionProblem::Overlap { other }));
            }
        }
        Ok(())
    }

    /// Replaces the regions; mappings without names stay.
    pub(crate) fn set_list(&mut self, list: Self) {
        self.list = list.list;
        self.index();
    }

    /// Removes the regions with these names.
    pub(crate) fn remove_all(&mut self, names: &[String]) {
        self.list.retain(|region| !names.contains(&region.name));
        self.index();
    }

    /// The region with this byte.
    pub(crate) fn at(&self, iova: u64) -> Option<&Region> {
        self.below(iova).filter(|region| region.range.last() >= iova)
    }

    pub(crate) fn truncate(&mut self, len: usize) {
        self.list.truncate(len);
        self.index();
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.list.retain(|region| region.name() != name);
        self.index();
    }

    /// Replaces the memory of a region, of which it is the same part.
    pub(crate) fn set_memory(&mut self, name: &str, memory: &Arc<Memory>) {
        let offset = self.get(name).map_or(0, Region::offset);
        self.set_part(name, memory, offset);
    }

    /// Makes a region another part of memory.
    pub(crate) fn set_part(&mut self, name: &str, memory: &Arc<Memory>, offset: u64) {
        let at = self.by_name.get(name).copied();
        if let Some(region) = at.and_then(|at| self.list.get_mut(at)) {
            region.memory = Arc::clone(memory);
            region.offset = offset;
        }
    }

    fn index(&mut self) {
        let entries = || self.list.iter().enumerate();
        self.by_name = entries().map(|(at, r)| (r.name().to_owned(), at)).collect();
        self.by_iova = entries().map(|(at, r)| (r.range().first(), at)).collect();
    }
}

pub(crate) fn problem(name: &str, problem: RegionProblem) -> Error {
    Error::Region { name: name.to_owned(), problem }
}

fn checked_range(name: &str, iova: u64, size: u64, usable: IovaRange) -> Result<IovaRange, Error> {
    let range = match IovaRange::from_size(iova, size) {
        Some(range) if iova.is_multiple_of(PAGE) && size.is_multiple_of(PAGE) => range,
        _ => return Err(problem(name, RegionProblem::Alignment { iova, size })),
    };
    if !usable.contains(range) {
        return Err(problem(name, RegionProblem::OutOfRange { range, usable }));
    }
    Ok(range)
}

pub(crate) fn check_part(name: &str, memory: &Memory, offset: u64, size: u64) -> Result<(), Error> {
    if offset.checked_add(size).is_none_or(|end| end > memory.size()) || !offset.is_multiple_of(PAGE) {
        return Err(problem(name, RegionProblem::Outside { offset, size, memory: memory.size() }));
    }
    Ok(())
}

/// The only address space that this library uses.
const SPACE: Asid = Asid(0);

/// Maps `pieces` for the device, in one batch if `batch`. All or nothing: what was mapped before a failure is
/// unmapped again.
pub(crate) fn map_all<'a, D: VdpaOps>(
    ops: &D,
    pieces: impl Iterator<Item = Piece<'a>> + Clone,
    batch: bool,
) -> Result<(), Error> {
    let result = in_batch(ops, batch, || {
        for piece in pieces.clone() {
            ops.dma_map(SPACE, piece.iova, piece.size, piece.uaddr, piece.perm)
                .map_err(|e| piece.failed(e))?;
        }
        Ok(())
    });
    if result.is_err() {
        // INVALIDATE of a range that is not mapped succeeds, so all of them can be sent.
        for piece in pieces {
            let _ = ops.dma_unmap(SPACE, piece.iova, piece.size);
        }
    }
    result
}

/// Sends REMAP with the address in this process for each mapping, in one batch if `batch`.
pub(crate) fn remap_all<'a, D: VdpaOps>(
    ops: &D,
    pieces: impl Iterator<Item = Piece<'a>>,
    batch: bool,
) -> Result<(), Error> {
    in_batch(ops, batch, || {
        for piece in pieces {
            ops.dma_remap(SPACE, piece.iova, piece.size, piece.uaddr).map_err(|e| piece.failed(e))?;
        }
        Ok(())
    })
}

/// Runs `messages` between BATCH_BEGIN and BATCH_END. Sends BATCH_END also after an error: while a batch is open, the device
/// does not apply later messages.
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
