//! [`RamBlk`]: a block device in RAM, on any platform whose memory can be copied.

use std::fmt;

use zerocopy::IntoBytes;

use super::table::{Maps, RamQueue, TableArea, View};

use crate::blk::{BlkConfig, BlkRequest, SECTOR, Status, kind};
use crate::errno::Errno;
use crate::features::{BackendFeatures, Features};
use crate::host::{Bytes, Event, Host};
use crate::iotlb::{Mapping, Table};
use crate::parent::{Dma, DmaMap, Parent, Profile, QueueStats, SetMap};
use crate::ring::Chain;
use crate::ring::split::SplitQueue;
use crate::testing::TestHost;
use crate::types::{Asid, IovaRange, QueueIndex, Result};
use crate::vq::{QueueSetup, QueueState};

/// A block device with one queue and its data in RAM. It has no thread: a queue is served when it starts and when
/// [`serve`](Self::serve) is called, in place of a kick.
///
/// Its profile is that of the kernel's simulator, as far as ownership and translation go; see
/// [`with`](Self::with) for others.
pub struct RamBlk<H: Host = TestHost> {
    profile: Profile,
    single: bool,
    bytes: Vec<u8>,
    maps: Maps<H>,
    queue: Option<RamQueue<H>>,
    stats: QueueStats,
    refuse_mappings: u32,
    refuse_owner: bool,
    received: u32,
}

impl<H: Host> fmt::Debug for RamBlk<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamBlk").field("bytes", &self.bytes.len()).finish_non_exhaustive()
    }
}

impl RamBlk {
    /// A device of `sectors` zeroed sectors, on the platform in memory.
    #[must_use]
    pub fn new(sectors: u64) -> Self {
        Self::on_host(sectors)
    }
}

impl<H: Host> RamBlk<H> {
    /// A device of `sectors` zeroed sectors, on any platform.
    #[must_use]
    pub fn on_host(sectors: u64) -> Self {
        Self {
            profile: profile(),
            single: false,
            bytes: vec![0; usize::try_from(sectors * SECTOR).unwrap_or(0)],
            maps: Maps::new(),
            queue: None,
            stats: QueueStats::default(),
            refuse_mappings: 0,
            refuse_owner: false,
            received: 0,
        }
    }

    /// Changes its profile.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Profile)) -> Self {
        change(&mut self.profile);
        self
    }

    /// Receives single mappings (`dma_map`) and not whole tables.
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

    /// Number of tables and mappings that it has received.
    #[must_use]
    pub const fn received(&self) -> u32 {
        self.received
    }

    /// Counts a table or mapping, and refuses it if that was asked for.
    fn receive(&mut self) -> Result<()> {
        self.received += 1;
        match self.refuse_mappings.checked_sub(1) {
            None => Ok(()),
            Some(left) => {
                self.refuse_mappings = left;
                Err(Errno::NOSPC)
            }
        }
    }

    /// The mappings of one address space: first address, last address and address in the owner.
    #[must_use]
    pub fn mappings(&self, asid: Asid) -> Vec<(u64, u64, u64)> {
        let row = |entry: &Mapping<_>| (entry.range.first(), entry.range.last(), entry.uaddr);
        self.maps.entries(asid).filter(|entry| !entry.stale).map(row).collect()
    }
}

fn profile() -> Profile {
    let config_size = u32::try_from(size_of::<BlkConfig>()).unwrap_or(0);
    let features = Features::of(&[Features::BLK_FLUSH, Features::VERSION_1, Features::ACCESS_PLATFORM]);
    let sim = Profile::simulator(2, features, 1, config_size);
    Profile {
        backend_features: sim
            .backend_features
            .with(BackendFeatures::NEW_OWNER)
            .with(BackendFeatures::IOTLB_REMAP),
        status_unsuspends: false,
        ..sim
    }
}

impl<H: Host<Memory: Bytes>> RamBlk<H> {
    /// Processes the available requests, if the queue is running. Call it after a kick.
    pub fn serve(&mut self) {
        let Some(mut queue) = self.queue.take() else { return };
        let view = self.maps.view(queue.setup.asid);
        // A ring that cannot be accessed waits for a mapping and the next call.
        if let Ok(mut ring) = queue.ring(&view) {
            self.serve_ring(&mut ring, &view);
            if ring.publish().unwrap_or(false)
                && let Some(call) = &queue.setup.call
            {
                call.signal();
            }
            queue.save(&ring);
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

    /// Processes one request and returns the number of bytes written; `None` when client memory cannot be accessed.
    fn answer(&mut self, chain: &Chain, view: &View<H>) -> Option<u32> {
        let request = match BlkRequest::parse(view, chain) {
            Ok(request) => request,
            Err(crate::blk::FramingError::Fault(_)) => return None,
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
        self.profile.mask_features(features)
    }

    fn start_queue(&mut self, _index: QueueIndex, setup: &QueueSetup<H>, state: QueueState) -> Result<()> {
        if self.queue.is_none() {
            self.queue = Some(RamQueue::new(setup, state));
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
        self.receive()?;
        self.maps.set_map(asid, table)
    }
}

impl<H: Host> DmaMap<H> for RamBlk<H> {
    fn dma_map(&mut self, asid: Asid, mapping: &Mapping<H::Memory>) -> Result<()> {
        self.receive()?;
        self.maps.dma_map(asid, mapping)
    }

    fn dma_unmap(&mut self, asid: Asid, range: IovaRange) {
        self.received += 1;
        self.maps.dma_unmap(asid, range);
    }
}
