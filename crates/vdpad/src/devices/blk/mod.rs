//! `blk`: a virtio block device on a file or block device.

mod backoff;
#[cfg(test)]
mod crash_tests;
mod disk;
mod file;
mod null;
mod options;
mod range;
mod unaligned;

use std::mem::offset_of;
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::blk::BlkConfig;
use vdpa_core::features::Features;
use vdpa_core::parent::{AddressMode, Dma, Parent, Profile, QueueStats};
use vdpa_core::types::{QueueIndex, Result};
use vdpa_sys::guest::LinuxHost;
use zerocopy::IntoBytes;

use self::disk::FileDisk;
use self::file::Backing;
use self::null::NullDisk;
use self::options::{Options, Source};
use super::options::no_worker;
use super::{Kept, MgmtDevice};
use vdpa_backend::front::vhost::AnyParent;
use vdpa_backend::worker::{ClientMemory, QueueControl, Size, WorkerPool};
use vdpa_control::api::{Attrs, CtlError, ID_BLOCK, MgmtDev};

use crate::block::{Disk, Requests, WriteCache};

#[cfg(test)]
pub(super) use self::options::KNOWN;

/// Most data segments of a request.
const SEG_MAX: u32 = 126;

/// Sectors of the largest discard: 1 GiB, so that one request does not occupy the disk for long.
const RANGE_SECTORS_MAX: u32 = 1 << 21;

/// The management device `blk`.
#[derive(Debug)]
pub(crate) struct BlkMgmt;

impl MgmtDevice for BlkMgmt {
    fn describe(&self) -> MgmtDev {
        MgmtDev {
            name: "blk".into(),
            bus: None,
            supported_classes: vec![ID_BLOCK],
            max_supported_vqs: 64,
            dev_features: features(true, true, true),
        }
    }

    fn create(
        &self,
        name: &str,
        attrs: &Attrs,
        pool: &WorkerPool,
        kept: &Kept,
    ) -> Result<AnyParent, CtlError> {
        let options = Options::parse(name, attrs)?;
        let blk = match &options.source {
            Source::File(path) => {
                let backing = Backing::open(path, &options, kept.mark(), pool.is_parked())?;
                let geometry = Geometry {
                    sectors: backing.sectors,
                    block_size: backing.block_size,
                    read_only: backing.read_only,
                };
                Blk::new(name, &options, geometry, FileDisk::new(backing, options.serial), pool)?
            }
            Source::Null(sectors) => {
                let geometry = Geometry { sectors: *sectors, block_size: 512, read_only: options.read_only };
                Blk::new(name, &options, geometry, NullDisk::new(*sectors, options.serial), pool)?
            }
        };
        Ok(Box::new(blk))
    }
}

fn features(read_only: bool, packed: bool, in_order: bool) -> Features {
    let offered = Features::of(&[
        Features::BLK_SEG_MAX,
        Features::BLK_BLK_SIZE,
        Features::BLK_FLUSH,
        Features::BLK_TOPOLOGY,
        Features::BLK_CONFIG_WCE,
        Features::BLK_MQ,
        Features::BLK_DISCARD,
        Features::BLK_WRITE_ZEROES,
        Features::RING_INDIRECT_DESC,
        Features::RING_EVENT_IDX,
        Features::VERSION_1,
        Features::ACCESS_PLATFORM,
    ]);
    let offered = if packed { offered.with(Features::RING_PACKED) } else { offered };
    let offered = if in_order { offered.with(Features::IN_ORDER) } else { offered };
    if read_only { offered.with(Features::BLK_RO) } else { offered }
}

/// The properties of a disk that configuration space reports.
#[derive(Clone, Copy)]
struct Geometry {
    /// Size in sectors of 512 bytes.
    sectors: u64,
    /// Logical block size, in bytes.
    block_size: u32,
    read_only: bool,
}

#[derive(Debug)]
struct Blk {
    profile: Profile,
    config: BlkConfig,
    /// Features that the driver has accepted.
    accepted: Features,
    cache: Arc<WriteCache>,
    memory: ClientMemory,
}

impl Blk {
    fn new(
        name: &str,
        options: &Options,
        geometry: Geometry,
        disk: impl Disk,
        pool: &WorkerPool,
    ) -> Result<Self, CtlError> {
        let config = config(options, geometry);
        let profile = profile(options, geometry);
        let place = &options.placement;
        let cache = Arc::<WriteCache>::default();
        let size = Size { queues: options.queues, address_spaces: 1 };
        let queues = pool.add(name, size, place, Requests::new(disk, Arc::clone(&cache)));
        let queues = queues.map_err(|errno| no_worker(name, place, errno))?;
        let memory = ClientMemory::new(name, queues, options.pin);
        Ok(Self { profile, config, accepted: Features::NONE, cache, memory })
    }

    const fn queues(&self) -> &QueueControl {
        self.memory.queues()
    }
}

fn config(options: &Options, geometry: Geometry) -> BlkConfig {
    BlkConfig {
        capacity: geometry.sectors.into(),
        seg_max: SEG_MAX.into(),
        blk_size: geometry.block_size.into(),
        min_io_size: 1.into(),
        opt_io_size: 1.into(),
        num_queues: options.queues.into(),
        max_discard_sectors: RANGE_SECTORS_MAX.into(),
        max_discard_seg: 1.into(),
        discard_sector_alignment: (geometry.block_size >> 9).into(),
        max_write_zeroes_sectors: RANGE_SECTORS_MAX.into(),
        max_write_zeroes_seg: 1.into(),
        write_zeroes_may_unmap: 1,
        ..BlkConfig::default()
    }
}

fn profile(options: &Options, geometry: Geometry) -> Profile {
    let features = features(geometry.read_only, options.packed, options.in_order);
    Profile {
        queue_size_max: options.queue_size,
        config_size: u32::try_from(size_of::<BlkConfig>()).unwrap_or(0),
        compat_reset: options.compat_reset,
        address_mode: if options.pin { AddressMode::Pinned } else { AddressMode::Objects },
        pin_limit: options.pin_limit,
        max_iotlb_entries: options.max_iotlb_entries,
        reset_owner: options.reset_owner,
        strict_new_owner: options.strict_new_owner,
        ..Profile::on_objects(ID_BLOCK, features, options.queues)
    }
}

impl Parent for Blk {
    type Host = LinuxHost;

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        // Before negotiation: the value that a driver which accepts all features will read.
        let features = if self.accepted == Features::NONE { self.profile.features } else { self.accepted };
        let wce = self.cache.is_write_back(features).into();
        copy_config(&BlkConfig { wce, ..self.config }, offset, out);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        // A driver may write `writeback` only (virtio 1.2 section 5.2.5), and only after it has accepted CONFIG_WCE.
        let at = u32::try_from(offset_of!(BlkConfig, wce)).ok().and_then(|wce| wce.checked_sub(offset));
        if self.accepted.has(Features::BLK_CONFIG_WCE)
            && let Some(wce) = at.and_then(|at| data.get(usize::try_from(at).ok()?))
        {
            self.cache.set(*wce != 0);
        }
    }

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        if !features.has(Features::ACCESS_PLATFORM) || !features.has(Features::VERSION_1) {
            return Err(Errno::INVAL);
        }
        self.accepted = features & self.profile.features;
        Ok(self.accepted)
    }

    vdpa_backend::queue_methods!(self => self.queues());

    fn dma(&mut self) -> Dma<'_, LinuxHost> {
        Dma::SetMap(&mut self.memory)
    }

    fn reset(&mut self) {
        self.accepted = Features::NONE;
        self.cache.reset();
        self.queues().reset();
    }

    fn fail(&mut self) -> Result<()> {
        self.queues().fail()
    }

    fn save_state(&self) -> Vec<u8> {
        vec![self.cache.save()]
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<()> {
        match state {
            [mode] if self.cache.restore(*mode) => Ok(()),
            _ => Err(Errno::INVAL),
        }
    }

    fn queue_stats(&self, index: QueueIndex) -> QueueStats {
        self.queues().stats(index)
    }
}

/// Copies a part of configuration space. Leaves `out` as it is if the range exceeds it, which the caller has checked.
pub(super) fn copy_config(config: &BlkConfig, offset: u32, out: &mut [u8]) {
    let bytes = config.as_bytes();
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    if let Some(part) = bytes.get(from..).and_then(|rest| rest.get(..out.len())) {
        out.copy_from_slice(part);
    }
}
