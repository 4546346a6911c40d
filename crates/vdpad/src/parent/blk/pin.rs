//! Pinning: guest memory as registered buffers of the worker's ring.

use std::collections::BTreeMap;

use vdpa_core::Errno;
use vdpa_core::host::MemoryObject;
use vdpa_core::iotlb::{Mapping, Table};
use vdpa_core::types::Result;
use vdpa_sys::guest::GuestMemory;
use vdpa_sys::uring::{IoPiece, MemorySet, Registrar};

use crate::worker::Pin;

/// Bytes of one registered buffer. Registering holds the ring's lock while pages are pinned, about 20 ms for
/// each GiB of 4 KiB pages, and I/O waits meanwhile: small pieces bound that to a few milliseconds.
const PIECE: usize = 256 << 20;

/// Registered buffers of one device: 1 TiB in pieces of full size.
const SLOTS: u16 = 4096;

/// What is pinned for one device.
#[derive(Debug, Default)]
pub(super) struct Pins {
    /// By address in the daemon.
    regions: BTreeMap<usize, Region>,
    free: Vec<u16>,
    /// Slots reserved with the ring: nothing is until the first pin, so that idle devices cost nothing.
    reserved: bool,
}

/// A pinned mapping.
#[derive(Debug)]
struct Region {
    /// Bytes.
    len: usize,
    /// One per [`PIECE`].
    slots: Vec<u16>,
    /// As long as it is here no other mapping can get its address, which is how a region is recognised.
    _memory: MemorySet,
}

impl Pins {
    /// Pins what `table` has and was not pinned yet. Blocks while pages are brought in and pinned, about half a
    /// second for each fresh 4 GiB of 4 KiB pages.
    ///
    /// # Errors
    /// `ENOMEM` when the daemon's own RLIMIT_MEMLOCK or the slots do not suffice, `EFAULT`, `EOPNOTSUPP` for file
    /// systems whose pages cannot be pinned; what was pinned by this call is unpinned again.
    pub(super) fn pin_new(&mut self, table: &Table<GuestMemory>, registrar: &Registrar) -> Result<()> {
        let mut added = Vec::new();
        for entry in table.iter() {
            let Some((addr, len)) = pinnable(entry) else { continue };
            if self.regions.contains_key(&addr) {
                continue;
            }
            match self.pin(entry, addr, len, registrar) {
                Ok(()) => added.push(addr),
                Err(error) => {
                    added.iter().for_each(|addr| self.unpin(*addr, registrar));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Whether an entry may be used: it is pinned, or is not of the kind that is.
    pub(super) fn serves(&self, entry: &Mapping<GuestMemory>) -> bool {
        pinnable(entry).is_none_or(|(addr, _)| self.regions.contains_key(&addr))
    }

    /// The pins of these entries, by address.
    pub(super) fn of(&self, entries: &[&Mapping<GuestMemory>]) -> Vec<Pin> {
        let mut pins: Vec<Pin> = entries
            .iter()
            .filter_map(|entry| pinnable(entry))
            .filter_map(|(addr, _)| self.regions.get_key_value(&addr))
            .flat_map(|(&addr, region)| {
                let place = |(piece, &slot): (IoPiece, &u16)| Pin { addr: piece.addr, len: piece.len, slot };
                pieces(addr, region.len).zip(&region.slots).map(place)
            })
            .collect();
        pins.sort_unstable_by_key(|pin| pin.addr);
        pins
    }

    /// Unpins what `table` has no more. Nothing may use it.
    pub(super) fn unpin_gone(&mut self, table: &Table<GuestMemory>, registrar: &Registrar) {
        let wanted: std::collections::BTreeSet<usize> =
            table.iter().filter_map(pinnable).map(|(addr, _)| addr).collect();
        let gone: Vec<usize> = self.regions.keys().copied().filter(|addr| !wanted.contains(addr)).collect();
        gone.iter().for_each(|addr| self.unpin(*addr, registrar));
    }

    fn pin(
        &mut self,
        entry: &Mapping<GuestMemory>,
        addr: usize,
        len: usize,
        registrar: &Registrar,
    ) -> Result<()> {
        if !self.reserved {
            registrar.reserve_buffers(SLOTS.into())?;
            self.free = (0..SLOTS).rev().collect();
            self.reserved = true;
        }
        let memory = MemorySet::new(entry.memory.stable());
        // Pinning pages that are there is five times as fast as pinning page by page.
        entry.memory.populate()?;
        let mut slots = Vec::new();
        for piece in pieces(addr, len) {
            let Some(slot) = self.free.pop() else {
                self.release(slots, registrar);
                return Err(Errno::NOMEM);
            };
            slots.push(slot);
            if let Err(error) = registrar.set_buffer(slot, piece, &memory) {
                self.release(slots, registrar);
                return Err(error);
            }
        }
        self.regions.insert(addr, Region { len, slots, _memory: memory });
        Ok(())
    }

    fn unpin(&mut self, addr: usize, registrar: &Registrar) {
        if let Some(region) = self.regions.remove(&addr) {
            self.release(region.slots, registrar);
        }
    }

    fn release(&mut self, slots: Vec<u16>, registrar: &Registrar) {
        for slot in slots {
            match registrar.clear_buffer(slot) {
                Ok(()) => self.free.push(slot),
                // The slot is not used again: its pages stay pinned, which the log must tell.
                Err(error) => tracing::error!(slot, "a pinned buffer cannot be released: {error}"),
            }
        }
    }
}

/// Where an entry is in the daemon, if its pages can be pinned.
fn pinnable(entry: &Mapping<GuestMemory>) -> Option<(usize, usize)> {
    if entry.stale || entry.memory.pin_pages() == 0 {
        return None;
    }
    Some((entry.memory.host_addr(0)?, usize::try_from(entry.range.size()).ok()?))
}

fn pieces(addr: usize, len: usize) -> impl Iterator<Item = IoPiece> {
    (0..len).step_by(PIECE).map(move |offset| IoPiece { addr: addr + offset, len: PIECE.min(len - offset) })
}
