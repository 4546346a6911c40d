//! Which pages the device writes.

use vdpa_core::Errno;
use vdpa_core::dirty::{DirtyInfo, DirtyRange};
use vdpa_core::features::BackendFeatures;
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::{Asid, IovaRange};
use vdpa_sys::eventfd::EventFd;

use super::Session;
use crate::dma::problem;
use crate::error::{Error, RegionProblem};

/// The dirty pages of a range of addresses.
///
/// ```
/// use vdpa_client::session::DirtyPages;
/// use vdpa_core::types::IovaRange;
///
/// # fn main() -> Option<()> {
/// let mut pages = DirtyPages::none(IovaRange::from_size(0x10_0000, 0x4000)?, 4096);
/// assert!(pages.is_empty());
/// pages.add(0x10_2fff);
/// assert_eq!(pages.iter().collect::<Vec<_>>(), [0x10_2000]);
/// # Some(())
/// # }
/// # main().unwrap();
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPages {
    range: IovaRange,
    page_size: u64,
    /// Bit `n % 64` of word `n / 64` is page `n` of the range.
    words: Vec<u64>,
}

impl DirtyPages {
    /// None of the pages of `page_size` bytes in `range`, which is whole pages.
    #[must_use]
    pub fn none(range: IovaRange, page_size: u64) -> Self {
        let page_size = page_size.max(1);
        let words = ((range.last() - range.first()) / page_size + 1).div_ceil(64);
        Self { range, page_size, words: vec![0; usize::try_from(words).unwrap_or(0)] }
    }

    /// Bytes of a page.
    #[must_use]
    pub const fn page_size(&self) -> u64 {
        self.page_size
    }

    /// The addresses that it is about.
    #[must_use]
    pub const fn range(&self) -> IovaRange {
        self.range
    }

    /// Whether no page is dirty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Number of dirty pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The addresses of the dirty pages, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        (0..).zip(&self.words).flat_map(move |(index, word)| {
            let bits = (0..64_u64).filter(move |bit| word >> bit & 1 != 0);
            bits.map(move |bit| self.range.first() + (index * 64 + bit) * self.page_size)
        })
    }

    /// All pages of a range.
    #[must_use]
    pub fn all(range: IovaRange, page_size: u64) -> Self {
        let mut pages = Self::none(range, page_size);
        pages.words.fill(u64::MAX);
        pages.trim();
        pages
    }

    /// Adds the pages that have bits in `words`: bit `n % 64` of word `n / 64` for page `n` of the range, as the bitmaps of KVM have
    /// it. Words and bits beyond the range are ignored.
    pub fn add_words(&mut self, words: &[u64]) {
        self.words.iter_mut().zip(words).for_each(|(word, more)| *word |= more);
        self.trim();
    }

    /// Adds the pages of `other`, which is about the same range and pages of the same size; pages of another range are ignored.
    pub fn merge(&mut self, other: &Self) {
        if (self.range, self.page_size) == (other.range, other.page_size) {
            self.add_words(&other.words);
        }
    }

    /// Runs of adjacent dirty pages, in ascending order: number of the first page in the range, and how many. At most `most` at
    /// a time; a longer run is several.
    pub fn runs(&self, most: u64) -> impl Iterator<Item = (u64, u64)> {
        let (mut next, end, most) = (0, self.pages(), most.max(1));
        std::iter::from_fn(move || {
            let first = self.find(next, end, true)?;
            let last = self.find(first, end.min(first.saturating_add(most)), false);
            next = last.unwrap_or(end.min(first.saturating_add(most)));
            Some((first, next - first))
        })
    }

    /// Pages of the range.
    const fn pages(&self) -> u64 {
        (self.range.last() - self.range.first()) / self.page_size + 1
    }

    /// The first page from `from` on and before `end` that is dirty, or is not.
    fn find(&self, from: u64, end: u64, dirty: bool) -> Option<u64> {
        let mut at = from;
        while at < end {
            let word = self.words.get(usize::try_from(at / 64).ok()?)?;
            let word = if dirty { *word } else { !*word } >> (at % 64);
            if word != 0 {
                let found = at + u64::from(word.trailing_zeros());
                return (found < end).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// Removes bits that are of no page.
    fn trim(&mut self) {
        let beyond = self.pages() % 64;
        if beyond != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << beyond) - 1;
        }
    }

    /// Adds the page with the byte at `iova`; nothing happens for one outside of the range.
    pub fn add(&mut self, iova: u64) {
        if (self.range.first()..=self.range.last()).contains(&iova) {
            let page = (iova - self.range.first()) / self.page_size;
            let word = usize::try_from(page / 64).ok().and_then(|word| self.words.get_mut(word));
            word.into_iter().for_each(|word| *word |= 1 << (page % 64));
        }
    }
}

impl<D: VdpaOps<Event = EventFd>> Session<D> {
    /// Whether the device can track which pages it writes.
    #[must_use]
    pub const fn tracks_dirty_pages(&self) -> bool {
        self.setup.offered.has(BackendFeatures::DIRTY_LOG)
    }

    /// What can be tracked, and whether something is. An update of this process changes nothing of what is tracked.
    ///
    /// # Errors
    /// [`Error::Request`]; `ENOTTY` from a device that cannot track.
    pub fn dirty_info(&self) -> Result<DirtyInfo, Error> {
        self.ops.dirty_info().map_err(Error::request("VDPA_DIRTY_INFO"))
    }

    /// Begins to track the pages that the device writes in `ranges`, with the smallest pages that it has. No page is dirty. Blocks
    /// until requests are done that the device had begun. Ranges need not be mapped.
    ///
    /// # Errors
    /// [`Error::Request`]: those of [`VdpaOps::dirty_start`].
    pub fn start_dirty_tracking(&mut self, ranges: &[IovaRange]) -> Result<(), Error> {
        let DirtyInfo { limits, .. } = self.dirty_info()?;
        let smallest = limits.page_sizes & limits.page_sizes.wrapping_neg();
        let ranges: Vec<_> = ranges.iter().map(|range| of(*range)).collect();
        self.ops.dirty_start(smallest, &ranges).map_err(Error::request("VDPA_DIRTY_START"))
    }

    /// The memory that is mapped writable for the device, as ranges to be tracked: adjacent ones are one.
    #[must_use]
    pub fn writable_ranges(&self) -> Vec<IovaRange> {
        let regions = self.setup.regions.list().iter().filter(|region| region.perm().write());
        let nameless = self.setup.regions.nameless().iter().filter(|(_, mapping)| mapping.perm.write());
        let nameless = nameless.filter_map(|(iova, mapping)| IovaRange::from_size(*iova, mapping.size));
        let mut all: Vec<_> = regions.map(crate::dma::Region::range).chain(nameless).collect();
        all.sort_unstable_by_key(|range| range.first());
        let mut merged: Vec<IovaRange> = Vec::with_capacity(all.len());
        for range in all {
            let joined = merged.last().filter(|last| last.last().checked_add(1) == Some(range.first()));
            match joined.and_then(|last| IovaRange::new(last.first(), range.last())) {
                Some(both) => merged.last_mut().into_iter().for_each(|last| *last = both),
                None => merged.push(range),
            }
        }
        merged
    }

    /// Ends the tracking and forgets what was found.
    ///
    /// # Errors
    /// [`Error::Request`].
    pub fn stop_dirty_tracking(&mut self) -> Result<(), Error> {
        self.ops.dirty_stop().map_err(Error::request("VDPA_DIRTY_STOP"))
    }

    /// The dirty pages of a range that is tracked. They are not dirty any more, so whoever copies them does so after this: a page
    /// that the device writes from now on is dirty again.
    ///
    /// # Errors
    /// [`Error::Request`]: those of [`VdpaOps::dirty_get`].
    pub fn take_dirty_pages(&mut self, range: IovaRange) -> Result<DirtyPages, Error> {
        self.get_dirty(range, false)
    }

    /// As [`take_dirty_pages`](Self::take_dirty_pages), but the pages stay dirty.
    ///
    /// # Errors
    /// As there.
    pub fn dirty_pages(&self, range: IovaRange) -> Result<DirtyPages, Error> {
        self.get_dirty(range, true)
    }

    fn get_dirty(&self, range: IovaRange, keep: bool) -> Result<DirtyPages, Error> {
        let mut pages = DirtyPages::none(range, self.dirty_page_size("VDPA_DIRTY_GET")?);
        self.ops
            .dirty_get(of(range), pages.page_size, keep, &mut pages.words)
            .map_err(Error::request("VDPA_DIRTY_GET"))?;
        Ok(pages)
    }

    /// [Unmaps](Self::unmap) a region and returns its dirty pages: the device writes none of them after that. The region
    /// must be tracked as a whole.
    ///
    /// # Errors
    /// [`Error::Region`] for an unknown name; [`Error::Request`]: those of [`VdpaOps::dirty_unmap`].
    pub fn unmap_dirty(&mut self, name: &str) -> Result<DirtyPages, Error> {
        let region = self.setup.regions.get(name).ok_or_else(|| problem(name, RegionProblem::Unknown))?;
        let range = region.range();
        let mut pages = DirtyPages::none(range, self.dirty_page_size("VDPA_DIRTY_UNMAP")?);
        self.ops
            .dirty_unmap(of(range), pages.page_size, &mut pages.words)
            .map_err(Error::request("VDPA_DIRTY_UNMAP"))?;
        self.setup.generation += 1;
        self.setup.regions.remove(name);
        Ok(pages)
    }

    fn dirty_page_size(&self, request: &'static str) -> Result<u64, Error> {
        self.dirty_info()?.page_size.ok_or(Errno::INVAL).map_err(Error::request(request))
    }
}

const fn of(range: IovaRange) -> DirtyRange {
    DirtyRange { asid: Asid(0), range }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_the_pages_and_no_others() {
        let range = IovaRange::from_size(0x10_0000, 200 * 4096).unwrap();
        let mut pages = DirtyPages::all(range, 4096);
        assert_eq!((pages.count(), pages.runs(u64::MAX).collect::<Vec<_>>()), (200, vec![(0, 200)]));
        assert_eq!(pages.runs(128).collect::<Vec<_>>(), [(0, 128), (128, 72)]);
        pages = DirtyPages::none(range, 4096);
        assert_eq!(pages.runs(8).count(), 0);
        pages.add_words(&[1 << 63, 3, 0, u64::MAX, 5]);
        assert_eq!(pages.runs(u64::MAX).collect::<Vec<_>>(), [(63, 3), (192, 8)], "the range ends there");
        let mut other = DirtyPages::none(range, 4096);
        other.add(0x10_0000);
        other.merge(&pages);
        assert_eq!(other.count(), 12);
        let flat: Vec<u64> = other.runs(3).flat_map(|(first, count)| first..first + count).collect();
        let listed: Vec<u64> = other.iter().map(|iova| (iova - 0x10_0000) / 4096).collect();
        assert_eq!(flat, listed);
        let elsewhere = DirtyPages::all(IovaRange::from_size(0, 200 * 4096).unwrap(), 4096);
        other.merge(&elsewhere);
        assert_eq!(other.count(), 12);
    }
}
