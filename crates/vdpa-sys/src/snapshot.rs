//! Snapshots of translation tables for the data path.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vdpa_core::faults;
use vdpa_core::iotlb::{Layered, Mapping, RangeChange, Table};
use vdpa_core::ring::{Area, Fault, Memory};
use vdpa_core::types::{Asid, IovaRange, Perm};

use crate::dirty::DirtyMemory;
use crate::guest::GuestMemory;
use crate::mmap::MapArea;

/// A mapping that was there and the one that is there now, if any.
pub type Change<'a> = (Option<&'a Mapping<GuestMemory>>, Option<&'a Mapping<GuestMemory>>);

/// An immutable snapshot of the translation of one address space. Read without a lock; every request keeps the snapshot with
/// which it was translated. [Changing](Self::changed) it makes the next one, which shares nearly all of it.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    lookup: Layered<Target>,
}

/// The memory of a range of addresses and the access to it.
#[derive(Clone, Debug)]
struct Target {
    perm: Perm,
    memory: GuestMemory,
}

/// A part of a translated range that lies in one piece of memory.
#[derive(Clone, Copy, Debug)]
pub struct Piece<'a> {
    /// The memory.
    pub memory: &'a GuestMemory,
    /// Offset of the first byte in it.
    pub offset: u64,
    /// Bytes, at least 1.
    pub len: u64,
}

impl Snapshot {
    /// Copies a table without its stale entries, which a change of owner has left.
    #[must_use]
    pub fn new(table: &Table<GuestMemory>) -> Self {
        Self::of(table.iter())
    }

    /// As [`new`](Self::new), with some entries of a table, in address order.
    #[must_use]
    pub fn of<'a>(mappings: impl Iterator<Item = &'a Mapping<GuestMemory>>) -> Self {
        Self { lookup: Layered::new(mappings.filter_map(target).collect()) }
    }

    /// The next snapshot, in which mappings were replaced, removed or added. `all` gives all mappings that are there now, in address order, and their number. It is
    /// called so rarely that its cost, divided among the changes in between, is that of a few mappings each.
    #[must_use]
    pub fn changed<'a, A: Iterator<Item = &'a Mapping<GuestMemory>>>(
        &self,
        changes: &[Change<'_>],
        count: usize,
        all: impl FnOnce() -> A,
    ) -> Self {
        let change = |(before, after): &Change<'_>| -> RangeChange<Target> {
            (before.and_then(target).map(|(range, _)| range), after.and_then(target))
        };
        let changes: Vec<_> = changes.iter().map(change).collect();
        Self { lookup: self.lookup.changed(&changes, count, || all().filter_map(target).collect()) }
    }

    /// The pieces of `[iova, iova + len)` in address order. Ends after a [`Fault`] with the address that is not
    /// mapped or does not allow `perm`. Empty for `len` 0.
    pub fn translate(&self, iova: u64, len: u64, perm: Perm) -> Translate<'_> {
        Translate { snapshot: self, iova, left: len, perm }
    }

    /// The piece that contains all of `[iova, iova + len)` and allows `perm`, if there is one. There nearly always is, since
    /// regions are large and buffers small.
    #[must_use]
    #[inline]
    pub fn whole(&self, iova: u64, len: u64, perm: Perm) -> Option<Piece<'_>> {
        self.piece(iova, len, perm).ok().filter(|piece| piece.len == len)
    }

    /// Prefetches the byte at `iova` into the CPU cache. This is only a hint.
    #[inline]
    pub fn prefetch(&self, iova: u64) {
        let piece = self.whole(iova, 1, Perm::RO);
        if let Some(addr) = piece.and_then(|piece| piece.memory.host_addr(piece.offset)) {
            crate::prefetch::prefetch(addr);
        }
    }

    /// The slow path of [`Memory::read`]: several pieces, or a fault.
    #[cold]
    fn read_in_pieces(&self, iova: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let mut rest = buf;
        let mut at = iova;
        for piece in self.translate(iova, rest.len() as u64, Perm::RO) {
            let piece = piece?;
            let (now, later) = usize::try_from(piece.len)
                .ok()
                .and_then(|len| std::mem::take(&mut rest).split_at_mut_checked(len))
                .ok_or(Fault { addr: at })?;
            piece.memory.read(piece.offset, now).map_err(|_| Fault { addr: at })?;
            rest = later;
            at = at.wrapping_add(piece.len);
        }
        Ok(())
    }

    /// The slow path of [`Memory::write`]: several pieces, or a fault.
    #[cold]
    fn write_in_pieces(&self, iova: u64, data: &[u8]) -> Result<(), Fault> {
        let mut rest = data;
        let mut at = iova;
        for piece in self.translate(iova, rest.len() as u64, Perm::WO) {
            let piece = piece?;
            let (now, later) = usize::try_from(piece.len)
                .ok()
                .and_then(|len| rest.split_at_checked(len))
                .ok_or(Fault { addr: at })?;
            piece.memory.write(piece.offset, now).map_err(|_| Fault { addr: at })?;
            rest = later;
            at = at.wrapping_add(piece.len);
        }
        Ok(())
    }

    #[inline]
    fn piece(&self, iova: u64, len: u64, perm: Perm) -> Result<Piece<'_>, Fault> {
        let found = self.lookup.find(iova).filter(|(_, place)| place.perm.allows(perm));
        let (range, place) = found.ok_or(Fault { addr: iova })?;
        let room = (range.last() - iova).saturating_add(1);
        Ok(Piece { memory: &place.memory, offset: iova - range.first(), len: len.min(room) })
    }
}

/// What the data path sees of a mapping; nothing of one that a change of owner has made stale.
fn target(mapping: &Mapping<GuestMemory>) -> Option<(IovaRange, Target)> {
    let target = || Target { perm: mapping.perm, memory: mapping.memory.clone() };
    (!mapping.stale).then(|| (mapping.range, target()))
}

/// See [`Snapshot::translate`].
#[derive(Clone, Debug)]
pub struct Translate<'a> {
    snapshot: &'a Snapshot,
    iova: u64,
    left: u64,
    perm: Perm,
}

impl<'a> Iterator for Translate<'a> {
    type Item = Result<Piece<'a>, Fault>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let piece = self.snapshot.piece(self.iova, self.left, self.perm);
        match &piece {
            Ok(piece) => {
                self.left -= piece.len;
                match self.iova.checked_add(piece.len) {
                    Some(next) => self.iova = next,
                    // The range reaches the end of the address space. It is a fault if it extends beyond.
                    None if self.left == 0 => {}
                    None => {
                        self.left = 0;
                        return Some(Err(Fault { addr: u64::MAX }));
                    }
                }
            }
            Err(_) => self.left = 0,
        }
        Some(piece)
    }
}

impl Memory for Snapshot {
    type Area = GuestArea;

    #[inline]
    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), Fault> {
        match self.whole(iova, buf.len() as u64, Perm::RO) {
            Some(piece) => piece.memory.read(piece.offset, buf).map_err(|_| Fault { addr: iova }),
            None => self.read_in_pieces(iova, buf),
        }
    }

    #[inline]
    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Fault> {
        match self.whole(iova, data.len() as u64, Perm::WO) {
            Some(piece) => piece.memory.write(piece.offset, data).map_err(|_| Fault { addr: iova }),
            None => self.write_in_pieces(iova, data),
        }
    }

    fn area(&self, iova: u64, size: u64, perm: Perm) -> Result<GuestArea, Fault> {
        let pieces = self.translate(iova, size, perm).collect::<Result<Vec<_>, _>>()?;
        if let [piece] = pieces.as_slice() {
            return piece.memory.area(piece.offset, piece.len);
        }
        let mut start = 0;
        let mut segments = Vec::with_capacity(pieces.len());
        for piece in &pieces {
            segments.push(Segment { start, offset: piece.offset, memory: piece.memory.clone() });
            start += piece.len;
        }
        GuestArea::segmented(segments, start).map_err(|_| Fault { addr: iova })
    }
}

impl GuestMemory {
    /// `size` bytes from `offset`, for repeated access.
    ///
    /// # Errors
    /// [`Fault`] with an offset, when it does not lie within the piece.
    pub fn area(&self, offset: u64, size: u64) -> Result<GuestArea, Fault> {
        let fault = Fault { addr: offset };
        if offset > self.size() || size > self.size() - offset {
            return Err(fault);
        }
        let len = usize::try_from(size).map_err(|_| fault)?;
        match self.map() {
            Some((map, start)) => {
                let at = usize::try_from(offset).map_err(|_| fault)?;
                Ok(GuestArea { kind: Kind::Direct(map.area(start + at, len)?), dirty: None })
            }
            None => GuestArea::segmented(vec![Segment { start: 0, offset, memory: self.clone() }], size),
        }
    }
}

/// A piece of guest memory for ring accesses: mapped in one piece, or gathered from several or from copies.
#[derive(Clone, Debug)]
pub struct GuestArea {
    kind: Kind,
    /// `None` for an area whose writes nobody asks for.
    dirty: Option<AreaAddress>,
}

/// Where an area is, for the pages that are written in it.
#[derive(Clone, Debug)]
struct AreaAddress {
    memory: Arc<DirtyMemory>,
    asid: Asid,
    iova: u64,
    /// Guest address in the log of vhost.
    logged: Option<u64>,
}

#[derive(Clone, Debug)]
enum Kind {
    Direct(MapArea),
    Segmented { segments: Vec<Segment>, len: usize },
}

#[derive(Clone, Debug)]
struct Segment {
    /// Offset of its first byte in the area.
    start: u64,
    /// Offset of its first byte in its memory.
    offset: u64,
    memory: GuestMemory,
}

impl GuestArea {
    fn segmented(segments: Vec<Segment>, size: u64) -> Result<Self, Fault> {
        let len = usize::try_from(size).map_err(|_| Fault { addr: 0 })?;
        Ok(Self { kind: Kind::Segmented { segments, len }, dirty: None })
    }

    /// The same area, which is at `iova`: pages that are written through it are marked in `memory` while it tracks them, and in the log
    /// of vhost as those at `logged`.
    #[must_use]
    pub fn tracked(self, memory: Arc<DirtyMemory>, asid: Asid, iova: u64, logged: Option<u64>) -> Self {
        Self { dirty: Some(AreaAddress { memory, asid, iova, logged }), ..self }
    }

    /// Marks the pages of `len` bytes that were written. After the write: a page that is copied in between is reported again.
    #[inline]
    fn written(&self, offset: usize, len: usize) {
        if let Some(AreaAddress { memory, asid, iova, logged }) = &self.dirty
            && memory.is_on()
            && !faults::is(faults::Fault::DirtyRingUnmarked)
        {
            let at = |address: u64| address.wrapping_add(offset as u64);
            memory.mark_ring(*asid, at(*iova), logged.map(at), len as u64);
        }
    }
}

/// Calls `access(memory, offset in it, first byte of the part, bytes of the part)` for each part of
/// `[offset, offset + len)`.
fn for_each_part(
    segments: &[Segment],
    size: usize,
    offset: usize,
    len: usize,
    mut access: impl FnMut(&GuestMemory, u64, usize, usize) -> Result<(), Fault>,
) -> Result<(), Fault> {
    if offset > size || len > size - offset {
        return Err(Fault { addr: offset as u64 });
    }
    let mut done = 0;
    while done < len {
        let at = (offset + done) as u64;
        let index = segments.partition_point(|segment| segment.start <= at);
        let end = segments.get(index).map_or(size as u64, |next| next.start);
        let segment = index.checked_sub(1).and_then(|index| segments.get(index)).ok_or(Fault { addr: at })?;
        let part = usize::try_from(end - at).map_or(len - done, |room| room.min(len - done));
        access(&segment.memory, segment.offset + (at - segment.start), done, part)
            .map_err(|_| Fault { addr: at })?;
        done += part;
    }
    Ok(())
}

impl Area for GuestArea {
    #[inline]
    fn size(&self) -> usize {
        match &self.kind {
            Kind::Direct(area) => area.size(),
            Kind::Segmented { len, .. } => *len,
        }
    }

    #[inline]
    fn load_u16(&self, offset: usize) -> Result<u16, Fault> {
        match &self.kind {
            Kind::Direct(area) => area.load_u16(offset),
            Kind::Segmented { .. } => {
                let mut bytes = [0; 2];
                self.read(offset, &mut bytes)?;
                fence(Ordering::Acquire);
                Ok(u16::from_le_bytes(bytes))
            }
        }
    }

    #[inline]
    fn store_u16(&self, offset: usize, value: u16) -> Result<(), Fault> {
        match &self.kind {
            Kind::Direct(area) => area.store_u16(offset, value)?,
            Kind::Segmented { .. } => {
                fence(Ordering::Release);
                return self.write(offset, &value.to_le_bytes());
            }
        }
        self.written(offset, size_of::<u16>());
        Ok(())
    }

    #[inline]
    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Fault> {
        match &self.kind {
            Kind::Direct(area) => area.read(offset, buf),
            Kind::Segmented { segments, len } => {
                for_each_part(segments, *len, offset, buf.len(), |memory, at, done, part| {
                    buf.get_mut(done..done + part)
                        .map_or(Err(Fault { addr: at }), |part| memory.read(at, part))
                })
            }
        }
    }

    #[inline]
    fn write(&self, offset: usize, data: &[u8]) -> Result<(), Fault> {
        let written = match &self.kind {
            Kind::Direct(area) => area.write(offset, data),
            Kind::Segmented { segments, len } => {
                for_each_part(segments, *len, offset, data.len(), |memory, at, done, part| {
                    data.get(done..done + part).map_or(Err(Fault { addr: at }), |part| memory.write(at, part))
                })
            }
        };
        // Also after a fault, which part of the data may precede.
        self.written(offset, data.len());
        written
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::guest::{ObjectFile, ObjectId};

    fn object(pages: u64) -> GuestMemory {
        let file = Arc::new(ObjectFile::new(crate::memfd::create(c"table", pages * 4096, None).unwrap()));
        let id = ObjectId { dev_major: 0, dev_minor: 0, inode: 0, created_ns: 0, offset: 0 };
        GuestMemory::from_object(file, id, pages * 4096, true).unwrap()
    }

    fn entry(first: u64, size: u64, perm: Perm) -> (IovaRange, Target) {
        let range = IovaRange::from_size(first, size).unwrap();
        (range, Target { perm, memory: object(size.div_ceil(4096)) })
    }

    /// Two neighbours, a gap, a read-only entry, and one at the end of the address space.
    fn table() -> Snapshot {
        let lookup = Layered::new(vec![
            entry(0x1000, 0x1001, Perm::RW),
            entry(0x2001, 0xfff, Perm::RW),
            entry(0x8000, 0x1000, Perm::RO),
            entry(u64::MAX - 0xfff, 0x1000, Perm::RW),
        ]);
        Snapshot { lookup }
    }

    fn pieces(table: &Snapshot, iova: u64, len: u64, perm: Perm) -> Vec<Result<(u64, u64), u64>> {
        let piece = |piece: Result<Piece<'_>, Fault>| {
            piece.map(|piece| (piece.offset, piece.len)).map_err(|fault| fault.addr)
        };
        table.translate(iova, len, perm).map(piece).collect()
    }

    #[test]
    fn ranges_are_cut_at_entries_and_end_at_faults() {
        let table = table();
        assert_eq!(pieces(&table, 0x1000, 0, Perm::RW), []);
        assert_eq!(pieces(&table, 0x1800, 0x1000, Perm::RW), [Ok((0x800, 0x801)), Ok((0, 0x7ff))]);
        assert_eq!(pieces(&table, 0xfff, 2, Perm::RO), [Err(0xfff)]);
        assert_eq!(pieces(&table, 0x2fff, 2, Perm::RO), [Ok((0xffe, 1)), Err(0x3000)]);
        assert_eq!(pieces(&table, 0x8000, 1, Perm::WO), [Err(0x8000)]);
        assert_eq!(pieces(&table, u64::MAX, 1, Perm::RW), [Ok((0xfff, 1))]);
        assert_eq!(pieces(&table, u64::MAX, 2, Perm::RW), [Err(u64::MAX)]);
        assert_eq!(pieces(&Snapshot::default(), 0, 1, Perm::RO), [Err(0)]);
    }

    #[test]
    fn copies_and_areas_cross_entries() {
        let table = table();
        let data: Vec<u8> = (0..=255).collect();
        table.write(0x1f80, &data).unwrap();
        let mut back = vec![0; 256];
        table.read(0x1f80, &mut back).unwrap();
        assert_eq!(back, data);
        let area = table.area(0x1f80, 256, Perm::RW).unwrap();
        assert!(matches!(area.kind, Kind::Segmented { .. }));
        assert_eq!(area.load_u16(0x80), Ok(0x8180), "one byte in each entry");
        area.store_u16(0x80, 0x1122).unwrap();
        assert_eq!((area.load_u16(0x80), area.size()), (Ok(0x1122), 256));
        assert_eq!(area.load_u16(255), Err(Fault { addr: 255 }));
        let direct = table.area(0x1f80, 0x80, Perm::RW).unwrap();
        assert!(matches!(direct.kind, Kind::Direct(_)));
        assert_eq!(direct.load_u16(0), Ok(0x0100));
        assert!(table.area(0x7fff, 2, Perm::RO).is_err() && table.area(0x8000, 2, Perm::RW).is_err());
        assert_eq!(table.write(0x8000, &[1]), Err(Fault { addr: 0x8000 }));
    }
}
