//! Scheduling of work with low priority.
#![expect(unsafe_code, reason = "sched_setscheduler(2) is not in rustix")]

use rustix::process::Pid;
use vdpa_core::Errno;

use crate::errno;

/// Gives a thread the policy `SCHED_IDLE`, with which it runs only on an otherwise idle CPU. For freeing large memory, which
/// would delay threads that were just woken. `None` is the calling thread. Reverting it may need privileges.
///
/// # Errors
/// `ESRCH`; `EPERM` for a thread of another user.
pub fn run_when_idle(thread: Option<Pid>) -> Result<(), Errno> {
    /// `struct sched_param` of the kernel, which has one field; some C libraries have more.
    static PARAMETERS: libc::c_int = 0;
    let thread = thread.map_or(0, |id| id.as_raw_nonzero().get());
    // SAFETY: the parameters are read by the call only. A policy changes when a thread runs, not what it does. The system call
    // itself, since musl's function always fails.
    let set = unsafe {
        libc::syscall(libc::SYS_sched_setscheduler, thread, libc::SCHED_IDLE, &raw const PARAMETERS)
    };
    if set == 0 { Ok(()) } else { Err(errno::last()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_can_be_set_to_run_when_idle() {
        let policy = || {
            let thread = rustix::thread::gettid().as_raw_nonzero();
            let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
            // Field 41, the policy, counted from after the name.
            stat.rsplit_once(") ").unwrap().1.split(' ').nth(38).unwrap().parse::<i32>().unwrap()
        };
        std::thread::spawn(move || {
            assert_eq!(policy(), libc::SCHED_OTHER);
            run_when_idle(None).unwrap();
            assert_eq!(policy(), libc::SCHED_IDLE);
        })
        .join()
        .unwrap();
        assert_eq!(run_when_idle(Pid::from_raw(i32::MAX)), Err(errno::SRCH));
    }
}
