//! [`Poller`]: whether it pays to look at the rings for a while before sleeping.
//!
//! Being woken costs a client an eventfd write and both sides a switch: about 2.5 us of 8.7 for one request at a time, where
//! both have a processor. Looking costs the processor, and everything if the client, or anybody else, waits for that very
//! processor. What decides is measured on the way and costs no visit to `/proc`:
//!
//! * the *gap*: how long it takes until something comes, smoothed, whether it was looked for or slept through. Where gaps are
//!   longer than some budgets it is not tried; being woken is a part of a gap that is slept through, so that one of more than
//!   the budget may be one of less;
//! * the *balance*: a hit saves what gaps are shorter than those slept through, a miss costs what was looked for in vain, and
//!   every short gap that is slept through earns a fiftieth of what a hit saves. Without credit there is no looking, so
//!   what is lost stays a small share of what is saved, or of the time, however wrong the guess is;
//! * *thieves*: where two looks are far apart, somebody else had the processor, who would not have had to wait if this thread
//!   had slept. That ends the look, and all of its time is a loss.
//!
//! A client on the same processor cannot ask while this thread looks, so that every look is a miss: the balance stops that
//! within one, and costs two per mille from then on to find out when it ends. Yielding the processor between two looks was
//! tried and given up: it hands over to such a client in a microsecond, but where anybody else computes it hands over to them
//! as well, for milliseconds.

use std::time::Duration;

/// Looks are a fraction of a microsecond apart. Two that are farther had somebody else between them.
pub(super) const STOLEN: Duration = Duration::from_micros(20);

/// What a hit saves at least, in ns: a write to an eventfd.
const SAVED_MIN: i64 = 1000;

/// A short gap that was slept through earns this part of what a hit would have saved.
const EARNED_PART: i64 = 50;

/// Most credit and most debt, in ns.
const BALANCE_MAX: i64 = 10_000_000;

/// Decides from the gaps so far. Knows no clock.
#[derive(Debug)]
pub(super) struct Poller {
    budget: Duration,
    /// Smoothed, at most twice [`SHORT`](Self::SHORT) budgets.
    gap: Duration,
    /// Short gaps that were slept through, smoothed; 0 before the first one.
    slept: Duration,
    /// Gaps of hits, smoothed.
    found: Duration,
    /// Saved and earned less lost, in ns.
    balance: i64,
}

impl Poller {
    /// Gaps of fewer budgets are short.
    const SHORT: u32 = 4;

    /// Looks for at most `budget` at a time; never if that is 0.
    pub(super) const fn new(budget: Duration) -> Self {
        const ZERO: Duration = Duration::ZERO;
        Self { budget, gap: ZERO, slept: ZERO, found: ZERO, balance: 0 }
    }

    pub(super) const fn budget(&self) -> Duration {
        self.budget
    }

    /// Whether to look at the rings in the next gap.
    pub(super) fn wants(&self) -> bool {
        !self.budget.is_zero() && self.balance >= 0 && self.gap < self.budget * Self::SHORT
    }

    /// Something came `after` that much of looking.
    pub(super) fn hit(&mut self, after: Duration) {
        self.smooth(after);
        smooth(&mut self.found, after);
        self.book(self.saved());
    }

    /// So much time is lost: nothing came, or somebody else had the processor.
    pub(super) fn lose(&mut self, time: Duration) {
        self.book(i64::try_from(time.as_nanos()).map_or(-BALANCE_MAX, i64::wrapping_neg));
    }

    /// A gap was slept through, after a loss or without looking.
    pub(super) fn slept(&mut self, gap: Duration) {
        self.smooth(gap);
        if gap < self.budget * Self::SHORT {
            smooth(&mut self.slept, gap);
            self.book(self.saved() / EARNED_PART);
        }
    }

    /// What a hit saves, in ns.
    fn saved(&self) -> i64 {
        let saved = self.slept.saturating_sub(self.found);
        i64::try_from(saved.as_nanos()).unwrap_or(SAVED_MIN).max(SAVED_MIN)
    }

    fn book(&mut self, ns: i64) {
        self.balance = self.balance.saturating_add(ns).clamp(-BALANCE_MAX, BALANCE_MAX);
    }

    fn smooth(&mut self, gap: Duration) {
        smooth(&mut self.gap, gap.min(self.budget * Self::SHORT * 2));
    }
}

fn smooth(mean: &mut Duration, value: Duration) {
    *mean = (*mean * 3 + value) / 4;
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_micros(20);
    const SHORT: Duration = Duration::from_micros(3);
    const LONG: Duration = Duration::from_millis(3);

    /// How many of `gaps` gaps are looked through, when each look is a hit or loses so much.
    fn looks(poller: &mut Poller, gaps: u32, gap: Duration, loses: Option<Duration>) -> u32 {
        let mut looks = 0;
        for _ in 0..gaps {
            if poller.wants() {
                looks += 1;
                let Some(time) = loses else {
                    poller.hit(gap);
                    continue;
                };
                poller.lose(time);
            }
            poller.slept(gap);
        }
        looks
    }

    #[test]
    fn it_looks_as_long_as_it_pays() {
        let mut poller = Poller::new(BUDGET);
        assert_eq!(looks(&mut poller, 1000, SHORT, None), 1000);
        assert!(looks(&mut poller, 1000, LONG, Some(BUDGET)) < 5, "long gaps are slept through");
        assert!(looks(&mut poller, 1000, SHORT, None) > 900, "and it begins again when they are short");
    }

    /// The client shares the processor and never gets to ask while this side looks: gaps seem short, looks never hit.
    #[test]
    fn losses_are_a_small_share_however_short_the_gaps() {
        let mut poller = Poller::new(BUDGET);
        // What was saved so far may be lost, but no more.
        looks(&mut poller, 1_000_000, SHORT, None);
        let misses = looks(&mut poller, 100_000, SHORT, Some(BUDGET));
        assert!((580..640).contains(&misses), "{misses} of 100000: 10 ms, and a share of 300 ms");
        let misses = looks(&mut poller, 100_000, SHORT, Some(BUDGET));
        assert!((90..130).contains(&misses), "{misses} of 100000");
        let thefts = looks(&mut poller, 100_000, SHORT, Some(Duration::from_millis(3)));
        assert!(thefts <= 1, "{thefts}");
        // It is found out when that ends.
        assert!(looks(&mut poller, 1_000_000, SHORT, None) > 700_000);
    }

    /// Being woken takes long here, so that hits save much: what others take now and then is no reason to stop.
    #[test]
    fn what_is_saved_pays_for_what_is_lost() {
        let mut poller = Poller::new(BUDGET);
        let (slept, found) = (Duration::from_micros(33), Duration::from_micros(15));
        looks(&mut poller, 10, slept, Some(BUDGET));
        let mut looked = 0;
        for _ in 0..100 {
            for _ in 0..2000 {
                if poller.wants() {
                    looked += 1;
                    poller.hit(found);
                } else {
                    poller.slept(slept);
                }
            }
            poller.lose(Duration::from_millis(3));
        }
        assert!(looked > 190_000, "{looked} of 200000");
    }

    #[test]
    fn a_loss_without_end_is_forgotten_some_time() {
        let mut poller = Poller::new(BUDGET);
        poller.lose(Duration::MAX);
        assert!(!poller.wants());
        assert!(looks(&mut poller, 1_000_000, SHORT, None) > 400_000);
    }

    #[test]
    fn without_a_budget_it_never_looks() {
        let mut poller = Poller::new(Duration::ZERO);
        assert_eq!(looks(&mut poller, 1000, Duration::ZERO, None), 0);
    }
}
