//! Finding and mapping the object behind a shared mapping of a client.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Statx, StatxFlags, statx};
use vdpa_core::Errno;

use crate::errno;
use crate::guest::{GuestMemory, ObjectId, ObjectKey};
use crate::maps::{self, Vma, vma_at};
use crate::mmap::SharedMap;
use crate::process::Caller;
use crate::space::OwnerSpace;

/// Largest number of a client's descriptors that are searched.
const FDS_MAX: usize = 65536;

/// Largest number of threads through which an object is searched. All see the same mappings, but some may have ended.
const THREADS_MAX: usize = 8;

/// Maps `[uaddr, uaddr + size)` of `vma`; `None` when the object cannot be opened or may not be mapped with this access.
///
/// Opens it through `/proc/TID/map_files`, with the rights of this process: the caller must have checked the access of the
/// VMA. Where that is not permitted (in a user namespace), uses a descriptor of the client that refers to the object.
///
/// # Errors
/// Of the system calls.
pub(crate) fn map(
    space: &OwnerSpace,
    vma: &Vma,
    uaddr: u64,
    size: u64,
    write: bool,
) -> Result<Option<GuestMemory>, Errno> {
    let mut last = None;
    for tid in space.threads().take(THREADS_MAX) {
        let found = match open_map_file(tid, vma) {
            Ok(path_fd) => path_fd.map(Found::Path),
            Err(Errno::PERM | Errno::ACCESS) => client_descriptor(tid, vma)?.map(Found::Descriptor),
            Err(error) => {
                last = Some(error);
                continue;
            }
        };
        let Some(found) = found else { return Ok(None) };
        if let Some(memory) = found.map(space, vma, uaddr, size, write)? {
            return Ok(Some(memory));
        }
    }
    last.map_or(Ok(None), Err)
}

/// An object found, before it is opened for use.
enum Found {
    /// Opened with `O_PATH`, which has no effect on the file.
    Path(OwnedFd),
    /// The client's own descriptor, with its rights.
    Descriptor(OwnedFd),
}

impl Found {
    /// Maps what was found, or uses a mapping of it; `None` if it is not the object of `vma`.
    fn map(
        self,
        space: &OwnerSpace,
        vma: &Vma,
        uaddr: u64,
        size: u64,
        write: bool,
    ) -> Result<Option<GuestMemory>, Errno> {
        let fd = match &self {
            Self::Path(fd) | Self::Descriptor(fd) => fd,
        };
        let created_ns = created_ns(fd)?;
        let key = ObjectKey { dev: vma.dev, inode: vma.inode, created_ns, write };
        let file = space.object(key, || self.open(write))?;
        let object = ObjectId {
            dev_major: vma.dev.0,
            dev_minor: vma.dev.1,
            inode: vma.inode,
            created_ns,
            offset: vma.offset + (uaddr - vma.start),
        };
        // The thread may have ended and its id may be reused, so what is mapped is compared with the VMA.
        let whole = file.map(object, size, write, |map| is_mapping_of(map, vma))?;
        whole.map(|whole| GuestMemory::in_mapping(whole, object.offset, size)).transpose()
    }

    fn open(self, write: bool) -> Result<OwnedFd, Errno> {
        match self {
            Self::Descriptor(fd) => Ok(fd),
            Self::Path(fd) => {
                let flags = if write { OFlags::RDWR } else { OFlags::RDONLY };
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                rustix::fs::open(path, flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())
                    .map_err(errno::from_rustix)
            }
        }
    }
}

/// The file behind `vma`; `None` unless it is a regular file. Opening a device would have effects of its own.
fn open_map_file(tid: i32, vma: &Vma) -> Result<Option<OwnedFd>, Errno> {
    let path = format!("/proc/{tid}/map_files/{:x}-{:x}", vma.start, vma.end);
    let fd =
        rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(errno::from_rustix)?;
    Ok(is_regular(&fd)?.then_some(fd))
}

/// A descriptor of the thread that refers to the object of `vma`.
fn client_descriptor(tid: i32, vma: &Vma) -> Result<Option<OwnedFd>, Errno> {
    let caller = Caller::new(tid)?;
    let entries = std::fs::read_dir(format!("/proc/{tid}/fd")).map_err(errno::from_io)?;
    for entry in entries.flatten().take(FDS_MAX) {
        let matches = rustix::fs::stat(entry.path()).is_ok_and(|stat| {
            let dev = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
            FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
                && (dev, stat.st_ino) == (vma.dev, vma.inode)
        });
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let (true, Some(number)) = (matches, number) {
            let fd = caller.get_fd(number)?;
            // The client may have replaced the descriptor since.
            if is_regular(&fd)? {
                return Ok(Some(fd));
            }
        }
    }
    Ok(None)
}

fn is_regular(fd: impl AsFd) -> Result<bool, Errno> {
    let stat = statx_local(fd, StatxFlags::TYPE)?;
    Ok(FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile)
}

fn created_ns(fd: impl AsFd) -> Result<u64, Errno> {
    let stat = statx_local(fd, StatxFlags::BTIME)?;
    if stat.stx_mask & StatxFlags::BTIME.bits() == 0 {
        return Ok(0);
    }
    let seconds = u64::try_from(stat.stx_btime.tv_sec).unwrap_or(0);
    Ok(seconds.saturating_mul(1_000_000_000).saturating_add(stat.stx_btime.tv_nsec.into()))
}

/// The attributes of a file that the kernel has cached, without a request to a file server that may never answer.
pub(crate) fn statx_local(fd: impl AsFd, fields: StatxFlags) -> Result<Statx, Errno> {
    statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, fields).map_err(errno::from_rustix)
}

/// Whether what is mapped is the object of `vma`, according to this process's maps. stat(2) cannot tell:
/// some file systems report other device numbers there.
fn is_mapping_of(map: &SharedMap, vma: &Vma) -> Result<bool, Errno> {
    let own = vma_at(maps::own()?, map.addr() as u64)?;
    Ok(own.is_some_and(|own| (own.dev, own.inode) == (vma.dev, vma.inode)))
}
