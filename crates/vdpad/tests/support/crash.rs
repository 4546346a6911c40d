//! [`Crashes`]: where the next process of a service is to end.

use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vdpa_core::crash_points::CrashPoint;
use vdpa_core::ring::inflight::LogMemory as _;
use vdpa_sys::shared_words::SharedWords;
use vdpad::crash_points::{ACTION, ARMED, Action, ENV, FIRED, LEFT, NEXT, WORDS};

/// A memory file that all processes of a service map.
pub(crate) struct Crashes {
    file: OwnedFd,
    words: SharedWords,
}

impl Crashes {
    pub(crate) fn new() -> Self {
        let (file, words) = SharedWords::create(c"crashes", WORDS).unwrap();
        Self { file, words }
    }

    /// Lets the service that `command` starts read it.
    pub(crate) fn watch(&self, command: &mut Command) {
        let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()));
        assert!(fs::exists(&path).unwrap());
        command.env(ENV, path);
    }

    /// The process that comes to `point` for the `nth` time (from 1 on) does this, once.
    pub(crate) fn arm(&self, point: CrashPoint, nth: u64, action: Action) {
        self.words.store(NEXT + ARMED, 0);
        self.choose(0, point, nth, action);
    }

    /// As [`arm`](Self::arm), but only after a process was killed at `first`.
    pub(crate) fn arm_after(&self, first: CrashPoint, point: CrashPoint, nth: u64, action: Action) {
        self.choose(NEXT, point, nth, action);
        self.choose(0, first, 1, Action::Kill);
    }

    fn choose(&self, at: usize, point: CrashPoint, nth: u64, action: Action) {
        self.words.store(at + LEFT, nth);
        self.words.store(at + ACTION, action as u64);
        // Last: it counts from here on.
        self.words.store(at + ARMED, point as u64 + 1);
    }

    /// Nothing happens any more.
    pub(crate) fn disarm(&self) {
        self.words.store(NEXT + ARMED, 0);
        self.words.store(ARMED, 0);
    }

    /// Calls `then` on another thread as soon as something was done `times` times.
    pub(crate) fn when_fired(&self, times: u64, then: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
        let words = self.words.clone();
        let deadline = Instant::now() + Duration::from_secs(20);
        thread::spawn(move || {
            while words.load(FIRED) < times && Instant::now() < deadline {
                thread::sleep(Duration::from_micros(200));
            }
            then();
        })
    }

    /// How often something was done.
    pub(crate) fn fired(&self) -> u64 {
        self.words.load(FIRED)
    }
}
