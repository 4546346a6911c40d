//! [`Backoff`]: whether the thread that serves a disk may do transfers itself.

use std::time::{Duration, Instant};

/// A transfer that takes no longer than this has no consequences. Longer than a time slice, so that a busy processor is not
/// taken for a slow disk.
const SLOW: Duration = Duration::from_millis(5);

/// The back-off after a slow transfer, as a multiple of the time that it took. It bounds the time that the thread, and
/// everything else that it serves, waits for slow transfers to 2 %.
const FACTOR: u32 = 50;

/// Leaves transfers to the kernel's threads for a while after a slow one.
///
/// A write to the page cache takes a microsecond or two on the calling thread, and several times that on another one. But
/// sometimes the file system blocks the caller: for its journal, for a page that must be read first, or because too many pages
/// are dirty.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    /// When it ends; `None` if there is none.
    until: Option<Instant>,
}

impl Backoff {
    /// Whether the next transfer may be done on this thread.
    pub(super) fn is_over(&mut self) -> bool {
        match self.until {
            Some(until) if Instant::now() < until => false,
            _ => {
                self.until = None;
                true
            }
        }
    }

    /// Does a transfer, and begins a back-off if it was slow.
    pub(super) fn measure<T>(&mut self, transfer: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = transfer();
        self.note(begin, begin.elapsed());
        result
    }

    fn note(&mut self, begin: Instant, taken: Duration) {
        if taken > SLOW {
            self.until = (begin + taken).checked_add(taken * FACTOR);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_transfer_is_followed_by_a_backoff_in_proportion() {
        let mut backoff = Backoff::default();
        let now = Instant::now();
        backoff.note(now, SLOW);
        assert!(backoff.is_over(), "just fast enough");
        backoff.note(now, Duration::from_secs(1));
        assert!(!backoff.is_over());
        assert_eq!(backoff.until, now.checked_add(Duration::from_secs(51)));
        backoff.until = Some(now);
        assert!(backoff.is_over() && backoff.until.is_none(), "the back-off is over");
        assert_eq!(backoff.measure(|| 7), 7);
        assert!(backoff.is_over());
    }
}
