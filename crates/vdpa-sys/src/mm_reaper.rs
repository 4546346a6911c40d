//! A helper process that frees the old address space after an exec, so that the exec does not wait for it.
//!
//! An exec frees the page tables of the old image, which takes tens of milliseconds for each GiB of 4 KiB pages. If another
//! process shares the address space (`CLONE_VM`), the exec only drops its reference. The helper, as the last user, frees the
//! tables when it ends, on another CPU.
#![expect(unsafe_code, reason = "a process that shares the address space is made by a raw clone")]

use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;
use rustix::time::Timespec;
use vdpa_core::Errno;

use crate::{errno, priority};

/// How long the reaper waits after the exec before it frees the page tables: longer than a new image takes to open its
/// devices. Before that, freeing would compete with it for CPUs and for the locks of the same memory objects.
const GRACE_NS: i64 = 50_000_000;
/// Stack in bytes; the process makes a few system calls only.
const STACK: usize = 64 << 10;

/// A process that shares this address space, and ends after this process has made an exec, has ended or has dropped this value.
///
/// All signals are blocked in it, so it runs no signal handler. Its only descriptors are two pipes. It is not a child of this
/// process: init, or the nearest subreaper, collects it.
#[derive(Debug)]
pub struct MmReaper {
    /// Closed by an exec and by the end of this process, which tells the reaper to end.
    release: Option<OwnedFd>,
    /// Reads end of file once the reaper has released the address space and with it the stack.
    done: OwnedFd,
    pid: i32,
    _stack: Box<[u8]>,
}

/// The arguments and results of the intermediate process, on the stack of the caller, which waits.
struct Job {
    release: RawFd,
    done: RawFd,
    stack_top: *mut c_void,
    reaper: AtomicI32,
}

impl MmReaper {
    /// Starts a reaper. Blocks for about 0.2 ms, after which much of the program's memory is no longer in the CPU caches. It may
    /// be started long before the exec, also by a thread that ends before. It ends if this process ends without an exec.
    ///
    /// # Errors
    /// Of pipe2(2) and clone(2), such as `EAGAIN` at a limit on processes or `EPERM` under seccomp; `ENOSYS` before
    /// Linux 5.9.
    pub fn spawn() -> Result<Self, Errno> {
        let (release_read, release) = pipe_with(PipeFlags::CLOEXEC).map_err(errno::from_rustix)?;
        let (done, done_write) = pipe_with(PipeFlags::CLOEXEC).map_err(errno::from_rustix)?;
        let mut stack = vec![0_u8; STACK].into_boxed_slice();
        let mut first_stack = vec![0_u8; STACK].into_boxed_slice();
        let job = Job {
            release: release_read.as_raw_fd(),
            done: done_write.as_raw_fd(),
            stack_top: stack.as_mut_ptr_range().end.cast(),
            reaper: AtomicI32::new(0),
        };
        let blocked = Signals::block();
        // SAFETY: the stack has STACK bytes below its end and lives until the intermediate process is done: CLONE_VFORK
        // suspends this thread until then. So does `job`, which it reads through the pointer. `intermediate` uses
        // nothing of the thread that is suspended but its thread-local errno.
        let first = unsafe {
            libc::clone(
                intermediate,
                first_stack.as_mut_ptr_range().end.cast(),
                libc::CLONE_VM | libc::CLONE_VFORK,
                ptr::from_ref(&job).cast_mut().cast(),
            )
        };
        let started = if first < 0 { Err(errno::last()) } else { Ok(()) };
        drop(blocked);
        started?;
        let status = wait_for(first)?;
        drop(first_stack);
        if !libc::WIFEXITED(status) || libc::WEXITSTATUS(status) != 0 {
            return Err(Errno::from_raw(libc::WEXITSTATUS(status)));
        }
        let pid = job.reaper.load(Ordering::Relaxed);
        Ok(Self { release: Some(release), done, pid, _stack: stack })
    }

    /// Its process id.
    #[must_use]
    pub const fn pid(&self) -> i32 {
        self.pid
    }
}

impl Drop for MmReaper {
    fn drop(&mut self) {
        if let Some(release) = self.release.take() {
            // A byte tells the reaper that there was no exec, so that it ends without delay.
            let _ = rustix::io::write(&release, &[0]);
        }
        // The kernel closes the other end after the reaper has released the address space, and the stack with it.
        let mut byte = [0];
        while rustix::io::read(&self.done, &mut byte) == Err(rustix::io::Errno::INTR) {}
    }
}

/// Starts the reaper and ends, so that the reaper is not a child of this process. Its exit status is 0 or an errno.
extern "C" fn intermediate(job: *mut c_void) -> c_int {
    // SAFETY: the caller's `Job`, which waits in `spawn` until this process has ended.
    let job = unsafe { &*job.cast::<Job>() };
    // This process has a copy of the descriptor table. All but the two pipes are closed, since they would keep files of the
    // old image open.
    let (low, high) = (job.release.min(job.done), job.release.max(job.done));
    for (first, last) in [(0, low - 1), (low + 1, high - 1), (high + 1, c_int::MAX)] {
        // SAFETY: closes descriptors of this process's own table, of which nothing here uses any but the two left out.
        if first <= last && unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } != 0 {
            return errno::last().raw();
        }
    }
    let release = ptr::without_provenance_mut(usize::try_from(job.release).unwrap_or(0));
    // SAFETY: the stack belongs to the `MmReaper` that is being made, which waits in its drop until the
    // reaper is done with it. `reap` gets a number, no pointer, and shares nothing with anybody.
    let reaper = unsafe { libc::clone(reap, job.stack_top, libc::CLONE_VM, release) };
    job.reaper.store(reaper, Ordering::Relaxed);
    // Freeing has no hurry: it must not take CPU time from the new image and the servers of its devices.
    let _ = priority::run_when_idle(Pid::from_raw(reaper.max(0)));
    if reaper < 0 { errno::last().raw() } else { 0 }
}

/// The reaper: waits until the other end of the pipe is closed (by an exec or by the end of the process) or has a byte.
///
/// It shares thread-local storage with a thread that continues to run, or ends. So it makes system calls without libc only
/// (rustix makes its own), and neither allocates nor panics.
extern "C" fn reap(release: *mut c_void) -> c_int {
    let Ok(number) = RawFd::try_from(release.addr()) else { return 1 };
    // SAFETY: open in this process's own table until it ends; nobody else has that table.
    let pipe = unsafe { BorrowedFd::borrow_raw(number) };
    let mut byte = [0];
    loop {
        match rustix::io::read(pipe, &mut byte) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) => break,
            Ok(_) | Err(_) => return 0,
        }
    }
    let grace = Timespec { tv_sec: 0, tv_nsec: GRACE_NS };
    // It is not interrupted, since signals are blocked.
    let _ = rustix::thread::nanosleep(&grace);
    0
}

fn wait_for(pid: i32) -> Result<c_int, Errno> {
    let mut status = 0;
    loop {
        // SAFETY: `status` has room for what is written. The process sends no signal when it ends, and only a wait with
        // __WALL for this very pid collects it.
        if unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) } == pid {
            return Ok(status);
        }
        match errno::last() {
            Errno::INTR => {}
            error => return Err(error),
        }
    }
}

/// Blocks all signals of this thread until it is dropped. A signal handler of the program must never run in a process that
/// only shares its memory.
struct Signals(libc::sigset_t);

impl Signals {
    fn block() -> Self {
        let mut all = std::mem::MaybeUninit::uninit();
        let mut before = std::mem::MaybeUninit::uninit();
        // SAFETY: fills the set it is given, and cannot fail.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        // SAFETY: `all` was filled; both pointers are to sets of this frame. Cannot fail for SIG_SETMASK.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
        // SAFETY: written by the call above.
        Self(unsafe { before.assume_init() })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: restores a mask that the kernel gave; nothing is written.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(pid: i32) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    }

    #[test]
    fn a_reaper_shares_memory_holds_no_files_and_ends_on_demand() {
        let mut counter = Box::new(0x5eed_u64);
        let reaper = MmReaper::spawn().unwrap();
        let pid = reaper.pid();
        assert!(matches!(state(pid), Some('S' | 'R')), "{:?}", state(pid));
        assert_eq!(std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(), 2);
        // The reaper shares the memory and has no copy: a write after its start is visible through it.
        *counter = 0x1234_5678_9abc_def0;
        let mem = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
        let mut bytes = [0; 8];
        let at = ptr::from_ref(&*counter).addr() as u64;
        std::os::unix::fs::FileExt::read_exact_at(&mem, &mut bytes, at).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), *counter);
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let policy = stat.rsplit_once(") ").unwrap().1.split(' ').nth(38).unwrap();
        assert_eq!(policy, libc::SCHED_IDLE.to_string(), "it frees memory only on an idle CPU");
        let blocked = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let blocked = blocked.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        assert_eq!(blocked.trim(), "fffffffe7ffbfeff", "all but KILL, STOP and the two of libc");
        drop(reaper);
        // It has released the address space already, and ends when a CPU is idle.
        let begin = std::time::Instant::now();
        while !matches!(state(pid), None | Some('Z' | 'X')) {
            assert!(begin.elapsed().as_secs() < 30, "{:?}", state(pid));
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_reaper_leaves_no_descriptor_and_no_child() {
        let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = fds();
        for _ in 0..50 {
            drop(MmReaper::spawn().unwrap());
        }
        assert_eq!(fds(), before);
        // SAFETY: collects nothing unless there is a child, and writes nothing.
        let child = unsafe { libc::waitpid(-1, ptr::null_mut(), libc::WNOHANG | libc::__WALL) };
        assert_eq!((child, errno::last().raw()), (-1, libc::ECHILD), "no child is left to wait for");
    }
}
