//! [`Turn`]: the right to begin a request that may be what ends the process.

use std::sync::atomic::{AtomicU64, Ordering};

use vdpa_sys::clock::monotonic_ns;

/// One suspected request in flight in this process has a turn, so that only one is in flight when the process dies. A turn ends by
/// itself after a second: a disk that does not answer must not keep those of other devices waiting.
#[derive(Debug)]
pub(crate) struct Turn(
    /// Its end by the clock, which nobody else has.
    u64,
);

const LIMIT_NS: u64 = 1_000_000_000;

/// The end of the present turn by the clock; 0 when nobody has one.
static PRESENT: AtomicU64 = AtomicU64::new(0);

impl Turn {
    /// `None` while another request has its turn.
    pub(crate) fn take() -> Option<Self> {
        Self::take_at(&PRESENT, monotonic_ns())
    }

    fn take_at(present: &AtomicU64, now: u64) -> Option<Self> {
        let before = present.load(Ordering::Relaxed);
        // The clock does not stand still for a turn, but two may be asked for at the same instant.
        let end = (now + LIMIT_NS).max(before + 1);
        let free = before <= now;
        let took = free && present.compare_exchange(before, end, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        took.then_some(Self(end))
    }

    /// The request has ended, or is not begun now.
    pub(crate) fn give_back(self) {
        self.give_back_to(&PRESENT);
    }

    fn give_back_to(self, present: &AtomicU64) {
        // It may have ended by the clock, and be another one's.
        let _ = present.compare_exchange(self.0, 0, Ordering::AcqRel, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_a_turn_until_it_gives_it_back_or_a_second_has_passed() {
        let present = AtomicU64::new(0);
        let first = Turn::take_at(&present, 10).unwrap();
        assert!(Turn::take_at(&present, 11).is_none());
        first.give_back_to(&present);
        let second = Turn::take_at(&present, 11).unwrap();
        assert!(Turn::take_at(&present, 10 + LIMIT_NS).is_none());
        let third = Turn::take_at(&present, 11 + LIMIT_NS).unwrap();
        second.give_back_to(&present);
        assert!(Turn::take_at(&present, 12 + LIMIT_NS).is_none(), "a late end is not that of the third");
        third.give_back_to(&present);
        assert!(Turn::take_at(&present, 12 + LIMIT_NS).is_some());
    }
}
