//! Freeing threads that signal an eventfd of a peer and are stuck, because the peer has filled its counter.
//!
//! A write to a full counter waits until somebody reads it, and whether it waits is the peer's to say: `O_NONBLOCK` belongs
//! to the open file, which both share. A look before the write costs as much as the write, and leaves a gap between the
//! two. So nothing is asked before: a thread of this module looks every 5 ms whether a write has not ended, and interrupts
//! it by a signal. It sleeps, without waking up, while nobody signals.
#![expect(unsafe_code, reason = "signals to threads")]

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::Duration;

use parking_lot::Mutex;

/// A write that takes longer than one of these and shorter than two is interrupted.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// So many looks without a write, and the thread goes to sleep.
const QUIET: u32 = 20;

/// Ignored by default, and nobody uses it for anything else here.
const SIGNAL: libc::c_int = libc::SIGURG;

/// A thread that signals peers.
struct Writer {
    thread: libc::pid_t,
    /// Writes begun and ended; written by the thread alone.
    begun: AtomicU64,
    ended: AtomicU64,
    /// The present write is not to be tried again.
    freed: AtomicBool,
}

/// Writers, and how many writes each had begun when it was looked at last.
static WRITERS: Mutex<Vec<(Arc<Writer>, u64)>> = Mutex::new(Vec::new());

/// The thread that looks; `None` when it could not be started.
static WATCHER: OnceLock<Option<Thread>> = OnceLock::new();

/// It sleeps until it is woken.
static ASLEEP: AtomicBool = AtomicBool::new(false);

/// The place of a thread among the writers, as long as the thread lives.
struct Place(Arc<Writer>);

thread_local! {
    static PLACE: Place = Place::new();
}

impl Place {
    fn new() -> Self {
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let writer = Arc::new(Writer {
            thread,
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            freed: AtomicBool::new(false),
        });
        WRITERS.lock().push((Arc::clone(&writer), 0));
        Self(writer)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // From here on the number may belong to another thread.
        WRITERS.lock().retain(|(writer, _)| !Arc::ptr_eq(writer, &self.0));
    }
}

/// How a write has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Written, or refused.
    Done,
    /// It took too long.
    Freed,
    /// Nobody is there who could free it, so it was not begun.
    Unwatched,
}

/// Carries out `write`, which is one system call; it is called again when a signal of somebody else ends it (`EINTR`).
pub(super) fn free_when_stuck(write: impl Fn() -> rustix::io::Result<usize>) -> Outcome {
    let Some(watcher) = WATCHER.get_or_init(start) else { return Outcome::Unwatched };
    // A thread that ends has no place any more.
    let outcome = PLACE.try_with(|Place(writer)| {
        writer.freed.store(false, Ordering::Relaxed);
        let number = writer.begun.load(Ordering::Relaxed) + 1;
        // Either the watcher sees this before it sleeps, or this thread sees that it sleeps.
        writer.begun.store(number, Ordering::SeqCst);
        if ASLEEP.load(Ordering::SeqCst) && ASLEEP.swap(false, Ordering::SeqCst) {
            watcher.unpark();
        }
        let outcome = loop {
            match write() {
                Err(rustix::io::Errno::INTR) if writer.freed.load(Ordering::Acquire) => break Outcome::Freed,
                Err(rustix::io::Errno::INTR) => {}
                _ => break Outcome::Done,
            }
        };
        writer.ended.store(number, Ordering::Release);
        outcome
    });
    outcome.unwrap_or(Outcome::Unwatched)
}

fn start() -> Option<Thread> {
    catch_signal().ok()?;
    let builder = std::thread::Builder::new().name("stuck-writes".into()).stack_size(64 << 10);
    Some(builder.spawn(watch).ok()?.thread().clone())
}

fn watch() {
    let mut quiet = 0;
    loop {
        if look() {
            quiet = 0;
        } else {
            quiet += 1;
        }
        if quiet >= QUIET {
            ASLEEP.store(true, Ordering::SeqCst);
            if look() {
                ASLEEP.store(false, Ordering::SeqCst);
            }
            while ASLEEP.load(Ordering::SeqCst) {
                std::thread::park();
            }
            quiet = 0;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Frees those that are where they were at the last look; whether anybody has written since, or still writes.
fn look() -> bool {
    let mut active = false;
    // Held while a thread is named by its number, so that it has not ended.
    for (writer, seen) in WRITERS.lock().iter_mut() {
        let begun = writer.begun.load(Ordering::SeqCst);
        let writes = writer.ended.load(Ordering::Acquire) != begun;
        active |= writes || begun != *seen;
        if writes && begun == *seen {
            writer.freed.store(true, Ordering::Release);
            interrupt(writer.thread);
        }
        *seen = begun;
    }
    active
}

/// Ends whatever system call the thread waits in.
fn interrupt(thread: libc::pid_t) {
    // SAFETY: numbers only. The thread is one of this process, as its place is held, and SIGNAL has a handler that does
    // nothing. A failure changes nothing: the next look tries again.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGNAL) };
}

extern "C" fn nothing(_: libc::c_int) {}

/// Gives the signal a handler, so that it interrupts; without `SA_RESTART`, so that the write is not repeated.
fn catch_signal() -> std::io::Result<()> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    let handler = nothing as extern "C" fn(libc::c_int);
    // SAFETY: a sigaction of zeros is one without flags and handler.
    let action = unsafe { action.assume_init_mut() };
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: `action` is valid and says what the handler is: it does nothing, so it may run at any point; nobody asks what
    // was there before.
    match unsafe { libc::sigaction(SIGNAL, action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
