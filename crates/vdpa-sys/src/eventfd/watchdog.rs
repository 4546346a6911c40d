//! A watchdog that interrupts writes to the eventfds of peers which block because the peer has filled the counter.
//!
//! A write to a full counter blocks until somebody reads the counter. The peer decides whether it blocks, since `O_NONBLOCK`
//! belongs to the open file, which both share. A poll before the write would cost as much as the write, and the counter
//! could be filled between the two. So the writer does not poll. Instead a thread of this module checks every 5 ms for
//! writes that have not ended since its last check, and interrupts them by a signal. While nobody writes, the thread sleeps
//! without waking up.
#![expect(unsafe_code, reason = "signals to threads")]

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::Duration;

use parking_lot::Mutex;

/// Time between two checks. A blocked write is interrupted after one to two of these.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);

/// Number of checks without a write after which the thread goes to sleep.
const IDLE_CHECKS_MAX: u32 = 20;

/// The signal that interrupts a write: ignored by default, and used for nothing else in this process.
const SIGNAL: libc::c_int = libc::SIGURG;

/// A thread that writes to the eventfds of peers.
struct Writer {
    thread: libc::pid_t,
    /// Number of writes begun and ended; changed by the thread itself only.
    begun: AtomicU64,
    ended: AtomicU64,
    /// The current write was interrupted and must not be repeated.
    interrupted: AtomicBool,
}

/// All writers, each with the number of writes it had begun at the last check.
static WRITERS: Mutex<Vec<(Arc<Writer>, u64)>> = Mutex::new(Vec::new());

/// The watchdog thread; `None` if it could not be started.
static WATCHDOG: OnceLock<Option<Thread>> = OnceLock::new();

/// Whether the watchdog thread sleeps until it is unparked.
static ASLEEP: AtomicBool = AtomicBool::new(false);

/// Registers a thread in [`WRITERS`] for as long as the thread exists.
struct Registration(Arc<Writer>);

thread_local! {
    static REGISTRATION: Registration = Registration::new();
}

impl Registration {
    fn new() -> Self {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let writer = Arc::new(Writer {
            thread,
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            interrupted: AtomicBool::new(false),
        });
        WRITERS.lock().push((Arc::clone(&writer), 0));
        Self(writer)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // After this the kernel may give the thread id to another thread.
        WRITERS.lock().retain(|(writer, _)| !Arc::ptr_eq(writer, &self.0));
    }
}

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The system call returned, with or without an error.
    Done,
    /// It was interrupted because it took too long.
    Interrupted,
    /// It was not begun, because no watchdog could interrupt it.
    NoWatchdog,
}

/// Calls `write`, which makes one system call, and repeats it when another signal interrupts it (`EINTR`). Blocks for less
/// than two check intervals.
pub(super) fn write_or_interrupt(write: impl Fn() -> rustix::io::Result<usize>) -> Outcome {
    let Some(watchdog) = WATCHDOG.get_or_init(start) else { return Outcome::NoWatchdog };
    // The registration of a thread that is ending is gone already.
    let outcome = REGISTRATION.try_with(|Registration(writer)| {
        writer.interrupted.store(false, Ordering::Relaxed);
        let number = writer.begun.load(Ordering::Relaxed) + 1;
        // SeqCst on both sides: either the watchdog sees this write before it sleeps, or this thread sees that it sleeps.
        writer.begun.store(number, Ordering::SeqCst);
        if ASLEEP.load(Ordering::SeqCst) && ASLEEP.swap(false, Ordering::SeqCst) {
            watchdog.unpark();
        }
        let outcome = loop {
            match write() {
                Err(rustix::io::Errno::INTR) if writer.interrupted.load(Ordering::Acquire) => {
                    break Outcome::Interrupted;
                }
                Err(rustix::io::Errno::INTR) => {}
                _ => break Outcome::Done,
            }
        };
        writer.ended.store(number, Ordering::Release);
        outcome
    });
    outcome.unwrap_or(Outcome::NoWatchdog)
}

fn start() -> Option<Thread> {
    install_handler().ok()?;
    let builder = std::thread::Builder::new().name("signal-watchdog".into()).stack_size(64 << 10);
    Some(builder.spawn(watch).ok()?.thread().clone())
}

fn watch() {
    let mut idle_checks = 0;
    loop {
        if check_writers() {
            idle_checks = 0;
        } else {
            idle_checks += 1;
        }
        if idle_checks >= IDLE_CHECKS_MAX {
            ASLEEP.store(true, Ordering::SeqCst);
            if check_writers() {
                ASLEEP.store(false, Ordering::SeqCst);
            }
            while ASLEEP.load(Ordering::SeqCst) {
                std::thread::park();
            }
            idle_checks = 0;
        }
        std::thread::sleep(CHECK_INTERVAL);
    }
}

/// Interrupts the writes that were in progress at the last check already. Returns whether any thread has written since
/// then or is writing.
fn check_writers() -> bool {
    let mut active = false;
    // The lock keeps a registered thread from ending while its id is used below.
    for (writer, seen) in WRITERS.lock().iter_mut() {
        let begun = writer.begun.load(Ordering::SeqCst);
        let writing = writer.ended.load(Ordering::Acquire) != begun;
        active |= writing || begun != *seen;
        if writing && begun == *seen {
            writer.interrupted.store(true, Ordering::Release);
            interrupt(writer.thread);
        }
        *seen = begun;
    }
    active
}

/// Interrupts the system call in which the thread blocks.
fn interrupt(thread: libc::pid_t) {
    // SAFETY: the arguments are numbers. The thread belongs to this process, since its registration is locked, and SIGNAL
    // has a handler that does nothing. After a failure the next check tries again.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGNAL) };
}

extern "C" fn do_nothing(_: libc::c_int) {}

/// Installs a handler, so that the signal interrupts system calls; without `SA_RESTART`, so that the kernel does not restart
/// the write.
fn install_handler() -> std::io::Result<()> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    let handler = do_nothing as extern "C" fn(libc::c_int);
    // SAFETY: all-zero is a valid sigaction, without flags and handler.
    let action = unsafe { action.assume_init_mut() };
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: `action` is a valid structure. Its handler does nothing, so it may run at any point; the previous action is
    // not asked for.
    match unsafe { libc::sigaction(SIGNAL, action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
