//! [`Poller`]: decides whether the thread busy-polls its rings for a while before it sleeps.
//!
//! A wake-up costs a client an eventfd write and both sides a context switch: about 2.5 us of 8.7 us for one request at a time,
//! where each side has a processor of its own. Busy-polling costs processor time, and much more where the client, or another
//! thread, waits for that very processor. The decision uses what is measured on the way, without reading `/proc`:
//!
//! * The *gap* is the time until the next event, as a moving average, over gaps that were polled and gaps that were slept
//!   through. Where it is longer than some budgets, the thread does not poll. A gap that was slept through includes the
//!   wake-up, so one of more than the budget may be one of less when polled.
//! * The *balance* is an account in nanoseconds. A hit adds the difference between slept and polled gaps; a miss subtracts the
//!   time that was polled in vain; every short gap that is slept through adds a fiftieth of what a hit adds. The thread polls
//!   only while the balance is not negative, so that losses stay a small share of the savings, or of the time, however wrong
//!   the guess is.
//! * *Preemption*: where two checks of a poll are far apart, another thread had the processor, and would not have had to wait
//!   if this thread had slept. It ends the poll, and the whole time of the poll counts as a loss.
//!
//! A client on the same processor cannot make requests while this thread polls, so every poll is a miss. The balance stops that
//! after one miss, and costs two per mille from then on to find out when the situation ends. Yielding the processor between
//! two checks was tried and given up: it switches to such a client in a microsecond, but where any other thread computes, it
//! switches to that one as well, for milliseconds.

use std::time::Duration;

/// The checks of a poll are a fraction of a microsecond apart. When two are farther apart than this, the thread was
/// preempted.
pub(super) const PREEMPTED_AFTER: Duration = Duration::from_micros(20);

/// Minimum saving of a hit, in ns: a write to an eventfd.
const SAVED_MIN: i64 = 1000;

/// A short gap that was slept through adds 1/`EARNED_PART` of what a hit would have saved.
const EARNED_PART: i64 = 50;

/// Limit of credit and of debt, in ns.
const BALANCE_MAX: i64 = 10_000_000;

/// Decides from the gaps so far. The caller measures time.
#[derive(Debug)]
pub(super) struct Poller {
    /// Maximum duration of one poll.
    budget: Duration,
    /// Moving average of all gaps, at most twice [`SHORT`](Self::SHORT) budgets.
    mean_gap: Duration,
    /// Moving average of short gaps that were slept through; 0 before the first one.
    mean_slept: Duration,
    /// Moving average of gaps that ended in a hit.
    mean_polled: Duration,
    /// Savings and earnings less losses, in ns.
    balance: i64,
}

impl Poller {
    /// A gap of fewer budgets than this is short.
    const SHORT: u32 = 4;

    /// Polls for at most `budget` at a time; never when that is 0.
    pub(super) const fn new(budget: Duration) -> Self {
        const ZERO: Duration = Duration::ZERO;
        Self { budget, mean_gap: ZERO, mean_slept: ZERO, mean_polled: ZERO, balance: 0 }
    }

    pub(super) const fn budget(&self) -> Duration {
        self.budget
    }

    /// Whether to busy-poll in the next gap.
    pub(super) fn should_poll(&self) -> bool {
        !self.budget.is_zero() && self.balance >= 0 && self.mean_gap < self.budget * Self::SHORT
    }

    /// Records that an event arrived after a poll of this duration.
    pub(super) fn record_hit(&mut self, after: Duration) {
        self.update_gap(after);
        update_mean(&mut self.mean_polled, after);
        self.add_to_balance(self.saved());
    }

    /// Records a loss of time: no event arrived, or the thread was preempted.
    pub(super) fn record_loss(&mut self, time: Duration) {
        self.add_to_balance(i64::try_from(time.as_nanos()).map_or(-BALANCE_MAX, i64::wrapping_neg));
    }

    /// Records a gap that was slept through, after a loss or without polling.
    pub(super) fn record_sleep(&mut self, gap: Duration) {
        self.update_gap(gap);
        if gap < self.budget * Self::SHORT {
            update_mean(&mut self.mean_slept, gap);
            self.add_to_balance(self.saved() / EARNED_PART);
        }
    }

    /// Saving of a hit, in ns.
    fn saved(&self) -> i64 {
        let saved = self.mean_slept.saturating_sub(self.mean_polled);
        i64::try_from(saved.as_nanos()).unwrap_or(SAVED_MIN).max(SAVED_MIN)
    }

    fn add_to_balance(&mut self, ns: i64) {
        self.balance = self.balance.saturating_add(ns).clamp(-BALANCE_MAX, BALANCE_MAX);
    }

    fn update_gap(&mut self, gap: Duration) {
        update_mean(&mut self.mean_gap, gap.min(self.budget * Self::SHORT * 2));
    }
}

fn update_mean(mean: &mut Duration, value: Duration) {
    *mean = (*mean * 3 + value) / 4;
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_micros(20);
    const SHORT: Duration = Duration::from_micros(3);
    const LONG: Duration = Duration::from_millis(3);

    /// How many of `gaps` gaps are polled, when each poll is a hit or loses this much.
    fn polls(poller: &mut Poller, gaps: u32, gap: Duration, loses: Option<Duration>) -> u32 {
        let mut polls = 0;
        for _ in 0..gaps {
            if poller.should_poll() {
                polls += 1;
                let Some(time) = loses else {
                    poller.record_hit(gap);
                    continue;
                };
                poller.record_loss(time);
            }
            poller.record_sleep(gap);
        }
        polls
    }

    #[test]
    fn it_polls_as_long_as_it_pays() {
        let mut poller = Poller::new(BUDGET);
        assert_eq!(polls(&mut poller, 1000, SHORT, None), 1000);
        assert!(polls(&mut poller, 1000, LONG, Some(BUDGET)) < 5, "long gaps are slept through");
        assert!(polls(&mut poller, 1000, SHORT, None) > 900, "and it begins again when they are short");
    }

    /// The client shares the processor and never makes requests while this side polls: gaps seem short, polls never hit.
    #[test]
    fn losses_are_a_small_share_however_short_the_gaps() {
        let mut poller = Poller::new(BUDGET);
        // What was saved so far may be lost, but no more.
        polls(&mut poller, 1_000_000, SHORT, None);
        let misses = polls(&mut poller, 100_000, SHORT, Some(BUDGET));
        assert!((580..640).contains(&misses), "{misses} of 100000: 10 ms, and a share of 300 ms");
        let misses = polls(&mut poller, 100_000, SHORT, Some(BUDGET));
        assert!((90..130).contains(&misses), "{misses} of 100000");
        let preempted = polls(&mut poller, 100_000, SHORT, Some(Duration::from_millis(3)));
        assert!(preempted <= 1, "{preempted}");
        // Polling begins again when that ends.
        assert!(polls(&mut poller, 1_000_000, SHORT, None) > 700_000);
    }

    /// A wake-up takes long here, so that hits save much: a preemption now and then is no reason to stop polling.
    #[test]
    fn what_is_saved_pays_for_what_is_lost() {
        let mut poller = Poller::new(BUDGET);
        let (slept, found) = (Duration::from_micros(33), Duration::from_micros(15));
        polls(&mut poller, 10, slept, Some(BUDGET));
        let mut polled = 0;
        for _ in 0..100 {
            for _ in 0..2000 {
                if poller.should_poll() {
                    polled += 1;
                    poller.record_hit(found);
                } else {
                    poller.record_sleep(slept);
                }
            }
            poller.record_loss(Duration::from_millis(3));
        }
        assert!(polled > 190_000, "{polled} of 200000");
    }

    #[test]
    fn a_loss_without_end_is_forgotten_some_time() {
        let mut poller = Poller::new(BUDGET);
        poller.record_loss(Duration::MAX);
        assert!(!poller.should_poll());
        assert!(polls(&mut poller, 1_000_000, SHORT, None) > 400_000);
    }

    #[test]
    fn without_a_budget_it_never_polls() {
        let mut poller = Poller::new(Duration::ZERO);
        assert_eq!(polls(&mut poller, 1000, Duration::ZERO, None), 0);
    }
}
