//! Signals read from a descriptor.
#![expect(unsafe_code, reason = "signalfd(2) and the signal mask are not in rustix")]

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use vdpa_core::Errno;

use crate::errno;

/// Signals that arrive by reading. They stay blocked for the thread that made this and over an exec, so that none is
/// lost while a program replaces itself. Children inherit that: see [`unblock_in_child`].
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Blocks these signals for the calling thread and has them arrive here. To be called while there is one thread.
    ///
    /// # Errors
    /// `EINVAL` for what is no signal; `EMFILE`.
    pub fn new(signals: &[i32]) -> Result<Self, Errno> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: makes an empty set of what it is given; cannot fail.
        unsafe { libc::sigemptyset(set.as_mut_ptr()) };
        for &signal in signals {
            // SAFETY: the set was initialised above; a number that is no signal is refused.
            if unsafe { libc::sigaddset(set.as_mut_ptr(), signal) } != 0 {
                return Err(errno::last());
            }
        }
        // SAFETY: the set is initialised, and nothing is written elsewhere. Cannot fail with SIG_BLOCK.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) };
        // SAFETY: the set is initialised; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(errno::last());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The next signal that has arrived; does not wait.
    #[must_use]
    pub fn next_signal(&self) -> Option<i32> {
        let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
        let got = rustix::io::read(&self.0, &mut info).ok()?;
        let number = info.first_chunk().filter(|_| got == info.len())?;
        i32::try_from(u32::from_ne_bytes(*number)).ok()
    }
}

/// Has the child of `command` start with no signal blocked.
pub fn unblock_in_child(command: &mut Command) -> &mut Command {
    let unblock = || {
        let mut none = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: makes an empty set of what it is given; cannot fail.
        unsafe { libc::sigemptyset(none.as_mut_ptr()) };
        // SAFETY: the set was initialised above, and nothing is written elsewhere. Cannot fail with SIG_SETMASK.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut()) };
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes one system call; it neither allocates nor takes a lock.
    unsafe { command.pre_exec(unblock) }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_read() {
        std::thread::spawn(|| {
            let signals = SignalFd::new(&[libc::SIGUSR1]).unwrap();
            assert_eq!(signals.next_signal(), None);
            // SAFETY: the signal is blocked for this thread, the only one it goes to.
            unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR1) };
            assert_eq!((signals.next_signal(), signals.next_signal()), (Some(libc::SIGUSR1), None));
            assert!(SignalFd::new(&[1000]).is_err());
            let blocked = |command: &mut Command| {
                let output = command.args(["^SigBlk", "/proc/self/status"]).output().unwrap();
                let text = String::from_utf8(output.stdout).unwrap();
                u64::from_str_radix(text.trim_start_matches("SigBlk:").trim(), 16).unwrap()
            };
            assert_ne!(blocked(&mut Command::new("grep")), 0, "a child inherits the mask");
            assert_eq!(blocked(unblock_in_child(&mut Command::new("grep"))), 0);
        })
        .join()
        .unwrap();
    }
}
