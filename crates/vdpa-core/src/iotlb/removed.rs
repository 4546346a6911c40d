//! [`Removed`]: the difference between an old and a new translation.

use crate::types::IovaRange;

/// Addresses whose translation was removed or changed. The removal is answered only when no request in flight uses any of
/// them (uapi-spec 2.5).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Disjoint, in ascending order.
    ranges: Vec<IovaRange>,
}

impl Removed {
    /// These ranges, which are in address order without overlap, as the entries of a [`Table`](super::Table) are.
    #[must_use]
    pub fn of(removed: impl IntoIterator<Item = IovaRange>) -> Self {
        let mut ranges: Vec<IovaRange> = Vec::new();
        for range in removed {
            let adjoins =
                ranges.last().filter(|last| last.last().checked_add(1) == Some(range.first())).copied();
            match adjoins.and_then(|last| IovaRange::new(last.first(), range.last())) {
                Some(both) => {
                    ranges.pop();
                    ranges.push(both);
                }
                None => ranges.push(range),
            }
        }
        Self { ranges }
    }

    /// All addresses: for devices that do not know the old translation.
    #[must_use]
    pub fn everything() -> Self {
        Self { ranges: vec![IovaRange::ALL] }
    }

    /// Whether nothing was removed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether one of the `len` bytes from `iova` was removed. Bytes beyond the end of the address space are ignored.
    #[must_use]
    pub fn touches(&self, iova: u64, len: u64) -> bool {
        let Some(more) = len.checked_sub(1) else { return false };
        let last = iova.saturating_add(more);
        let at = self.ranges.partition_point(|range| range.last() < iova);
        self.ranges.get(at).is_some_and(|range| range.first() <= last)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(first, last).unwrap()
    }

    #[test]
    fn the_whole_space_and_its_last_byte() {
        let all = Removed::everything();
        assert!(all.touches(0, 1) && all.touches(u64::MAX, 1) && all.touches(u64::MAX, u64::MAX));
        assert!(!all.touches(5, 0) && !all.is_empty());
        let end = Removed::of([range(u64::MAX, u64::MAX)]);
        assert!(end.touches(u64::MAX - 1, 2) && !end.touches(u64::MAX - 1, 1));
        assert!(Removed::of([]).is_empty());
    }

    #[test]
    fn neighbours_are_one_range() {
        let removed = Removed::of([range(0, 9), range(10, 19), range(30, 39)]);
        assert_eq!(removed.ranges, [range(0, 19), range(30, 39)]);
    }

    proptest! {
        /// Compares with a check of each byte.
        #[test]
        fn agrees_with_a_naive_model(
            parts in prop::collection::vec((0u64..4, 1u64..5), 0..12), iova in 0u64..80, len in 0u64..20,
        ) {
            let mut at = 0;
            let ranges: Vec<IovaRange> = parts
                .into_iter()
                .map(|(gap, size)| {
                    let first = at + gap;
                    at = first + size;
                    IovaRange::from_size(first, size).unwrap()
                })
                .collect();
            let removed = Removed::of(ranges.iter().copied());
            let is_removed = |byte: u64| ranges.iter().any(|range| range.first() <= byte && byte <= range.last());
            prop_assert_eq!(removed.touches(iova, len), (iova..iova + len).any(is_removed));
            prop_assert_eq!(removed.is_empty(), !(0..200).any(is_removed));
            let apart = |pair: &[IovaRange]| pair[0].last() + 1 < pair[1].first();
            prop_assert!(removed.ranges.windows(2).all(apart), "{:?}", removed.ranges);
        }
    }
}
