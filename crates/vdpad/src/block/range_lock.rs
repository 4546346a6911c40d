//! [`RangeLocks`]: shared and exclusive locks on byte ranges of a disk, for operations in flight.

use std::num::NonZeroU32;

/// A byte range of the disk that an operation changes. Held until the request is answered or only waits for its flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RangeLock {
    /// Offset of the first byte.
    pub(crate) start: u64,
    /// Offset of the byte behind the last one.
    pub(crate) end: u64,
    /// Set for a read-modify-write of the range: no other operation may change any of its bytes meanwhile. Shared locks may
    /// overlap each other.
    pub(crate) exclusive: bool,
}

impl RangeLock {
    const fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Whether the two cannot be held at the same time.
    const fn conflicts(&self, other: &Self) -> bool {
        (self.exclusive || other.exclusive) && self.overlaps(other)
    }
}

/// Identifies a lock that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LockId(NonZeroU32);

/// The locks of one disk that are held, and the operations (`T`) that wait for one.
#[derive(Debug)]
pub(super) struct RangeLocks<T> {
    held: Vec<Option<RangeLock>>,
    free: Vec<LockId>,
    /// In order of arrival. A lock is granted only if it conflicts with none that arrived earlier, so none waits for ever.
    waiting: Vec<(RangeLock, T)>,
}

impl<T> Default for RangeLocks<T> {
    fn default() -> Self {
        Self { held: Vec::new(), free: Vec::new(), waiting: Vec::new() }
    }
}

impl<T> RangeLocks<T> {
    /// Grants `lock` and returns `operation`, or queues both behind the conflicting locks that came earlier.
    pub(super) fn acquire(&mut self, lock: RangeLock, operation: T) -> Option<(LockId, T)> {
        if self.is_blocked(&lock, self.waiting.len()) {
            self.waiting.push((lock, operation));
            return None;
        }
        Some((self.grant(lock), operation))
    }

    /// Releases a lock. Returns the waiting operations that are granted theirs as a result.
    pub(super) fn release(&mut self, id: LockId) -> Vec<(LockId, T)> {
        let Some(released) = self.held.get_mut(id.index()).and_then(Option::take) else {
            return Vec::new();
        };
        self.free.push(id);
        let mut granted = Vec::new();
        let mut at = 0;
        while let Some((lock, _)) = self.waiting.get(at) {
            let lock = *lock;
            if lock.conflicts(&released) && !self.is_blocked(&lock, at) {
                let (lock, operation) = self.waiting.remove(at);
                granted.push((self.grant(lock), operation));
            } else {
                at += 1;
            }
        }
        granted
    }

    /// The operations that wait.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &T> {
        self.waiting.iter().map(|(_, operation)| operation)
    }

    /// The operations that wait.
    pub(super) fn waiting_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.waiting.iter_mut().map(|(_, operation)| operation)
    }

    /// The number of operations that wait.
    pub(super) const fn waiting_len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether `lock` conflicts with one that is held, or with one of the first `earlier` that wait.
    fn is_blocked(&self, lock: &RangeLock, earlier: usize) -> bool {
        self.held.iter().flatten().any(|other| other.conflicts(lock))
            || self.waiting.iter().take(earlier).any(|(other, _)| other.conflicts(lock))
    }

    fn grant(&mut self, lock: RangeLock) -> LockId {
        let id = self.free.pop().unwrap_or_else(|| {
            self.held.push(None);
            // The number of locks is bounded by the number of requests in flight, so it fits.
            LockId(u32::try_from(self.held.len()).ok().and_then(NonZeroU32::new).unwrap_or(NonZeroU32::MAX))
        });
        if let Some(slot) = self.held.get_mut(id.index()) {
            *slot = Some(lock);
        }
        id
    }
}

impl LockId {
    const fn index(self) -> usize {
        self.0.get() as usize - 1
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lock(start: u64, end: u64, exclusive: bool) -> RangeLock {
        RangeLock { start, end, exclusive }
    }

    #[test]
    fn shared_locks_overlap_and_exclusive_ones_wait_in_order() {
        let mut locks = RangeLocks::default();
        let (first, _) = locks.acquire(lock(0, 8, false), 'a').unwrap();
        let (second, _) = locks.acquire(lock(4, 12, false), 'b').unwrap();
        assert_eq!(locks.acquire(lock(7, 8, true), 'c'), None);
        assert_eq!(
            locks.acquire(lock(7, 8, false), 'd'),
            None,
            "a shared lock does not overtake an exclusive one that waits"
        );
        assert!(
            locks.acquire(lock(8, 9, true), 'e').is_none()
                && locks.acquire(lock(20, 21, true), 'f').is_some()
        );
        assert_eq!(locks.release(first), [], "the second lock still blocks the third");
        let granted = locks.release(second);
        assert_eq!(granted.iter().map(|(_, operation)| *operation).collect::<String>(), "ce");
        assert_eq!(locks.release(granted[1].0), []);
        assert_eq!(
            locks.release(granted[0].0).iter().map(|(_, operation)| *operation).collect::<String>(),
            "d"
        );
        assert_eq!(locks.waiting_len(), 0);
    }

    proptest! {
        /// Locks held at the same time never conflict, and every lock is granted in the end.
        #[test]
        fn no_conflict_is_granted_and_no_request_is_forgotten(
            requested in prop::collection::vec((0u64..32, 1u64..8, any::<bool>(), 0usize..4), 1..60)
        ) {
            let mut locks = RangeLocks::default();
            let mut held: Vec<(LockId, RangeLock)> = Vec::new();
            let mut seen = 0;
            for &(start, len, exclusive, releases) in &requested {
                let new = lock(start, start + len, exclusive);
                held.extend(locks.acquire(new, new));
                for _ in 0..releases.min(held.len()) {
                    let (id, _) = held.remove(releases * 7 % held.len());
                    seen += 1;
                    held.extend(locks.release(id));
                }
                for (at, (_, one)) in held.iter().enumerate() {
                    prop_assert!(held[..at].iter().all(|(_, other)| !other.conflicts(one)));
                }
            }
            while let Some((id, _)) = held.pop() {
                seen += 1;
                held.extend(locks.release(id));
            }
            prop_assert_eq!((seen, locks.waiting_len()), (requested.len(), 0));
        }
    }
}
