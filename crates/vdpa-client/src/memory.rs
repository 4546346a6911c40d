//! Memory for devices: objects that outlive a program image. Each is mapped once, however many devices use it.
//!
//! ```
//! use vdpa_client::memory::Memory;
//! use vdpa_sys::memfd;
//!
//! # fn main() -> Result<(), vdpa_client::Error> {
//! let fd = memfd::create(c"guest", 0x20_0000, None).map_err(|source| vdpa_client::Error::Request {
//!     request: "memfd_create",
//!     source,
//! })?;
//! let memory = Memory::map("guest", fd, 0, 0x20_0000, false)?;
//! assert!(memory.survives() && memory.size() == 0x20_0000);
//! # Ok(())
//! # }
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use vdpa_core::Errno;
use vdpa_sys::maps;
use vdpa_sys::mmap::{PrivateMap, Prot, SharedMap};

use crate::error::{Error, MemoryProblem, RegionProblem};

/// A piece of memory of this process, to be mapped for any number of devices.
///
/// Shared by [`Arc`]. An update carries it over once, and in the next image all its devices share it again. It owns its mapping,
/// so a device that writes it cannot write anything else: an address alone is not memory.
#[derive(Debug)]
pub struct Memory {
    name: String,
    size: u64,
    /// The object and the offset in it; `None` for memory that ends with this process.
    object: Option<(OwnedFd, u64)>,
    /// Empty only in a successor that has not begun to take over.
    mapped: OnceLock<Mapped>,
}

#[derive(Debug)]
struct Mapped {
    map: SharedMap,
    /// Whether the caller has mapped it, so that it may be of another object.
    by_caller: bool,
}

impl Memory {
    /// Maps `size` bytes of a memory object (memfd, hugetlb memfd, file of a tmpfs or of a disk) from byte `offset` on,
    /// shared and for reading and writing. With `populate` all pages are allocated and mapped at once, so that no later
    /// access faults; that takes about 0.1 s for each GiB.
    ///
    /// `offset` and `size` are multiples of the object's page size (2 MiB or 1 GiB for hugetlb).
    ///
    /// # Errors
    /// [`Error::Region`] when the object is shorter; [`Error::Request`] with the errno of mmap(2).
    pub fn map(name: &str, fd: OwnedFd, offset: u64, size: u64, populate: bool) -> Result<Arc<Self>, Error> {
        let memory = Self::unmapped(name, fd, offset, size)?;
        memory.map_here(populate)?;
        Ok(memory)
    }

    /// Memory of an object that the caller has mapped shared, from byte `offset` of the object on. For programs that map guest
    /// memory themselves; see [`SharedMap::over`]. The next image receives the object.
    ///
    /// Whether it is that object is checked when an update is prepared, not here.
    ///
    /// # Errors
    /// [`Error::Region`] when the object is shorter.
    pub fn from_mapping(
        name: &str,
        fd: OwnedFd,
        offset: u64,
        map: impl Into<SharedMap>,
    ) -> Result<Arc<Self>, Error> {
        let map = map.into();
        checked_len(name, fd.as_fd(), offset, map.len() as u64)?;
        Ok(Self::of_caller(name, Some((fd, offset)), map))
    }

    /// Guest memory of the crate `vm-memory`: a region that was mapped shared from a file.
    ///
    /// # Errors
    /// [`Error::Region`] when the region has no file, so that it would end with this program.
    #[cfg(feature = "vm-memory")]
    pub fn from_guest_region<B: vm_memory::bitmap::Bitmap + Send + Sync + 'static>(
        name: &str,
        region: &vm_memory::GuestRegionMmap<B>,
    ) -> Result<Arc<Self>, Error> {
        let mapping = region.get_mmap();
        let problem = |problem| Error::Region { name: name.to_owned(), problem };
        let file = mapping.file_offset().ok_or_else(|| problem(RegionProblem::NoFile))?;
        let fd = file.file().as_fd().try_clone_to_owned().map_err(|e| Error::Request {
            request: "dup of a memory object",
            source: Errno::from_raw(e.raw_os_error().unwrap_or(0)),
        })?;
        Self::from_mapping(name, fd, file.start(), SharedMap::from(mapping))
    }

    /// `size` bytes of memory without an object. It ends with the program, so a session that uses it cannot be updated.
    ///
    /// # Errors
    /// [`Error::Request`] with the errno of mmap(2).
    pub fn anonymous(name: &str, size: u64) -> Result<Arc<Self>, Error> {
        let request = Error::request("mmap of private memory");
        let len = usize::try_from(size).map_err(|_| request(Errno::INVAL))?;
        Ok(Self::of_caller(name, None, PrivateMap::new(len).map_err(request)?.into()))
    }

    /// Memory of the caller without an object. It ends with the program, so a session that uses it cannot be updated.
    #[must_use]
    pub fn private(name: &str, map: impl Into<SharedMap>) -> Arc<Self> {
        Self::of_caller(name, None, map.into())
    }

    fn of_caller(name: &str, object: Option<(OwnedFd, u64)>, map: SharedMap) -> Arc<Self> {
        let size = map.len() as u64;
        let mapped = OnceLock::from(Mapped { map, by_caller: true });
        Arc::new(Self { name: name.to_owned(), size, object, mapped })
    }

    /// Memory that is not mapped yet.
    pub(crate) fn unmapped(name: &str, fd: OwnedFd, offset: u64, size: u64) -> Result<Arc<Self>, Error> {
        checked_len(name, fd.as_fd(), offset, size)?;
        let (name, object, mapped) = (name.to_owned(), Some((fd, offset)), OnceLock::new());
        Ok(Arc::new(Self { name, size, object, mapped }))
    }

    /// Maps it, unless it is mapped.
    pub(crate) fn map_here(&self, populate: bool) -> Result<(), Error> {
        let Some((fd, offset)) = self.object.as_ref().filter(|_| self.mapped.get().is_none()) else {
            return Ok(());
        };
        let len = usize::try_from(self.size).unwrap_or(usize::MAX);
        let map = SharedMap::map(fd, *offset, len, Prot::RW, populate)
            .map_err(Error::request("mmap of a memory object"))?;
        // If another thread was faster, its mapping is used and this one goes.
        let _ = self.mapped.set(Mapped { map, by_caller: false });
        Ok(())
    }

    /// Takes `map` as the mapping of this memory in a successor, which has not mapped it yet
    /// ([`Incoming::memories`](crate::update::Incoming::memories)). So a program that maps guest memory itself has it mapped once.
    ///
    /// # Errors
    /// [`MemoryProblem`] when it is not the same object at the same offset in the same size, or is mapped already.
    pub fn bring(&self, map: impl Into<SharedMap>) -> Result<(), MemoryProblem> {
        let map = map.into();
        if map.len() as u64 != self.size {
            return Err(MemoryProblem::Size { mapped: map.len() as u64, size: self.size });
        }
        self.verify_map(&map)?;
        self.mapped.set(Mapped { map, by_caller: true }).map_err(|_| MemoryProblem::Mapped)
    }

    /// Name of the memory, for errors and reports.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Virtual address of the memory in this process; 0 in a successor that has not mapped it yet.
    #[must_use]
    pub fn uaddr(&self) -> u64 {
        self.as_map().map_or(0, |map| map.addr() as u64)
    }

    /// The object, and the offset of this memory in it in bytes; `None` for memory without an object.
    #[must_use]
    pub fn object(&self) -> Option<(BorrowedFd<'_>, u64)> {
        self.object.as_ref().map(|(fd, offset)| (fd.as_fd(), *offset))
    }

    /// The memory in this process; `None` in a successor that has not mapped it yet.
    #[must_use]
    pub fn as_map(&self) -> Option<&SharedMap> {
        self.mapped.get().map(|mapped| &mapped.map)
    }

    /// Whether it has an object that outlives this program.
    #[must_use]
    pub const fn survives(&self) -> bool {
        self.object.is_some()
    }

    /// Whether both are the same part of one object.
    pub(crate) fn is_same_object(&self, other: &Self) -> bool {
        match (self.object(), other.object()) {
            (Some((fd, offset)), Some((other_fd, other_offset))) => {
                (offset, self.size) == (other_offset, other.size) && is_same_file(fd, other_fd)
            }
            _ => false,
        }
    }

    /// Whether byte `offset` of this memory and byte `other_offset` of the other one are the same byte.
    pub(crate) fn is_same_byte(&self, offset: u64, other: &Self, other_offset: u64) -> bool {
        if std::ptr::eq(self, other) {
            return offset == other_offset;
        }
        match (self.object(), other.object()) {
            (Some((fd, start)), Some((other_fd, other_start))) => {
                start.checked_add(offset) == other_start.checked_add(other_offset)
                    && is_same_file(fd, other_fd)
            }
            (None, None) => self.uaddr().checked_add(offset) == other.uaddr().checked_add(other_offset),
            _ => false,
        }
    }

    /// Checks that the caller has mapped this object, shared, at this offset. Otherwise the next image would see other bytes
    /// than the device. Maps the object once without touching a page, and looks up each mapping (VMA) of the range.
    pub(crate) fn verify(&self) -> Result<(), MemoryProblem> {
        match self.mapped.get() {
            _ if self.object.is_none() => Err(MemoryProblem::Private),
            Some(mapped) if mapped.by_caller => self.verify_map(&mapped.map),
            _ => Ok(()),
        }
    }

    fn verify_map(&self, map: &SharedMap) -> Result<(), MemoryProblem> {
        let Some((fd, offset)) = &self.object else { return Err(MemoryProblem::Private) };
        let uaddr = map.addr() as u64;
        let unreadable = |source| MemoryProblem::Unreadable { source };
        let maps = maps::own().map_err(unreadable)?;
        // Take device number and inode of the object from the same table: on some file systems stat(2) reports another
        // device number. The inode alone is not enough, since two file systems may use the same one.
        let len = usize::try_from(self.size).map_err(|_| unreadable(Errno::INVAL))?;
        let probe = SharedMap::map(fd, *offset, len, Prot::RO, false).map_err(unreadable)?;
        let object = maps::vma_at(&maps, probe.addr() as u64).map_err(unreadable)?;
        let object = object.map(|vma| (vma.dev, vma.inode)).ok_or(unreadable(Errno::IO))?;
        let end = uaddr.saturating_add(self.size);
        let mut at = uaddr;
        while at < end {
            let vma =
                maps::vma_at(&maps, at).map_err(unreadable)?.ok_or(MemoryProblem::Hole { uaddr: at })?;
            if !vma.shared || (vma.dev, vma.inode) != object {
                return Err(if vma.shared {
                    MemoryProblem::Other { uaddr: at }
                } else {
                    MemoryProblem::Private
                });
            }
            if vma.offset.saturating_add(at - vma.start) != offset.saturating_add(at - uaddr) {
                return Err(MemoryProblem::Other { uaddr: at });
            }
            at = vma.end;
        }
        Ok(())
    }
}

fn is_same_file(file: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    let inode = |fd| rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).ok();
    inode(file).is_some_and(|own| Some(own) == inode(other))
}

fn checked_len(name: &str, fd: BorrowedFd<'_>, offset: u64, size: u64) -> Result<usize, Error> {
    let object = rustix::fs::fstat(fd)
        .map_err(|e| Error::Request {
            request: "fstat of a memory object",
            source: Errno::from_raw(e.raw_os_error()),
        })?
        .st_size;
    let object = u64::try_from(object).unwrap_or(0);
    let short =
        || Error::Region { name: name.to_owned(), problem: RegionProblem::Short { offset, size, object } };
    match offset.checked_add(size) {
        Some(end) if end <= object => usize::try_from(size).map_err(|_| short()),
        _ => Err(short()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vdpa_sys::memfd;

    #[test]
    fn an_object_is_mapped_from_its_offset() {
        let fd = memfd::create(c"object", 0x4000, None).unwrap();
        rustix::io::pwrite(&fd, b"here", 0x2000).unwrap();
        let memory = Memory::map("object", fd, 0x2000, 0x2000, true).unwrap();
        let mut bytes = [0; 4];
        memory.as_map().unwrap().read(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"here");
        assert_eq!(memory.object().unwrap().1, 0x2000);
        memory.verify().unwrap();
        let fd = memfd::create(c"short", 0x2000, None).unwrap();
        let error = Memory::map("short", fd, 0x1000, 0x2000, false).unwrap_err().to_string();
        assert!(
            error.contains("has 8192 bytes from byte 4096 of its memory object on, which has only 8192"),
            "{error}"
        );
    }

    #[test]
    fn what_the_caller_has_mapped_must_be_the_object() {
        let fd = memfd::create(c"placed", 0x4000, None).unwrap();
        let map = SharedMap::map(&fd, 0x1000, 0x3000, Prot::RW, false).unwrap();
        let placed = |offset, map: SharedMap| {
            Memory::from_mapping("placed", fd.try_clone().unwrap(), offset, map).unwrap().verify()
        };
        let uaddr = map.addr() as u64;
        assert_eq!(placed(0x1000, map.clone()), Ok(()));
        assert_eq!(placed(0, map), Err(MemoryProblem::Other { uaddr }));
        assert_eq!(placed(0, PrivateMap::new(0x3000).unwrap().into()), Err(MemoryProblem::Private));
        assert_eq!(Memory::anonymous("heap", 0x1000).unwrap().verify(), Err(MemoryProblem::Private));
    }

    #[test]
    fn a_mapping_is_brought_once_and_must_be_of_the_object() {
        let fd = memfd::create(c"brought", 0x4000, None).unwrap();
        let map = |len| SharedMap::map(&fd, 0, len, Prot::RW, false).unwrap();
        let memory = Memory::unmapped("ram", fd.try_clone().unwrap(), 0, 0x4000).unwrap();
        assert_eq!(memory.uaddr(), 0);
        assert_eq!(memory.bring(map(0x3000)), Err(MemoryProblem::Size { mapped: 0x3000, size: 0x4000 }));
        let private = PrivateMap::new(0x4000).unwrap();
        assert_eq!(memory.bring(private), Err(MemoryProblem::Private));
        let own = map(0x4000);
        assert_eq!(memory.bring(own.clone()), Ok(()));
        memory.map_here(false).unwrap();
        assert_eq!(memory.uaddr(), own.addr() as u64, "it is not mapped a second time");
        assert_eq!(memory.bring(own), Err(MemoryProblem::Mapped));
    }

    /// The first file of a tmpfs of its own, which nobody else sees. Needs root.
    fn first_file() -> OwnedFd {
        use rustix::fs::{Mode, OFlags, ftruncate, openat};
        use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
        let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        fsconfig_create(&tmpfs).unwrap();
        let root = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
        let file = openat(root, "ram", OFlags::CREATE | OFlags::RDWR, Mode::RUSR | Mode::WUSR).unwrap();
        ftruncate(&file, 0x2000).unwrap();
        file
    }

    #[test]
    fn a_file_of_another_file_system_is_another_object() {
        let (mapped, other) = (first_file(), first_file());
        let inode = |file: &OwnedFd| rustix::fs::fstat(file).unwrap().st_ino;
        assert_eq!(inode(&mapped), inode(&other), "by its number it is the same one");
        let map = SharedMap::map(&mapped, 0, 0x2000, Prot::RW, false).unwrap();
        let uaddr = map.addr() as u64;
        let placed = |file: &OwnedFd| {
            Memory::from_mapping("placed", file.try_clone().unwrap(), 0, map.clone()).unwrap().verify()
        };
        assert_eq!(placed(&mapped), Ok(()));
        assert_eq!(placed(&other), Err(MemoryProblem::Other { uaddr }));
    }
}
