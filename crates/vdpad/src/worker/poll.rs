//! [`Poller`]: whether it pays to look at the rings for a while before sleeping.
//!
//! Being woken costs a client an eventfd write and both sides a switch: about 2.5 us of 8.7 for one request at a time, where
//! both have a processor. Looking costs the processor, and everything if the client, or anybody else, waits for that very
//! processor. What decides is measured on the way and costs no visit to `/proc`:
//!
//! * the *gap*: how long it takes until something comes, smoothed, whether it was looked for or slept through. Only gaps
//!   shorter than the budget are worth looking;
//! * *misses*: each one is followed by a pause in which gaps are slept through, twice as long as the one before, until a hit;
//! * *thieves*: the thread yields its processor again and again. If nobody else wants it, that takes a fraction of a
//!   microsecond. If it takes long, somebody did; where this was not the client, whose request is there then, it counts as
//!   a miss and ends the look at once. So on a processor that is shared with the client, looking is handing over to it.

use std::time::Duration;

/// A yield that takes longer has let somebody else run.
pub(super) const STOLEN: Duration = Duration::from_micros(20);

/// Longest pause, in gaps.
const PAUSE_MAX: u32 = 1024;

/// Decides from the gaps so far. Knows no clock.
#[derive(Debug)]
pub(super) struct Poller {
    budget: Duration,
    /// Smoothed, at most four budgets.
    gap: Duration,
    /// Gaps still to be slept through.
    pause: u32,
    /// Length of the pause after the next miss.
    next_pause: u32,
}

impl Poller {
    /// Looks for at most `budget` at a time; never if that is 0.
    pub(super) const fn new(budget: Duration) -> Self {
        Self { budget, gap: Duration::ZERO, pause: 0, next_pause: 1 }
    }

    pub(super) const fn budget(&self) -> Duration {
        self.budget
    }

    /// Whether to look at the rings in the next gap.
    pub(super) fn wants(&self) -> bool {
        !self.budget.is_zero() && self.pause == 0 && self.gap < self.budget
    }

    /// Something came `after` that much of looking.
    pub(super) fn hit(&mut self, after: Duration) {
        self.smooth(after);
        self.next_pause = (self.next_pause / 2).max(1);
    }

    /// Nothing came, or somebody else needs the processor.
    pub(super) fn miss(&mut self) {
        self.pause = self.next_pause;
        self.next_pause = (self.next_pause * 2).min(PAUSE_MAX);
    }

    /// A gap was slept through, after a miss or without looking.
    pub(super) fn slept(&mut self, gap: Duration) {
        self.smooth(gap);
        self.pause = self.pause.saturating_sub(1);
    }

    fn smooth(&mut self, gap: Duration) {
        self.gap = (self.gap * 3 + gap.min(self.budget * 4)) / 4;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_micros(20);
    const SHORT: Duration = Duration::from_micros(3);
    const LONG: Duration = Duration::from_millis(3);

    /// How many of `gaps` gaps are looked through, when each look is a `hit` or not.
    fn looks(poller: &mut Poller, gaps: u32, gap: Duration, hit: bool) -> u32 {
        let mut looks = 0;
        for _ in 0..gaps {
            if poller.wants() {
                looks += 1;
                if hit {
                    poller.hit(gap);
                    continue;
                }
                poller.miss();
            }
            poller.slept(gap);
        }
        looks
    }

    #[test]
    fn it_looks_as_long_as_it_pays() {
        let mut poller = Poller::new(BUDGET);
        assert_eq!(looks(&mut poller, 1000, SHORT, true), 1000);
        assert!(looks(&mut poller, 1000, LONG, false) < 5, "long gaps are slept through");
        assert!(looks(&mut poller, 1000, SHORT, true) > 900, "and it begins again when they are short");
    }

    /// The client shares the processor and never gets to ask while this side looks: gaps seem short, looks never hit.
    #[test]
    fn misses_are_rare_however_short_the_gaps() {
        let mut poller = Poller::new(BUDGET);
        let misses = looks(&mut poller, 100_000, SHORT, false);
        assert!((90..130).contains(&misses), "{misses} of 100000");
        // It is found out when that ends.
        assert!(looks(&mut poller, 10_000, SHORT, true) > 8_000);
    }

    #[test]
    fn without_a_budget_it_never_looks() {
        let mut poller = Poller::new(Duration::ZERO);
        assert_eq!(looks(&mut poller, 1000, Duration::ZERO, true), 0);
    }
}
