//! An index that finds the range which contains an address, for the data path.

use crate::types::IovaRange;

/// Largest number of ranges that begin in a slot without a directory of its own. Always as many are compared, because a
/// branch on their number would be mispredicted too often.
const SCAN: usize = 2;
/// Largest depth of directories. Ranges that are too dense for it are found by binary search.
const DEPTH: u32 = 6;
/// Marks a slot that refers to a directory.
const DIRECTORY: u32 = 1 << 31;
/// Refers to no directory: for a slot whose ranges are too dense for the largest depth.
const NONE: u32 = DIRECTORY - 1;

/// Disjoint ranges, each with a value, and an immutable index over them: a snapshot of a translation table.
///
/// The ranges are in one array in address order. A directory divides their start addresses into slots of equal width, one
/// to two per range. A slot has the number of ranges that begin before it and in it, so that mostly one range is left to
/// compare, wherever a guest's memory is. Where many ranges begin in one slot, they get a directory of their own.
///
/// ```
/// use vdpa_core::iotlb::Lookup;
/// use vdpa_core::types::IovaRange;
///
/// let range = |first, last| IovaRange::new(first, last).ok_or("a range");
/// let lookup = Lookup::new(vec![(range(0x1000, 0x1fff)?, 'a'), (range(0x8000, 0xffff)?, 'b')]);
/// let found = |iova| lookup.find(iova).map(|&(_, name)| name);
/// assert_eq!((found(0x1fff), found(0x2000), found(0x8000)), (Some('a'), None, Some('b')));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Lookup<T> {
    ranges: Vec<(IovaRange, T)>,
    /// The directory of all ranges.
    root: Directory,
    /// The directories below it.
    directories: Vec<Directory>,
    slots: Vec<Slot>,
}

/// A directory: consecutive ranges and the slots in which they begin.
#[derive(Clone, Copy, Debug, Default)]
struct Directory {
    /// Start address of its first range.
    base: u64,
    /// Logarithm of the width of a slot.
    shift: u32,
    /// Index of its first range.
    start: u32,
    /// Index of its first slot.
    first_slot: u32,
    /// Its last slot, relative to the first.
    last_slot: u32,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Index of the first range that begins in it or after it.
    start: u32,
    /// 0, or the directory of the ranges that begin in it (marked).
    directory: u32,
    /// Start addresses of the ranges from `start` on; without a directory these include all ranges that begin in the slot. The
    /// highest address stands for ranges that do not exist.
    firsts: [u64; SCAN],
}

impl<T> Default for Lookup<T> {
    fn default() -> Self {
        Self { ranges: Vec::new(), root: Directory::default(), directories: Vec::new(), slots: Vec::new() }
    }
}

impl<T> Lookup<T> {
    /// Creates an index over `ranges`, which must be in address order without overlap; otherwise results are unspecified.
    /// Takes time and memory in proportion to their number.
    #[must_use]
    pub fn new(ranges: Vec<(IovaRange, T)>) -> Self {
        let mut lookup = Self { ranges, ..Self::default() };
        // Far more ranges than a table can have, and few enough that no number below overflows.
        if (1..1 << 26).contains(&lookup.ranges.len()) {
            lookup.root = lookup.directory(0, lookup.ranges.len(), DEPTH);
        }
        lookup
    }

    /// The range that contains `iova`, with its value.
    #[must_use]
    #[inline]
    pub fn find(&self, iova: u64) -> Option<&(IovaRange, T)> {
        self.position(iova).map(|(_, found)| found)
    }

    /// As [`find`](Self::find), with the number of the range in address order.
    #[inline]
    pub(super) fn position(&self, iova: u64) -> Option<(usize, &(IovaRange, T))> {
        let at = self.count_up_to(iova).wrapping_sub(1);
        match self.ranges.get(at) {
            Some(found) => (iova <= found.0.last()).then_some((at, found)),
            // Either no range begins at or before `iova`, or `iova` is the highest address, which also stands for ranges that do
            // not exist.
            None => self.last_with(iova),
        }
    }

    #[cold]
    fn last_with(&self, iova: u64) -> Option<(usize, &(IovaRange, T))> {
        let last = self.ranges.last().filter(|(range, _)| (range.first()..=range.last()).contains(&iova));
        last.map(|found| (self.ranges.len() - 1, found))
    }

    /// All ranges, in address order.
    #[must_use]
    pub fn ranges(&self) -> &[(IovaRange, T)] {
        &self.ranges
    }

    /// Number of ranges that begin at `iova` or before it; for the highest address it may be more.
    #[inline]
    fn count_up_to(&self, iova: u64) -> usize {
        let mut directory = &self.root;
        // This ends, because only a directory at a higher level refers to a directory.
        loop {
            let Some(offset) = iova.checked_sub(directory.base) else { return directory.start as usize };
            let position = (offset >> directory.shift).min(directory.last_slot.into());
            let Ok(position) = usize::try_from(position) else { break };
            let Some(slot) = self.slots.get(directory.first_slot as usize + position) else { break };
            if slot.directory != 0 {
                let Some(below) = self.directories.get((slot.directory & !DIRECTORY) as usize) else { break };
                directory = below;
                continue;
            }
            // Ranges that begin in a later slot begin after `iova` anyway.
            let count: usize = slot.firsts.iter().map(|&first| usize::from(first <= iova)).sum();
            return slot.start as usize + count;
        }
        self.ranges.partition_point(|(range, _)| range.first() <= iova)
    }

    /// Builds the directory of the ranges `start..end`, at least one. Adds its slots, and directories below it to a depth of at
    /// most `depth` - 1.
    #[expect(clippy::cast_possible_truncation, reason = "`new` lets no numbers come here that do not fit")]
    fn directory(&mut self, start: usize, end: usize, depth: u32) -> Directory {
        let firsts: Vec<u64> =
            self.ranges.get(start..end).unwrap_or_default().iter().map(|(range, _)| range.first()).collect();
        let (Some(&base), Some(&last)) = (firsts.first(), firsts.last()) else { return Directory::default() };
        let span = last.wrapping_sub(base);
        let most = 2 * firsts.len() as u64;
        let mut shift = 0;
        while span >> shift >= most {
            shift += 1;
        }
        let (first_slot, last_slot) = (self.slots.len(), span >> shift);
        let (mut rest, mut crowded) = (&*firsts, Vec::new());
        for position in 0..=last_slot {
            let inside = |first: &&u64| first.wrapping_sub(base) >> shift <= position;
            let count = rest.iter().take_while(inside).count();
            let from = end - rest.len();
            if count > SCAN {
                crowded.push((self.slots.len(), from, from + count));
            }
            let first = |at: usize| self.ranges.get(from + at).map_or(u64::MAX, |(range, _)| range.first());
            self.slots.push(Slot { start: from as u32, directory: 0, firsts: std::array::from_fn(first) });
            rest = rest.get(count..).unwrap_or_default();
        }
        for (slot, start, end) in crowded {
            let mut name = NONE;
            if depth > 1 {
                let below = self.directory(start, end, depth - 1);
                name = self.directories.len() as u32;
                self.directories.push(below);
            }
            if let Some(slot) = self.slots.get_mut(slot) {
                slot.directory = DIRECTORY | name;
            }
        }
        Directory {
            base,
            shift,
            start: start as u32,
            first_slot: first_slot as u32,
            last_slot: last_slot as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn naive(ranges: &[IovaRange], iova: u64) -> Option<usize> {
        ranges.iter().position(|range| range.first() <= iova && iova <= range.last())
    }

    /// Each range with its position.
    fn numbered(ranges: &[IovaRange]) -> Lookup<usize> {
        Lookup::new(ranges.iter().copied().zip(0..).collect())
    }

    fn found(lookup: &Lookup<usize>, iova: u64) -> Option<usize> {
        lookup.find(iova).map(|&(_, index)| index)
    }

    fn check(ranges: &[IovaRange]) {
        let lookup = numbered(ranges);
        assert!(lookup.ranges().iter().map(|(range, _)| range).eq(ranges));
        assert!(lookup.slots.len() <= 2 * ranges.len() * DEPTH as usize, "{} slots", lookup.slots.len());
        for range in ranges {
            for edge in [range.first(), range.last()] {
                for iova in [edge.saturating_sub(1), edge, edge.saturating_add(1)] {
                    assert_eq!(found(&lookup, iova), naive(ranges, iova), "{iova:#x}");
                }
            }
        }
        for iova in [0, 1, u64::MAX / 2, u64::MAX] {
            assert_eq!(found(&lookup, iova), naive(ranges, iova), "{iova:#x}");
        }
    }

    fn ranges(list: impl IntoIterator<Item = (u64, u64)>) -> Vec<IovaRange> {
        list.into_iter().map(|(first, last)| IovaRange::new(first, last).unwrap()).collect()
    }

    #[test]
    fn few_ranges_and_the_ends_of_the_space_are_found() {
        check(&[]);
        check(&[IovaRange::ALL]);
        check(&ranges([(0, 0), (u64::MAX, u64::MAX)]));
        check(&ranges([(0, 0xfff), (0x1000, 0x1fff), (0x1_0000_0000, u64::MAX)]));
    }

    #[test]
    fn clusters_far_apart_are_found() {
        let cluster = |base: u64| (0..300u64).map(move |i| (base + i * 0x3000, base + i * 0x3000 + 0xfff));
        let mut all: Vec<_> = cluster(0x1000).chain(cluster(0x7f00_0000_0000)).collect();
        all.extend(cluster(0xffff_0000_0000_0000));
        check(&ranges(all));
    }

    /// The worst case: each directory separates only its last few ranges, down to the largest depth.
    #[test]
    fn ranges_with_doubling_distances_are_found() {
        let mut all = vec![(0, 0)];
        for power in 0..=60 {
            let base = 1u64 << power;
            all.extend((0..base.min(40)).map(|i| (base + i, base + i)));
        }
        check(&ranges(all));
    }

    proptest! {
        #[test]
        fn agrees_with_a_scan(
            mut edges in prop::collection::btree_set(prop_oneof![0..400u64, any::<u64>(), (0..64u32).prop_map(|b| 1 << b)], 0..80),
            iovas in prop::collection::vec(prop_oneof![0..400u64, any::<u64>()], 20),
        ) {
            if edges.len() % 2 == 1 {
                edges.pop_last();
            }
            let edges: Vec<u64> = edges.into_iter().collect();
            let ranges: Vec<_> = edges.chunks(2).map(|pair| IovaRange::new(pair[0], pair[1]).unwrap()).collect();
            check(&ranges);
            let lookup = numbered(&ranges);
            for iova in iovas {
                prop_assert_eq!(found(&lookup, iova), naive(&ranges, iova));
            }
        }
    }
}
