//! Memory that a device can reach.
#![expect(
    unsafe_code,
    reason = "functions are exported by their names, and addresses are those of C programs"
)]

use std::ffi::{CString, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;

use vdpa_client::dma::{Backing, RegionSpec};
use vdpa_client::memory::Memory;
use vdpa_client::mmap::SharedMap;
use vdpa_client::types::Perm;

use crate::border::{Out, answer, array, c_text, descriptor, needed, quietly, text};
use crate::failure::Failure;
use crate::failure::errno::ENOENT;
use crate::session::vdpa_live_session;

/// The device may read.
pub const VDPA_LIVE_READ: u32 = 1;
/// The device may write.
pub const VDPA_LIVE_WRITE: u32 = 2;

const PAGE: usize = 4096;

/// Memory of this process that any number of devices use, wholly or in parts. An update carries it over once.
#[derive(Debug)]
pub struct vdpa_live_memory {
    pub(crate) memory: Arc<Memory>,
    name: CString,
}

impl vdpa_live_memory {
    pub(crate) fn new(memory: Arc<Memory>) -> Self {
        let name = c_text(memory.name());
        Self { memory, name }
    }
}

/// What vdpa_live_memory_info() tells. Pointers and the descriptor belong to the memory and are valid as long as it.
#[repr(C)]
#[derive(Debug)]
pub struct vdpa_live_memory_info {
    /// Name of the memory.
    pub name: *const c_char,
    /// Address in this process; NULL in a successor that has not taken over yet.
    pub address: *mut c_void,
    /// Bytes.
    pub size: u64,
    /// The object; -1 for memory without one.
    pub fd: c_int,
    /// First byte of the memory in the object.
    pub offset: u64,
}

/// A mapping for the device: a part of a memory at I/O virtual addresses.
#[repr(C)]
#[derive(Debug)]
pub struct vdpa_live_region {
    /// Name of the region, unique in the session. The successor finds it by this name.
    pub name: *const c_char,
    /// The memory. The region keeps it, so it may be freed once it is mapped.
    pub memory: *mut vdpa_live_memory,
    /// First byte in the memory; a multiple of 4096.
    pub offset: u64,
    /// First I/O virtual address; a multiple of 4096.
    pub iova: u64,
    /// Bytes; a multiple of 4096.
    pub size: u64,
    /// VDPA_LIVE_READ, VDPA_LIVE_WRITE or both.
    pub perm: u32,
}

fn perm(bits: u32) -> Result<Perm, Failure> {
    match u8::try_from(bits) {
        Ok(bits @ 1..=3) => Ok(Perm(bits)),
        _ => Err(Failure::invalid(format!(
            "perm is {bits:#x}; it is VDPA_LIVE_READ, VDPA_LIVE_WRITE or both of them"
        ))),
    }
}

/// Memory that the caller has mapped.
///
/// # Safety
/// `size` bytes from `address` stay mapped, readable and writable until the memory is freed and no region has it.
unsafe fn mapped_by_caller(address: *mut c_void, size: u64) -> Result<SharedMap, Failure> {
    let at = address.expose_provenance();
    let len = usize::try_from(size).ok().filter(|&len| len > 0 && at.checked_add(len).is_some());
    let len = len.filter(|_| at.is_multiple_of(PAGE)).ok_or_else(|| {
        Failure::invalid(format!(
            "address {at:#x} and size {size} are no memory: the address must be a multiple of 4096 and the size not 0"
        ))
    })?;
    // SAFETY: the caller promises that the range stays mapped and accessible; a C program has no references of Rust to it.
    Ok(unsafe { SharedMap::from_raw_parts(at, len) })
}

/// Makes memory: size bytes of the object fd (a memfd, a hugetlb memfd, a file) from byte offset on. The library copies the
/// descriptor.
///
/// With address NULL the library maps it, shared. Otherwise it is mapped there by the caller, shared and for reading and writing,
/// and stays mapped until the memory is freed and no region has it; that it is this object is checked when an update begins. With
/// fd -1 the memory has no object: it ends with this program, so sessions that use it cannot be updated.
///
/// Free it with vdpa_live_memory_free().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_memory_new(
    name: *const c_char,
    fd: c_int,
    offset: u64,
    size: u64,
    address: *mut c_void,
    memory: Option<&mut MaybeUninit<*mut vdpa_live_memory>>,
) -> c_int {
    answer(|| {
        let out = Out::new(memory, "memory")?;
        // SAFETY: the caller gives a string or NULL.
        let name = unsafe { text(name, "name") }?;
        let object = if fd == -1 { None } else { Some(descriptor(fd, "fd")?) };
        // SAFETY: the caller keeps the range mapped for as long as the header says.
        let map = || unsafe { mapped_by_caller(address, size) };
        let memory = match (object, address.is_null()) {
            (Some(fd), true) => Memory::map(name, fd, offset, size, false)?,
            (Some(fd), false) => Memory::from_mapping(name, fd, offset, map()?)?,
            (None, true) => Memory::anonymous(name, size)?,
            (None, false) => Memory::private(name, map()?),
        };
        out.put(vdpa_live_memory::new(memory));
        Ok(0)
    })
}

/// Frees memory. It stays where it is as long as a region has it. NULL does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_memory_free(memory: Option<Box<vdpa_live_memory>>) {
    quietly(|| drop(memory));
}

/// Tells where memory is.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_memory_info(
    memory: Option<&vdpa_live_memory>,
    info: Option<&mut MaybeUninit<vdpa_live_memory_info>>,
) -> c_int {
    answer(|| {
        let vdpa_live_memory { memory, name } = needed(memory, "memory")?;
        let (fd, offset) = memory.object().map_or((-1, 0), |(fd, offset)| (fd.as_raw_fd(), offset));
        let address = usize::try_from(memory.uaddr()).unwrap_or(0);
        needed(info, "info")?.write(vdpa_live_memory_info {
            name: name.as_ptr(),
            address: std::ptr::with_exposed_provenance_mut(address),
            size: memory.size(),
            fd,
            offset,
        });
        Ok(0)
    })
}

/// Brings the mapping of a successor that maps memory itself: memory is of vdpa_live_incoming_memory(), before the devices are
/// taken over, and the object and offset of vdpa_live_memory_info() are mapped at address, shared, in full size. It stays mapped
/// as in vdpa_live_memory_new(). Without this call the library maps the memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_memory_bring(
    memory: Option<&vdpa_live_memory>,
    address: *mut c_void,
) -> c_int {
    answer(|| {
        let memory = &needed(memory, "memory")?.memory;
        // SAFETY: the caller keeps the range mapped for as long as the header says.
        let map = unsafe { mapped_by_caller(address, memory.size()) }?;
        memory.bring(map).map_err(|e| Failure::invalid(format!("memory \"{}\" {e}", memory.name())))?;
        Ok(0)
    })
}

/// Maps count regions for the device, in one batch if the device can. All or nothing.
///
/// Fails with -EEXIST for a name that is there, -ERANGE outside of what the device can address, -ENOMEM when RLIMIT_MEMLOCK is too
/// low, or the error of the device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_map(
    session: Option<&vdpa_live_session>,
    regions: *const vdpa_live_region,
    count: usize,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives `count` regions.
        let specs = unsafe { specs(regions, count) }?;
        needed(session, "session")?.with(|session| Ok(session.map(specs)?))?;
        Ok(0)
    })
}

/// Regions for a session.
///
/// # Safety
/// `regions` are `count` regions with strings and memories as the header says.
pub(crate) unsafe fn specs(
    regions: *const vdpa_live_region,
    count: usize,
) -> Result<Vec<RegionSpec>, Failure> {
    // SAFETY: passed on from the caller.
    let regions = unsafe { array(regions, count, "regions") }?;
    let spec = |region: &vdpa_live_region| {
        let &vdpa_live_region { name, memory, offset, iova, size, perm: bits } = region;
        // SAFETY: the caller gives a string or NULL.
        let name = unsafe { text(name, "name of a region") }?;
        // SAFETY: the caller gives a memory that nobody frees during the call, or NULL.
        let memory = needed(unsafe { memory.as_ref() }, &format!("memory of region \"{name}\""))?;
        let backing = Backing::Memory(Arc::clone(&memory.memory), offset);
        Ok(RegionSpec { name: name.to_owned(), backing, iova, size, perm: perm(bits)?, populate: false })
    };
    regions.iter().map(spec).collect()
}

/// Unmaps a region. The caller makes sure that no ring lies in it and no request in flight uses it. Blocks until the device does
/// not access it any more. -ENOENT: there is none of that name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_unmap(session: Option<&vdpa_live_session>, name: *const c_char) -> c_int {
    answer(|| {
        // SAFETY: the caller gives a string or NULL.
        let name = unsafe { text(name, "name") }?;
        needed(session, "session")?.with(|session| Ok(session.unmap(name)?))?;
        Ok(0)
    })
}

/// Says that a region is mapped at another address of this process from now on: memory is another mapping of the same object, from
/// the same offset of it, in the same size. The device may run; it accesses the same pages as before. Both mappings must exist
/// during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_remap(
    session: Option<&vdpa_live_session>,
    name: *const c_char,
    memory: Option<&vdpa_live_memory>,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives a string or NULL.
        let name = unsafe { text(name, "name") }?;
        let memory = needed(memory, "memory")?;
        needed(session, "session")?.with(|session| Ok(session.remap(name, &memory.memory)?))?;
        Ok(0)
    })
}

/// Maps a part of a memory without a name, for mappings that a guest's virtual IOMMU makes, many in a second: one request, and an
/// update that is being prepared stays valid if the memory was in use when it began.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_map_at(
    session: Option<&vdpa_live_session>,
    memory: Option<&vdpa_live_memory>,
    offset: u64,
    iova: u64,
    size: u64,
    perm: u32,
) -> c_int {
    answer(|| {
        let memory = &needed(memory, "memory")?.memory;
        let perm = self::perm(perm)?;
        let session = needed(session, "session")?;
        session.with(|session| Ok(session.map_at(memory, offset, iova, size, perm)?))?;
        Ok(0)
    })
}

/// Unmaps what vdpa_live_map_at() has mapped at exactly this range. As vdpa_live_unmap() otherwise.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_unmap_at(session: Option<&vdpa_live_session>, iova: u64, size: u64) -> c_int {
    answer(|| {
        needed(session, "session")?.with(|session| Ok(session.unmap_at(iova, size)?))?;
        Ok(0)
    })
}

/// Finds a region by its name, as a successor does. Sets *region, with the caller's pointer as the name and with a memory of its
/// own: free that with vdpa_live_memory_free(). -ENOENT: there is none of that name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_find_region(
    session: Option<&vdpa_live_session>,
    name: *const c_char,
    region: Option<&mut MaybeUninit<vdpa_live_region>>,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives a string or NULL.
        let wanted = unsafe { text(name, "name") }?;
        let out = needed(region, "region")?;
        let found = needed(session, "session")?.with(|session| {
            let missing = || Failure::new(ENOENT, format!("there is no region \"{wanted}\""));
            let found = session.region(wanted).ok_or_else(missing)?;
            let range = found.range();
            Ok(vdpa_live_region {
                name,
                memory: Box::into_raw(Box::new(vdpa_live_memory::new(Arc::clone(found.memory())))),
                offset: found.offset(),
                iova: range.first(),
                size: range.size(),
                perm: found.perm().0.into(),
            })
        })?;
        out.write(found);
        Ok(0)
    })
}
