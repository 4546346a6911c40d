//! Ends this process, or its holder, at the point that a test has chosen ([`vdpa_core::crash_points`]).
//!
//! The test's choice is in a memory file that all processes of the service map, so that a daemon that is started again does not
//! end at the same point for ever.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, getpid, getppid, kill_process};
use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, on_reach};
use vdpa_core::ring::inflight::LogMemory as _;
use vdpa_sys::shared_words::SharedWords;

/// Environment variable with the path of the memory file, for example in `/proc/PID/fd`.
pub const ENV: &str = "VDPA_CRASH_POINTS";

/// Words of the memory file: 1 more than the number of the point, 0 for none.
pub const ARMED: usize = 0;
/// An [`Action`].
pub const ACTION: usize = 1;
/// How often the point is still to be reached; 0 is like 1.
pub const LEFT: usize = 2;
/// How often an action was done.
pub const FIRED: usize = 3;
/// Armed when an action was done, with these three: as the first three.
pub const NEXT: usize = 4;
/// Number of words.
pub const WORDS: usize = 8;

/// What is done at the point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Action {
    /// This process is killed.
    Kill = 1,
    /// The parent of this process is killed: the holder. This process goes on when it has ended.
    KillHolder = 2,
    /// The parent is stopped and this process killed, so that the test can kill the parent before it does anything about that.
    StopHolderAndKill = 3,
    /// This process ends as by a panic with `panic = "abort"`: by SIGABRT.
    Abort = 4,
    /// Nothing; the test learns that the point was reached.
    Note = 5,
    /// This process is killed a little later, by when its other threads have done what they had to do.
    KillLater = 6,
}

/// How much later.
const LATER: Duration = Duration::from_millis(20);

static CHOICE: OnceLock<SharedWords> = OnceLock::new();
static ONE: Mutex<()> = Mutex::new(());

/// Maps the memory file that the environment names, if it names one.
///
/// # Errors
/// Of opening and mapping it.
pub fn from_env() -> Result<(), Errno> {
    let Some(path) = std::env::var_os(ENV).map(PathBuf::from) else { return Ok(()) };
    let file = File::options().read(true).write(true).open(path);
    let file = file.map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(Errno::IO.raw())))?;
    let _ = CHOICE.set(SharedWords::map(file)?);
    on_reach(reached);
    Ok(())
}

fn reached(point: CrashPoint) {
    let Some(choice) = CHOICE.get() else { return };
    if choice.load(ARMED) != point as u64 + 1 {
        return;
    }
    // Of several threads that are at the point one acts.
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    if choice.load(ARMED) != point as u64 + 1 {
        return;
    }
    let left = choice.load(LEFT);
    if left > 1 {
        return choice.store(LEFT, left - 1);
    }
    let action = choice.load(ACTION);
    choice.store(FIRED, choice.load(FIRED) + 1);
    for word in [LEFT, ACTION, ARMED] {
        choice.store(word, choice.load(NEXT + word));
        choice.store(NEXT + word, 0);
    }
    act(action);
    drop(one);
}

fn act(action: u64) {
    if action == Action::Kill as u64 {
        end(Signal::KILL);
    } else if action == Action::KillLater as u64 {
        thread::sleep(LATER);
        end(Signal::KILL);
    } else if action == Action::Abort as u64 {
        std::process::abort();
    } else if action == Action::KillHolder as u64 {
        let holder = getppid();
        signal(holder, Signal::KILL);
        while getppid() == holder {
            thread::sleep(Duration::from_micros(100));
        }
    } else if action == Action::StopHolderAndKill as u64 {
        signal(getppid(), Signal::STOP);
        end(Signal::KILL);
    }
}

fn end(with: Signal) {
    signal(Some(getpid()), with);
    loop {
        thread::park();
    }
}

fn signal(process: Option<Pid>, signal: Signal) {
    if let Some(process) = process
        && let Err(error) = kill_process(process, signal)
    {
        tracing::error!(%error, "a crash point has no effect");
    }
}
