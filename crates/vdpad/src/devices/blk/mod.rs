//! `blk`: a virtio block device on a file or block device.

mod backoff;
#[cfg(test)]
mod crash_tests;
mod discard;
mod disk;
mod file;
mod format;
mod lock;
mod null;
mod options;
mod passed;
mod range;
mod size;
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
use self::size::{Capacity, DiskControls};
use super::options::no_worker;
use super::{Kept, MgmtDevice};
use vdpa_backend::front::vhost::AnyParent;
use vdpa_backend::worker::{ClientMemory, QueueControl, Size, WorkerPool};
use vdpa_control::api::{Attrs, CtlError, ID_BLOCK, MgmtDev};

use crate::block::limit::{Limits, SharedLimits};
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
            dev_features: features(true, true, true, true),
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
                let backing = Backing::open(path, &options, kept, pool.is_parked())?;
                let geometry = Geometry {
                    capacity: Arc::clone(&backing.capacity),
                    block_size: backing.block_size,
                    read_only: backing.read_only,
                    discard: backing.discard,
                };
                let disk = FileDisk::new(backing.clone(), options.serial);
                let blk = Blk::new(name, &options, geometry, disk, pool)?;
                let (signal, limits) = (blk.queues().config_signal(), Arc::clone(&blk.limits));
                kept.set_controls(Arc::new(DiskControls::new(&backing, path.clone(), signal, limits)));
                blk
            }
            Source::Null(sectors) => {
                let capacity = Arc::new(Capacity::new(*sectors));
                let (block_size, read_only) = (512, options.read_only);
                let geometry = Geometry { capacity, block_size, read_only, discard: true };
                Blk::new(name, &options, geometry, NullDisk::new(*sectors, options.serial), pool)?
            }
        };
        Ok(Box::new(blk))
    }
}

fn features(read_only: bool, packed: bool, in_order: bool, discard: bool) -> Features {
    let offered = Features::of(&[
        Features::BLK_SEG_MAX,
        Features::BLK_BLK_SIZE,
        Features::BLK_FLUSH,
        Features::BLK_TOPOLOGY,
        Features::BLK_CONFIG_WCE,
        Features::BLK_MQ,
        Features::BLK_WRITE_ZEROES,
        Features::RING_INDIRECT_DESC,
        Features::RING_EVENT_IDX,
        Features::VERSION_1,
        Features::ACCESS_PLATFORM,
    ]);
    let offered = if discard { offered.with(Features::BLK_DISCARD) } else { offered };
    let offered = if packed { offered.with(Features::RING_PACKED) } else { offered };
    let offered = if in_order { offered.with(Features::IN_ORDER) } else { offered };
    if read_only { offered.with(Features::BLK_RO) } else { offered }
}

/// The properties of a disk that configuration space reports.
struct Geometry {
    capacity: Arc<Capacity>,
    /// Logical block size, in bytes.
    block_size: u32,
    read_only: bool,
    /// Offer discards.
    discard: bool,
}

#[derive(Debug)]
struct Blk {
    profile: Profile,
    /// Without what changes: capacity, and the mode of the cache.
    config: BlkConfig,
    capacity: Arc<Capacity>,
    limits: Arc<SharedLimits>,
    /// The limits that the device was made with.
    first_limits: Limits,
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
        let config = config(options, &geometry);
        let profile = profile(options, &geometry);
        let place = &options.placement;
        let cache = Arc::<WriteCache>::default();
        let size = Size { queues: options.queues, address_spaces: 1 };
        let limits = Arc::new(SharedLimits::new(options.limits));
        let requests = Requests::new(disk, Arc::clone(&cache), Arc::clone(&limits));
        let queues = pool.add(name, size, place, requests);
        let queues = queues.map_err(|errno| no_worker(name, place, errno))?;
        let memory = ClientMemory::new(name, queues, options.pin);
        let capacity = geometry.capacity;
        let (accepted, first_limits) = (Features::NONE, options.limits);
        Ok(Self { profile, config, capacity, limits, first_limits, accepted, cache, memory })
    }

    const fn queues(&self) -> &QueueControl {
        self.memory.queues()
    }
}

fn config(options: &Options, geometry: &Geometry) -> BlkConfig {
    BlkConfig {
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
        write_zeroes_may_unmap: geometry.discard.into(),
        ..BlkConfig::default()
    }
}

fn profile(options: &Options, geometry: &Geometry) -> Profile {
    let features = features(geometry.read_only, options.packed, options.in_order, geometry.discard);
    Profile {
        queue_size_max: options.queue_size,
        config_size: u32::try_from(size_of::<BlkConfig>()).unwrap_or(0),
        compat_reset: options.compat_reset,
        address_mode: if options.pin { AddressMode::Pinned } else { AddressMode::Objects },
        pin_limit: options.pin_limit,
        max_iotlb_entries: options.max_iotlb_entries,
        mem_table: options.mem_table,
        vhost_log: options.vhost_log,
        reset_owner: options.reset_owner,
        strict_new_owner: options.strict_new_owner,
        moves: true,
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
        // As a whole: the size changes while the device is locked, as it is now.
        let capacity = self.capacity.sectors().into();
        copy_config(&BlkConfig { wce, capacity, ..self.config }, offset, out);
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
        let limits = Some(self.limits.get()).filter(|limits| *limits != self.first_limits);
        save(self.cache.save(), self.capacity.changed(), limits)
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<()> {
        let Saved { mode, sectors, limits } = saved(state).ok_or(Errno::INVAL)?;
        if !self.cache.restore(mode) {
            return Err(Errno::INVAL);
        }
        sectors.into_iter().for_each(|sectors| self.capacity.set(sectors));
        limits.into_iter().for_each(|limits| self.limits.set(limits));
        Ok(())
    }

    fn queue_stats(&self, index: QueueIndex) -> QueueStats {
        self.queues().stats(index)
    }
}

/// What is saved of a disk.
#[derive(Debug, PartialEq, Eq)]
struct Saved {
    /// Mode of its cache.
    mode: u8,
    /// Its sectors, if they are not those that it was made with.
    sectors: Option<u64>,
    /// Its limits, if they are not those that it was made with.
    limits: Option<Limits>,
}

/// The bytes of [`Saved`]: the mode (version 1), the sectors or 0 (since version 2), the limits (since version 3). The shortest that
/// has what is to be said: programs of earlier versions can go on with it if they know what that is.
fn save(mode: u8, sectors: Option<u64>, limits: Option<Limits>) -> Vec<u8> {
    let mut state = vec![mode];
    if sectors.is_some() || limits.is_some() {
        state.extend(sectors.unwrap_or(0).to_le_bytes());
    }
    state.extend(limits.into_iter().flat_map(Limits::save));
    state
}

/// Reads what [`save`] has written; `None` if that is something else.
fn saved(state: &[u8]) -> Option<Saved> {
    let (&mode, rest) = state.split_first()?;
    if rest.is_empty() {
        return Some(Saved { mode, sectors: None, limits: None });
    }
    let (sectors, rest) = rest.split_first_chunk()?;
    let sectors = Some(u64::from_le_bytes(*sectors)).filter(|sectors| *sectors > 0);
    let limits = if rest.is_empty() { None } else { Some(Limits::saved(rest)?) };
    Some(Saved { mode, sectors, limits })
}

/// Copies a part of configuration space. Leaves `out` as it is if the range exceeds it, which the caller has checked.
pub(super) fn copy_config(config: &BlkConfig, offset: u32, out: &mut [u8]) {
    let bytes = config.as_bytes();
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    if let Some(part) = bytes.get(from..).and_then(|rest| rest.get(..out.len())) {
        out.copy_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One file for each version, which never changes.
    #[test]
    fn every_version_of_the_saved_state_is_read() {
        let limits = Limits { iops: 1000, bps: 1 << 30, burst_ms: 20 };
        for (name, expected) in [
            ("blk-v1.bin", Saved { mode: 1, sectors: None, limits: None }),
            ("blk-v2.bin", Saved { mode: 0, sectors: Some(2048), limits: None }),
            ("blk-v3.bin", Saved { mode: 1, sectors: None, limits: Some(limits) }),
        ] {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
            let bytes = save(expected.mode, expected.sectors, expected.limits);
            if std::env::var_os("VDPA_WRITE_GOLDEN").is_some() && !path.exists() {
                std::fs::write(&path, &bytes).unwrap();
            }
            let golden = std::fs::read(&path).unwrap();
            assert_eq!((saved(&golden).unwrap(), golden), (expected, bytes));
        }
        for wrong in [&[][..], &[1, 2], &[0; 8], &[0; 10], &[0; 33], &[1; 34]] {
            assert_eq!(saved(wrong), None, "{wrong:?}");
        }
    }
}
