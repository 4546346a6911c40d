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
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_sys::maps;
use vdpa_sys::mmap::{Prot, SharedMap};

use crate::error::{Error, MemoryProblem, RegionProblem};

/// A piece of memory of this process, to be mapped for any number of devices.
///
/// Shared by [`Arc`]. An update carries it over once, and in the next image all its devices share it again.
#[derive(Debug)]
pub struct Memory {
    name: String,
    size: u64,
    backing: Backed,
}

#[derive(Debug)]
enum Backed {
    /// Mapped by this library.
    Library { fd: OwnedFd, offset: u64, map: SharedMap },
    /// An object mapped by the caller, who keeps it mapped.
    Caller { fd: OwnedFd, offset: u64, uaddr: u64 },
    /// Without an object: it exists in this address space only.
    Anonymous { uaddr: u64 },
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
        let len = checked_len(name, fd.as_fd(), offset, size)?;
        let map = SharedMap::map(&fd, offset, len, Prot::RW, populate)
            .map_err(Error::request("mmap of a memory object"))?;
        Ok(Arc::new(Self { name: name.to_owned(), size, backing: Backed::Library { fd, offset, map } }))
    }

    /// Memory of an object that the caller has mapped shared at `uaddr` and keeps mapped as long as this value lives. For
    /// programs that map guest memory themselves. The next image receives the object and this library maps it there.
    ///
    /// The mapping is checked when an update is prepared, not here.
    ///
    /// # Errors
    /// [`Error::Region`] when the object is shorter.
    pub fn from_mapping(
        name: &str,
        fd: OwnedFd,
        offset: u64,
        size: u64,
        uaddr: u64,
    ) -> Result<Arc<Self>, Error> {
        checked_len(name, fd.as_fd(), offset, size)?;
        Ok(Arc::new(Self { name: name.to_owned(), size, backing: Backed::Caller { fd, offset, uaddr } }))
    }

    /// Memory without an object, at `uaddr`. It ends with the program, so a session that uses it cannot be updated.
    #[must_use]
    pub fn anonymous(name: &str, uaddr: u64, size: u64) -> Arc<Self> {
        Arc::new(Self { name: name.to_owned(), size, backing: Backed::Anonymous { uaddr } })
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

    /// Virtual address of the memory in this process.
    #[must_use]
    pub fn uaddr(&self) -> u64 {
        match &self.backing {
            Backed::Library { map, .. } => map.addr() as u64,
            Backed::Caller { uaddr, .. } | Backed::Anonymous { uaddr } => *uaddr,
        }
    }

    /// The object, and the offset of this memory in it in bytes; `None` for memory without an object.
    #[must_use]
    pub fn object(&self) -> Option<(BorrowedFd<'_>, u64)> {
        match &self.backing {
            Backed::Library { fd, offset, .. } | Backed::Caller { fd, offset, .. } => {
                Some((fd.as_fd(), *offset))
            }
            Backed::Anonymous { .. } => None,
        }
    }

    /// The memory in this process, if this library has mapped it.
    #[must_use]
    pub const fn as_map(&self) -> Option<&SharedMap> {
        match &self.backing {
            Backed::Library { map, .. } => Some(map),
            Backed::Caller { .. } | Backed::Anonymous { .. } => None,
        }
    }

    /// Whether it has an object that outlives this program.
    #[must_use]
    pub const fn survives(&self) -> bool {
        !matches!(self.backing, Backed::Anonymous { .. })
    }

    /// Checks that the caller has mapped this object, shared, at this offset. Otherwise the next image would see other bytes
    /// than the device. Maps the object once without touching a page, and looks up each mapping (VMA) of the range.
    pub(crate) fn verify(&self) -> Result<(), MemoryProblem> {
        let Backed::Caller { fd, offset, uaddr } = &self.backing else {
            return if self.survives() { Ok(()) } else { Err(MemoryProblem::Private) };
        };
        let unreadable = |source| MemoryProblem::Unreadable { source };
        let maps = maps::own().map_err(unreadable)?;
        // Take device number and inode of the object from the same table: on some file systems stat(2) reports another
        // device number. The inode alone is not enough, since two file systems may use the same one.
        let len = usize::try_from(self.size).map_err(|_| unreadable(Errno::INVAL))?;
        let probe = SharedMap::map(fd, *offset, len, Prot::RO, false).map_err(unreadable)?;
        let object = maps::vma_at(&maps, probe.addr() as u64).map_err(unreadable)?;
        let object = object.map(|vma| (vma.dev, vma.inode)).ok_or(unreadable(Errno::IO))?;
        let end = uaddr.saturating_add(self.size);
        let mut at = *uaddr;
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
        let placed = |offset, uaddr| {
            Memory::from_mapping("placed", fd.try_clone().unwrap(), offset, 0x3000, uaddr).unwrap().verify()
        };
        let uaddr = map.addr() as u64;
        assert_eq!(placed(0x1000, uaddr), Ok(()));
        assert_eq!(placed(0, uaddr), Err(MemoryProblem::Other { uaddr }));
        let heap = vec![0_u8; 0x8000].leak();
        let private = placed(0, (heap.as_ptr() as u64).next_multiple_of(0x1000));
        assert_eq!(private, Err(MemoryProblem::Private));
        assert_eq!(placed(0, 0x1000), Err(MemoryProblem::Hole { uaddr: 0x1000 }));
        assert_eq!(Memory::anonymous("heap", uaddr, 0x1000).verify(), Err(MemoryProblem::Private));
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
            Memory::from_mapping("placed", file.try_clone().unwrap(), 0, 0x2000, uaddr).unwrap().verify()
        };
        assert_eq!(placed(&mapped), Ok(()));
        assert_eq!(placed(&other), Err(MemoryProblem::Other { uaddr }));
    }
}
