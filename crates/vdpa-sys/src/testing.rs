//! For tests: faults of other processes, and facilities that the kernel withholds.
#![expect(unsafe_code, reason = "ptrace(2) and seccomp(2) are not in rustix")]

use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::Pid;
use vdpa_core::Errno;

use crate::errno;

/// Makes a program find io_uring forbidden (`EPERM`), as seccomp profiles of containers do it, and so does
/// `kernel.io_uring_disabled=2` for all processes. Its children inherit that.
pub fn without_io_uring(command: &mut Command) {
    // SAFETY: the closure makes two system calls and allocates nothing, so it may run between fork and exec.
    unsafe { command.pre_exec(|| refuse_io_uring().map_err(std::io::Error::from)) };
}

fn refuse_io_uring() -> Result<(), rustix::io::Errno> {
    const fn statement(code: u32, jump_true: u8, jump_false: u8, k: u32) -> libc::sock_filter {
        #[expect(clippy::cast_possible_truncation, reason = "codes of the classic BPF have 16 bits")]
        let code = code as u16;
        libc::sock_filter { code, jt: jump_true, jf: jump_false, k }
    }
    #[expect(clippy::cast_possible_truncation, reason = "the number of a system call")]
    let mut filter = [
        // The number of the system call is the first word of what the filter examines.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, libc::SYS_io_uring_setup as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    let none = 0;
    // SAFETY: sets a flag of this process.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, none, none, none) };
    if result != 0 {
        return Err(rustix::io::Errno::PERM);
    }
    // SAFETY: `program` and the filter that it names exist during the call, which copies them.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    if result == 0 { Ok(()) } else { Err(rustix::io::Errno::PERM) }
}

/// One thread of another process that is stopped, as if it hung, while the others of that process go on. Dropping it lets the
/// thread go on. To be used and dropped by one thread of the test.
#[derive(Debug)]
pub struct StoppedThread(libc::pid_t);

impl StoppedThread {
    /// Stops the thread, wherever it is.
    ///
    /// # Errors
    /// Of ptrace(2): `ESRCH` without such a thread, `EPERM`.
    pub fn stop(thread: Pid) -> Result<Self, Errno> {
        let tid = thread.as_raw_nonzero().get();
        ptrace(libc::PTRACE_SEIZE, tid)?;
        let this = Self(tid);
        ptrace(libc::PTRACE_INTERRUPT, tid)?;
        this.wait(0);
        Ok(this)
    }

    /// Whether the thread has ended, which nobody else hears before this was called.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let (found, status) = self.wait(libc::WNOHANG);
        found < 0 || found > 0 && (libc::WIFEXITED(status) || libc::WIFSIGNALED(status))
    }

    fn wait(&self, flags: i32) -> (i32, i32) {
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result, and nothing else is written.
        let found = unsafe { libc::waitpid(self.0, &raw mut status, libc::__WALL | flags) };
        (found, status)
    }
}

impl Drop for StoppedThread {
    fn drop(&mut self) {
        // One that has ended is traced no more.
        let _ = ptrace(libc::PTRACE_DETACH, self.0);
    }
}

fn ptrace(request: libc::c_uint, tid: libc::pid_t) -> Result<(), Errno> {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: these requests take no address and no data, and change nothing in the memory of this process.
    if unsafe { libc::ptrace(request, tid, none, none) } < 0 { Err(errno::last()) } else { Ok(()) }
}
