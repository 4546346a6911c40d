//! Memory on its way: pages that are read here, and written there.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use vdpa_core::types::IovaRange;
use vdpa_sys::mmap::SharedMap;

use super::error::{Malformed, MigrateError};
use super::wire::{self, RUNS_MAX, Run};
use crate::dma::Region;
use crate::session::DirtyPages;

/// Bytes that are read, or written, at a time.
const CHUNK: u64 = 1 << 20;

/// Memory of one region in this process.
#[derive(Debug)]
pub(super) struct Area {
    pub(super) name: String,
    pub(super) range: IovaRange,
    map: SharedMap,
    offset: u64,
}

impl Area {
    /// `None` for a region that is not mapped in this process.
    pub(super) fn of(region: &Region) -> Option<Self> {
        let (name, map) = (region.name().to_owned(), region.map()?.clone());
        Some(Self { name, range: region.range(), map, offset: region.offset() })
    }

    pub(super) fn pages(&self, page_size: u64) -> u64 {
        self.range.size() / page_size
    }

    fn at(&self, offset: u64) -> Result<usize, MigrateError> {
        usize::try_from(self.offset.saturating_add(offset)).map_err(|_| self.gone())
    }

    fn gone(&self) -> MigrateError {
        MigrateError::Memory { region: self.name.clone() }
    }
}

/// What was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    /// Pages, with those of zeros.
    pub pages: u64,
    /// Pages of zeros, of which no data is sent.
    pub zero_pages: u64,
    /// Bytes of data.
    pub bytes: u64,
}

/// Sends pages.
pub(super) struct Sender<'a, S> {
    stream: &'a mut S,
    page_size: u64,
    buffer: Vec<u8>,
    runs: Vec<Run>,
    /// Bytes of the buffer that are in use.
    used: usize,
    pub(super) sent: Sent,
    limit: Option<(u64, Instant)>,
}

impl<'a, S: Write> Sender<'a, S> {
    /// At most `rate` bytes in a second.
    pub(super) fn new(stream: &'a mut S, page_size: u64, rate: Option<u64>) -> Self {
        let size = usize::try_from(CHUNK.max(page_size)).unwrap_or(0);
        Self {
            stream,
            page_size,
            buffer: vec![0; size],
            runs: Vec::new(),
            used: 0,
            sent: Sent::default(),
            limit: rate.map(|rate| (rate.max(1), Instant::now())),
        }
    }

    /// Sends the pages of one region, and asks now and then whether to go on.
    pub(super) fn region(
        &mut self,
        number: u32,
        area: &Area,
        pages: &DirtyPages,
        go_on: &mut dyn FnMut(Sent) -> Result<(), MigrateError>,
    ) -> Result<(), MigrateError> {
        let most = CHUNK.max(self.page_size) / self.page_size;
        for (first, count) in pages.runs(most) {
            let len = usize::try_from(count * self.page_size).map_err(|_| area.gone())?;
            if self.used + len > self.buffer.len() || self.runs.len() >= RUNS_MAX / 2 {
                self.flush()?;
                go_on(self.sent)?;
            }
            let place = self.buffer.get_mut(self.used..self.used + len).ok_or_else(|| area.gone())?;
            area.map.read(area.at(first * self.page_size)?, place).map_err(|_| area.gone())?;
            self.add(number, first, len)?;
        }
        Ok(())
    }

    /// Adds the pages that begin at `used`: those of zeros without data.
    fn add(&mut self, region: u32, first: u64, len: usize) -> Result<(), MigrateError> {
        let page = usize::try_from(self.page_size).unwrap_or(usize::MAX);
        let (mut from, mut to, end) = (self.used, self.used, self.used + len);
        let mut number = first;
        while from < end {
            let bytes = self.buffer.get(from..from + page).unwrap_or_default();
            let zero = is_zero(bytes);
            if !zero && from != to {
                self.buffer.copy_within(from..from + page, to);
            }
            match self.runs.last_mut() {
                Some(run) if (run.region, run.zero) == (region, zero) && run.first + run.count == number => {
                    run.count += 1;
                }
                _ => {
                    if self.runs.len() == RUNS_MAX {
                        // What is behind `from` has to be kept.
                        self.used = to;
                        let rest = self.buffer.get(from..end).unwrap_or_default().to_vec();
                        self.flush()?;
                        self.buffer.get_mut(..rest.len()).unwrap_or_default().copy_from_slice(&rest);
                        return self.add(region, number, rest.len());
                    }
                    self.runs.push(Run { region, zero, first: number, count: 1 });
                }
            }
            self.sent.pages += 1;
            self.sent.zero_pages += u64::from(zero);
            to += if zero { 0 } else { page };
            from += page;
            number += 1;
        }
        self.used = to;
        Ok(())
    }

    /// Writes what was collected.
    pub(super) fn flush(&mut self) -> Result<(), MigrateError> {
        if self.runs.is_empty() {
            return Ok(());
        }
        wire::write_runs(self.stream, &self.runs)?;
        self.stream.write_all(self.buffer.get(..self.used).unwrap_or_default())?;
        self.sent.bytes += self.used as u64;
        self.runs.clear();
        self.used = 0;
        if let Some((rate, since)) = self.limit {
            let due = Duration::from_nanos(
                (u128::from(self.sent.bytes) * 1_000_000_000 / u128::from(rate))
                    .try_into()
                    .unwrap_or(u64::MAX),
            );
            std::thread::sleep(due.saturating_sub(since.elapsed()));
        }
        Ok(())
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// Puts pages into memory.
#[derive(Debug)]
pub(super) struct Receiver {
    page_size: u64,
    buffer: Vec<u8>,
}

impl Receiver {
    pub(super) fn new(page_size: u64) -> Self {
        Self { page_size, buffer: vec![0; usize::try_from(CHUNK.max(page_size)).unwrap_or(0)] }
    }

    /// Takes the data of a message of pages. Returns the bytes.
    pub(super) fn take(
        &mut self,
        stream: &mut impl Read,
        payload: &[u8],
        areas: &[Area],
    ) -> Result<u64, MigrateError> {
        let pages: Vec<u64> = areas.iter().map(|area| area.pages(self.page_size)).collect();
        let mut bytes = 0;
        for run in wire::runs(payload, &pages)? {
            let area = usize::try_from(run.region).ok().and_then(|number| areas.get(number));
            let area = area.ok_or(Malformed::Pages { what: "a run is of no region" })?;
            let (mut at, mut left) = (run.first * self.page_size, run.count * self.page_size);
            while left > 0 {
                let len = usize::try_from(left.min(self.buffer.len() as u64)).unwrap_or(0);
                let piece = self.buffer.get_mut(..len).unwrap_or_default();
                if run.zero {
                    area.map.read(area.at(at)?, piece).map_err(|_| area.gone())?;
                    // To read private memory that was never written makes no page, to write it does.
                    if !is_zero(piece) {
                        piece.fill(0);
                        area.map.write(area.at(at)?, piece).map_err(|_| area.gone())?;
                    }
                } else {
                    stream.read_exact(piece)?;
                    area.map.write(area.at(at)?, piece).map_err(|_| area.gone())?;
                    bytes += len as u64;
                }
                at += len as u64;
                left -= len as u64;
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vdpa_core::types::Perm;
    use vdpa_sys::memfd;

    use super::*;
    use crate::dma::{Backing, RegionSpec};
    use crate::memory::Memory;

    const PAGE: u64 = 4096;

    fn area(pages: u64) -> (Arc<Memory>, Area) {
        let fd = memfd::create(c"m", (pages + 1) * PAGE, None).unwrap();
        let memory = Memory::map("m", fd, 0, (pages + 1) * PAGE, false).unwrap();
        // Not from its beginning on.
        let backing = Backing::Memory(Arc::clone(&memory), PAGE);
        let spec = RegionSpec {
            name: "m".into(),
            backing,
            iova: 0x10_0000,
            size: pages * PAGE,
            perm: Perm::RW,
            populate: false,
        };
        let region = Region::new(spec, IovaRange::ALL).unwrap();
        (memory, Area::of(&region).unwrap())
    }

    fn fill(memory: &Memory, page: u64, byte: u8) {
        memory.as_map().unwrap().write(usize::try_from((page + 1) * PAGE).unwrap(), &[byte; 4096]).unwrap();
    }

    fn all_of(memory: &Memory) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(memory.size()).unwrap()];
        memory.as_map().unwrap().read(0, &mut bytes).unwrap();
        bytes
    }

    /// Sends `pages`, receives them, and compares those with the originals.
    fn round(from: &Area, to: &Area, pages: &DirtyPages) -> Sent {
        let mut stream = Vec::new();
        let mut sender = Sender::new(&mut stream, PAGE, None);
        sender.region(0, from, pages, &mut |_| Ok(())).unwrap();
        sender.flush().unwrap();
        let sent = sender.sent;
        let mut stream = &stream[..];
        let mut receiver = Receiver::new(PAGE);
        while !stream.is_empty() {
            let message = wire::read(&mut stream).unwrap();
            receiver.take(&mut stream, &message.payload, std::slice::from_ref(to)).unwrap();
        }
        sent
    }

    #[test]
    fn memory_arrives_as_it_was_sent() {
        let ((here, from), (there, to)) = (area(1500), area(1500));
        for page in 0..1500 {
            if page % 3 != 1 {
                fill(&here, page, u8::try_from(page % 251).unwrap());
            }
            if page % 5 == 0 {
                fill(&there, page, 0xee);
            }
        }
        let sent = round(&from, &to, &DirtyPages::all(from.range, PAGE));
        assert_eq!(all_of(&there), all_of(&here));
        assert_eq!(sent.pages, 1500);
        assert_eq!(sent.bytes, (1500 - sent.zero_pages) * PAGE);
        assert!(sent.zero_pages >= 500, "{sent:?}");
        let mut some = DirtyPages::none(from.range, PAGE);
        for page in [3, 4, 700, 1499] {
            fill(&here, page, 9);
            some.add(0x10_0000 + page * PAGE);
        }
        fill(&here, 5, 9);
        assert_eq!(round(&from, &to, &some).pages, 4);
        assert_ne!(all_of(&there), all_of(&here), "page 5 was not sent");
        some.add(0x10_0000 + 5 * PAGE);
        round(&from, &to, &some);
        assert_eq!(all_of(&there), all_of(&here));
    }

    /// More runs than one message has.
    #[test]
    fn many_small_runs() {
        let pages = 2 * RUNS_MAX as u64 + 100;
        let ((here, from), (there, to)) = (area(pages), area(pages));
        (0..pages).step_by(2).for_each(|page| fill(&here, page, 1));
        round(&from, &to, &DirtyPages::all(from.range, PAGE));
        assert_eq!(all_of(&there), all_of(&here));
    }
}
