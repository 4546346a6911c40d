//! Whether the thread that serves a disk may do transfers itself.

use std::time::{Duration, Instant};

/// What a transfer may take without consequences. Longer than a time slice, so that a busy processor is not taken for a
/// slow disk.
const SLOW: Duration = Duration::from_millis(5);

/// How many times as long as a slow transfer took the kernel's threads do all of them: the thread that serves the disk,
/// and everything else it serves, waits for slow ones 2 % of its time at most.
const REST: u32 = 50;

/// Watches how long transfers take. A write to the page cache is done by whoever calls, in a microsecond or two; handing
/// it to another thread costs several times that. But now and then the file system makes the caller wait: for its journal,
/// for a page that has to be read first, because too much is dirty.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Until then, others wait.
    rest: Option<Instant>,
}

impl Pace {
    /// Whether the next transfer may be done at once.
    pub(super) fn allows(&mut self) -> bool {
        match self.rest {
            Some(until) if Instant::now() < until => false,
            _ => {
                self.rest = None;
                true
            }
        }
    }

    /// Does a transfer and notes how long it took.
    pub(super) fn time<T>(&mut self, transfer: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = transfer();
        self.note(begin, begin.elapsed());
        result
    }

    fn note(&mut self, begin: Instant, taken: Duration) {
        if taken > SLOW {
            self.rest = (begin + taken).checked_add(taken * REST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_transfer_is_followed_by_a_rest_in_proportion() {
        let mut pace = Pace::default();
        let now = Instant::now();
        pace.note(now, SLOW);
        assert!(pace.allows(), "just fast enough");
        pace.note(now, Duration::from_secs(1));
        assert!(!pace.allows());
        assert_eq!(pace.rest, now.checked_add(Duration::from_secs(51)));
        pace.rest = Some(now);
        assert!(pace.allows() && pace.rest.is_none(), "the rest is over");
        assert_eq!(pace.time(|| 7), 7);
        assert!(pace.allows());
    }
}
