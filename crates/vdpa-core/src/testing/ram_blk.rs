//! [`RamBlk`]: a block device in RAM, on any platform whose memory can be copied.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use zerocopy::IntoBytes;

use crate::blk::{BlkConfig, BlkRequest, SECTOR, Status, kind};
use crate::errno::Errno;
use crate::features::{BackendFeatures, Features};
use crate::host::{Bytes, Event, Host};
use crate::iotlb::{Mapping, Table};
use crate::parent::{
    AddressMode, CompatReset, Dma, DmaMap, Parent, PinLimit, PrivateMemory, Profile, QueueStats, SetMap,
};
use crate::ring::split::{SplitQueue, area_sizes};
use crate::ring::{Area, Chain, Fault, Memory};
use crate::testing::TestHost;
use crate::types::{Asid, IovaRange, Perm, QueueIndex, Result};
use crate::vq::{QueueSetup, QueueState};

/// A translation table as the data path uses it.
type View<H> = TableMemory<<H as Host>::Memory>;

/// A block device with one queue and its data in RAM. It has no thread: a queue is served when it starts and when
/// [`serve`](Self::serve) is called, in place of a kick.
///
/// Its profile is that of the kernel's simulator, as far as ownership and translation go; see
/// [`with`](Self::with) for others.
pub struct RamBlk<H: Host = TestHost> {
    profile: Profile,
    single: bool,
    bytes: Vec<u8>,
    maps: BTreeMap<Asid, BTreeMap<u64, Mapping<H::Memory>>>,
    queue: Option<Queue<H>>,
    stats: QueueStats,
    refuse_mappings: u32,
    refuse_owner: bool,
    told: u32,
}

struct Queue<H: Host> {
    setup: QueueSetup<H>,
    state: QueueState,
}

impl<H: Host> fmt::Debug for RamBlk<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamBlk").field("bytes", &self.bytes.len()).finish_non_exhaustive()
    }
}

impl RamBlk {
    /// `sectors` sectors of zeros, on the platform in memory.
    #[must_use]
    pub fn new(sectors: u64) -> Self {
        Self::on_host(sectors)
    }
}

impl<H: Host> RamBlk<H> {
    /// `sectors` sectors of zeros, on any platform.
    #[must_use]
    pub fn on_host(sectors: u64) -> Self {
        Self {
            profile: profile(),
            single: false,
            bytes: vec![0; usize::try_from(sectors * SECTOR).unwrap_or(0)],
            maps: BTreeMap::new(),
            queue: None,
            stats: QueueStats::default(),
            refuse_mappings: 0,
            refuse_owner: false,
            told: 0,
        }
    }

    /// Changes what it is.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Profile)) -> Self {
        change(&mut self.profile);
        self
    }

    /// Takes single mappings (`dma_map`) and not whole tables.
    #[must_use]
    pub fn with_single_mappings(self) -> Self {
        Self { single: true, ..self }.with(|profile| profile.vring_size = true)
    }

    /// Refuses the next `count` tables or mappings with `ENOSPC`; it keeps what it has.
    pub const fn refuse_mappings(&mut self, count: u32) {
        self.refuse_mappings = count;
    }

    /// Refuses owners with `EIO` from now on, or accepts them again.
    pub const fn refuse_owner(&mut self, refuse: bool) {
        self.refuse_owner = refuse;
    }

    /// How often it was told of mappings.
    #[must_use]
    pub const fn told(&self) -> u32 {
        self.told
    }

    fn hear(&mut self) -> Result<()> {
        self.told += 1;
        match self.refuse_mappings.checked_sub(1) {
            None => Ok(()),
            Some(left) => {
                self.refuse_mappings = left;
                Err(Errno::NOSPC)
            }
        }
    }

    /// What it translates with in one address space: first address, last address and address in the owner.
    #[must_use]
    pub fn mappings(&self, asid: Asid) -> Vec<(u64, u64, u64)> {
        let row = |entry: &Mapping<_>| (entry.range.first(), entry.range.last(), entry.uaddr);
        let entries = self.maps.get(&asid).into_iter().flat_map(BTreeMap::values);
        entries.filter(|entry| !entry.stale).map(row).collect()
    }
}

fn profile() -> Profile {
    Profile {
        device_id: 2,
        vendor_id: 0,
        features: Features::of(&[Features::BLK_FLUSH, Features::VERSION_1, Features::ACCESS_PLATFORM]),
        backend_features: BackendFeatures::of(&[
            BackendFeatures::ENABLE_AFTER_DRIVER_OK,
            BackendFeatures::NEW_OWNER,
            BackendFeatures::IOTLB_REMAP,
        ]),
        queues: 1,
        queue_size_max: 256,
        queue_groups: Vec::new(),
        groups: 1,
        address_spaces: 1,
        iova_range: IovaRange::ALL,
        config_size: u32::try_from(size_of::<BlkConfig>()).unwrap_or(0),
        suspend: true,
        resume: true,
        vring_size: false,
        reset_map: true,
        compat_reset: CompatReset::Clean,
        address_mode: AddressMode::OwnerAddresses,
        pin_limit: PinLimit::Rlimit,
        private_memory: PrivateMemory::Skip,
        max_iotlb_entries: 2048,
        verify_remap: true,
        identity_map: true,
        reset_owner: false,
        strict_new_owner: false,
        status_unsuspends: false,
        report_batch_errors: false,
    }
}

impl<H: Host<Memory: Bytes>> RamBlk<H> {
    /// Serves what is available, if the queue is running. To be called after a kick.
    pub fn serve(&mut self) {
        let Some(mut queue) = self.queue.take() else { return };
        // A ring that cannot be reached waits for a mapping and the next call.
        if let Ok(mut ring) = self.ring(&queue) {
            let view = self.view(queue.setup.asid);
            self.serve_ring(&mut ring, &view);
            if ring.publish().unwrap_or(false)
                && let Some(call) = &queue.setup.call
            {
                call.signal();
            }
            queue.state = ring.state();
        }
        self.queue = Some(queue);
    }

    fn serve_ring(&mut self, ring: &mut SplitQueue<TableArea<H::Memory>>, view: &View<H>) {
        let mut chain = Chain::new();
        while let Ok(true) = ring.pop(view, &mut chain) {
            let Some(len) = self.answer(&chain, view) else {
                // Out of reach: it stays in the ring until the next call.
                let _ = ring.abandon(&chain);
                return;
            };
            if ring.push_used(chain.head, len).is_err() {
                return;
            }
        }
    }

    /// Answers one request and returns the bytes written; `None` when client memory is out of reach.
    fn answer(&mut self, chain: &Chain, view: &View<H>) -> Option<u32> {
        let request = match BlkRequest::parse(view, chain) {
            Ok(request) => request,
            Err(crate::blk::ShapeError::Fault(_)) => return None,
            Err(_) => return Some(0),
        };
        let sector = request.header.sector;
        let (status, written) = match request.header.kind {
            kind::IN => match self.range(sector, request.data_in.len()) {
                Some(bytes) => {
                    let bytes = &*bytes;
                    request.data_in.write(view, bytes).ok()?;
                    (Status::Ok, bytes.len())
                }
                None => (Status::IoErr, 0),
            },
            kind::OUT => match self.range(sector, request.data_out.len()) {
                Some(bytes) => {
                    request.data_out.read(view, bytes).ok()?;
                    (Status::Ok, 0)
                }
                None => (Status::IoErr, 0),
            },
            kind::FLUSH => (Status::Ok, 0),
            _ => (Status::Unsupp, 0),
        };
        request.write_status(view, status).ok()?;
        self.stats.requests += 1;
        self.stats.bytes += request.data_in.len() + request.data_out.len();
        self.stats.errors += u64::from(status != Status::Ok);
        u32::try_from(written + 1).ok()
    }

    fn range(&mut self, sector: u64, len: u64) -> Option<&mut [u8]> {
        let from = usize::try_from(sector.checked_mul(SECTOR)?).ok()?;
        self.bytes.get_mut(from..)?.get_mut(..usize::try_from(len).ok()?)
    }

    fn ring(&self, queue: &Queue<H>) -> Result<SplitQueue<TableArea<H::Memory>>> {
        let QueueSetup { size, desc, avail, used, asid, features, .. } = queue.setup;
        let view = self.view(asid);
        let sizes = area_sizes(size, features.has(Features::RING_EVENT_IDX));
        let area = |iova, size: usize, perm| view.area(iova, size as u64, perm).map_err(|_| Errno::FAULT);
        let areas = (
            area(desc, sizes.desc, Perm::RO)?,
            area(avail, sizes.avail, Perm::RO)?,
            area(used, sizes.used, Perm::RW)?,
        );
        SplitQueue::new(size, features, areas.0, areas.1, areas.2, queue.state).map_err(|_| Errno::INVAL)
    }

    fn view(&self, asid: Asid) -> View<H> {
        let entries = self.maps.get(&asid).into_iter().flat_map(BTreeMap::values);
        TableMemory::new(entries.cloned().collect())
    }
}

impl<H: Host<Memory: Bytes> + Send> Parent for RamBlk<H> {
    type Host = H;

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        let config =
            BlkConfig { capacity: (self.bytes.len() as u64 / SECTOR).into(), ..BlkConfig::default() };
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        if let Some(part) = config.as_bytes().get(from..).and_then(|rest| rest.get(..out.len())) {
            out.copy_from_slice(part);
        }
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        if features.has(Features::ACCESS_PLATFORM) {
            Ok(features & self.profile.features)
        } else {
            Err(Errno::INVAL)
        }
    }

    fn start_queue(&mut self, _index: QueueIndex, setup: &QueueSetup<H>, state: QueueState) -> Result<()> {
        if self.queue.is_none() {
            self.queue = Some(Queue { setup: setup.clone(), state });
            self.serve();
        }
        Ok(())
    }

    fn stop_queue(&mut self, _index: QueueIndex) -> Result<Option<QueueState>> {
        Ok(self.queue.take().map(|queue| queue.state))
    }

    fn dma(&mut self) -> Dma<'_, H> {
        if self.single { Dma::DmaMap(self) } else { Dma::SetMap(self) }
    }

    fn queue_stats(&self, _index: QueueIndex) -> QueueStats {
        self.stats
    }

    fn bind_owner(&mut self, owner: Option<&H::AddressSpace>) -> Result<()> {
        if owner.is_some() && self.refuse_owner { Err(Errno::IO) } else { Ok(()) }
    }
}

impl<H: Host> SetMap<H> for RamBlk<H> {
    fn set_map(&mut self, asid: Asid, table: &Table<H::Memory>) -> Result<()> {
        self.hear()?;
        let entries = table.iter().map(|entry| (entry.range.first(), entry.clone())).collect();
        self.maps.insert(asid, entries);
        Ok(())
    }
}

impl<H: Host> DmaMap<H> for RamBlk<H> {
    fn dma_map(&mut self, asid: Asid, mapping: &Mapping<H::Memory>) -> Result<()> {
        self.hear()?;
        self.maps.entry(asid).or_default().insert(mapping.range.first(), mapping.clone());
        Ok(())
    }

    fn dma_unmap(&mut self, asid: Asid, range: IovaRange) {
        self.told += 1;
        if let Some(entries) = self.maps.get_mut(&asid) {
            entries.retain(|_, mapping| !range.contains(mapping.range));
        }
    }
}

/// Client memory through a table, entry by entry.
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
