//! [`ObjectFile`]: an open memory object, and the mappings of it that pieces of client memory share.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::fs::StatxFlags;
use vdpa_core::Errno;

use crate::guest::ObjectId;
use crate::mmap::{Prot, SharedMap, page_size};
use crate::object;

/// A mapping begins and ends at multiples of this offset in its object, or at the object's end. So
/// the mappings of this process are few, whatever the number of pieces: the kernel allows 65,530 of them. It bounds the
/// addresses that one small piece can take.
const WINDOW: u64 = 16 << 30;
/// Mappings that are looked at for one that has a piece. Without pieces across windows and overlapping leftovers it is the first.
const LOOKED_AT: usize = 8;

/// An open memory object. Pieces of it share mappings.
#[derive(Debug)]
pub struct ObjectFile {
    fd: OwnedFd,
    maps: Mutex<Maps>,
}

#[derive(Debug, Default)]
struct Maps {
    /// By the offset of their first bytes.
    by_offset: BTreeMap<u64, Weak<ObjectMap>>,
    /// How many may be there before those that nobody uses are looked for.
    most: usize,
}

/// A mapping of a part of an object in this process. It ends with the last piece that lies in it.
#[derive(Debug)]
pub(crate) struct ObjectMap {
    pub(crate) file: Arc<ObjectFile>,
    /// The object, from the first byte of the mapping on.
    pub(crate) object: ObjectId,
    pub(crate) map: SharedMap,
}

impl ObjectFile {
    /// An object that is not mapped yet.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd, maps: Mutex::default() }
    }

    /// A mapping that has `size` bytes from `object.offset` on: one that there is, or a new one, which has more of the
    /// object beside them: the windows they are in. `is_object` says whether a new mapping is what was to be mapped;
    /// `None` if not.
    ///
    /// A mapping in which an access has failed is not used again.
    ///
    /// # Errors
    /// Of mmap(2) and of `is_object`.
    pub(crate) fn map(
        self: &Arc<Self>,
        object: ObjectId,
        size: u64,
        write: bool,
        is_object: impl FnOnce(&SharedMap) -> Result<bool, Errno>,
    ) -> Result<Option<Arc<ObjectMap>>, Errno> {
        let end = object.offset.checked_add(size).ok_or(Errno::INVAL)?;
        let mut maps = self.maps.lock();
        if let Some(found) = maps.find(object.offset, end, write) {
            return Ok(Some(found));
        }
        let page = page_size(self.fd.as_fd())? as u64;
        let exact =
            object.offset - object.offset % page..end.checked_next_multiple_of(page).ok_or(Errno::INVAL)?;
        // Huge pages are reserved by mapping them: not more of them than are used.
        let wide = (page == rustix::param::page_size() as u64).then(|| widen(&exact, self.size(), page));
        let (start, map) = match wide.filter(|wide| *wide != exact).map(|wide| self.map_range(&wide, write)) {
            Some(Ok(map)) => map,
            // Addresses or address space may be limited.
            Some(Err(_)) | None => self.map_range(&exact, write)?,
        };
        if !is_object(&map)? {
            return Ok(None);
        }
        let object = ObjectId { offset: start, ..object };
        let map = Arc::new(ObjectMap { file: Arc::clone(self), object, map });
        maps.insert(start, &map);
        Ok(Some(map))
    }

    /// Bytes of the object; 0 if it cannot be asked.
    pub(crate) fn size(&self) -> u64 {
        object::statx_local(&self.fd, StatxFlags::SIZE).map_or(0, |stat| stat.stx_size)
    }

    fn map_range(&self, range: &Range<u64>, write: bool) -> Result<(u64, SharedMap), Errno> {
        let len = usize::try_from(range.end - range.start).map_err(|_| Errno::INVAL)?;
        let prot = if write { Prot::RW } else { Prot::RO };
        Ok((range.start, SharedMap::map_guest(&self.fd, range.start, len, prot, false)?))
    }

    /// Mappings in use.
    #[cfg(test)]
    fn mappings(&self) -> usize {
        self.maps.lock().by_offset.values().filter(|map| map.strong_count() > 0).count()
    }
}

impl ObjectMap {
    /// The object, from byte `start` of the mapping on.
    pub(crate) const fn at(&self, start: usize) -> ObjectId {
        ObjectId { offset: self.object.offset.wrapping_add(start as u64), ..self.object }
    }
}

impl AsFd for ObjectFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<OwnedFd> for ObjectFile {
    fn from(fd: OwnedFd) -> Self {
        Self::new(fd)
    }
}

impl Maps {
    fn find(&self, first: u64, end: u64, write: bool) -> Option<Arc<ObjectMap>> {
        let before = self.by_offset.range(..=first).rev().take(LOOKED_AT);
        before.filter_map(|(_, map)| map.upgrade()).find(|map| {
            let covered = map.object.offset.checked_add(map.map.len() as u64).is_some_and(|last| end <= last);
            covered && map.map.prot().write == write && !map.map.poisoned()
        })
    }

    fn insert(&mut self, start: u64, map: &Arc<ObjectMap>) {
        if self.by_offset.len() >= self.most {
            self.by_offset.retain(|_, map| map.strong_count() > 0);
            self.most = 2 * self.by_offset.len() + 16;
        }
        self.by_offset.insert(start, Arc::downgrade(map));
    }
}

/// The whole windows around `exact`, as far as an object of `size` bytes has pages there.
fn widen(exact: &Range<u64>, size: u64, page: u64) -> Range<u64> {
    let window_end = exact.end.checked_next_multiple_of(WINDOW).unwrap_or(exact.end);
    let end = window_end.min(size - size % page);
    exact.start - exact.start % WINDOW..end.max(exact.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::GuestMemory;

    const PAGE: u64 = 4096;
    const ID: ObjectId = ObjectId { dev_major: 0, dev_minor: 0, inode: 0, created_ns: 0, offset: 0 };

    fn file(pages: u64) -> Arc<ObjectFile> {
        Arc::new(ObjectFile::new(crate::memfd::create(c"object", pages * PAGE, None).unwrap()))
    }

    fn piece(file: &Arc<ObjectFile>, offset: u64, size: u64, write: bool) -> GuestMemory {
        GuestMemory::from_object(Arc::clone(file), ObjectId { offset, ..ID }, size, write).unwrap()
    }

    #[test]
    fn pieces_of_an_object_share_a_mapping_for_as_long_as_one_exists() {
        let file = file(256);
        let pieces: Vec<_> = (0..256).map(|page| piece(&file, page * PAGE, PAGE, true)).collect();
        assert_eq!(file.mappings(), 1);
        for (at, piece) in (0u64..).zip(&pieces) {
            piece.write(PAGE - 8, &at.to_le_bytes()).unwrap();
        }
        let whole = piece(&file, 0, 256 * PAGE, true);
        for at in 0..256u64 {
            let mut bytes = [0; 8];
            whole.read(at * PAGE + PAGE - 8, &mut bytes).unwrap();
            assert_eq!(u64::from_le_bytes(bytes), at);
            assert_eq!(pieces[usize::try_from(at).unwrap()].host_addr(0), whole.host_addr(at * PAGE));
        }
        drop((pieces, whole));
        assert_eq!(file.mappings(), 0);
    }

    #[test]
    fn a_piece_behind_the_end_is_mapped_and_a_piece_across_windows_too() {
        let file = file(1);
        let behind = piece(&file, 0, 3 * PAGE, true);
        assert!(behind.write(0, &[1]).is_ok() && behind.write(PAGE, &[1]).is_err());
        let size = 2 * WINDOW + 2 * PAGE;
        rustix::fs::ftruncate(&*file, size).unwrap();
        let across = piece(&file, WINDOW - PAGE, 2 * PAGE, true);
        across.write(PAGE - 1, &[1, 2]).unwrap();
        let after = piece(&file, WINDOW, PAGE, true);
        let mut byte = [0];
        after.read(0, &mut byte).unwrap();
        assert_eq!((byte, after.host_addr(0)), ([2], across.host_addr(PAGE)), "they share a mapping");
    }

    #[test]
    fn what_was_truncated_is_mapped_anew() {
        let file = file(2);
        let lost = piece(&file, PAGE, PAGE, true);
        rustix::fs::ftruncate(&*file, PAGE).unwrap();
        assert!(lost.write(0, &[1]).is_err());
        rustix::fs::ftruncate(&*file, 2 * PAGE).unwrap();
        let again = piece(&file, PAGE, PAGE, true);
        assert!(again.write(0, &[1]).is_ok() && lost.write(0, &[1]).is_err());
    }

    #[test]
    fn windows_are_cut_to_the_object() {
        let cut = |first: u64, last: u64, size: u64| widen(&(first..last), size, PAGE);
        assert_eq!(cut(0, PAGE, 5 * PAGE + 1), 0..5 * PAGE);
        assert_eq!(cut(2 * PAGE, 3 * PAGE, 5 * PAGE), 0..5 * PAGE);
        assert_eq!(cut(WINDOW, WINDOW + PAGE, 9 * WINDOW), WINDOW..2 * WINDOW);
        assert_eq!(cut(WINDOW - PAGE, WINDOW + PAGE, 9 * WINDOW), 0..2 * WINDOW);
        assert_eq!(cut(0, 2 * PAGE, 100), 0..2 * PAGE, "it is not cut itself");
    }
}
