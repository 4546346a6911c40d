//! Memory that the kernel may access while a request is in flight.
#![expect(unsafe_code, reason = "the kernel reads and writes memory of others while requests are in flight")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::iotlb::Tree;

pub use crate::stable::StableMemory;

/// A range of memory by address in this process; laid out as `struct iovec`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoVec {
    /// First byte.
    pub addr: usize,
    /// Bytes.
    pub len: usize,
}

const _: () = assert!(size_of::<IoVec>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<IoVec>() == align_of::<libc::iovec>());
const _: () = assert!(std::mem::offset_of!(IoVec, len) == std::mem::offset_of!(libc::iovec, iov_len));

/// Mappings that are kept alive together, such as those of one snapshot of an IOTLB. A request keeps all of them by one
/// clone of an `Arc`. Sets that differ in a few mappings share the rest.
#[derive(Clone, Default)]
pub struct MemorySet {
    /// By base. Mappings do not overlap, since each is mapped.
    regions: Tree<Region>,
}

#[derive(Clone)]
struct Region {
    last: usize,
    memory: Arc<dyn StableMemory>,
}

impl MemorySet {
    /// Creates a set of mappings, without empty ones. A mapping may be given more than once.
    pub fn new(memories: impl IntoIterator<Item = Arc<dyn StableMemory>>) -> Self {
        let mut set = Self::default();
        memories.into_iter().for_each(|memory| set.insert(memory));
        set
    }

    /// Adds a mapping, unless it is empty.
    pub fn insert(&mut self, memory: Arc<dyn StableMemory>) {
        let (base, len) = (memory.base(), memory.len());
        if let Some(last) = len.checked_sub(1).and_then(|more| base.checked_add(more)) {
            self.regions.insert(base as u64, Region { last, memory });
        }
    }

    /// Removes the mapping that begins at this address.
    pub fn remove(&mut self, base: usize) {
        self.regions.remove(base as u64);
    }

    /// Whether all bytes of `iovec` lie in one mapping of the set. An empty one does.
    #[must_use]
    #[inline]
    pub fn covers(&self, iovec: IoVec) -> bool {
        let Some(more) = iovec.len.checked_sub(1) else { return true };
        let Some(last) = iovec.addr.checked_add(more) else { return false };
        self.regions.floor(iovec.addr as u64).is_some_and(|(_, region)| last <= region.last)
    }

    /// The mappings, by address.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn StableMemory>> {
        self.regions.iter().map(|(_, region)| &region.memory)
    }
}

impl fmt::Debug for MemorySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.regions.iter().map(|(base, region)| (base, region.last))).finish()
    }
}

/// A scatter-gather list over mappings that it keeps alive.
#[derive(Debug)]
pub struct GuestIoVecs {
    pub(super) iovecs: Box<[IoVec]>,
    pub(super) memory: Arc<MemorySet>,
}

/// Largest number of ranges of one request: `UIO_MAXIOV`.
pub const MAX_IOVECS: usize = 1024;

impl GuestIoVecs {
    /// The list of `iovecs`, each inside one mapping of `memory`.
    ///
    /// # Errors
    /// `EFAULT` for a range outside of `memory`, `EINVAL` for more than [`MAX_IOVECS`].
    pub fn new(iovecs: impl Into<Box<[IoVec]>>, memory: Arc<MemorySet>) -> Result<Self, Errno> {
        let iovecs = iovecs.into();
        if iovecs.len() > MAX_IOVECS {
            return Err(Errno::INVAL);
        }
        if !iovecs.iter().all(|&iovec| memory.covers(iovec)) {
            return Err(Errno::FAULT);
        }
        Ok(Self { iovecs, memory })
    }

    /// Bytes of all ranges.
    #[must_use]
    pub fn len(&self) -> usize {
        self.iovecs.iter().map(|iovec| iovec.len).fold(0, usize::saturating_add)
    }

    /// Whether it has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file to memory.
    Read,
    /// From memory to the file.
    Write,
}

/// Whether a transfer may block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It may block.
    Allowed,
    /// It must not wait for a disk or a lock (`RWF_NOWAIT`).
    Refused,
}

/// Moves bytes between byte `offset` of a file and the ranges `iovecs` of mappings, in the calling thread. Returns the
/// number of bytes, which may be less than requested if it must not block.
///
/// # Errors
/// As [`GuestIoVecs::new`]; those of `preadv2(2)` and `pwritev2(2)`: `EAGAIN` when it would block and must not,
/// `EOPNOTSUPP` for files that do not support that.
pub fn transfer_now(
    file: impl AsFd,
    direction: Direction,
    wait: Wait,
    iovecs: &[IoVec],
    memory: &MemorySet,
    offset: u64,
) -> Result<usize, Errno> {
    if iovecs.len() > MAX_IOVECS {
        return Err(Errno::INVAL);
    }
    if !iovecs.iter().all(|&iovec| memory.covers(iovec)) {
        return Err(Errno::FAULT);
    }
    let (fd, iov) = (file.as_fd().as_raw_fd(), iovecs.as_ptr().cast::<libc::iovec>());
    let count = libc::c_int::try_from(iovecs.len()).map_err(|_| Errno::INVAL)?;
    let at = i64::try_from(offset).map_err(|_| Errno::INVAL)?;
    loop {
        // SAFETY: `iovecs` is laid out as an array of `count` iovecs, and each lies inside a `StableMemory`, which allows
        // the kernel to access it at any time and which exists during this call. A single range needs no list.
        let moved = unsafe {
            match (direction, wait, iovecs) {
                (Direction::Read, Wait::Allowed, [one]) => libc::pread(fd, pointer(one), one.len, at),
                (Direction::Write, Wait::Allowed, [one]) => libc::pwrite(fd, pointer(one), one.len, at),
                (Direction::Read, Wait::Allowed, _) => libc::preadv(fd, iov, count, at),
                (Direction::Write, Wait::Allowed, _) => libc::pwritev(fd, iov, count, at),
                (Direction::Read, Wait::Refused, _) => libc::preadv2(fd, iov, count, at, libc::RWF_NOWAIT),
                (Direction::Write, Wait::Refused, _) => libc::pwritev2(fd, iov, count, at, libc::RWF_NOWAIT),
            }
        };
        match usize::try_from(moved) {
            Ok(moved) => return Ok(moved),
            Err(_) => match io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR) => {}
                error => return Err(Errno::from_raw(error.unwrap_or(libc::EIO))),
            },
        }
    }
}

fn pointer(iovec: &IoVec) -> *mut libc::c_void {
    std::ptr::with_exposed_provenance_mut(iovec.addr)
}

/// A zeroed buffer at an address that `O_DIRECT` accepts.
pub struct AlignedBuf {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer owns its bytes as a Vec does; nothing about it is bound to a thread.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// A buffer of `len` zero bytes aligned to `align`.
    ///
    /// # Errors
    /// `EINVAL` when `len` is 0, `align` is no power of two, or the two exceed the address space.
    pub fn new(len: usize, align: usize) -> Result<Self, Errno> {
        let layout = Layout::from_size_align(len, align).map_err(|_| Errno::INVAL)?;
        if len == 0 {
            return Err(Errno::INVAL);
        }
        // SAFETY: the layout has a size above 0, checked just now.
        let start = unsafe { alloc_zeroed(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout));
        Ok(Self { start, layout })
    }
}

impl std::ops::Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` points to `layout.size()` bytes, zeroed at allocation, owned by self; while the kernel
        // writes to them the buffer is inside the ring's slab, where nobody can borrow it.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }
}

impl std::ops::DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout and not freed since.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf").field("len", &self.len()).field("align", &self.layout.align()).finish()
    }
}

/// A buffer that a request owns while it is in flight; the completion returns it.
#[derive(Debug)]
pub enum OwnedBuf {
    /// Its `len()` bytes are read or written; spare capacity is not used.
    Vec(Vec<u8>),
    /// For `O_DIRECT`.
    Aligned(AlignedBuf),
}

impl OwnedBuf {
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Vec(bytes) => bytes,
            Self::Aligned(bytes) => bytes,
        }
    }

    pub(super) fn iovec(&mut self) -> IoVec {
        // as_mut_ptr and not as_ptr: the kernel may write through the address.
        let (addr, len) = match self {
            Self::Vec(bytes) => (bytes.as_mut_ptr(), bytes.len()),
            Self::Aligned(bytes) => (bytes.start.as_ptr(), bytes.layout.size()),
        };
        IoVec { addr: addr.expose_provenance(), len }
    }
}

impl std::ops::Deref for OwnedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Vec(bytes) => bytes,
            Self::Aligned(bytes) => bytes,
        }
    }
}

impl From<Vec<u8>> for OwnedBuf {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Vec(bytes)
    }
}

impl From<AlignedBuf> for OwnedBuf {
    fn from(bytes: AlignedBuf) -> Self {
        Self::Aligned(bytes)
    }
}

/// Destination of a read or source of a write.
#[derive(Debug)]
pub enum Buffers {
    /// Guest memory.
    Guest(GuestIoVecs),
    /// A buffer that the request owns.
    Owned(OwnedBuf),
}

impl From<GuestIoVecs> for Buffers {
    fn from(iovecs: GuestIoVecs) -> Self {
        Self::Guest(iovecs)
    }
}

impl<T: Into<OwnedBuf>> From<T> for Buffers {
    fn from(buffer: T) -> Self {
        Self::Owned(buffer.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake(usize, usize);
    // SAFETY: its addresses are never passed to the kernel, only compared.
    unsafe impl StableMemory for Fake {
        fn base(&self) -> usize {
            self.0
        }
        fn len(&self) -> usize {
            self.1
        }
    }

    #[test]
    fn a_set_covers_ranges_within_one_mapping() {
        let set = MemorySet::new(
            [Fake(0x3000, 0x1000), Fake(0x1000, 0x1000), Fake(usize::MAX, 1), Fake(5, 0)]
                .map(|fake| Arc::new(fake) as Arc<dyn StableMemory>),
        );
        let covers = |addr, len| set.covers(IoVec { addr, len });
        assert!(covers(0x1000, 0x1000) && covers(0x3fff, 1) && covers(usize::MAX, 1));
        assert!(!covers(0xfff, 1) && !covers(0x1fff, 2) && !covers(0x2000, 1) && !covers(5, 1));
        assert!(!covers(usize::MAX, 2), "the sum passes the end of the address space");
        assert!(covers(0, 0));
        let outside = vec![IoVec { addr: 0x1000, len: 1 }, IoVec { addr: 0x2000, len: 1 }];
        assert_eq!(GuestIoVecs::new(outside, Arc::new(set)).unwrap_err(), Errno::FAULT);
    }

    #[test]
    fn aligned_buffers_are_aligned_and_refuse_invalid_sizes() {
        let mut buffer = AlignedBuf::new(8192, 4096).unwrap();
        assert_eq!(buffer.as_ptr().addr() % 4096, 0);
        buffer[8191] = 7;
        assert_eq!((buffer[0], buffer[8191], buffer.len()), (0, 7, 8192));
        assert_eq!(AlignedBuf::new(0, 512).unwrap_err(), Errno::INVAL);
        assert_eq!(AlignedBuf::new(512, 3).unwrap_err(), Errno::INVAL);
    }
}
