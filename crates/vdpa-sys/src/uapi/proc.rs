//! `uapi/linux/fs.h` and `uapi/linux/pidfd.h`: questions about other processes.
#![expect(unsafe_code, reason = "binds ioctl numbers to their arguments")]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::ioctl::{Updater, iowr};

/// `struct pidfd_info`, first published version (Linux 6.13).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct PidfdInfo {
    /// What is asked for, then what was answered: `PIDFD_INFO_*`.
    pub(crate) mask: u64,
    pub(crate) cgroupid: u64,
    pub(crate) pid: u32,
    pub(crate) tgid: u32,
    pub(crate) ppid: u32,
    pub(crate) credentials: [u32; 8],
    pub(crate) exit_code: i32,
}
const _: () = assert!(size_of::<PidfdInfo>() == 64);

/// `PIDFD_INFO_PID`: the ids are wanted; they always come.
pub(crate) const PIDFD_INFO_PID: u64 = 1;

/// `PIDFD_GET_INFO`.
// SAFETY: pidfs reads `mask` and writes at most the size in the number, 64 bytes.
pub(crate) const PIDFD_GET_INFO: Updater<PidfdInfo> = unsafe { Updater::new(iowr::<PidfdInfo>(0xff, 11)) };

/// `struct procmap_query` (Linux 6.11).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct ProcmapQuery {
    pub(crate) size: u64,
    pub(crate) query_flags: u64,
    pub(crate) query_addr: u64,
    pub(crate) vma_start: u64,
    pub(crate) vma_end: u64,
    pub(crate) vma_flags: u64,
    pub(crate) vma_page_size: u64,
    pub(crate) vma_offset: u64,
    pub(crate) inode: u64,
    pub(crate) dev_major: u32,
    pub(crate) dev_minor: u32,
    /// 0: the name is not wanted, and `vma_name_addr` not looked at. The same for the build id.
    pub(crate) vma_name_size: u32,
    pub(crate) build_id_size: u32,
    pub(crate) vma_name_addr: u64,
    pub(crate) build_id_addr: u64,
}
const _: () = assert!(size_of::<ProcmapQuery>() == 104);

pub(crate) const PROCMAP_QUERY_VMA_READABLE: u64 = 1;
pub(crate) const PROCMAP_QUERY_VMA_WRITABLE: u64 = 2;
pub(crate) const PROCMAP_QUERY_VMA_SHARED: u64 = 8;

/// `PROCMAP_QUERY`.
// SAFETY: procfs reads and writes the structure alone as long as both sizes in it are 0, which is what the only
// caller, `maps::query`, sets.
pub(crate) const PROCMAP_QUERY: Updater<ProcmapQuery> =
    unsafe { Updater::new(iowr::<ProcmapQuery>(b'f', 17)) };
