use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::ring::inflight::LogMemory;

/// Words of which few are not 0.
#[derive(Debug, Default)]
struct Sparse(Mutex<BTreeMap<usize, u64>>);

impl LogMemory for Sparse {
    fn words(&self) -> usize {
        MAP_WORDS
    }

    fn load(&self, word: usize) -> u64 {
        self.0.lock().unwrap().get(&word).copied().unwrap_or(0)
    }

    fn store(&self, word: usize, value: u64) {
        self.0.lock().unwrap().insert(word, value);
    }
}

impl DirtyWords for Sparse {
    fn set(&self, word: usize, bits: u64) -> u64 {
        assert!(word < MAP_WORDS, "{word}");
        let mut words = self.0.lock().unwrap();
        let value = words.entry(word).or_default();
        let before = *value;
        *value |= bits;
        before
    }

    fn clear(&self, word: usize, bits: u64) -> u64 {
        let mut words = self.0.lock().unwrap();
        let value = words.entry(word).or_default();
        let before = *value;
        *value &= !bits;
        before
    }
}

fn range(asid: u32, first_page: u64, pages: u64) -> DirtyRange {
    let range = IovaRange::from_size(first_page << 12, pages << 12).unwrap();
    DirtyRange { asid: Asid(asid), range }
}

fn map() -> DirtyMap<Sparse> {
    DirtyMap::new(Sparse::default()).unwrap()
}

fn report(map: &DirtyMap<Sparse>, of: DirtyRange, clear: bool) -> Result<Vec<u64>> {
    let mut bits: BTreeMap<u64, u64> = BTreeMap::new();
    map.report(of, clear, &mut |found| {
        found.iter().for_each(|(word, found)| *bits.entry(*word).or_default() |= found);
        Ok(())
    })?;
    let pages = |(word, bits): (u64, u64)| {
        (0..64).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| word * 64 + bit)
    };
    Ok(bits.into_iter().flat_map(pages).collect())
}

#[test]
fn arguments_are_checked() {
    let one = [range(0, 0, 1)];
    for (page_size, ranges, errno) in [
        (0, &one[..], Errno::INVAL),
        (2048, &one, Errno::INVAL),
        (4097, &one, Errno::INVAL),
        (1 << 31, &[range(0, 0, 1 << 19)], Errno::INVAL),
        (4096, &[], Errno::INVAL),
        (8192, &[range(0, 1, 2)], Errno::INVAL),
        (8192, &[range(0, 0, 3)], Errno::INVAL),
        (4096, &[range(0, 0, 4), range(0, 3, 1)], Errno::INVAL),
        (4096, &[range(0, 0, (1 << 31) + 1)], Errno::INVAL),
        (4096, &[range(0, 0, 1 << 31), range(1, 0, 1)], Errno::INVAL),
        (4096, &[range(0, 0, 1); 257], Errno::TOOBIG),
    ] {
        assert_eq!(map().start(page_size, ranges, 0), Err(errno), "{page_size} {ranges:?}");
    }
    let map = map();
    assert_eq!(report(&map, one[0], true), Err(Errno::INVAL), "nothing is tracked");
    map.start(4096, &[range(1, 8, 8), range(0, 16, 16), range(0, 0, 8), range(0, 8, 8)], 5).unwrap();
    assert_eq!(map.start(4096, &one, 0), Err(Errno::BUSY));
    let tracked = map.tracked().unwrap();
    assert_eq!(tracked.ranges, [range(0, 0, 8), range(0, 8, 8), range(0, 16, 16), range(1, 8, 8)]);
    assert_eq!((tracked.page_size, map.request()), (4096, 5));
    assert_eq!(report(&map, range(0, 4, 20), true), Ok(Vec::new()), "in three ranges");
    for of in [range(0, 31, 2), range(1, 7, 2), range(1, 0, 1), range(2, 8, 1)] {
        assert_eq!(report(&map, of, true), Err(Errno::INVAL), "{of:?}");
    }
    let odd = DirtyRange { asid: Asid(0), range: IovaRange::from_size(0x800, 0x1000).unwrap() };
    assert_eq!(report(&map, odd, true), Err(Errno::INVAL));
}

#[test]
fn the_largest_map_has_room_and_its_last_page_is_found() {
    let map = map();
    let mut ranges = vec![range(0, 1, PAGES_MAX - 255)];
    ranges.extend((0..255).map(|number| range(1, number * 2, 1)));
    map.start(4096, &ranges, 0).unwrap();
    map.mark(Asid(0), (PAGES_MAX - 255) << 12, 4096);
    map.mark(Asid(1), 0, u64::MAX);
    assert_eq!(report(&map, ranges[0], true), Ok(vec![PAGES_MAX - 256]));
    assert!(ranges[1..].iter().all(|of| report(&map, *of, true) == Ok(vec![0])));
    let top = range(0, (1 << 52) - 1, 1);
    let map = self::map();
    map.start(4096, &[top], 0).unwrap();
    map.mark(Asid(0), u64::MAX, 1);
    assert_eq!((report(&map, top, false), map.tracked().unwrap().ranges), (Ok(vec![0]), vec![top]));
}

#[test]
fn what_a_sink_refuses_stays_dirty() {
    let map = map();
    let all = range(0, 0, 1 << 20);
    map.start(4096, &[all], 0).unwrap();
    map.mark(Asid(0), 0, 1 << 32);
    let mut calls = 0;
    let result = map.report(all, true, &mut |_| {
        calls += 1;
        if calls == 2 { Err(Errno::FAULT) } else { Ok(()) }
    });
    assert_eq!(result, Err(Errno::FAULT));
    let left = report(&map, all, true).unwrap();
    assert!(left.len() > 700_000 && left.len() < 1 << 20, "{}", left.len());
    assert_eq!(report(&map, all, true), Ok(Vec::new()));
}

#[derive(Clone, Debug)]
enum Step {
    Mark(u32, u64, u64),
    Report(usize, u64, u64, bool),
}

/// Numbers that a header can have, right and wrong.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..70_u64,
        any::<u64>().prop_map(|bits| bits >> (bits % 64)),
        Just(MAP_WORDS as u64),
        any::<u64>()
    ]
}

proptest! {
    /// Memory that another process has left: nothing outside of the map is accessed (see `Sparse::set`), nothing panics, and only what was
    /// asked for is reported.
    #[test]
    fn a_damaged_header_harms_nobody(
        header in prop::collection::vec(number(), 23),
        marks in prop::collection::vec((0..3_u32, number(), 0..1_u64 << 20), 0..6),
        asked in (0..3_u32, number(), 1..2000_u64),
    ) {
        let words = Sparse::default();
        (1..).zip(header).for_each(|(word, value)| words.store(word, value));
        words.store(0, u64::from_le_bytes(*b"VDPADRT\x01"));
        words.store(1, 1);
        let map = DirtyMap::new(words).unwrap();
        for (asid, iova, len) in marks {
            map.mark(Asid(asid), iova, len);
        }
        map.find(0, 4096);
        let size = map.tracked().unwrap().page_size;
        let (asid, first, pages) = asked;
        let range = first.checked_mul(size).zip(pages.checked_mul(size)).and_then(|(at, len)| IovaRange::from_size(at, len));
        if let Some(range) = range
            && let Ok(found) = report(&map, DirtyRange { asid: Asid(asid), range }, true)
        {
            prop_assert!(found.iter().all(|page| *page < pages), "{found:?} of {pages} pages");
        }
        map.stop();
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let mark =
        (0..3_u32, 0..3_000_000_u64, 0..20_000_u64).prop_map(|(asid, iova, len)| Step::Mark(asid, iova, len));
    let report = (0..3_usize, 0..700_u64, 1..700_u64, any::<bool>())
        .prop_map(|(range, skip, pages, clear)| Step::Report(range, skip, pages, clear));
    prop::collection::vec(prop_oneof![2 => mark, 1 => report], 0..40)
}

proptest! {
    /// Compares with a set of pages, over ranges of odd lengths and beginnings.
    #[test]
    fn agrees_with_a_naive_model(steps in steps()) {
        let ranges = [range(0, 3, 517), range(0, 600, 100), range(1, 0, 700)];
        let map = map();
        map.start(4096, &ranges, 0).unwrap();
        let tracked = |asid: Asid, page: u64| ranges.iter().any(|range| {
            range.asid == asid && (range.range.first()..=range.range.last()).contains(&(page << 12))
        });
        let mut model = BTreeSet::new();
        for step in steps {
            match step {
                Step::Mark(asid, iova, len) => {
                    map.mark(Asid(asid), iova, len);
                    if len > 0 {
                        let pages = iova >> 12..=(iova + len - 1) >> 12;
                        model.extend(pages.filter(|page| tracked(Asid(asid), *page)).map(|page| (asid, page)));
                    }
                }
                Step::Report(index, skip, pages, clear) => {
                    let DirtyRange { asid, range: whole } = ranges[index];
                    let (first, last) = (whole.first() >> 12, whole.last() >> 12);
                    let first = (first + skip).min(last);
                    let pages = pages.min(last - first + 1);
                    let found = report(&map, range(asid.0, first, pages), clear).unwrap();
                    let wanted: Vec<u64> = (0..pages).filter(|page| model.contains(&(asid.0, first + page))).collect();
                    prop_assert_eq!(found, wanted);
                    if clear {
                        model.retain(|(space, page)| *space != asid.0 || !(first..first + pages).contains(page));
                    }
                }
            }
        }
        for DirtyRange { asid, range: whole } in ranges {
            let (first, last) = (whole.first() >> 12, whole.last() >> 12);
            let found = report(&map, range(asid.0, first, last - first + 1), false).unwrap();
            let wanted: Vec<u64> = (first..=last).filter(|page| model.contains(&(asid.0, *page))).map(|page| page - first).collect();
            prop_assert_eq!(found, wanted);
        }
    }
}
