//! The process on whose behalf a request runs.
//!
//! A request names its caller by thread id. The thread waits uninterruptibly until the request is answered: it
//! can neither end nor exec, its id is not reused, and look-ups under `/proc/TID` are free of races. All of it
//! needs `CAP_SYS_PTRACE` for clients of other users.
#![expect(unsafe_code, reason = "process_vm_readv(2), process_vm_writev(2) and kcmp(2) are not in rustix")]

use std::cell::OnceCell;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use vdpa_core::Errno;
use vdpa_core::host::PAGE_SIZE;

use crate::errno;
use crate::maps::vma_at;
pub use crate::space::{OwnerSpace, ProcessCaller, Spaces, ThisProcess};
use crate::uapi::proc::{PIDFD_GET_INFO, PIDFD_INFO_PID, PidfdInfo};

/// `PIDFD_THREAD`, Linux 6.9: the descriptor stands for one thread and its descriptor table.
const PIDFD_THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL.cast_unsigned());
/// Type of the entry of the auxiliary vector that points at 16 random bytes, drawn anew by every exec.
const AT_RANDOM: u64 = 25;
/// Pieces of memory in one call (`UIO_MAXIOV`).
const IOV_MAX: usize = 1024;
/// Bytes of a word of a bitmap.
const WORD: usize = size_of::<u64>();
/// Largest auxiliary vector that is read, in bytes: the kernel's has at most 52 entries.
const AUXV_MAX: usize = 4096;

/// A thread that waits for the answer to its request. Handles are opened when first needed.
#[derive(Debug)]
pub struct Caller {
    tid: i32,
    pidfd: OnceCell<OwnedFd>,
    tgid: OnceCell<i32>,
}

/// The 16 random bytes of an address space (`AT_RANDOM`) and their address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Random {
    pub(crate) addr: u64,
    pub(crate) bytes: [u8; 16],
}

impl Caller {
    /// The thread `tid`, as the process-id namespace of this process numbers it.
    ///
    /// # Errors
    /// `ESRCH` for 0 or less, which FUSE reports for a process that is not visible from here.
    pub const fn new(tid: i32) -> Result<Self, Errno> {
        if tid <= 0 {
            return Err(errno::SRCH);
        }
        Ok(Self { tid, pidfd: OnceCell::new(), tgid: OnceCell::new() })
    }

    /// Its thread id.
    #[must_use]
    pub const fn tid(&self) -> i32 {
        self.tid
    }

    /// The id of its process (thread group).
    ///
    /// # Errors
    /// `ESRCH`, `EPERM`.
    pub fn pid(&self) -> Result<i32, Errno> {
        if let Some(&tgid) = self.tgid.get() {
            return Ok(tgid);
        }
        let tgid = match self.tgid_by_pidfd() {
            // Linux before 6.13 does not know the request, and reports that by different errors.
            Err(error) if error != errno::SRCH => self.tgid_by_status()?,
            result => result?,
        };
        Ok(*self.tgid.get_or_init(|| tgid))
    }

    /// A duplicate of its descriptor `fd`, closed on exec. Descriptor tables can differ between threads: it is
    /// this thread's (before Linux 6.9: the one of the first thread of its process).
    ///
    /// # Errors
    /// `EBADF` when there is none; `EPERM` without the right to examine the caller.
    pub fn get_fd(&self, fd: i32) -> Result<OwnedFd, Errno> {
        if fd < 0 {
            return Err(Errno::BADF);
        }
        pidfd_getfd(self.pidfd()?, fd, PidfdGetfdFlags::empty()).map_err(errno::from_rustix)
    }

    /// Copies from its memory, which must be readable for it.
    ///
    /// # Errors
    /// `EFAULT` unless all of it could be read.
    pub fn read_mem(&self, addr: u64, buf: &mut [u8]) -> Result<(), Errno> {
        let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        let remote = remote(addr, buf.len())?;
        // SAFETY: the local vector is `buf`, exclusively borrowed; remote addresses are not accessed as memory
        // of this process.
        let read = unsafe { libc::process_vm_readv(self.tid, &raw const local, 1, &raw const remote, 1, 0) };
        if usize::try_from(read) == Ok(buf.len()) { Ok(()) } else { Err(Errno::FAULT) }
    }

    /// Copies into its memory, which must be writable for it.
    ///
    /// # Errors
    /// `EFAULT` unless all of it could be written; a part may have been.
    pub fn write_mem(&self, addr: u64, data: &[u8]) -> Result<(), Errno> {
        let local = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
        let remote = remote(addr, data.len())?;
        // SAFETY: the local vector is `data`, which this call only reads; remote addresses are not accessed as
        // memory of this process.
        let written =
            unsafe { libc::process_vm_writev(self.tid, &raw const local, 1, &raw const remote, 1, 0) };
        if usize::try_from(written) == Ok(data.len()) { Ok(()) } else { Err(Errno::FAULT) }
    }

    /// Sets bits in words of its memory: `(index, bits)`, in ascending order of the indexes of words behind `addr`. Other bits and words
    /// stay as they are, unless the caller changes them at the same time.
    ///
    /// # Errors
    /// `EFAULT` when a word cannot be read and written; some may have been changed.
    pub fn set_bits(&self, addr: u64, bits: &[(u64, u64)]) -> Result<(), Errno> {
        // Words that follow each other are one piece; a call takes `IOV_MAX` of them.
        let mut pieces: Vec<libc::iovec> = Vec::with_capacity(bits.len().min(IOV_MAX));
        let mut begin = 0;
        let mut next = None;
        for (index, &(word, _)) in bits.iter().enumerate() {
            match pieces.last_mut() {
                Some(last) if next == Some(word) => last.iov_len += WORD,
                _ => {
                    if pieces.len() == IOV_MAX {
                        self.set_words(&pieces, bits.get(begin..index).unwrap_or_default())?;
                        pieces.clear();
                        begin = index;
                    }
                    let at = word.checked_mul(WORD as u64).and_then(|offset| addr.checked_add(offset));
                    pieces.push(remote(at.ok_or(Errno::FAULT)?, WORD)?);
                }
            }
            next = word.checked_add(1);
        }
        self.set_words(&pieces, bits.get(begin..).unwrap_or_default())
    }

    /// Sets bits in the words of `pieces`, one for each element of `bits`.
    fn set_words(&self, pieces: &[libc::iovec], bits: &[(u64, u64)]) -> Result<(), Errno> {
        if bits.is_empty() {
            return Ok(());
        }
        let mut words = vec![0_u64; bits.len()];
        let len = words.len() * WORD;
        let local = libc::iovec { iov_base: words.as_mut_ptr().cast(), iov_len: len };
        let count = pieces.len() as libc::c_ulong;
        // SAFETY: the local vector is `words`, which nobody else uses; remote addresses are not accessed as memory of this process.
        let read =
            unsafe { libc::process_vm_readv(self.tid, &raw const local, 1, pieces.as_ptr(), count, 0) };
        if usize::try_from(read) != Ok(len) {
            return Err(Errno::FAULT);
        }
        words.iter_mut().zip(bits).for_each(|(word, (_, bits))| *word |= bits);
        // SAFETY: as above; this call only reads `words`.
        let written =
            unsafe { libc::process_vm_writev(self.tid, &raw const local, 1, pieces.as_ptr(), count, 0) };
        if usize::try_from(written) == Ok(len) { Ok(()) } else { Err(Errno::FAULT) }
    }

    /// Checks that it may read and write `len` bytes of its memory at `addr`, by its mappings.
    ///
    /// # Errors
    /// `EFAULT` when it may not; what opening its mappings reports.
    pub fn check_writable(&self, addr: u64, len: u64) -> Result<(), Errno> {
        let end = addr.checked_add(len).ok_or(Errno::FAULT)?;
        let maps = self.open_proc("maps", OFlags::RDONLY)?;
        let mut at = addr;
        while at < end {
            let vma = vma_at(&maps, at)?.filter(|vma| vma.readable && vma.writable).ok_or(Errno::FAULT)?;
            at = vma.end;
        }
        Ok(())
    }

    /// Its soft `RLIMIT_MEMLOCK` in pages; 0 when it cannot be read, so that nothing is pinned for a process
    /// whose limit is unknown.
    #[must_use]
    pub fn memlock_pages(&self) -> u64 {
        crate::rlimit::memlock_of(self.tid).map_or(0, |limit| limit.soft.unwrap_or(u64::MAX) / PAGE_SIZE)
    }

    /// Whether it runs in the address space `owner`, as the kernel's check `dev->mm == current->mm` tells.
    ///
    /// All three conditions must hold, since none is sufficient alone:
    /// 1. the held address space still has users (an exec or exit leaves none);
    /// 2. the caller is a thread of the owner, or `kcmp` finds both in one address space (vfork; kcmp alone says
    ///    no once the first thread of the owner has ended);
    /// 3. the caller has, at the address of the random bytes of the held address space, these bytes (an exec whose
    ///    old address space a `CLONE_VM` child keeps alive passes the other two; its new image has bytes of its own).
    ///
    /// It is stricter than the kernel in one case: a `CLONE_VM` child whose parent, the owner, has ended is no longer
    /// recognised, because kcmp has nothing to compare it with.
    #[must_use]
    pub fn is(&self, owner: &OwnerSpace) -> bool {
        let Some(held) = owner.random() else { return false };
        let Ok(pid) = self.pid() else { return false };
        let same_process = pid == owner.pid() || self.shares_memory_with(owner.pid());
        let mut here = [0; 16];
        let same = same_process && self.read_mem(held.addr, &mut here).is_ok() && here == held.bytes;
        if same {
            owner.set_last_thread(self.tid);
        }
        same
    }

    /// The name of the thread, for display; empty when it has ended.
    #[must_use]
    pub fn comm(&self) -> String {
        self.proc_text("comm").map_or_else(|_| String::new(), |text| text.trim_end().to_owned())
    }

    /// The address of its random bytes.
    pub(crate) fn random_addr(&self) -> Result<u64, Errno> {
        at_random(&self.proc_bytes("auxv", AUXV_MAX)?).ok_or(Errno::FAULT)
    }

    /// Opens `/proc/TID/name`.
    pub(crate) fn open_proc(&self, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        rustix::fs::open(format!("/proc/{}/{name}", self.tid), flags | OFlags::CLOEXEC, Mode::empty())
            .map_err(
                |error| {
                    if error == rustix::io::Errno::NOENT { errno::SRCH } else { errno::from_rustix(error) }
                },
            )
    }

    fn shares_memory_with(&self, pid: i32) -> bool {
        const KCMP_VM: libc::c_int = 1;
        // SAFETY: kcmp compares kernel objects of two processes and touches no memory of this one.
        unsafe { libc::syscall(libc::SYS_kcmp, self.tid, pid, KCMP_VM, 0_u64, 0_u64) == 0 }
    }

    fn pidfd(&self) -> Result<&OwnedFd, Errno> {
        if let Some(fd) = self.pidfd.get() {
            return Ok(fd);
        }
        let open = |id, flags| pidfd_open(Pid::from_raw(id).ok_or(rustix::io::Errno::SRCH)?, flags);
        let fd = match open(self.tid, PIDFD_THREAD) {
            // Linux before 6.9 supports pidfds of whole processes only.
            Err(rustix::io::Errno::INVAL) => {
                open(self.tgid_by_status()?, PidfdFlags::empty()).map_err(errno::from_rustix)?
            }
            result => result.map_err(errno::from_rustix)?,
        };
        Ok(self.pidfd.get_or_init(|| fd))
    }

    fn tgid_by_pidfd(&self) -> Result<i32, Errno> {
        let mut info = PidfdInfo { mask: PIDFD_INFO_PID, ..PidfdInfo::default() };
        PIDFD_GET_INFO.update(self.pidfd()?, &mut info)?;
        i32::try_from(info.tgid).ok().filter(|&tgid| tgid > 0).ok_or(errno::SRCH)
    }

    fn tgid_by_status(&self) -> Result<i32, Errno> {
        let status = self.proc_text("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
        line.and_then(|tgid| tgid.trim().parse().ok()).ok_or(errno::SRCH)
    }

    fn proc_text(&self, name: &str) -> Result<String, Errno> {
        self.proc_bytes(name, 16384).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    fn proc_bytes(&self, name: &str, limit: usize) -> Result<Vec<u8>, Errno> {
        let fd = self.open_proc(name, OFlags::RDONLY)?;
        let mut bytes = vec![0; limit];
        let mut read = 0;
        while let Some(rest) = bytes.get_mut(read..).filter(|rest| !rest.is_empty()) {
            match rustix::io::read(&fd, rest) {
                Ok(0) => break,
                Ok(count) => read += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(errno::from_rustix(error)),
            }
        }
        bytes.truncate(read);
        Ok(bytes)
    }
}

fn remote(addr: u64, len: usize) -> Result<libc::iovec, Errno> {
    let addr = usize::try_from(addr).map_err(|_| Errno::FAULT)?;
    Ok(libc::iovec { iov_base: std::ptr::without_provenance_mut(addr), iov_len: len })
}

/// The address of the random bytes in an auxiliary vector of a 64-bit or a 32-bit program.
fn at_random(auxv: &[u8]) -> Option<u64> {
    let wide = auxv.chunks_exact(8).map(|word| word.try_into().map(u64::from_ne_bytes).unwrap_or(0));
    let narrow = auxv.chunks_exact(4).map(|word| word.try_into().map(u32::from_ne_bytes).unwrap_or(0).into());
    find_entry(wide).or_else(|| find_entry(narrow))
}

fn find_entry(mut words: impl Iterator<Item = u64>) -> Option<u64> {
    while let (Some(kind), Some(value)) = (words.next(), words.next()) {
        match kind {
            AT_RANDOM => return Some(value),
            0 => return None,
            _ => {}
        }
    }
    None
}

/// The target of a descriptor's link in `/proc/self/fd`; empty when it cannot be read.
pub(crate) fn describe_fd(fd: impl AsFd) -> String {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    rustix::fs::readlink(path, Vec::new())
        .map_or_else(|_| String::new(), |target| target.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn this_thread() -> Caller {
        Caller::new(rustix::thread::gettid().as_raw_nonzero().get()).unwrap()
    }

    #[test]
    fn a_caller_is_found_by_its_thread() {
        let caller = this_thread();
        assert_eq!(caller.pid().unwrap(), i32::try_from(std::process::id()).unwrap());
        assert_eq!(caller.tgid_by_status(), caller.pid());
        assert_eq!(caller.tgid_by_pidfd(), caller.pid());
        assert!(!caller.comm().is_empty());
        assert!(Caller::new(0).is_err() && Caller::new(-1).is_err());
        assert!(Caller::new(i32::MAX).unwrap().pid().is_err());
    }

    #[test]
    fn the_memory_of_a_caller_is_read_and_written() {
        let caller = this_thread();
        let mut memory = [1_u8, 2, 3];
        let addr = memory.as_mut_ptr().expose_provenance() as u64;
        let mut buffer = [0; 3];
        caller.read_mem(addr, &mut buffer).unwrap();
        assert_eq!(buffer, [1, 2, 3]);
        caller.write_mem(addr + 1, &[9]).unwrap();
        assert_eq!(std::hint::black_box(&memory), &[1, 9, 3]);
        for addr in [0, 8, u64::MAX] {
            assert_eq!(caller.read_mem(addr, &mut buffer), Err(Errno::FAULT));
            assert_eq!(caller.write_mem(addr, &buffer), Err(Errno::FAULT));
        }
        let read_only = "text".as_ptr().addr() as u64;
        assert_eq!(
            caller.write_mem(read_only, &[0]),
            Err(Errno::FAULT),
            "the protection of the caller applies"
        );
    }

    #[test]
    fn descriptors_of_a_caller_are_duplicated() {
        let caller = this_thread();
        let memory = crate::memfd::create(c"mine", 0, None).unwrap();
        let copy = caller.get_fd(memory.as_raw_fd()).unwrap();
        assert_eq!(describe_fd(&copy), describe_fd(&memory));
        assert_eq!(caller.get_fd(-1).unwrap_err(), Errno::BADF);
        assert_eq!(caller.get_fd(999_999).unwrap_err(), Errno::BADF);
    }

    #[test]
    fn auxiliary_vectors_of_both_widths_are_parsed() {
        let wide: Vec<u8> =
            [6_u64, 4096, 25, 0x1234, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let narrow: Vec<u8> =
            [6_u32, 4096, 25, 0x1234, 0, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!((at_random(&wide), at_random(&narrow)), (Some(0x1234), Some(0x1234)));
        assert_eq!((at_random(&[]), at_random(&wide[..16])), (None, None));
    }
}
