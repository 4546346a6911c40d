//! What is mapped in a VDUSE device, as the kernel tells it.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, fstat};
use vdpa_core::Errno;
use vdpa_core::device::WholeMapping;
use vdpa_core::types::{IovaRange, Perm, Result};
use vdpa_sys::guest::{GuestMemory, ObjectFile, ObjectId};
use vdpa_sys::uapi::vduse::IotlbEntry;
use vdpa_sys::vduse::VduseDevice;

/// How the kernel names the memory that it has for its own drivers: bounce buffers, and what they allocate for rings.
const DOMAIN: &str = "anon_inode:[vduse-domain]";

/// Entries that are read of a table: more than the kernel allows (its parameter `max_iotlb_entries` is 2048 by default).
const ENTRIES_MAX: usize = 1 << 16;

/// The table of one address space.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub(super) mappings: Vec<WholeMapping<GuestMemory>>,
    /// The driver is the kernel's and has not mapped any buffer: the range of its bounce buffers, which begins at 0, is mapped with the
    /// first one, without a message.
    pub(super) without_buffers: bool,
}

/// An open file of a mapping: its device and inode, and whether it is written.
type Files = HashMap<(u64, u64, bool), Arc<ObjectFile>>;

/// Reads the table of address space `asid`; `version` is the interface's. What cannot be mapped is left out, and is named in the log.
///
/// # Errors
/// Of the requests: `EPERM` of a broken device.
pub(super) fn read(name: &str, device: &VduseDevice, version: u64, asid: u32) -> Result<Memory> {
    let mut memory = Memory::default();
    let mut files = Files::new();
    let (mut first, mut buffers, mut kernel) = (0, false, false);
    for _ in 0..ENTRIES_MAX {
        let found = if version == 0 {
            device.mapping(first, u64::MAX)
        } else {
            device.mapping_in(asid, first, u64::MAX)
        };
        let (entry, fd) = match found {
            Ok(found) => found,
            // Nothing is mapped from there on, or the device is not on the bus.
            Err(Errno::INVAL) => break,
            Err(errno) => return Err(errno),
        };
        if is_domain(&fd) {
            kernel = true;
            buffers |= entry.start == 0;
        }
        match map(&entry, fd, &mut files) {
            Ok(mapping) => memory.mappings.push(mapping),
            Err(errno) => {
                let IotlbEntry { start, last, .. } = entry;
                tracing::warn!(device = name, asid, "[{start:#x}, {last:#x}] cannot be mapped: {errno}");
            }
        }
        match entry.last.checked_add(1) {
            Some(next) if next > first => first = next,
            _ => break,
        }
    }
    memory.without_buffers = kernel && !buffers;
    Ok(memory)
}

fn is_domain(fd: &OwnedFd) -> bool {
    let link = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new());
    link.is_ok_and(|target| target.to_bytes() == DOMAIN.as_bytes())
}

fn map(entry: &IotlbEntry, fd: OwnedFd, files: &mut Files) -> Result<WholeMapping<GuestMemory>> {
    let errno = |error: rustix::io::Errno| Errno::from_raw(error.raw_os_error());
    let range = IovaRange::new(entry.start, entry.last).ok_or(Errno::INVAL)?;
    let size =
        range.last().checked_sub(range.first()).and_then(|last| last.checked_add(1)).ok_or(Errno::INVAL)?;
    let perm = Perm(entry.perm);
    let stat = fstat(&fd).map_err(errno)?;
    // All of the kernel's own memory in one table is one file, and its inode that of other files too, which are not in it.
    let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    let key = if regular { (stat.st_dev, stat.st_ino, perm.write()) } else { (0, 0, perm.write()) };
    let file = files.entry(key).or_insert_with(|| Arc::new(ObjectFile::new(fd)));
    let object = ObjectId {
        dev_major: rustix::fs::major(stat.st_dev),
        dev_minor: rustix::fs::minor(stat.st_dev),
        inode: stat.st_ino,
        created_ns: 0,
        offset: entry.offset,
    };
    Ok((range, perm, GuestMemory::from_object(Arc::clone(file), object, size, perm.write())?))
}
