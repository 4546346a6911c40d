//! [`Layered`]: a [`Lookup`] that can be changed at a cost that does not depend on its size.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Lookup, Tree};
use crate::types::IovaRange;

/// Up to so many ranges are put into a new index after each change: that takes a few microseconds, and nothing is found as
/// fast as in an index without changes on it.
const SMALL: usize = 64;
/// A new index is made when this part of the ranges, as a divisor, has changed since the last one.
const PART: usize = 8;

/// Disjoint ranges, each with a value: an immutable index over nearly all of them, and what has changed since it was made.
///
/// [`changed`](Self::changed) makes the next one from the last one, which shares its index. A new index is made so rarely
/// that its cost, divided among the changes in between, is that of a few ranges each.
///
/// A range that was there when the index was made, and has not been removed since, is found as fast as in an index alone.
#[derive(Clone, Debug)]
pub struct Layered<T> {
    index: Arc<Index<T>>,
    /// By first address: what is there instead of what the index has there; with no value, nothing is.
    over: Tree<(IovaRange, Option<T>)>,
}

/// An index, and which of its ranges were removed in any of those that share it. Whoever finds one of these looks at what has
/// changed in its own: it may still be there.
#[derive(Debug)]
struct Index<T> {
    lookup: Lookup<T>,
    /// A bit for each range. Set before the one without the range exists, and never cleared.
    removed: Box<[AtomicU64]>,
}

impl<T> Index<T> {
    fn new(ranges: Vec<(IovaRange, T)>) -> Self {
        let removed = (0..ranges.len().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { lookup: Lookup::new(ranges), removed }
    }

    #[inline]
    fn is_removed(&self, at: usize) -> bool {
        self.removed.get(at / 64).is_none_or(|word| word.load(Ordering::Relaxed) >> (at % 64) & 1 == 1)
    }

    /// What contains `iova` is removed, or was before.
    fn remove(&self, iova: u64) {
        let found = self.lookup.position(iova).map(|(at, _)| at);
        if let Some((at, word)) = found.and_then(|at| Some((at, self.removed.get(at / 64)?))) {
            word.fetch_or(1 << (at % 64), Ordering::Relaxed);
        }
    }
}

impl<T> Default for Index<T> {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl<T> Default for Layered<T> {
    fn default() -> Self {
        Self { index: Arc::default(), over: Tree::default() }
    }
}

/// What has changed: the range that was there, and the range and value that are there now. At least one of them.
pub type RangeChange<T> = (Option<IovaRange>, Option<(IovaRange, T)>);

impl<T> Layered<T> {
    /// An index over `ranges`, which must be in address order without overlap.
    #[must_use]
    pub fn new(ranges: Vec<(IovaRange, T)>) -> Self {
        Self { index: Arc::new(Index::new(ranges)), over: Tree::default() }
    }

    /// The range that contains `iova`, with its value.
    #[must_use]
    #[inline]
    pub fn find(&self, iova: u64) -> Option<(IovaRange, &T)> {
        match self.index.lookup.position(iova) {
            Some((at, (range, value))) if self.over.is_empty() || !self.index.is_removed(at) => {
                Some((*range, value))
            }
            found => self.find_changed(iova, found.map(|(_, found)| found)),
        }
    }

    /// What contains `iova`, where the index has `found`, which may have been removed.
    fn find_changed<'a>(
        &'a self,
        iova: u64,
        found: Option<&'a (IovaRange, T)>,
    ) -> Option<(IovaRange, &'a T)> {
        match self.over.floor(iova) {
            Some((_, (range, value))) if iova <= range.last() => value.as_ref().map(|value| (*range, value)),
            _ => found.map(|(range, value)| (*range, value)),
        }
    }
}

impl<T: Clone> Layered<T> {
    /// With these changes, after which there are `count` ranges. `all` gives them all, in address order, when an index is to be
    /// made. What is removed must be there as it was added.
    #[must_use]
    pub fn changed(
        &self,
        changes: &[RangeChange<T>],
        count: usize,
        all: impl FnOnce() -> Vec<(IovaRange, T)>,
    ) -> Self {
        if count <= SMALL || self.over.len() + changes.len() > SMALL.max(count / PART) {
            return Self::new(all());
        }
        let mut over = self.over.clone();
        // What is removed may make room for what is added, whatever their order is.
        for range in changes.iter().filter_map(|(removed, _)| *removed) {
            self.index.remove(range.first());
            over.insert(range.first(), (range, None));
        }
        for (range, value) in changes.iter().filter_map(|(_, added)| added.as_ref()) {
            uncover(&mut over, *range);
            over.insert(range.first(), (*range, Some(value.clone())));
        }
        Self { index: Arc::clone(&self.index), over }
    }
}

/// Makes room for a range where nothing is. What the index has beside it stays hidden.
fn uncover<T: Clone>(over: &mut Tree<(IovaRange, Option<T>)>, range: IovaRange) {
    while let Some((first, (hidden, _))) =
        over.floor(range.last()).filter(|(_, (hidden, _))| hidden.last() >= range.first())
    {
        let hidden = *hidden;
        over.remove(first);
        let before = range.first().checked_sub(1).and_then(|last| IovaRange::new(first, last));
        let after = range.last().checked_add(1).and_then(|first| IovaRange::new(first, hidden.last()));
        for rest in [before, after].into_iter().flatten() {
            over.insert(rest.first(), (rest, None));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Ranges as a table has them, and the index that follows it.
    #[derive(Clone, Default)]
    struct Bench {
        table: BTreeMap<u64, (IovaRange, u32)>,
        layered: Layered<u32>,
        indices: usize,
    }

    impl Bench {
        fn change(&mut self, changes: &[RangeChange<u32>]) {
            for range in changes.iter().filter_map(|(removed, _)| *removed) {
                assert!(self.table.remove(&range.first()).is_some());
            }
            self.table
                .extend(changes.iter().filter_map(|(_, added)| *added).map(|added| (added.0.first(), added)));
            let mut made = 0;
            self.layered = self.layered.changed(changes, self.table.len(), || {
                made = 1;
                self.table.values().copied().collect()
            });
            self.indices += made;
        }

        fn overlaps(&self, range: IovaRange) -> bool {
            let before = self.table.range(..=range.last()).next_back();
            before.is_some_and(|(_, (found, _))| found.last() >= range.first())
        }

        fn check(&self, iovas: impl Iterator<Item = u64>) {
            for iova in iovas {
                let found =
                    self.table.range(..=iova).next_back().filter(|(_, (range, _))| iova <= range.last());
                let expected = found.map(|(_, (range, value))| (*range, value));
                assert_eq!(self.layered.find(iova), expected, "{iova}");
            }
        }
    }

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(first, last).unwrap()
    }

    #[test]
    fn indices_are_made_rarely() {
        let mut bench = Bench::default();
        let all: Vec<RangeChange<u32>> =
            (0..10_000).map(|i| (None, Some((range(10 * i, 10 * i + 4), 1)))).collect();
        bench.change(&all);
        assert_eq!(bench.indices, 1);
        for i in 0..10_000u64 {
            let old = range(10 * (i * 7 % 10_000), 10 * (i * 7 % 10_000) + 4);
            bench.change(&[(Some(old), Some((range(old.first(), old.last() + 3), 2)))]);
        }
        assert!((6..12).contains(&bench.indices), "{} indices", bench.indices);
        bench.check(0..100_010);
    }

    #[test]
    fn the_whole_space_is_covered_and_uncovered() {
        let mut bench = Bench::default();
        // Enough that changes are kept apart from the index.
        let all: Vec<RangeChange<u32>> = (0..100).map(|i| (None, Some((range(i, i), 1)))).collect();
        bench.change(&all);
        bench.change(&[(None, Some((range(100, u64::MAX), 7)))]);
        assert_eq!(bench.indices, 1);
        bench.change(&[(Some(range(100, u64::MAX)), Some((range(200, u64::MAX - 1), 8)))]);
        bench.change(&[(None, Some((range(u64::MAX, u64::MAX), 9)))]);
        bench.change(&[(Some(range(0, 0)), None)]);
        bench.check((0..300).chain([u64::MAX - 1, u64::MAX]));
    }

    proptest! {
        #[test]
        fn agrees_with_a_map(
            ops in prop::collection::vec((any::<bool>(), 0..700u64, 0..9u64, 0..9u64), 0..250),
        ) {
            let (mut bench, mut before) = (Bench::default(), Vec::new());
            let all: Vec<RangeChange<u32>> =
                (0..100).map(|i| (None, Some((range(6 * i, 6 * i + 2), 0)))).collect();
            bench.change(&all);
            for (at, (several, first, len, other)) in (1..).zip(ops) {
                if at % 16 == 1 {
                    before.push(bench.clone());
                }
                let mut changes = Vec::new();
                let wanted = range(first, first + len);
                let hit: Vec<IovaRange> =
                    bench.table.values().map(|(range, _)| *range).filter(|range| range.overlaps(wanted)).collect();
                changes.extend(hit.iter().map(|range| (Some(*range), None)));
                if several || hit.is_empty() {
                    let room = range(first, first + len.min(other));
                    changes.push((None, Some((room, at))));
                    prop_assert!(!bench.overlaps(room) || !hit.is_empty());
                }
                bench.change(&changes);
            }
            // Those of before share the index, and are as they were.
            before.iter().chain([&bench]).for_each(|bench| bench.check(0..720));
        }
    }
}
