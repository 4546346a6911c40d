//! What a thread of another process is doing, as far as the kernel tells.

use std::fs;

/// Whether the thread `tid` of process `pid` sleeps until something outside its process happens: a page of memory that another
/// process provides, a file, a pipe. `false` for one that runs, is stopped, or waits for a lock of its own process, and for one of
/// which nothing can be said. A snapshot: it may do something else by now.
#[must_use]
pub fn waits_for_others(pid: i32, tid: u64) -> bool {
    let read = |name| fs::read_to_string(format!("/proc/{pid}/task/{tid}/{name}")).unwrap_or_default();
    is_waiting(&read("stat"), &read("syscall"))
}

/// The same of the texts of proc(5).
fn is_waiting(stat: &str, syscall: &str) -> bool {
    // The name of the thread, in parentheses, may contain anything.
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    // -1 is no system call: asleep, it waits for a page.
    let number = syscall.split_whitespace().next().and_then(|word| word.parse::<i64>().ok());
    let futex = [libc::SYS_futex, SYS_FUTEX_WAITV];
    matches!(state, Some('S' | 'D')) && number.is_some_and(|number| !futex.contains(&number))
}

/// futex_waitv(2) has one number on every architecture.
const SYS_FUTEX_WAITV: libc::c_long = 449;

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    /// Whether a thread that does this waits for others, once it is in this state; `end` ends it.
    fn waits(work: impl FnOnce() + Send, state: &str, end: impl FnOnce()) -> bool {
        let tid = AtomicU64::new(0);
        let pid = i32::try_from(std::process::id()).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let id = rustix::thread::gettid().as_raw_nonzero().get();
                tid.store(u64::try_from(id).unwrap(), Ordering::Release);
                work();
            });
            let deadline = Instant::now() + Duration::from_secs(10);
            let stat =
                || fs::read_to_string(format!("/proc/{pid}/task/{}/stat", tid.load(Ordering::Acquire)));
            while !stat().is_ok_and(|stat| stat.contains(&format!(") {state} "))) {
                assert!(Instant::now() < deadline, "it is never in the state {state}");
                thread::yield_now();
            }
            let found = waits_for_others(pid, tid.load(Ordering::Acquire));
            end();
            found
        })
    }

    #[test]
    fn a_thread_in_a_read_waits_and_one_that_spins_or_wants_a_lock_does_not() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        assert!(waits(|| assert!(rustix::io::read(&reader, &mut [0_u8; 1]).is_ok()), "S", || drop(writer)));
        let enough = AtomicBool::new(false);
        let spin = || {
            while !enough.load(Ordering::Acquire) {
                std::hint::spin_loop();
            }
        };
        assert!(!waits(spin, "R", || enough.store(true, Ordering::Release)));
        // As every lock, it waits by futex(2).
        let (send, receive) = channel::<()>();
        assert!(!waits(move || assert!(receive.recv().is_err()), "S", || drop(send)));
    }

    #[test]
    fn the_texts_of_the_kernel_are_understood() {
        let stat = |state| format!("12 (a) (b) ) {state} 1 12 12");
        assert!(is_waiting(&stat('D'), "-1 0x7ffe 0x7f00\n"), "a page that does not come");
        assert!(is_waiting(&stat('S'), "0 0x3 0x7ffe 0x1 0x0 0x0 0x0 0x7ffe 0x7f00\n"), "read");
        assert!(!is_waiting(&stat('S'), &format!("{} 0x3\n", libc::SYS_futex)), "a lock");
        assert!(!is_waiting(&stat('S'), "449 0x3\n"));
        assert!(!is_waiting(&stat('R'), "running\n"));
        assert!(!is_waiting(&stat('t'), "-1 0x7ffe 0x7f00\n"), "stopped in its own code");
        assert!(!is_waiting("", ""));
    }
}
