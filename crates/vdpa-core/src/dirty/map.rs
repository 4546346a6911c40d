//! [`DirtyMap`]: the bits of dirty pages.
//!
//! Words of 64 bits, in memory that may outlive the process:
//!
//! | word | what |
//! |---|---|
//! | 0 | [`MAGIC`], with the version |
//! | 1 | 1 while pages are tracked, the last store of a start |
//! | 2 | page size, log2 |
//! | 3 | number of ranges |
//! | 4 | number of the request that began |
//! | 8.. | ranges: address space, first page, number of pages, first word of its bits; ascending, not overlapping |
//! | [`SUMMARY`].. | one bit for each line of bits that may have one |
//! | [`LEAVES`].. | the bits: one for each page, those of each range from a line on |
//!
//! A line is 8 words: a cache line, 512 pages. Only the summary is read as a whole, so what a report costs depends on what is dirty.
//! To mark a page sets its bit, then the one of its line if the word was 0. To clear takes bits, then the one of their line,
//! and sets that again if the line is not empty: so whoever marks at the same time finds one of both. A process that dies in
//! between leaves a line without its bit, so the next one has [`find`](DirtyMap::find) look at the bits that are there.

use super::{DirtyLimits, DirtyRange, DirtySink, PAGES_MAX, RANGES_MAX, Tracked, check_pages};
use crate::errno::Errno;
use crate::faults::{self, Fault};
use crate::ring::inflight::LogMemory;
use crate::types::{Asid, IovaRange, Result};

/// `VDPADRT` and the version of the format.
const MAGIC: u64 = u64::from_le_bytes(*b"VDPADRT\x01");

/// Words of the header by what they hold.
const STATE: usize = 1;
const SHIFT: usize = 2;
const RANGES: usize = 3;
const REQUEST: usize = 4;
const FIRST_RANGE: usize = 8;
/// Words of a range.
const RANGE: usize = 4;

/// Words of a line.
const LINE: usize = 8;
/// Lines at most: those of the pages, and one more for each range.
#[expect(clippy::cast_possible_truncation, reason = "2^22 and 256")]
const LINES: usize = PAGES_MAX as usize / (64 * LINE) + RANGES_MAX as usize;

/// First word of the summary.
const SUMMARY: usize = 2048;
/// First word of the bits.
const LEAVES: usize = (SUMMARY + LINES.div_ceil(64)).next_multiple_of(512);
/// Words that a map needs. Memory is needed for those that are used.
pub const MAP_WORDS: usize = LEAVES + LINES * LINE;

const _: () = assert!(FIRST_RANGE + RANGE * RANGES_MAX as usize <= SUMMARY);

/// Words of bits that are given to a sink at once.
const BATCH: usize = 4096;

/// Words that several threads and processes change at once.
pub trait DirtyWords: LogMemory {
    /// Sets bits of a word, ordered with all other accesses; returns the word before. 0 beyond the end.
    fn set(&self, word: usize, bits: u64) -> u64;

    /// Clears bits of a word, ordered with all other accesses; returns the word before. 0 beyond the end.
    fn clear(&self, word: usize, bits: u64) -> u64;
}

/// Which pages are dirty, in two levels: a bit for each page, and one for each line of bits that has any.
///
/// [`mark`](Self::mark) and [`report`](Self::report) may run at the same time, on any threads. [`start`](Self::start) and
/// [`stop`](Self::stop) run alone: nobody marks meanwhile.
#[derive(Debug)]
pub struct DirtyMap<M> {
    words: M,
}

/// A tracked range, as it is in the header.
#[derive(Clone, Copy, Debug)]
struct Tracks {
    asid: u64,
    first: u64,
    pages: u64,
    /// First word of its bits.
    bits: usize,
}

impl<M: DirtyWords> DirtyMap<M> {
    /// The map in these words: what is tracked in there goes on.
    ///
    /// # Errors
    /// `EINVAL` for too few words, or those of another version.
    pub fn new(words: M) -> Result<Self> {
        let known = [0, MAGIC].contains(&words.load(0));
        if known && words.words() >= MAP_WORDS { Ok(Self { words }) } else { Err(Errno::INVAL) }
    }

    /// Whether pages are tracked, by the first two words of a map.
    #[must_use]
    pub const fn is_started([magic, state]: [u64; 2]) -> bool {
        magic == MAGIC && state == 1
    }

    /// Whether pages are tracked.
    #[must_use]
    pub fn is_on(&self) -> bool {
        Self::is_started([self.words.load(0), self.words.load(STATE)])
    }

    /// The number of the request that began.
    #[must_use]
    pub fn request(&self) -> u64 {
        self.words.load(REQUEST)
    }

    /// What is tracked.
    #[must_use]
    pub fn tracked(&self) -> Option<Tracked> {
        let range = |tracks: Tracks| {
            let first = tracks.first << self.shift();
            let range =
                IovaRange::new(first, ((tracks.first + tracks.pages) << self.shift()).wrapping_sub(1))?;
            Some(DirtyRange { asid: Asid(u32::try_from(tracks.asid).ok()?), range })
        };
        self.is_on().then(|| Tracked {
            page_size: 1 << self.shift(),
            ranges: (0..self.count()).filter_map(|index| range(self.range(index))).collect(),
        })
    }

    /// Begins to track. All bits must be 0.
    ///
    /// # Errors
    /// As [`DirtyTracking::start`](super::DirtyTracking::start).
    pub fn start(&self, page_size: u64, ranges: &[DirtyRange], request: u64) -> Result<()> {
        if self.is_on() {
            return Err(Errno::BUSY);
        }
        let ranges = checked(page_size, ranges)?;
        let shift = page_size.trailing_zeros();
        let mut bits = LEAVES;
        let mut at = FIRST_RANGE;
        for DirtyRange { asid, range } in &ranges {
            let pages = (range.last() >> shift) - (range.first() >> shift) + 1;
            let words = [asid.0.into(), range.first() >> shift, pages, bits as u64];
            words.into_iter().zip(at..).for_each(|(value, word)| self.words.store(word, value));
            at += RANGE;
            let needed = usize::try_from(pages.div_ceil(64)).map_err(|_| Errno::INVAL)?;
            bits += needed.next_multiple_of(LINE);
        }
        if bits > MAP_WORDS {
            return Err(Errno::INVAL);
        }
        self.words.store(SHIFT, shift.into());
        self.words.store(RANGES, ranges.len() as u64);
        self.words.store(REQUEST, request);
        self.words.store(0, MAGIC);
        self.words.store(STATE, 1);
        Ok(())
    }

    /// Ends the tracking. The bits are to be zeroed by whoever owns the memory.
    pub fn stop(&self) {
        self.words.store(STATE, 0);
    }

    /// Marks the pages of `len` bytes from `iova` that are tracked: one atomic operation for each word of bits, and sometimes one for
    /// its line.
    pub fn mark(&self, asid: Asid, iova: u64, len: u64) {
        let Some(range) = IovaRange::from_size(iova, len) else { return };
        let shift = self.shift();
        let (first, last) = (range.first() >> shift, range.last() >> shift);
        let mut index = self.search(asid, first);
        while let Some(tracks) = (index < self.count()).then(|| self.range(index)) {
            if tracks.asid != u64::from(asid.0) || tracks.first > last {
                break;
            }
            let (from, to) = (first.max(tracks.first), last.min(tracks.first + (tracks.pages - 1)));
            if from <= to {
                self.mark_pages(tracks, from, to);
            }
            index += 1;
        }
    }

    fn mark_pages(&self, tracks: Tracks, from: u64, to: u64) {
        let (mut bit, last) = (from - tracks.first, to - tracks.first);
        while bit <= last {
            let end = (bit | 63).min(last);
            let mask = u64::MAX >> (63 - (end - bit)) << (bit % 64);
            let Ok(offset) = usize::try_from(bit / 64) else { return };
            let word = tracks.bits + offset;
            if self.words.set(word, mask) == 0 {
                self.mark_line(word);
            }
            bit = end + 1;
        }
    }

    fn mark_line(&self, word: usize) {
        // A word outside is one of a damaged map.
        if (LEAVES..MAP_WORDS).contains(&word) {
            let line = (word - LEAVES) / LINE;
            self.words.set(SUMMARY + line / 64, 1 << (line % 64));
        }
    }

    /// Reports the dirty pages of a range: see [`DirtyTracking::report`](super::DirtyTracking::report).
    ///
    /// # Errors
    /// As there.
    pub fn report(&self, of: DirtyRange, clear: bool, sink: DirtySink<'_>) -> Result<()> {
        if !self.is_on() {
            return Err(Errno::INVAL);
        }
        let shift = self.shift();
        check_pages(of.range, 1 << shift)?;
        let (first, last) = (of.range.first() >> shift, of.range.last() >> shift);
        let parts = self.parts(of.asid, first, last)?;
        let mut batch = Batch { first, last, bits: Vec::new(), taken: Vec::new() };
        for tracks in parts {
            let from = first.max(tracks.first) - tracks.first;
            let to = last.min(tracks.first + (tracks.pages - 1)) - tracks.first;
            let line_of =
                |page: u64| usize::try_from(page / 64).map(|word| (tracks.bits + word - LEAVES) / LINE);
            let (Ok(from), Ok(to)) = (line_of(from), line_of(to)) else { return Err(Errno::INVAL) };
            for line in self.lines(from, to) {
                batch.add(&self.words, tracks, LEAVES + line * LINE);
                if batch.bits.len() >= BATCH {
                    self.give(&mut batch, clear, sink)?;
                }
            }
        }
        self.give(&mut batch, clear, sink)
    }

    /// Gives what was found to the sink, then takes the bits away.
    fn give(&self, batch: &mut Batch, clear: bool, sink: DirtySink<'_>) -> Result<()> {
        if !batch.bits.is_empty() {
            sink(&batch.bits)?;
        }
        batch.bits.clear();
        let taken = std::mem::take(&mut batch.taken);
        if !clear {
            return Ok(());
        }
        for line in taken.chunk_by(|(a, _), (b, _)| a / LINE == b / LINE) {
            for &(word, bits) in line {
                self.words.clear(word, bits);
            }
            let Some(&(word, _)) = line.first() else { continue };
            let start = word - word % LINE;
            let number = (start - LEAVES) / LINE;
            self.words.clear(SUMMARY + number / 64, 1 << (number % 64));
            if (start..start + LINE).any(|word| self.words.set(word, 0) != 0) {
                self.mark_line(start);
            }
        }
        Ok(())
    }

    /// The lines from `first` to `last` that may have bits.
    fn lines(&self, first: usize, last: usize) -> impl Iterator<Item = usize> {
        (first / 64..=last / 64).flat_map(move |word| {
            let mut bits = self.words.load(SUMMARY + word);
            std::iter::from_fn(move || {
                let bit = bits.trailing_zeros() as usize;
                bits &= bits.wrapping_sub(1);
                (bit < 64).then_some(word * 64 + bit)
            })
            .filter(move |line| (first..=last).contains(line))
        })
    }

    /// Looks for bits in words `from..to` of the map whose line has none in the summary, after the death of a process. Words without
    /// memory need not be looked at.
    pub fn find(&self, from: usize, to: usize) {
        for word in from.max(LEAVES)..to.min(MAP_WORDS) {
            if self.words.load(word) != 0 {
                self.mark_line(word);
            }
        }
    }

    /// The ranges that pages `first..=last` are in.
    fn parts(&self, asid: Asid, first: u64, last: u64) -> Result<Vec<Tracks>> {
        let mut covered = first;
        let mut parts = Vec::new();
        for index in self.search(asid, first)..self.count() {
            let tracks = self.range(index);
            if tracks.asid != u64::from(asid.0) || tracks.first > covered {
                break;
            }
            parts.push(tracks);
            covered = tracks.first + tracks.pages;
            if covered > last {
                return Ok(parts);
            }
        }
        Err(Errno::INVAL)
    }

    /// The first range that ends at or behind page `first` of an address space, or begins behind it.
    #[inline]
    fn search(&self, asid: Asid, first: u64) -> usize {
        let (mut low, mut high) = (0, self.count());
        while low < high {
            let middle = usize::midpoint(low, high);
            let tracks = self.range(middle);
            if (tracks.asid, tracks.first + tracks.pages) <= (asid.0.into(), first) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }

    #[inline]
    fn shift(&self) -> u32 {
        // As it was stored; a damaged map must not overflow.
        u32::try_from(self.words.load(SHIFT) & 63).unwrap_or(0)
    }

    #[inline]
    fn count(&self) -> usize {
        usize::try_from(self.words.load(RANGES).min(RANGES_MAX.into())).unwrap_or(0)
    }

    /// A range of the header. A damaged one is made one that lies in the map.
    #[inline]
    fn range(&self, index: usize) -> Tracks {
        let at = FIRST_RANGE + index * RANGE;
        let first = self.words.load(at + 1).min(1 << 52);
        let pages = self.words.load(at + 2).clamp(1, PAGES_MAX);
        let bits = usize::try_from(self.words.load(at + 3)).unwrap_or(LEAVES).clamp(LEAVES, MAP_WORDS - LINE);
        Tracks { asid: self.words.load(at), first, pages, bits }
    }
}

/// What was found and not yet given away.
#[derive(Debug)]
struct Batch {
    /// Pages that are asked for.
    first: u64,
    last: u64,
    /// Words of the bitmap.
    bits: Vec<(u64, u64)>,
    /// Words of the map, with the bits that were found in them.
    taken: Vec<(usize, u64)>,
}

impl Batch {
    /// Adds what is in a line of the map.
    fn add(&mut self, words: &impl DirtyWords, tracks: Tracks, line: usize) {
        for word in line.max(tracks.bits)..line + LINE {
            let found = words.load(word);
            if found == 0 {
                continue;
            }
            let page = tracks.first + (word - tracks.bits) as u64 * 64;
            let Some(wanted) = mask(page, self.first, self.last) else { continue };
            let found = found & wanted;
            if found == 0 {
                continue;
            }
            self.taken.push((word, found));
            if page < self.first {
                self.put(0, found >> (self.first - page));
                continue;
            }
            let bit = page - self.first;
            self.put(bit / 64, found << (bit % 64));
            if !bit.is_multiple_of(64) {
                self.put(bit / 64 + 1, found >> (64 - bit % 64));
            }
        }
    }

    fn put(&mut self, word: u64, bits: u64) {
        match self.bits.last_mut() {
            _ if bits == 0 => {}
            Some((last, found)) if *last == word => *found |= bits,
            _ => self.bits.push((word, bits)),
        }
    }
}

/// The bits of a word that begins with `page` which are pages `first..=last`.
fn mask(page: u64, first: u64, last: u64) -> Option<u64> {
    let end = page.checked_add(63)?;
    if page > last || end < first {
        return None;
    }
    let low = u64::MAX << first.saturating_sub(page);
    let high = u64::MAX >> end.saturating_sub(last);
    Some(low & high)
}

/// The ranges in order, if they can be tracked.
fn checked(page_size: u64, ranges: &[DirtyRange]) -> Result<Vec<DirtyRange>> {
    let limits = DirtyLimits::MAP;
    if !page_size.is_power_of_two() || limits.page_sizes & page_size == 0 || ranges.is_empty() {
        return Err(Errno::INVAL);
    }
    if ranges.len() > limits.ranges as usize {
        return Err(Errno::TOOBIG);
    }
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable_by_key(|range| (range.asid, range.range.first()));
    let mut pages = 0_u64;
    for DirtyRange { range, .. } in &sorted {
        check_pages(*range, page_size)?;
        pages += (range.last() - range.first()) / page_size + 1;
    }
    let overlap = |pair: &[DirtyRange]| {
        matches!(pair, [a, b] if a.asid == b.asid && a.range.overlaps(b.range))
            && !faults::is(Fault::DirtyOverlap)
    };
    if pages > limits.pages || sorted.windows(2).any(overlap) { Err(Errno::INVAL) } else { Ok(sorted) }
}
