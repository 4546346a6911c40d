//! Access of the devices in RAM to client memory: their translation ([`Maps`]), memory through it ([`TableMemory`]) and the
//! position of a queue in its ring ([`RamQueue`]).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use crate::errno::Errno;
use crate::features::Features;
use crate::host::{Bytes, Host};
use crate::iotlb::{Mapping, Table};
use crate::parent::{DmaMap, SetMap};
use crate::ring::split::{SplitQueue, area_sizes};
use crate::ring::{Area, Fault, Memory};
use crate::types::{Asid, IovaRange, Perm, Result};
use crate::vq::{QueueSetup, QueueState};

/// A translation table as the data path uses it.
pub(super) type View<H> = TableMemory<<H as Host>::Memory>;

/// The tables that a device has received.
pub(super) struct Maps<H: Host>(BTreeMap<Asid, BTreeMap<u64, Mapping<H::Memory>>>);

impl<H: Host> fmt::Debug for Maps<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Maps").field(&self.0.len()).finish()
    }
}

impl<H: Host> Maps<H> {
    pub(super) const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// The mappings of one address space, in order.
    pub(super) fn entries(&self, asid: Asid) -> impl Iterator<Item = &Mapping<H::Memory>> {
        self.0.get(&asid).into_iter().flat_map(BTreeMap::values)
    }

    /// A snapshot of one address space.
    pub(super) fn view(&self, asid: Asid) -> View<H> {
        TableMemory::new(self.entries(asid).cloned().collect())
    }
}

impl<H: Host> SetMap<H> for Maps<H> {
    fn set_map(&mut self, asid: Asid, table: &Table<H::Memory>) -> Result<()> {
        let entries = table.iter().map(|entry| (entry.range.first(), entry.clone())).collect();
        self.0.insert(asid, entries);
        Ok(())
    }
}

impl<H: Host> DmaMap<H> for Maps<H> {
    fn dma_map(&mut self, asid: Asid, mapping: &Mapping<H::Memory>) -> Result<()> {
        self.0.entry(asid).or_default().insert(mapping.range.first(), mapping.clone());
        Ok(())
    }

    fn dma_unmap(&mut self, asid: Asid, range: IovaRange) {
        if let Some(entries) = self.0.get_mut(&asid) {
            entries.retain(|_, mapping| !range.contains(mapping.range));
        }
    }
}

/// The state of a started queue while its ring is not being processed.
pub(super) struct RamQueue<H: Host> {
    pub(super) setup: QueueSetup<H>,
    pub(super) state: QueueState,
    /// Number of popped requests that are never completed.
    abandoned: u16,
}

impl<H: Host> RamQueue<H> {
    pub(super) fn new(setup: &QueueSetup<H>, state: QueueState) -> Self {
        Self { setup: setup.clone(), state, abandoned: 0 }
    }

    /// Stores the position of `ring`.
    pub(super) fn save<A: Area>(&mut self, ring: &SplitQueue<A>) {
        (self.state, self.abandoned) = (ring.state(), ring.in_flight());
    }
}

impl<H: Host<Memory: Bytes>> RamQueue<H> {
    /// The ring in the memory of `view`.
    ///
    /// # Errors
    /// `EFAULT` when it cannot be accessed, `EINVAL` when its setup is invalid.
    pub(super) fn ring(&self, view: &View<H>) -> Result<SplitQueue<TableArea<H::Memory>>> {
        let QueueSetup { size, desc, avail, used, features, .. } = self.setup;
        let sizes = area_sizes(size, features.has(Features::RING_EVENT_IDX));
        let area = |iova, size: usize, perm| view.area(iova, size as u64, perm).map_err(|_| Errno::FAULT);
        let areas = (
            area(desc, sizes.desc, Perm::RO)?,
            area(avail, sizes.avail, Perm::RO)?,
            area(used, sizes.used, Perm::RW)?,
        );
        SplitQueue::new(size, features, areas.0, areas.1, areas.2, self.state)
            .map(|ring| ring.with_in_flight(self.abandoned))
            .map_err(|_| Errno::INVAL)
    }
}

/// Client memory through a table.
#[derive(Debug)]
pub struct TableMemory<M>(Arc<Table<M>>);

impl<M> TableMemory<M> {
    /// What `table` maps.
    #[must_use]
    pub fn new(table: Table<M>) -> Self {
        Self(Arc::new(table))
    }
}

impl<M> Clone for TableMemory<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<M: Bytes> TableMemory<M> {
    /// Calls `access(memory, offset in it, first byte of the part, bytes of the part)` for each part of a range.
    fn parts(
        &self,
        iova: u64,
        len: usize,
        perm: Perm,
        mut access: impl FnMut(&M, u64, usize, usize) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let mut done = 0;
        while done < len {
            let at = iova.checked_add(done as u64).ok_or(Fault { addr: iova })?;
            let fault = Fault { addr: at };
            let entry =
                self.0.get(at).filter(|entry| !entry.stale && entry.perm.allows(perm)).ok_or(fault)?;
            let room = (entry.range.last() - at).saturating_add(1);
            let part = usize::try_from(room).map_or(len - done, |room| room.min(len - done));
            access(&entry.memory, at - entry.range.first(), done, part).map_err(|_| fault)?;
            done += part;
        }
        Ok(())
    }
}

impl<M: Bytes> Memory for TableMemory<M> {
    type Area = TableArea<M>;

    fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), Fault> {
        self.parts(iova, buf.len(), Perm::RO, |memory, offset, at, len| {
            memory.read(offset, buf.get_mut(at..at + len).unwrap_or_default())
        })
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Fault> {
        self.parts(iova, data.len(), Perm::WO, |memory, offset, at, len| {
            memory.write(offset, data.get(at..at + len).unwrap_or_default())
        })
    }

    fn area(&self, iova: u64, size: u64, perm: Perm) -> Result<TableArea<M>, Fault> {
        let size = usize::try_from(size).map_err(|_| Fault { addr: iova })?;
        self.parts(iova, size, perm, |_, _, _, _| Ok(()))?;
        Ok(TableArea { memory: self.clone(), iova, size })
    }
}

/// A part of a [`TableMemory`]. Its u16 accesses are copies: both sides of the ring must be on one thread.
#[derive(Debug)]
pub struct TableArea<M> {
    memory: TableMemory<M>,
    iova: u64,
    size: usize,
}

impl<M> TableArea<M> {
    fn at(&self, offset: usize, len: usize) -> Result<u64, Fault> {
        let fault = Fault { addr: offset as u64 };
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(fault);
        }
        self.iova.checked_add(offset as u64).ok_or(fault)
    }
}

impl<M: Bytes> Area for TableArea<M> {
    fn size(&self) -> usize {
        self.size
    }

    fn load_u16(&self, offset: usize) -> Result<u16, Fault> {
        let mut bytes = [0; 2];
        Area::read(self, offset, &mut bytes)?;
        fence(Ordering::Acquire);
        Ok(u16::from_le_bytes(bytes))
    }

    fn store_u16(&self, offset: usize, value: u16) -> Result<(), Fault> {
        fence(Ordering::Release);
        Area::write(self, offset, &value.to_le_bytes())
    }

    fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), Fault> {
        self.memory.read(self.at(offset, buf.len())?, buf)
    }

    fn write(&self, offset: usize, data: &[u8]) -> Result<(), Fault> {
        self.memory.write(self.at(offset, data.len())?, data)
    }
}
