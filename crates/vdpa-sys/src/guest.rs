//! Guest memory: the memory objects behind the addresses of a client.
//!
//! This process maps the objects of the client's shared mappings, so they survive the client's exec and exit. Private
//! mappings are accessed by copying through an open `/proc/TID/mem`, as long as the address space exists.

use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::dirty::BitLog;
use vdpa_core::host::{AddressSpace, Bytes, Fragment, Host, MemoryObject, PAGE_SIZE, PinAccount};
use vdpa_core::ring::Fault;
use vdpa_core::types::Perm;

use crate::dma;
use crate::errno;
use crate::eventfd::EventFd;
use crate::maps::{Vma, vma_at};
use crate::mmap::SharedMap;
use crate::object;
use crate::object_file::ObjectMap;
use crate::space::OwnerSpace;
use crate::stable::StableMemory;

pub use crate::object_file::ObjectFile;

/// Largest number of fragments of one range: twice the entries of a kernel IOTLB. Memory in more pieces could exhaust the
/// mappings of this process.
const FRAGMENTS_MAX: usize = 4096;

/// Linux as the platform of devices.
#[derive(Clone, Debug)]
pub struct LinuxHost;

impl Host for LinuxHost {
    type AddressSpace = OwnerSpace;
    type Memory = GuestMemory;
    type Event = EventFd;
}

/// A memory object and an offset in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObjectId {
    /// Device of its file system, major number.
    pub dev_major: u32,
    /// Device of its file system, minor number.
    pub dev_minor: u32,
    /// Inode; 0 exists (the first System V segment).
    pub inode: u64,
    /// Creation time in nanoseconds since 1970; 0 if the file system does not record it. System V segments have a separate
    /// count of inode numbers, so the inode number alone may mean two objects.
    pub created_ns: u64,
    /// Offset of the first byte, in bytes.
    pub offset: u64,
}

/// Key of an open object: its identity without an offset, and whether it is open for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ObjectKey {
    pub(crate) dev: (u32, u32),
    pub(crate) inode: u64,
    pub(crate) created_ns: u64,
    pub(crate) write: bool,
}

/// A piece of client memory. Clones share it, and pieces of one object share mappings.
#[derive(Clone, Debug)]
pub struct GuestMemory {
    size: u64,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    /// `map` is that of `whole`, without a step to it; the piece begins at byte `start` of it.
    Mapped {
        map: SharedMap,
        start: usize,
        whole: Arc<ObjectMap>,
    },
    Copied {
        space: OwnerSpace,
        uaddr: u64,
    },
}

/// The saved state of a [`GuestMemory`], without its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryRecord {
    /// Mapped: restored by [`GuestMemory::from_object`] with [`GuestMemory::file`].
    Object {
        /// The object and the offset in it.
        object: ObjectId,
        /// Bytes.
        size: u64,
        /// Whether it is mapped writable.
        write: bool,
    },
    /// Copied: restored by [`GuestMemory::from_private`].
    Private {
        /// Address in the address space.
        uaddr: u64,
        /// Bytes.
        size: u64,
    },
}

impl GuestMemory {
    /// `size` bytes of an open object from `object.offset`, which need not be a multiple of the page size. They are mapped,
    /// unless a mapping of `file` has them already.
    ///
    /// # Errors
    /// Of mmap(2); `EACCES` and `EPERM` when the file or a seal forbids writing.
    pub fn from_object(
        file: Arc<ObjectFile>,
        object: ObjectId,
        size: u64,
        write: bool,
    ) -> Result<Self, Errno> {
        let whole = file.map(object, size, write, |_| Ok(true))?.ok_or(Errno::INVAL)?;
        Self::in_mapping(whole, object.offset, size)
    }

    /// `size` bytes of a mapping that has them, from `offset` of its object on.
    pub(crate) fn in_mapping(whole: Arc<ObjectMap>, offset: u64, size: u64) -> Result<Self, Errno> {
        let start = offset.checked_sub(whole.object.offset).and_then(|start| usize::try_from(start).ok());
        let (map, start) = (whole.map.clone(), start.ok_or(Errno::INVAL)?);
        Ok(Self { size, kind: Kind::Mapped { map, start, whole } })
    }

    /// `size` bytes at `uaddr` of an address space, reached by copying. The access rights of the mapping are not checked.
    #[must_use]
    pub const fn from_private(space: OwnerSpace, uaddr: u64, size: u64) -> Self {
        Self { size, kind: Kind::Copied { space, uaddr } }
    }

    /// Bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The state that a later image of this process needs.
    #[must_use]
    pub fn record(&self) -> MemoryRecord {
        let size = self.size;
        match &self.kind {
            Kind::Mapped { map, start, whole } => {
                MemoryRecord::Object { object: whole.at(*start), size, write: map.prot().write }
            }
            Kind::Copied { uaddr, .. } => MemoryRecord::Private { uaddr: *uaddr, size },
        }
    }

    /// The open object, shared by all pieces of it with the same access; `None` when copied.
    #[must_use]
    pub fn file(&self) -> Option<&Arc<ObjectFile>> {
        match &self.kind {
            Kind::Mapped { whole, .. } => Some(&whole.file),
            Kind::Copied { .. } => None,
        }
    }

    /// The address space it is copied from; `None` when mapped.
    #[must_use]
    pub const fn space(&self) -> Option<&OwnerSpace> {
        match &self.kind {
            Kind::Copied { space, .. } => Some(space),
            Kind::Mapped { .. } => None,
        }
    }

    /// The mapping, which may have other pieces of the object too, and the offset of the first byte in it; `None` when copied.
    #[must_use]
    pub const fn map(&self) -> Option<(&SharedMap, usize)> {
        match &self.kind {
            Kind::Mapped { map, start, .. } => Some((map, *start)),
            Kind::Copied { .. } => None,
        }
    }

    /// The mapping as memory for kernel I/O; `None` when copied.
    #[must_use]
    pub fn stable(&self) -> Option<Arc<dyn StableMemory>> {
        self.map().map(|(map, _)| Arc::new(map.clone()) as Arc<dyn StableMemory>)
    }

    /// Populates all its pages; see [`SharedMap::populate`]. No effect when copied.
    ///
    /// # Errors
    /// As [`SharedMap::populate`].
    pub fn populate(&self) -> Result<(), Errno> {
        let Some((map, start)) = self.map() else { return Ok(()) };
        map.populate_part(start, usize::try_from(self.size).map_err(|_| Errno::INVAL)?)
    }

    /// Address in this process of the byte at `offset`, for iovecs and registered buffers; `None` when copied
    /// or beyond the end. Valid while this value or a clone exists.
    #[must_use]
    #[inline]
    pub fn host_addr(&self, offset: u64) -> Option<usize> {
        let Kind::Mapped { map, start, .. } = &self.kind else { return None };
        (offset < self.size)
            .then(|| usize::try_from(offset).ok().map(|offset| map.addr() + start + offset))?
    }

    /// Copies `buf.len()` bytes from `offset` into `buf`.
    ///
    /// # Errors
    /// [`Fault`] with an offset, beyond the end or when the memory no longer exists; `buf` may be partly overwritten.
    #[inline]
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Fault> {
        self.check(offset, buf.len())?;
        match &self.kind {
            Kind::Mapped { map, start, .. } => map.read(*start + index(offset)?, buf),
            Kind::Copied { space, uaddr } => in_full(buf.len(), |done| {
                let rest = buf.get_mut(done..).unwrap_or_default();
                rustix::io::pread(space.mem(), rest, uaddr + offset + done as u64)
            }),
        }
        .map_err(|_| Fault { addr: offset })
    }

    /// Copies `data` to `offset`.
    ///
    /// # Errors
    /// [`Fault`] with an offset, beyond the end, when it is mapped read-only, or when the memory no longer exists; part
    /// of the data may be written.
    #[inline]
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        self.check(offset, data.len())?;
        match &self.kind {
            Kind::Mapped { map, start, .. } => map.write(*start + index(offset)?, data),
            Kind::Copied { space, uaddr } => {
                let to = uaddr.checked_add(offset).ok_or(Fault { addr: offset })?;
                // Kept while it is written.
                let _own = if space.is_own() {
                    dma::hold(to, data.len() as u64).ok_or(Fault { addr: offset })?
                } else {
                    Vec::new()
                };
                in_full(data.len(), |done| {
                    let rest = data.get(done..).unwrap_or_default();
                    rustix::io::pwrite(space.mem(), rest, to + done as u64)
                })
            }
        }
        .map_err(|_| Fault { addr: offset })
    }

    #[inline]
    fn check(&self, offset: u64, len: usize) -> Result<(), Fault> {
        if offset <= self.size && len as u64 <= self.size - offset {
            Ok(())
        } else {
            Err(Fault { addr: offset })
        }
    }
}

/// Repeats `step`, which gets the number of bytes copied so far, until all `len` bytes are copied. An address space that no
/// longer exists copies none, which is a fault.
fn in_full(len: usize, mut step: impl FnMut(usize) -> rustix::io::Result<usize>) -> Result<(), Fault> {
    let mut done = 0;
    while done < len {
        match step(done) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) | Err(_) => return Err(Fault { addr: done as u64 }),
            Ok(count) => done += count,
        }
    }
    Ok(())
}

#[inline]
fn index(offset: u64) -> Result<usize, Fault> {
    usize::try_from(offset).map_err(|_| Fault { addr: offset })
}

impl MemoryObject for GuestMemory {
    fn is_shared(&self) -> bool {
        matches!(self.kind, Kind::Mapped { .. })
    }

    fn pin_pages(&self) -> u64 {
        match &self.kind {
            // A mapping begins at a page.
            Kind::Mapped { map, start, .. } if map.prot().write => {
                (self.size + *start as u64 % PAGE_SIZE).div_ceil(PAGE_SIZE)
            }
            Kind::Mapped { .. } | Kind::Copied { .. } => 0,
        }
    }

    fn same_object(&self, offset: u64, other: &Self, other_offset: u64) -> bool {
        match (&self.kind, &other.kind) {
            (Kind::Mapped { start, whole, .. }, Kind::Mapped { start: their_start, whole: theirs, .. }) => {
                let at = |object: ObjectId, offset| ObjectId {
                    offset: object.offset.wrapping_add(offset),
                    ..object
                };
                at(whole.at(*start), offset) == at(theirs.at(*their_start), other_offset)
            }
            (Kind::Copied { space, uaddr }, Kind::Copied { space: their_space, uaddr: theirs }) => {
                space.is_same(their_space) && uaddr.wrapping_add(offset) == theirs.wrapping_add(other_offset)
            }
            _ => false,
        }
    }

    fn bit_log(&self) -> Option<Arc<dyn BitLog>> {
        let writable = self.map().is_some_and(|(map, _)| map.prot().write);
        writable.then(|| Arc::new(self.clone()) as Arc<dyn BitLog>)
    }
}

impl BitLog for GuestMemory {
    fn pages(&self) -> u64 {
        self.size.saturating_mul(8)
    }

    /// One atomic operation for each word of 64 bits. A client that has truncated the memory loses the marks.
    fn set(&self, first: u64, last: u64) {
        /// Pages of a word.
        const PAGES: u64 = u64::BITS as u64;
        let Some((map, start)) = self.map() else { return };
        // The bits of a byte that is not at a multiple of 8 in the mapping begin inside of a word.
        let Ok(before) = u64::try_from(start).map(|start| start.saturating_mul(8)) else { return };
        let end = self.pages().saturating_sub(1);
        let (first, last) = (first.min(end + 1).saturating_add(before), last.min(end).saturating_add(before));
        let mut bit = first;
        while bit <= last {
            let upto = (bit | (PAGES - 1)).min(last);
            let mask = u64::MAX >> (PAGES - 1 - (upto - bit)) << (bit % PAGES);
            let Ok(word) = usize::try_from(bit / PAGES) else { return };
            // A fault, if there is one, is the client's.
            let _ = map.set_bits(word * size_of::<u64>(), mask);
            bit = upto + 1;
        }
    }
}

impl Bytes for GuestMemory {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Fault> {
        Self::read(self, offset, buf)
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), Fault> {
        Self::write(self, offset, data)
    }
}

impl AddressSpace for OwnerSpace {
    type Memory = GuestMemory;

    fn resolve(&self, uaddr: u64, size: u64, perm: Perm) -> Result<Vec<Fragment<GuestMemory>>, Errno> {
        let end = uaddr.checked_add(size).ok_or(Errno::FAULT)?;
        if self.is_own() && perm.write() && dma::hold(uaddr, size).is_none() {
            return Err(Errno::FAULT);
        }
        let mut fragments = Vec::new();
        let mut at = uaddr;
        while at < end {
            let vma = vma_at(self.maps(), at)?.ok_or(Errno::FAULT)?;
            // As pin_user_pages does: requires write access if the device writes, else read access.
            let allowed = if perm.write() { vma.writable } else { vma.readable };
            if !allowed || (perm.read() && !vma.readable) || fragments.len() == FRAGMENTS_MAX {
                return Err(Errno::FAULT);
            }
            let size = vma.end.min(end) - at;
            fragments.push(Fragment { size, memory: fragment(self, &vma, at, size, perm.write())? });
            at += size;
        }
        Ok(fragments)
    }

    fn resolve_mapping(&self, uaddr: u64) -> Result<Fragment<GuestMemory>, Errno> {
        if self.is_own() && dma::hold(uaddr, 1).is_none() {
            return Err(Errno::FAULT);
        }
        let vma =
            vma_at(self.maps(), uaddr)?.filter(|vma| vma.readable && vma.writable).ok_or(Errno::FAULT)?;
        let size = vma.end - uaddr;
        Ok(Fragment { size, memory: fragment(self, &vma, uaddr, size, true)? })
    }

    fn account(&self) -> &PinAccount {
        self.pin_account()
    }

    fn whole(&self) -> Option<GuestMemory> {
        Some(GuestMemory::from_private(self.clone(), 0, u64::MAX))
    }
}

/// The memory of `[uaddr, uaddr + size)`, which lies within `vma`.
fn fragment(space: &OwnerSpace, vma: &Vma, uaddr: u64, size: u64, write: bool) -> Result<GuestMemory, Errno> {
    if vma.shared {
        match object::map(space, vma, uaddr, size, write) {
            // Without free descriptors or mappings the request fails: copying instead would be slow for as long as it is mapped.
            Err(error) if error == Errno::NOMEM || error == errno::MFILE || error == errno::NFILE => {
                return Err(error);
            }
            Ok(Some(memory)) => return Ok(memory),
            Ok(None) | Err(_) => {}
        }
    }
    let memory = GuestMemory::from_private(space.clone(), uaddr, size);
    // Memory that only its process can read (memfd_secret, device memory) is refused now and not at the first use.
    memory.read(0, &mut [0]).map_err(|_| Errno::FAULT)?;
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmap::Prot;

    #[test]
    fn a_log_sets_the_bits_of_its_pages_and_no_others() {
        let fd = crate::memfd::create(c"log", 0x2000, None).unwrap();
        let map = SharedMap::map(&fd, 0, 0x2000, Prot::RW, false).unwrap();
        let file = Arc::new(ObjectFile::new(fd));
        // A log need not begin at a word.
        for start in [0, 8, 13, 0x1003] {
            let id = ObjectId { dev_major: 0, dev_minor: 0, inode: 0, created_ns: 0, offset: start };
            let memory = GuestMemory::from_object(Arc::clone(&file), id, 64, true).unwrap();
            let log = memory.bit_log().unwrap();
            assert_eq!(log.pages(), 512);
            for (first, last) in [
                (0, 0),
                (7, 8),
                (60, 70),
                (1, 511),
                (511, 511),
                (500, u64::MAX),
                (512, 600),
                (u64::MAX, u64::MAX),
            ] {
                map.write(0, &[0; 0x2000]).unwrap();
                log.set(first, last);
                let mut bytes = vec![0; 0x2000];
                map.read(0, &mut bytes).unwrap();
                let begin = usize::try_from(start).unwrap() * 8;
                for (bit, byte) in (0..bytes.len() * 8).map(|bit| (bit, bytes[bit / 8])) {
                    let page = bit.checked_sub(begin).map(|page| page as u64).filter(|page| *page < 512);
                    let wanted = page.is_some_and(|page| (first..=last).contains(&page));
                    assert_eq!(
                        byte >> (bit % 8) & 1 == 1,
                        wanted,
                        "bit {bit} of {first} to {last} from {start}"
                    );
                }
            }
        }
        let read_only = ObjectId { dev_major: 0, dev_minor: 0, inode: 0, created_ns: 0, offset: 0 };
        assert!(GuestMemory::from_object(file, read_only, 64, false).unwrap().bit_log().is_none());
    }
}
