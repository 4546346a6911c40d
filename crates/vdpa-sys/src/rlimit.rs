//! `RLIMIT_MEMLOCK` and `RLIMIT_NOFILE`.
#![expect(unsafe_code, reason = "prlimit(2) of another process without setting anything is not in rustix")]

use std::mem::MaybeUninit;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit, setrlimit};
use vdpa_core::Errno;

use crate::errno;

/// A limit in bytes; `None` is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// In force.
    pub soft: Option<u64>,
    /// How far an unprivileged process may raise it.
    pub hard: Option<u64>,
}

/// The limit on locked memory of this process.
#[must_use]
pub fn memlock() -> Limit {
    let limit = getrlimit(Resource::Memlock);
    Limit { soft: limit.current, hard: limit.maximum }
}

/// Raises the soft limit on locked memory of this process to at least `bytes` (`None`: no limit), and the hard
/// limit where that is below. Never lowers either.
///
/// # Errors
/// `EPERM` when the hard limit would have to be raised without `CAP_SYS_RESOURCE`.
pub fn raise_memlock(bytes: Option<u64>) -> Result<(), Errno> {
    let now = memlock();
    let at_least = |limit: Option<u64>| limit.zip(bytes).map(|(a, b)| a.max(b));
    let new = Rlimit { current: at_least(now.soft), maximum: at_least(now.hard) };
    if (Limit { soft: new.current, hard: new.maximum }) == now {
        return Ok(());
    }
    setrlimit(Resource::Memlock, new).map_err(errno::from_rustix)
}

/// The limit on descriptors of this process: one more than the greatest that it may have.
#[must_use]
pub fn nofile() -> Limit {
    let limit = getrlimit(Resource::Nofile);
    Limit { soft: limit.current, hard: limit.maximum }
}

/// Raises the soft limit on descriptors of this process to the hard one, which any process may. To be called before a program that uses
/// select(2) could be started: the limit is inherited.
///
/// # Errors
/// None that is known.
pub fn raise_nofile() -> Result<(), Errno> {
    let Limit { soft, hard } = nofile();
    if soft == hard {
        return Ok(());
    }
    setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard }).map_err(errno::from_rustix)
}

/// The limit on locked memory of the process or thread `pid`.
///
/// # Errors
/// `ESRCH`; `EPERM` for a process of another user without `CAP_SYS_RESOURCE` where `/proc/PID/limits`, which tells everybody, is not to be seen.
pub fn memlock_of(pid: i32) -> Result<Limit, Errno> {
    match prlimit_memlock(pid) {
        Err(Errno::PERM) => {
            let text = std::fs::read_to_string(format!("/proc/{pid}/limits")).map_err(|_| Errno::PERM)?;
            find_memlock(&text).ok_or(Errno::PERM)
        }
        result => result,
    }
}

/// Finds the line in the form of `/proc/PID/limits`: name, soft limit, hard limit, unit.
fn find_memlock(text: &str) -> Option<Limit> {
    let values = text.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    let mut values = values.split_whitespace().map(|value| match value {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    });
    Some(Limit { soft: values.next()??, hard: values.next()?? })
}

fn prlimit_memlock(pid: i32) -> Result<Limit, Errno> {
    let mut old = MaybeUninit::<libc::rlimit64>::uninit();
    // SAFETY: a null `new_limit` sets nothing, and `old` has room for the one structure the call writes.
    let result = unsafe { libc::prlimit64(pid, libc::RLIMIT_MEMLOCK, std::ptr::null(), old.as_mut_ptr()) };
    if result != 0 {
        return Err(errno::last());
    }
    // SAFETY: the call succeeded and wrote the whole structure.
    let old = unsafe { old.assume_init() };
    let limit = |value| if value == libc::RLIM64_INFINITY { None } else { Some(value) };
    Ok(Limit { soft: limit(old.rlim_cur), hard: limit(old.rlim_max) })
}

/// Sets the soft limit on locked memory of the process `pid`, which must not exceed its hard one.
///
/// # Errors
/// `EINVAL` beyond the hard limit; `ESRCH`; `EPERM` for a process of another user without `CAP_SYS_RESOURCE`.
pub fn set_memlock_of(pid: i32, bytes: u64) -> Result<(), Errno> {
    let hard = memlock_of(pid)?.hard;
    let process = Pid::from_raw(pid).ok_or(errno::SRCH)?;
    prlimit(Some(process), Resource::Memlock, Rlimit { current: Some(bytes), maximum: hard })
        .map(drop)
        .map_err(errno::from_rustix)
}

/// Whether this process may pin memory (io_uring buffers, mlock) without a limit: it has `CAP_IPC_LOCK` in the
/// initial user namespace. In a namespace of its own, root is held to `RLIMIT_MEMLOCK`.
#[must_use]
pub fn memlock_exempt() -> bool {
    const CAP_IPC_LOCK: u32 = 14;
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let initial = read("/proc/self/uid_map").split_whitespace().eq(["0", "0", "4294967295"]);
    let effective = read("/proc/self/status")
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    initial && effective.is_some_and(|caps| caps >> CAP_IPC_LOCK & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_a_child_is_set() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        set_memlock_of(pid, 8192).unwrap();
        assert_eq!(memlock_of(pid).unwrap().soft, Some(8192));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert_eq!(set_memlock_of(i32::MAX, 0), Err(errno::SRCH));
    }

    #[test]
    fn the_limit_is_read_as_text_too() {
        let text = std::fs::read_to_string("/proc/self/limits").unwrap();
        assert_eq!(find_memlock(&text), Some(memlock()));
        let limit = |soft, hard| Some(Limit { soft, hard });
        assert_eq!(
            find_memlock("Max locked memory         4096                 unlimited            bytes\n"),
            limit(Some(4096), None)
        );
        assert_eq!(find_memlock("Max locked memory  -1  unlimited  bytes\n"), None);
        assert_eq!(find_memlock("Max processes  1  1  processes\n"), None);
    }

    #[test]
    fn both_ways_give_the_own_limit_and_it_is_never_lowered() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(memlock_of(pid).unwrap(), memlock());
        let before = memlock();
        raise_memlock(Some(1)).unwrap();
        assert_eq!(memlock(), before);
        assert_eq!(memlock_of(i32::MAX).unwrap_err(), errno::SRCH);
    }
}
