//! [`Region`]: memory that a case maps for the device.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::ring::Fault;
use vdpa_sys::memfd;
use vdpa_sys::mmap::{Prot, SharedMap};

use crate::case::{Stop, prepare};
use crate::device::errno;

/// Bytes of a page on the machines the suite runs on.
pub(crate) const PAGE: u64 = 4096;

/// A memfd and its mapping: shared memory, which every device can access.
#[derive(Debug)]
pub(crate) struct Region {
    file: OwnedFd,
    map: SharedMap,
}

impl Region {
    /// `pages` pages of zeros.
    pub(crate) fn new(pages: u64) -> Result<Self, Stop> {
        let file = prepare("memfd_create", memfd::create(c"vdpa-conform", pages * PAGE, None))?;
        let map = prepare("mmap", Self::mapping(&file, pages * PAGE))?;
        Ok(Self { file, map })
    }

    /// Two pages of zeros, adjacent in memory and in one file, which the kernel holds as two mappings (VMAs).
    pub(crate) fn in_two_mappings() -> Result<Self, Stop> {
        let region = Self::new(2)?;
        let page = rustix::param::page_size();
        prepare("madvise", region.map.leave_out_of_dumps(page, page))?;
        Ok(region)
    }

    /// Two pages of which only the first is shared. The file was truncated to one page, and a read of the second page has put
    /// a page private to this process in its place ([`SharedMap::map_guest`]).
    pub(crate) fn with_private_page() -> Result<Self, Stop> {
        let file = prepare("memfd_create", memfd::create(c"vdpa-conform", 2 * PAGE, None))?;
        let page = rustix::param::page_size();
        let map = prepare("mmap", SharedMap::map_guest(&file, 0, 2 * page, Prot::RW, false))?;
        prepare("ftruncate", rustix::fs::ftruncate(&file, PAGE).map_err(errno))?;
        // Not `read`: the compiler would remove a copy whose result is not used, and with it the page fault.
        let shared = map.load_u32(page).is_ok();
        if shared {
            Err(Stop::Failed("set-up: a page beyond the file's end".to_owned()))
        } else {
            // A device may be told of it only as memory of another owner.
            Ok(Self { file, map: SharedMap::over(Arc::new(map)) })
        }
    }

    /// Maps the memory of another process's region, given by its [`path`](Self::path).
    pub(crate) fn of_path(path: &Path) -> Result<Self, Errno> {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path);
        let io = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(0));
        let file = file.map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let file = OwnedFd::from(file);
        let map = Self::mapping(&file, size)?;
        Ok(Self { file, map })
    }

    fn mapping(file: &OwnedFd, size: u64) -> Result<SharedMap, Errno> {
        let len = usize::try_from(size).map_err(|_| Errno::NOMEM)?;
        SharedMap::map(file, 0, len, Prot::RW, false)
    }

    /// Path by which another process can open the memory while this process runs.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Virtual address in this process.
    pub(crate) fn uaddr(&self) -> u64 {
        self.map.addr() as u64
    }

    /// Size in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.map.len() as u64
    }

    /// Copies bytes out of the region.
    pub(crate) fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], Stop> {
        let mut bytes = [0; N];
        self.map.read(offset, &mut bytes).map_err(outside)?;
        Ok(bytes)
    }

    /// Copies bytes into the region.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), Stop> {
        self.map.write(offset, bytes).map_err(outside)
    }
}

fn outside(fault: Fault) -> Stop {
    Stop::Failed(format!("set-up: {fault}"))
}
