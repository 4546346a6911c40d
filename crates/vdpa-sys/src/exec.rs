//! Replacing the program of this process.
#![expect(unsafe_code, reason = "exec takes arrays of pointers")]

use std::convert::Infallible;
use std::ffi::{CStr, CString, c_char};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::ptr;

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use vdpa_core::Errno;

use crate::errno;

/// The program to run.
#[derive(Clone, Copy, Debug)]
pub enum Program<'a> {
    /// By path, without a search of `PATH`.
    Path(&'a CStr),
    /// By descriptor (`execveat` with `AT_EMPTY_PATH`): exactly the file that was checked. For a script
    /// the descriptor must stay open across the exec.
    Fd(BorrowedFd<'a>),
}

/// Sets or clears the close-on-exec flag of `fd`.
///
/// # Errors
/// Those of fcntl(2); none is known for an open descriptor.
pub fn set_close_on_exec(fd: impl AsFd, close: bool) -> Result<(), Errno> {
    let flags = fcntl_getfd(&fd).map_err(errno::from_rustix)?;
    let mut wanted = flags;
    wanted.set(FdFlags::CLOEXEC, close);
    if wanted == flags {
        return Ok(());
    }
    fcntl_setfd(&fd, wanted).map_err(errno::from_rustix)
}

/// Replaces the program of this process. Returns only on failure, and nothing has changed then.
///
/// Unlike `std::os::unix::process::CommandExt::exec` it keeps the signal mask and the ignored signals: a blocked signal stays
/// blocked, and a pending one stays pending, until the new program handles it. All other threads end at once.
///
/// # Errors
/// Of execve(2): `ENOENT`, `EACCES`, `ENOEXEC`, `E2BIG`, `ETXTBSY`, ...
pub fn execve(program: Program<'_>, argv: &[CString], env: &[CString]) -> Result<Infallible, Errno> {
    let argv = pointers(argv);
    let env = pointers(env);
    match program {
        Program::Path(path) => {
            // SAFETY: `path` is a C string; both arrays end with a null pointer, and the C strings that they
            // point to are borrowed by this function until after the call.
            unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr()) };
        }
        Program::Fd(fd) => {
            // SAFETY: as above; the path is an empty C string, and the descriptor is borrowed.
            unsafe {
                libc::syscall(
                    libc::SYS_execveat,
                    fd.as_raw_fd(),
                    c"".as_ptr(),
                    argv.as_ptr(),
                    env.as_ptr(),
                    libc::AT_EMPTY_PATH,
                )
            };
        }
    }
    Err(errno::last())
}

/// Starts `command` as a child that inherits the descriptors `keep` under their numbers, besides the three standard ones and
/// those without close-on-exec flag. Closes `keep` in this process once the child has started.
///
/// # Errors
/// Of `Command::spawn`: the program cannot be run, or there can be no more processes.
pub fn spawn(command: &mut Command, keep: Vec<OwnedFd>) -> io::Result<Child> {
    let inherit = move || {
        for fd in &keep {
            fcntl_setfd(fd, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes fcntl calls on descriptors that were open before the fork; it
    // neither allocates nor takes a lock, and its error is made of a number.
    unsafe { command.pre_exec(inherit) };
    command.spawn()
}

/// Requests `signal` for this process when the thread that created it ends (`PR_SET_PDEATHSIG`); 0 for none. Cleared by fork, and by
/// the exec of a program that gains privileges.
///
/// The parent may have ended before the call, so compare `getppid()` afterwards.
///
/// # Errors
/// `EINVAL` for an invalid signal number.
pub fn set_parent_death_signal(signal: i32) -> Result<(), Errno> {
    let signal = match signal {
        0 => None,
        number => Some(Signal::from_named_raw(number).ok_or(Errno::INVAL)?),
    };
    set_parent_process_death_signal(signal).map_err(errno::from_rustix)
}

/// Makes the child of `command` receive `SIGTERM` when the thread that starts it ends, even by `SIGKILL`. The starting thread
/// must live as long as the child is needed.
pub fn terminate_with_parent(command: &mut Command) -> &mut Command {
    let starter = std::process::id();
    let bind = move || {
        set_parent_process_death_signal(Some(Signal::TERM))?;
        // The parent may have ended before this request.
        let parent = getppid().map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs());
        if parent == starter { Ok(()) } else { Err(rustix::io::Errno::SRCH.into()) }
    };
    // SAFETY: between fork and exec the closure makes two system calls, prctl and getppid; it neither allocates nor takes a
    // lock, and its error is made of a number.
    unsafe { command.pre_exec(bind) }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_exec_returns_with_the_reason() {
        let missing = Program::Path(c"/no/such/program");
        assert_eq!(execve(missing, &[], &[]).unwrap_err(), Errno::NOENT);
        let no_program = crate::memfd::sealed(c"not-a-program", b"text").unwrap();
        let error = execve(Program::Fd(no_program.as_fd()), &[c"x".into()], &[]).unwrap_err();
        assert_eq!(error.raw(), libc::ENOEXEC);
    }

    #[test]
    fn a_child_inherits_the_given_descriptors_under_their_numbers() {
        let given = crate::memfd::sealed(c"given", b"hello").unwrap();
        let kept = crate::memfd::sealed(c"kept", b"secret").unwrap();
        let (given_number, kept_number) = (given.as_raw_fd(), kept.as_raw_fd());
        let script = format!("cat /proc/self/fd/{given_number} && ! test -e /proc/self/fd/{kept_number}");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script]).stdout(std::process::Stdio::piped());
        let child = spawn(&mut command, vec![given]).unwrap();
        drop(command);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        assert_eq!(output.stdout, b"hello");
        assert!(fcntl_getfd(&kept).unwrap().contains(FdFlags::CLOEXEC));
        assert!(spawn(&mut Command::new("/no/such/program"), Vec::new()).is_err());
    }

    #[test]
    fn close_on_exec_is_set_and_cleared() {
        let fd = crate::memfd::create(c"kept", 0, None).unwrap();
        set_close_on_exec(&fd, false).unwrap();
        assert!(!fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
        set_close_on_exec(&fd, true).unwrap();
        assert!(fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
    }

    #[test]
    fn a_death_signal_must_be_a_signal() {
        assert_eq!(set_parent_death_signal(4711), Err(Errno::INVAL));
        set_parent_death_signal(libc::SIGTERM).unwrap();
        set_parent_death_signal(0).unwrap();
    }
}
