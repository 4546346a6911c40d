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
    /// The entries of `before` that are not in `after` or differ there in any way. Both lists are in address order without
    /// overlap, as the entries of a [`Table`](super::Table).
    #[must_use]
    pub fn between<T: PartialEq>(before: &[(IovaRange, T)], after: &[(IovaRange, T)]) -> Self {
        let stays = |entry: &&(IovaRange, T)| {
            let found = after.binary_search_by_key(&entry.0.first(), |(range, _)| range.first());
            found.ok().and_then(|at| after.get(at)) == Some(*entry)
        };
        let mut ranges: Vec<IovaRange> = Vec::new();
        for &(range, _) in before.iter().filter(|entry| !stays(entry)) {
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

    /// Generates a table of a small address space from cuts, gaps and values.
    fn entries() -> impl Strategy<Value = Vec<(IovaRange, u8)>> {
        let entry = (0u64..4, 1u64..5, 0u8..2);
        prop::collection::vec(entry, 0..12).prop_map(|parts| {
            let mut at = 0;
            parts
                .into_iter()
                .map(|(gap, size, value)| {
                    let first = at + gap;
                    at = first + size;
                    (IovaRange::from_size(first, size).unwrap(), value)
                })
                .collect()
        })
    }

    #[test]
    fn the_whole_space_and_its_last_byte() {
        let all = Removed::everything();
        assert!(all.touches(0, 1) && all.touches(u64::MAX, 1) && all.touches(u64::MAX, u64::MAX));
        assert!(!all.touches(5, 0) && !all.is_empty());
        let end = Removed::between(&[(IovaRange::new(u64::MAX, u64::MAX).unwrap(), ())], &[]);
        assert!(end.touches(u64::MAX - 1, 2) && !end.touches(u64::MAX - 1, 1));
    }

    #[test]
    fn an_entry_that_was_cut_or_changed_is_removed_whole() {
        let range = |first, last| IovaRange::new(first, last).unwrap();
        let before = [(range(0, 9), 'a'), (range(10, 19), 'b'), (range(30, 39), 'c')];
        assert!(Removed::between(&before, &before).is_empty());
        let cut = [(range(0, 9), 'a'), (range(10, 18), 'b'), (range(30, 39), 'x')];
        assert_eq!(Removed::between(&before, &cut).ranges, [range(10, 19), range(30, 39)]);
        assert_eq!(Removed::between(&before, &[]).ranges, [range(0, 19), range(30, 39)]);
        assert!(Removed::between(&[], &before).is_empty(), "what is new was not removed");
    }

    proptest! {
        /// Compares with a check of each byte.
        #[test]
        fn agrees_with_a_naive_model(
            before in entries(), after in entries(), kept in any::<u16>(), iova in 0u64..80, len in 0u64..20,
        ) {
            // Some of the entries stay as they were.
            let mut after = after;
            for (bit, entry) in before.iter().take(12).enumerate() {
                if kept >> bit & 1 == 1 {
                    after.retain(|(range, _)| !range.overlaps(entry.0));
                    after.push(*entry);
                }
            }
            after.sort_unstable_by_key(|(range, _)| range.first());
            let removed = Removed::between(&before, &after);
            let is_removed = |byte: u64| {
                before.iter().any(|entry| entry.0.first() <= byte && byte <= entry.0.last() && !after.contains(entry))
            };
            prop_assert_eq!(removed.touches(iova, len), (iova..iova + len).any(is_removed));
            prop_assert_eq!(removed.is_empty(), !(0..200).any(is_removed));
            let apart = |pair: &[IovaRange]| pair[0].last() + 1 < pair[1].first();
            prop_assert!(removed.ranges.windows(2).all(apart), "{:?}", removed.ranges);
        }
    }
}
