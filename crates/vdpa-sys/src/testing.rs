//! For tests: faults of other processes.
#![expect(unsafe_code, reason = "ptrace(2) is not in rustix")]

use rustix::process::Pid;
use vdpa_core::Errno;

use crate::errno;

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
