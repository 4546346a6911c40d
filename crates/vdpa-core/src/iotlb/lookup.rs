//! Which of many ranges an address is in, as fast as the data path needs it.

use crate::types::IovaRange;

/// Most ranges that begin in one slot and have no directory of their own; always as many are compared with, because a
/// branch on their number would be guessed wrong too often.
const SCAN: usize = 4;
/// Directories below each other. Addresses crowded beyond that are found by binary search.
const DEPTH: u32 = 6;
/// Marks a slot that names a directory.
const DIRECTORY: u32 = 1 << 31;

/// An index over disjoint ranges that never changes: the translation table of one moment.
///
/// The ranges lie in one array in address order, and a directory divides the addresses they begin at into slots of
/// equal width, at least one and at most two per range. A slot says how many ranges begin before it and in it, which
/// mostly leaves one to compare with, wherever a guest's memory is. Where many ranges crowd into one slot, they have
/// a directory of their own.
///
/// ```
/// use vdpa_core::iotlb::Lookup;
/// use vdpa_core::types::IovaRange;
///
/// let range = |first, last| IovaRange::new(first, last).ok_or("a range");
/// let lookup = Lookup::new(vec![range(0x1000, 0x1fff)?, range(0x8000, 0xffff)?]);
/// assert_eq!((lookup.find(0x1fff), lookup.find(0x2000), lookup.find(0x8000)), (Some(0), None, Some(1)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Lookup {
    ranges: Vec<IovaRange>,
    /// First addresses, and [`SCAN`] more that are not below any.
    firsts: Vec<u64>,
    /// The directory of all ranges.
    root: Directory,
    /// Those below it.
    directories: Vec<Directory>,
    slots: Vec<Slot>,
}

/// Ranges and the slots they begin in.
#[derive(Clone, Copy, Debug, Default)]
struct Directory {
    /// First address of its first range.
    base: u64,
    /// Of the width of a slot.
    shift: u32,
    /// Its first range.
    start: u32,
    /// Its first slot.
    first_slot: u32,
    /// Its last slot, from the first.
    last_slot: u32,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    /// The first range that begins in it or behind it.
    start: u32,
    /// Ranges that begin in it, or the directory that has them.
    content: u32,
}

impl Lookup {
    /// An index over `ranges`, which are in address order and do not overlap; else what is found is unspecified.
    /// Takes time and memory in proportion to their number.
    #[must_use]
    pub fn new(ranges: Vec<IovaRange>) -> Self {
        let firsts = ranges.iter().map(|range| range.first()).chain([u64::MAX; SCAN]).collect();
        let mut lookup = Self { ranges, firsts, ..Self::default() };
        // Far more than anybody maps, and little enough that every number below fits.
        if (1..1 << 26).contains(&lookup.ranges.len()) {
            lookup.root = lookup.directory(0, lookup.ranges.len());
            lookup.divide_slots(lookup.root, DEPTH - 1);
        }
        lookup
    }

    /// The range that contains `iova`, by its position.
    #[must_use]
    #[inline]
    pub fn find(&self, iova: u64) -> Option<usize> {
        let index = self.count_up_to(iova).checked_sub(1)?;
        self.ranges.get(index).filter(|range| iova <= range.last()).map(|_| index)
    }

    /// The range at a position.
    #[must_use]
    #[inline]
    pub fn range(&self, index: usize) -> Option<IovaRange> {
        self.ranges.get(index).copied()
    }

    /// Number of ranges.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Number of ranges that begin at `iova` or before it.
    #[inline]
    fn count_up_to(&self, iova: u64) -> usize {
        let mut directory = &self.root;
        // Each directory names only later ones, so this ends.
        loop {
            let Some(offset) = iova.checked_sub(directory.base) else { return directory.start as usize };
            let position = (offset >> directory.shift).min(directory.last_slot.into());
            let Ok(position) = usize::try_from(position) else { break };
            let Some(slot) = self.slots.get(directory.first_slot as usize + position) else { break };
            if slot.content & DIRECTORY != 0 {
                let Some(below) = self.directories.get((slot.content & !DIRECTORY) as usize) else { break };
                directory = below;
                continue;
            }
            let start = slot.start as usize;
            let Some(firsts) = self.firsts.get(start..).and_then(<[u64]>::first_chunk::<SCAN>) else { break };
            if slot.content as usize > SCAN {
                break;
            }
            // What begins in a later slot is beyond `iova` anyway; only what is behind the last range may not be.
            let count: usize = firsts.iter().map(|&first| usize::from(first <= iova)).sum();
            return (start + count).min(self.ranges.len());
        }
        self.ranges.partition_point(|range| range.first() <= iova)
    }

    /// The directory of the ranges from `start` to before `end`, at least one; adds its slots.
    #[expect(clippy::cast_possible_truncation, reason = "`new` lets no numbers come here that do not fit")]
    fn directory(&mut self, start: usize, end: usize) -> Directory {
        let Some(firsts @ ([first, .., last] | [first @ last])) = self.firsts.get(start..end) else {
            return Directory::default();
        };
        let (base, span) = (*first, last.wrapping_sub(*first));
        let most = 2 * firsts.len() as u64;
        let mut shift = 0;
        while span >> shift >= most {
            shift += 1;
        }
        let (first_slot, last_slot) = (self.slots.len() as u32, (span >> shift) as u32);
        let mut rest = firsts;
        for position in 0..=u64::from(last_slot) {
            let inside = |first: &&u64| first.wrapping_sub(base) >> shift <= position;
            let count = rest.iter().take_while(inside).count();
            self.slots.push(Slot { start: (end - rest.len()) as u32, content: count as u32 });
            rest = rest.get(count..).unwrap_or_default();
        }
        Directory { base, shift, start: start as u32, first_slot, last_slot }
    }

    /// Gives those slots of a directory that have many ranges directories of their own.
    #[expect(clippy::cast_possible_truncation, reason = "at most one directory per five ranges and level")]
    fn divide_slots(&mut self, above: Directory, depth: u32) {
        if depth == 0 {
            return;
        }
        for at in above.first_slot..=above.first_slot + above.last_slot {
            let Some(&Slot { start, content }) = self.slots.get(at as usize) else { return };
            if content as usize <= SCAN {
                continue;
            }
            let below = self.directory(start as usize, start as usize + content as usize);
            if let Some(slot) = self.slots.get_mut(at as usize) {
                slot.content = DIRECTORY | self.directories.len() as u32;
            }
            self.directories.push(below);
            self.divide_slots(below, depth - 1);
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

    fn check(ranges: &[IovaRange]) {
        let lookup = Lookup::new(ranges.to_vec());
        assert!(lookup.slots.len() <= 2 * ranges.len() * DEPTH as usize, "{} slots", lookup.slots.len());
        for (index, range) in ranges.iter().enumerate() {
            assert_eq!(lookup.range(index), Some(*range));
            for edge in [range.first(), range.last()] {
                for iova in [edge.saturating_sub(1), edge, edge.saturating_add(1)] {
                    assert_eq!(lookup.find(iova), naive(ranges, iova), "{iova:#x}");
                }
            }
        }
        for iova in [0, 1, u64::MAX / 2, u64::MAX] {
            assert_eq!(lookup.find(iova), naive(ranges, iova), "{iova:#x}");
        }
    }

    fn ranges(list: impl IntoIterator<Item = (u64, u64)>) -> Vec<IovaRange> {
        list.into_iter().map(|(first, last)| IovaRange::new(first, last).unwrap()).collect()
    }

    #[test]
    fn few_ranges_and_the_ends_of_the_space() {
        check(&[]);
        check(&[IovaRange::ALL]);
        check(&ranges([(0, 0), (u64::MAX, u64::MAX)]));
        check(&ranges([(0, 0xfff), (0x1000, 0x1fff), (0x1_0000_0000, u64::MAX)]));
    }

    #[test]
    fn crowds_far_apart() {
        let crowd = |base: u64| (0..300u64).map(move |i| (base + i * 0x3000, base + i * 0x3000 + 0xfff));
        let mut all: Vec<_> = crowd(0x1000).chain(crowd(0x7f00_0000_0000)).collect();
        all.extend(crowd(0xffff_0000_0000_0000));
        check(&ranges(all));
    }

    /// The worst case: each directory tells only the last few apart, until there may be no more of them.
    #[test]
    fn distances_that_double() {
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
            let lookup = Lookup::new(ranges.clone());
            for iova in iovas {
                prop_assert_eq!(lookup.find(iova), naive(&ranges, iova));
            }
        }
    }
}
