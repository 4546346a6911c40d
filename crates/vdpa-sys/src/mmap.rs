//! Memory that devices and other processes write at the same time: shared mappings, and memory that others have mapped.
//!
//! There are no references into the memory: bytes are copied exactly once, or accessed by single atomic loads and stores.
#![expect(unsafe_code, reason = "memory shared with other processes is accessed through raw pointers")]

mod bits;
mod private;

use std::fmt;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, compiler_fence};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};
use vdpa_core::Errno;
use vdpa_core::ring::{Area, Fault};

use crate::dma;
use crate::errno;
use crate::sigbus::Registration;
use crate::stable::StableMemory;

pub use self::private::PrivateMap;

const HUGETLBFS_MAGIC: u64 = 0x958458f6;

/// Access to a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prot {
    /// Loads and copies out.
    pub read: bool,
    /// Stores and copies in.
    pub write: bool,
}

impl Prot {
    /// Read only.
    pub const RO: Self = Self { read: true, write: false };
    /// Read and write.
    pub const RW: Self = Self { read: true, write: true };
}

/// Memory that others may access at any time: a `MAP_SHARED` mapping of a piece of a file, or [memory of another
/// owner](Self::over). Clones share it; the last one unmaps it.
///
/// A device may be told its address as long as it exists; see [`VhostVdpaFd`](crate::vhost_vdpa::VhostVdpaFd).
#[derive(Clone, Debug)]
pub struct SharedMap(Arc<Mapped>);

#[derive(Debug)]
pub(crate) struct Mapped {
    addr: usize,
    /// Requested size in bytes.
    len: usize,
    prot: Prot,
    origin: Origin,
    /// Number in the list of memory that devices may write; 0 for one that is not listed.
    listed: u64,
}

/// Who has mapped the memory.
enum Origin {
    /// This module: `span` bytes, the requested size in whole pages of the file.
    Mapped { span: usize, guard: Option<Registration> },
    /// Somebody else, who keeps it while this value exists.
    Other(Arc<dyn StableMemory>),
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mapped { span, .. } => write!(f, "mapped {span}"),
            Self::Other(memory) => write!(f, "of another owner {}", memory.len()),
        }
    }
}

impl SharedMap {
    /// Maps `len` bytes of `fd` from `offset`, which is a multiple of the file's page size. With `populate` all
    /// pages are present when it returns, which takes 0.03 s (huge pages) to 30 s per TiB.
    ///
    /// Only for files that no other process can truncate: an access beyond the end of the file kills the process.
    ///
    /// # Errors
    /// Of mmap(2): `EACCES`, `EINVAL`, `ENODEV`, `ENOMEM`, `EPERM` (sealed); `EINVAL` for `len` 0.
    pub fn map(fd: impl AsFd, offset: u64, len: usize, prot: Prot, populate: bool) -> Result<Self, Errno> {
        Ok(Self::listed(Mapped::new(fd.as_fd(), offset, len, prot, populate)?))
    }

    /// As [`map`](Self::map), from any `offset`: maps the whole pages that have the bytes, and returns where in the mapping they begin.
    /// Nothing is populated.
    ///
    /// Of a file that others can truncate the caller must not access the bytes; a device that was told their address may.
    ///
    /// # Errors
    /// As [`map`](Self::map); `EINVAL` beyond 2^64.
    pub fn map_around(fd: impl AsFd, offset: u64, len: usize, prot: Prot) -> Result<(Self, usize), Errno> {
        let before = offset % page_size(fd.as_fd())? as u64;
        let start = usize::try_from(before).map_err(|_| Errno::INVAL)?;
        let len = len.checked_add(start).ok_or(Errno::INVAL)?;
        Ok((Self::map(fd, offset - before, len, prot, false)?, start))
    }

    /// Memory that somebody else has mapped readable and writable: of a machine monitor, for example.
    #[must_use]
    pub fn over(memory: Arc<dyn StableMemory>) -> Self {
        Self::over_as(memory, Prot::RW)
    }

    pub(crate) fn over_as(memory: Arc<dyn StableMemory>, prot: Prot) -> Self {
        let (addr, len) = (memory.base(), memory.len());
        Self::listed(Mapped { addr, len, prot, origin: Origin::Other(memory), listed: 0 })
    }

    /// Memory by its address, for programs whose memory has no type of this project.
    ///
    /// # Safety
    /// As long as this value or a clone exists, and until every device that was told the address has unmapped it or is closed,
    /// `len` bytes from `addr` stay mapped, readable and writable, and no reference of Rust to any of them exists: devices
    /// and other processes change them at any time.
    #[must_use]
    pub unsafe fn from_raw_parts(addr: usize, len: usize) -> Self {
        Self::over(Arc::new(Raw { addr, len }))
    }

    /// Lists the mapping, so that a device may be told its address.
    fn listed(mut mapped: Mapped) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        mapped.listed = number;
        let addr = mapped.addr;
        let map = Self(Arc::new(mapped));
        dma::list(addr, number, Arc::downgrade(&map.0));
        map
    }

    pub(crate) const fn from_mapped(mapped: Arc<Mapped>) -> Self {
        Self(mapped)
    }

    /// As [`map`](Self::map), for a file that a client can truncate: accesses beyond its end read zeros and report
    /// [`Fault`], and the mapping is [`poisoned`](Self::poisoned) from then on. For servers of devices; a device cannot be told
    /// the address of such a mapping, unless it is given to [`over`](Self::over).
    ///
    /// # Errors
    /// As [`map`](Self::map); also `ENOMEM` when too many such mappings exist.
    pub fn map_guest(
        fd: impl AsFd,
        offset: u64,
        len: usize,
        prot: Prot,
        populate: bool,
    ) -> Result<Self, Errno> {
        let page = page_size(fd.as_fd())?;
        let mut mapped = Mapped::new(fd.as_fd(), offset, len, prot, populate)?;
        if let Origin::Mapped { span, guard } = &mut mapped.origin {
            *guard = Some(Registration::new(mapped.addr, *span, page, prot)?);
        }
        Ok(Self(Arc::new(mapped)))
    }

    /// Address of the first byte in this process.
    #[must_use]
    pub fn addr(&self) -> usize {
        self.0.addr
    }

    /// Size in bytes, at least 1.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Access it was mapped with.
    #[must_use]
    pub fn prot(&self) -> Prot {
        self.0.prot
    }

    /// Whether an access has hit a page without memory since the mapping was created. Never cleared.
    #[must_use]
    #[inline]
    pub fn poisoned(&self) -> bool {
        match &self.0.origin {
            Origin::Mapped { guard, .. } => guard.as_ref().is_some_and(Registration::poisoned),
            Origin::Other(_) => false,
        }
    }

    /// Populates all pages, writable if the mapping is (`MADV_POPULATE_WRITE`, Linux 5.14). Blocks as
    /// [`map`](Self::map) does.
    ///
    /// # Errors
    /// `ENOMEM`, `EFAULT` or `EHWPOISON` when a page has no memory; `EINVAL` on old kernels.
    pub fn populate(&self) -> Result<(), Errno> {
        self.populate_part(0, self.0.len)
    }

    /// As [`populate`](Self::populate), the pages of `len` bytes from `offset`.
    pub(crate) fn populate_part(&self, offset: usize, len: usize) -> Result<(), Errno> {
        let advice = if self.0.prot.write { Advice::LinuxPopulateWrite } else { Advice::LinuxPopulateRead };
        let before = (self.0.addr + offset) % rustix::param::page_size();
        self.advise(offset.checked_sub(before).ok_or(Errno::INVAL)?, before + len, advice)
    }

    /// Excludes `len` bytes from `offset` from core dumps (`MADV_DONTDUMP`). The kernel splits the mapping there.
    ///
    /// # Errors
    /// `EINVAL` unless both are whole pages within the mapping.
    pub fn leave_out_of_dumps(&self, offset: usize, len: usize) -> Result<(), Errno> {
        self.advise(offset, len, Advice::LinuxDontDump)
    }

    fn advise(&self, offset: usize, len: usize, advice: Advice) -> Result<(), Errno> {
        let start = self.0.check(offset, len).map_err(|_| Errno::INVAL).map(|()| self.0.addr + offset)?;
        // SAFETY: the range lies within the mapping that `self` keeps alive (the kernel refuses one that begins in a page), and
        // none of the callers' advices, to populate and to leave out of dumps, changes bytes or access.
        unsafe { madvise(ptr::with_exposed_provenance_mut(start), len, advice) }.map_err(errno::from_rustix)
    }

    /// A part of the mapping, which keeps the whole mapping alive.
    ///
    /// # Errors
    /// [`Fault`] when it does not lie within the mapping.
    pub fn area(&self, offset: usize, len: usize) -> Result<MapArea, Fault> {
        self.0.check(offset, len)?;
        Ok(MapArea { map: self.clone(), offset, len })
    }

    /// Copies `buf.len()` bytes from `offset` into `buf`.
    ///
    /// # Errors
    /// [`Fault`] beyond the end, for a mapping that is not readable, or one that is poisoned.
    #[inline]
    pub fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Fault> {
        let from: *mut u8 = self.0.readable(offset, buf.len())?;
        compiler_fence(Ordering::SeqCst);
        // SAFETY: `readable` checked that `buf.len()` bytes from `from` lie in the mapping, which `self` keeps;
        // `buf` is ours alone, so they do not overlap. Other processes may change the source meanwhile: any
        // bytes are valid, and the fences keep the compiler from reading them again later.
        unsafe { ptr::copy_nonoverlapping(from.cast_const(), buf.as_mut_ptr(), buf.len()) };
        self.sound(offset)
    }

    /// Copies `data` to `offset`.
    ///
    /// # Errors
    /// [`Fault`] beyond the end, for a mapping that is not writable, or one that is poisoned.
    #[inline]
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<(), Fault> {
        let to: *mut u8 = self.0.writable(offset, data.len())?;
        compiler_fence(Ordering::SeqCst);
        // SAFETY: `writable` checked that `data.len()` bytes from `to` lie in the mapping, which `self` keeps;
        // `data` is a reference and the mapping is never behind one, so they do not overlap.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        self.sound(offset)
    }

    #[inline]
    fn sound(&self, offset: usize) -> Result<(), Fault> {
        // The flag is set by a signal handler on this very thread, so the processor keeps the order by itself;
        // the compiler must not look at it before the access.
        compiler_fence(Ordering::SeqCst);
        if self.poisoned() { Err(fault(offset)) } else { Ok(()) }
    }
}

// SAFETY: the mapping stays where it is until the last clone is dropped, and a reference to its bytes is never
// made: all access goes through raw copies and atomics. One without PROT_WRITE is the exception the trait allows.
unsafe impl StableMemory for SharedMap {
    fn base(&self) -> usize {
        self.addr()
    }

    fn len(&self) -> usize {
        Self::len(self)
    }
}

/// What [`SharedMap::from_raw_parts`] was given.
struct Raw {
    addr: usize,
    len: usize,
}

// SAFETY: the caller of `from_raw_parts` has promised it.
unsafe impl StableMemory for Raw {
    fn base(&self) -> usize {
        self.addr
    }

    fn len(&self) -> usize {
        self.len
    }
}

impl From<PrivateMap> for SharedMap {
    fn from(memory: PrivateMap) -> Self {
        Self::over(Arc::new(memory))
    }
}

macro_rules! atomics {
    ($($load:ident, $store:ident, $int:ty, $atomic:ty;)*) => {
        impl SharedMap {
            $(
                #[doc = concat!("Loads a little-endian ", stringify!($int), ", with acquire ordering.")]
                ///
                /// # Errors
                /// [`Fault`] as [`read`](Self::read), and for an address that is not aligned.
                #[inline]
                pub fn $load(&self, offset: usize) -> Result<$int, Fault> {
                    let at: *mut $int = self.0.readable(offset, size_of::<$int>())?;
                    if !at.is_aligned() {
                        return Err(fault(offset));
                    }
                    // SAFETY: `readable` checked that the bytes lie in the mapping, which `self` keeps, and they
                    // are aligned. Nothing in this process holds a reference to them; what other processes or
                    // copies do to them at the same time is as any concurrent store.
                    let value = unsafe { <$atomic>::from_ptr(at) }.load(Ordering::Acquire);
                    self.sound(offset)?;
                    Ok(<$int>::from_le(value))
                }

                #[doc = concat!("Stores a little-endian ", stringify!($int), ", with release ordering.")]
                ///
                /// # Errors
                /// [`Fault`] as [`write`](Self::write), and for an address that is not aligned.
                #[inline]
                pub fn $store(&self, offset: usize, value: $int) -> Result<(), Fault> {
                    let at: *mut $int = self.0.writable(offset, size_of::<$int>())?;
                    if !at.is_aligned() {
                        return Err(fault(offset));
                    }
                    // SAFETY: as for the load, with `writable`.
                    unsafe { <$atomic>::from_ptr(at) }.store(value.to_le(), Ordering::Release);
                    self.sound(offset)
                }
            )*
        }
    };
}

atomics! {
    load_u16, store_u16, u16, AtomicU16;
    load_u32, store_u32, u32, AtomicU32;
    load_u64, store_u64, u64, AtomicU64;
}

impl Mapped {
    fn new(
        fd: std::os::fd::BorrowedFd<'_>,
        offset: u64,
        len: usize,
        prot: Prot,
        populate: bool,
    ) -> Result<Self, Errno> {
        let span = len.checked_next_multiple_of(page_size(fd)?).ok_or(Errno::INVAL)?;
        let mut flags = ProtFlags::empty();
        flags.set(ProtFlags::READ, prot.read);
        flags.set(ProtFlags::WRITE, prot.write);
        let populate = if populate { MapFlags::POPULATE } else { MapFlags::empty() };
        // SAFETY: without a wanted address the kernel picks one that is free, so nothing in use is replaced.
        let addr = unsafe { mmap(ptr::null_mut(), span, flags, MapFlags::SHARED | populate, fd, offset) }
            .map_err(errno::from_rustix)?;
        let origin = Origin::Mapped { span, guard: None };
        Ok(Self { addr: addr.expose_provenance(), len, prot, origin, listed: 0 })
    }

    #[inline]
    fn check(&self, offset: usize, len: usize) -> Result<(), Fault> {
        if offset <= self.len && len <= self.len - offset { Ok(()) } else { Err(fault(offset)) }
    }

    #[inline]
    fn readable<T>(&self, offset: usize, len: usize) -> Result<*mut T, Fault> {
        self.check(offset, len)?;
        if self.prot.read {
            Ok(ptr::with_exposed_provenance_mut(self.addr + offset))
        } else {
            Err(fault(offset))
        }
    }

    #[inline]
    fn writable<T>(&self, offset: usize, len: usize) -> Result<*mut T, Fault> {
        self.check(offset, len)?;
        if self.prot.write {
            Ok(ptr::with_exposed_provenance_mut(self.addr + offset))
        } else {
            Err(fault(offset))
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if self.listed != 0 {
            dma::remove(self.addr, self.listed);
        }
        let Origin::Mapped { span, guard } = &mut self.origin else { return };
        // Removed from the table before the kernel can reuse the addresses.
        *guard = None;
        // SAFETY: the range was mapped by `new`, and nobody can access it any more: every access and every
        // area holds the Arc that is being dropped.
        let result = unsafe { munmap(ptr::with_exposed_provenance_mut(self.addr), *span) };
        debug_assert!(result.is_ok(), "unmapping what was mapped succeeds: {result:?}");
    }
}

/// Page size of a file in bytes: that of its file system for huge pages, else that of the machine.
pub(crate) fn page_size(fd: std::os::fd::BorrowedFd<'_>) -> Result<usize, Errno> {
    let stat = rustix::fs::fstatfs(fd).map_err(errno::from_rustix)?;
    if u64::try_from(stat.f_type).is_ok_and(|kind| kind == HUGETLBFS_MAGIC) {
        usize::try_from(stat.f_bsize).map_err(|_| Errno::INVAL)
    } else {
        Ok(rustix::param::page_size())
    }
}

#[cold]
fn fault(offset: usize) -> Fault {
    Fault { addr: offset as u64 }
}

/// A part of a [`SharedMap`], for ring accesses. Offsets are relative to its start.
#[derive(Clone, Debug)]
pub struct MapArea {
    map: SharedMap,
    offset: usize,
    len: usize,
}

impl MapArea {
    #[inline]
    fn at(&self, offset: usize, len: usize) -> Result<usize, Fault> {
        if offset <= self.len && len <= self.len - offset {
            Ok(self.offset + offset)
        } else {
            Err(fault(offset))
        }
    }
}

impl Area for MapArea {
    #[inline]
    fn size(&self) -> usize {
        self.len
    }

    #[inline]
    fn load_u16(&self, offset: usize) -> Result<u16, Fault> {
        self.map.load_u16(self.at(offset, 2)?).map_err(|_| fault(offset))
    }

    #[inline]
    fn store_u16(&self, offset: usize, value: u16) -> Result<(), Fault> {
        self.map.store_u16(self.at(offset, 2)?, value).map_err(|_| fault(offset))
    }

    #[inline]
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Fault> {
        self.map.read(self.at(offset, buf.len())?, buf).map_err(|_| fault(offset))
    }

    #[inline]
    fn write(&self, offset: usize, data: &[u8]) -> Result<(), Fault> {
        self.map.write(self.at(offset, data.len())?, data).map_err(|_| fault(offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_of_a_file_see_the_same_bytes() {
        let fd = crate::memfd::create(c"map", 8192, None).unwrap();
        let writer = SharedMap::map(&fd, 0, 8192, Prot::RW, true).unwrap();
        let reader = SharedMap::map(&fd, 4096, 100, Prot::RO, false).unwrap();
        writer.write(4096, b"hello").unwrap();
        let mut bytes = [0; 5];
        reader.read(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
        writer.store_u64(4096, 0x0102_0304_0506_0708).unwrap();
        assert_eq!(reader.load_u16(0), Ok(0x0708));
        assert_eq!(reader.load_u32(4), Ok(0x0102_0304));
        writer.populate().unwrap();
        reader.populate().unwrap();
    }

    #[test]
    fn a_range_left_out_of_dumps_becomes_a_separate_mapping() {
        let fd = crate::memfd::create(c"map", 8192, None).unwrap();
        let map = SharedMap::map(&fd, 0, 8192, Prot::RW, false).unwrap();
        let line = format!("{:x}-", map.addr() + 4096);
        let split =
            || std::fs::read_to_string("/proc/self/maps").unwrap().lines().any(|l| l.starts_with(&line));
        assert!(!split());
        assert_eq!(map.leave_out_of_dumps(4096, 8192), Err(Errno::INVAL));
        map.leave_out_of_dumps(4096, 4096).unwrap();
        assert!(split());
        map.write(4096, &[1]).unwrap();
    }

    #[test]
    fn bounds_rights_and_alignment_are_checked() {
        let fd = crate::memfd::create(c"map", 4096, None).unwrap();
        let map = SharedMap::map(&fd, 0, 100, Prot::RO, false).unwrap();
        assert_eq!(map.write(0, &[1]), Err(Fault { addr: 0 }));
        assert_eq!(map.read(99, &mut [0; 2]), Err(Fault { addr: 99 }));
        assert_eq!(map.read(usize::MAX, &mut [0; 2]), Err(Fault { addr: u64::MAX }));
        assert_eq!(map.read(100, &mut []), Ok(()));
        assert_eq!(map.load_u16(1), Err(Fault { addr: 1 }));
        assert!(map.area(50, 51).is_err());
        let area = map.area(50, 50).unwrap();
        assert_eq!((area.load_u16(48), area.load_u16(50)), (Ok(0), Err(Fault { addr: 50 })));
        assert_eq!(SharedMap::map(&fd, 0, 0, Prot::RO, false).unwrap_err(), Errno::INVAL);
    }
}
