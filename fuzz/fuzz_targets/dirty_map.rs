//! The map of dirty pages in memory that another process, or another version of the program, has left: whatever its header says, pages are
//! marked and reported without a panic and without an access outside of it, and only what was asked for is reported.
#![no_main]

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vdpa_core::dirty::{DirtyMap, DirtyRange, DirtyWords, MAP_WORDS};
use vdpa_core::ring::inflight::LogMemory;
use vdpa_core::types::{Asid, IovaRange};

/// Words of a header with a few ranges.
const HEADER: usize = 24;
/// Bytes of a request: a damaged page size must not make a loop of minutes.
const LONGEST: u64 = 1 << 24;

#[derive(Arbitrary, Debug)]
struct Input {
    /// The state and what follows it; the version is right, or nothing would be read.
    header: [u64; HEADER - 1],
    /// Bits and summary, by their place.
    words: Vec<(u32, u64)>,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Mark { asid: u8, iova: u64, len: u32 },
    Report { asid: u8, first: u64, pages: u16, clear: bool },
    Find { from: u32, words: u16 },
    Start { page_shift: u8, ranges: Vec<(u8, u32, u16)> },
    Stop,
    Ask,
}

/// Most words are 0. A clone is the same.
#[derive(Clone, Debug, Default)]
struct Words(Rc<RefCell<HashMap<usize, u64>>>);

impl LogMemory for Words {
    fn words(&self) -> usize {
        MAP_WORDS
    }

    fn load(&self, word: usize) -> u64 {
        self.0.borrow().get(&word).copied().unwrap_or(0)
    }

    fn store(&self, word: usize, value: u64) {
        assert!(word < MAP_WORDS, "word {word} is outside");
        self.0.borrow_mut().insert(word, value);
    }
}

impl DirtyWords for Words {
    fn set(&self, word: usize, bits: u64) -> u64 {
        let before = self.load(word);
        if word < MAP_WORDS {
            self.store(word, before | bits);
        }
        before
    }

    fn clear(&self, word: usize, bits: u64) -> u64 {
        let before = self.load(word);
        if word < MAP_WORDS {
            self.store(word, before & !bits);
        }
        before
    }
}

fuzz_target!(|input: Input| {
    let words = Words::default();
    for (at, value) in (1..).zip(input.header) {
        words.store(at, value);
    }
    for (at, value) in input.words.into_iter().take(64) {
        words.store(at as usize % MAP_WORDS, value);
    }
    words.store(0, u64::from_le_bytes(*b"VDPADRT\x01"));
    let map = DirtyMap::new(words.clone()).expect("the version is known");
    for step in input.steps.into_iter().take(32) {
        carry_out(&map, step);
    }
});

fn carry_out(map: &DirtyMap<Words>, step: Step) {
    match step {
        Step::Mark { asid, iova, len } => map.mark(Asid(asid.into()), iova, u64::from(len) % LONGEST),
        Step::Report { asid, first, pages, clear } => {
            let size = map.tracked().map_or(4096, |tracked| tracked.page_size);
            let (Some(bytes), first) = (size.checked_mul(u64::from(pages)), first.saturating_mul(size)) else { return };
            let Some(range) = IovaRange::from_size(first, bytes) else { return };
            let mut next = 0;
            let mut sink = |bits: &[(u64, u64)]| {
                for &(word, bits) in bits {
                    assert!(word >= next && bits != 0, "words are in order and not empty");
                    let highest = word * 64 + u64::from(63 - bits.leading_zeros());
                    assert!(highest < u64::from(pages), "page {highest} of {pages}");
                    next = word;
                }
                Ok(())
            };
            let _ = map.report(DirtyRange { asid: Asid(asid.into()), range }, clear, &mut sink);
        }
        Step::Find { from, words } => map.find(from as usize, from as usize + usize::from(words)),
        Step::Start { page_shift, ranges } => {
            let size = 1_u64 << (page_shift % 40);
            let range = |(asid, first, pages): (u8, u32, u16)| {
                let range = IovaRange::from_size(u64::from(first).checked_mul(size)?, size.checked_mul(pages.into())?)?;
                Some(DirtyRange { asid: Asid(asid.into()), range })
            };
            let ranges: Vec<_> = ranges.into_iter().take(300).filter_map(range).collect();
            let _ = map.start(size, &ranges, 1);
        }
        Step::Stop => map.stop(),
        Step::Ask => {
            let _ = (map.is_on(), map.request(), map.tracked());
        }
    }
}
