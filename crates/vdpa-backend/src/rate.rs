//! [`RateLimit`]: limits log lines that a client can cause.

use std::time::Instant;

use parking_lot::Mutex;

/// Allows a number of events per second and counts the others.
#[derive(Debug)]
pub(crate) struct RateLimit {
    per_second: u32,
    window: Mutex<Window>,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    passed: u32,
    suppressed: u64,
}

impl RateLimit {
    /// At most `per_second` events in each second.
    pub(crate) fn per_second(per_second: u32) -> Self {
        Self { per_second, window: Mutex::new(Window { since: Instant::now(), passed: 0, suppressed: 0 }) }
    }

    /// Whether an event may pass now; if so, how many were suppressed since the last one that did.
    pub(crate) fn allow(&self) -> Option<u64> {
        let mut window = self.window.lock();
        if window.since.elapsed().as_secs() >= 1 {
            window.since = Instant::now();
            window.passed = 0;
        }
        if window.passed >= self.per_second {
            window.suppressed += 1;
            return None;
        }
        window.passed += 1;
        Some(std::mem::take(&mut window.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_cut_and_counted() {
        let limit = RateLimit::per_second(2);
        assert_eq!(
            (limit.allow(), limit.allow(), limit.allow(), limit.allow()),
            (Some(0), Some(0), None, None)
        );
        limit.window.lock().since = Instant::now() - std::time::Duration::from_secs(2);
        assert_eq!((limit.allow(), limit.allow()), (Some(2), Some(0)));
    }
}
