//! [`Poller`]: whether it pays to look at the rings for a while before sleeping.
//!
//! Being woken costs a client an eventfd write and both sides a switch: about 2.5 us of 8.7 for one request at a time, where
//! both have a processor. Looking costs the processor, and everything if the client, or anybody else, waits for that very
//! processor. What decides is measured on the way and costs no visit to `/proc`:
//!
//! * the *gap*: how long it takes until something comes, smoothed, whether it was looked for or slept through. Only gaps
//!   shorter than the budget are worth looking;
//! * the *balance*: a hit saves a little, a miss costs what was looked for in vain, and every short gap that is slept through
//!   earns a fiftieth of what a hit saves. Without credit there is no looking, so what is lost stays a small share of the time,
//!   however wrong the guess is;
//! * *thieves*: the thread yields its processor again and again. If nobody else wants it, that takes a fraction of a
//!   microsecond; a client on the same processor answers within a few, and looking is handing over to it. If it takes
//!   longer, somebody else has computed meanwhile, whom a sleeper would have displaced when it was woken: that ends the look,
//!   and all of that time is a loss.

use std::time::Duration;

/// A yield that takes longer has let somebody else compute.
pub(super) const STOLEN: Duration = Duration::from_micros(20);

/// What a hit saves, in ns: a write to an eventfd, and most of being woken.
const SAVED: i64 = 1000;

/// What a short gap earns that was slept through, in ns.
const EARNED: i64 = SAVED / 50;

/// Most credit there can be, in ns: what was earned long ago is no reason to lose much now.
const CREDIT_MAX: i64 = 100_000;

/// Most debt, in ns: what was lost once is forgotten some time.
const DEBT_MAX: i64 = 10_000_000;

/// Decides from the gaps so far. Knows no clock.
#[derive(Debug)]
pub(super) struct Poller {
    budget: Duration,
    /// Smoothed, at most four budgets.
    gap: Duration,
    /// Saved and earned less lost, in ns.
    balance: i64,
}

impl Poller {
    /// Looks for at most `budget` at a time; never if that is 0.
    pub(super) const fn new(budget: Duration) -> Self {
        Self { budget, gap: Duration::ZERO, balance: 0 }
    }

    pub(super) const fn budget(&self) -> Duration {
        self.budget
    }

    /// Whether to look at the rings in the next gap.
    pub(super) fn wants(&self) -> bool {
        !self.budget.is_zero() && self.balance >= 0 && self.gap < self.budget
    }

    /// Something came `after` that much of looking.
    pub(super) fn hit(&mut self, after: Duration) {
        self.smooth(after);
        self.book(SAVED);
    }

    /// So much time is lost: nothing came, or somebody else had the processor.
    pub(super) fn lose(&mut self, time: Duration) {
        self.book(i64::try_from(time.as_nanos()).map_or(-DEBT_MAX, i64::wrapping_neg));
    }

    /// A gap was slept through, after a loss or without looking.
    pub(super) fn slept(&mut self, gap: Duration) {
        self.smooth(gap);
        if gap < self.budget {
            self.book(EARNED);
        }
    }

    fn book(&mut self, ns: i64) {
        self.balance = self.balance.saturating_add(ns).clamp(-DEBT_MAX, CREDIT_MAX);
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
        looks(&mut poller, 1000, SHORT, None);
        let misses = looks(&mut poller, 100_000, SHORT, Some(BUDGET));
        assert!((90..110).contains(&misses), "{misses} of 100000: 20 us for each ms and a half of gaps");
        let thefts = looks(&mut poller, 100_000, SHORT, Some(Duration::from_millis(3)));
        assert!(thefts <= 1, "{thefts}");
        // It is found out when that ends.
        assert!(looks(&mut poller, 1_000_000, SHORT, None) > 800_000);
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
