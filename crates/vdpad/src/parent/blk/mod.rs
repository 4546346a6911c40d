//! `blk`: a virtio block device on a file or block device.

mod disk;
mod edges;
mod file;
mod null;
mod options;
mod pace;
mod pin;
mod range;

use std::mem::offset_of;
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::blk::BlkConfig;
use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::host::MemoryObject;
use vdpa_core::iotlb::{Mapping, Removed, Table};
use vdpa_core::parent::{AddressMode, Dma, Parent, PrivateMemory, Profile, QueueStats, SetMap};
use vdpa_core::types::{Asid, IovaRange, Perm, QueueIndex, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::guest::{GuestMemory, LinuxHost};
use vdpa_sys::rlimit;
use zerocopy::IntoBytes;

use self::disk::FileDisk;
use self::file::Backing;
use self::null::NullDisk;
use self::options::{Options, Source};
use self::pin::Pins;
use super::MgmtDevice;
use super::options::no_worker;
use crate::ctl::api::{Attrs, CtlError, ID_BLOCK, MgmtDev};
use crate::front::vhost::AnyParent;
use crate::worker::{Disk, Pool, View, Worker};

/// Segments of data in one request.
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

    fn create(&self, name: &str, attrs: &Attrs, pool: &Pool) -> Result<AnyParent, CtlError> {
        let options = Options::parse(name, attrs)?;
        let blk = match &options.source {
            Source::File(path) => {
                let backing = Backing::open(path, &options)?;
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

/// An entry as the data path sees it, without its range: where it is, and its rights.
#[derive(Debug)]
struct Place {
    memory: Location,
    perm: Perm,
    stale: bool,
}

/// Where the bytes of an entry are.
#[derive(Debug)]
enum Location {
    /// In the daemon, at this address.
    Mapped(usize),
    /// In an address space from which they are copied.
    Copied(GuestMemory),
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        let same = match (&self.memory, &other.memory) {
            (Location::Mapped(here), Location::Mapped(there)) => here == there,
            (Location::Copied(here), Location::Copied(there)) => here.same_object(0, there, 0),
            _ => false,
        };
        same && (self.perm, self.stale) == (other.perm, other.stale)
    }
}

fn place(entry: &Mapping<GuestMemory>) -> (IovaRange, Place) {
    let addr = entry.memory.host_addr(0);
    let memory = addr.map_or_else(|| Location::Copied(entry.memory.clone()), Location::Mapped);
    (entry.range, Place { memory, perm: entry.perm, stale: entry.stale })
}

/// What the driver is told of a disk.
#[derive(Clone, Copy)]
struct Geometry {
    /// Of 512 bytes.
    sectors: u64,
    /// Logical, in bytes.
    block_size: u32,
    read_only: bool,
}

#[derive(Debug)]
struct Blk {
    name: String,
    profile: Profile,
    config: BlkConfig,
    /// What the driver has accepted.
    accepted: Features,
    worker: Worker,
    /// `None` with `pin off`.
    pins: Option<Pins>,
    /// Entries of the table the worker has, to see which have gone.
    mapped: Vec<(IovaRange, Place)>,
}

impl Blk {
    fn new(
        name: &str,
        options: &Options,
        geometry: Geometry,
        disk: impl Disk,
        pool: &Pool,
    ) -> Result<Self, CtlError> {
        let config = config(options, geometry);
        let profile = profile(options, geometry);
        let place = &options.placement;
        let worker = pool.add_disk(name, options.queues, place, disk);
        let worker = worker.map_err(|errno| no_worker(name, place, errno))?;
        let pins = options.pin.then(Pins::default);
        let accepted = Features::NONE;
        Ok(Self { name: name.into(), profile, config, accepted, worker, pins, mapped: Vec::new() })
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
    Profile {
        device_id: ID_BLOCK,
        vendor_id: 0,
        features: features(geometry.read_only, options.packed, options.in_order),
        backend_features: BackendFeatures::of(&[
            BackendFeatures::ENABLE_AFTER_DRIVER_OK,
            BackendFeatures::NEW_OWNER,
        ]),
        queues: options.queues,
        queue_size_max: options.queue_size,
        queue_groups: Vec::new(),
        groups: 1,
        address_spaces: 1,
        iova_range: IovaRange::ALL,
        config_size: u32::try_from(size_of::<BlkConfig>()).unwrap_or(0),
        suspend: true,
        resume: true,
        vring_size: true,
        reset_map: true,
        compat_reset: options.compat_reset,
        address_mode: if options.pin { AddressMode::Pinned } else { AddressMode::Objects },
        pin_limit: options.pin_limit,
        private_memory: PrivateMemory::Copy,
        max_iotlb_entries: 2048,
        verify_remap: true,
        identity_map: false,
        reset_owner: options.reset_owner,
        strict_new_owner: options.strict_new_owner,
        status_unsuspends: false,
        report_batch_errors: true,
    }
}

impl Parent for Blk {
    type Host = LinuxHost;

    fn profile(&self) -> &Profile {
        &self.profile
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        // Before the features are agreed on, what a driver with a flush command will find.
        let features = if self.accepted == Features::NONE { self.profile.features } else { self.accepted };
        let wce = self.worker.is_write_back(features).into();
        copy_config(&BlkConfig { wce, ..self.config }, offset, out);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        // The field `writeback` is all that is the driver's to write (virtio 1.2 section 5.2.5), if it has accepted that.
        let at = u32::try_from(offset_of!(BlkConfig, wce)).ok().and_then(|wce| wce.checked_sub(offset));
        if self.accepted.has(Features::BLK_CONFIG_WCE)
            && let Some(wce) = at.and_then(|at| data.get(usize::try_from(at).ok()?))
        {
            self.worker.set_write_back(*wce != 0);
        }
    }

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        if !features.has(Features::ACCESS_PLATFORM) || !features.has(Features::VERSION_1) {
            return Err(Errno::INVAL);
        }
        self.accepted = features & self.profile.features;
        Ok(self.accepted)
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        setup: &QueueSetup<LinuxHost>,
        state: QueueState,
    ) -> Result<()> {
        self.worker.start(index, setup, state)
    }

    fn stop_queue(&mut self, index: QueueIndex) -> Result<Option<QueueState>> {
        self.worker.stop(index)
    }

    fn dma(&mut self) -> Dma<'_, LinuxHost> {
        Dma::SetMap(self)
    }

    fn reset(&mut self) {
        self.accepted = Features::NONE;
        self.worker.reset();
    }

    fn fail(&mut self) -> Result<()> {
        self.worker.fail()
    }

    fn needs_reset(&self) -> bool {
        self.worker.needs_reset()
    }

    fn set_config_call(&mut self, event: Option<&EventFd>) {
        self.worker.set_config_call(event);
    }

    fn queue_stats(&self, index: QueueIndex) -> QueueStats {
        self.worker.stats(index)
    }
}

impl SetMap<LinuxHost> for Blk {
    fn set_map(&mut self, asid: Asid, table: &Table<GuestMemory>) -> Result<()> {
        let buffers = self.worker.buffers();
        let pinned = self.pins.as_mut().map_or(Ok(()), |pins| pins.pin_new(table, buffers));
        // Also when something cannot be pinned: that is not served then, and what the table has no more must be out
        // of reach whatever happens.
        let serves = |entry: &&Mapping<_>| self.pins.as_ref().is_none_or(|pins| pins.serves(entry));
        let entries: Vec<_> = table.iter().filter(serves).collect();
        let pins = self.pins.as_ref().map(|pins| pins.of(&entries)).unwrap_or_default();
        let now: Vec<_> = entries.iter().map(|entry| place(entry)).collect();
        let removed = Removed::between(&self.mapped, &now);
        self.worker.set_view(asid, Arc::new(View::of(&entries, pins)), removed)?;
        self.mapped = now;
        if let Some(pins) = &mut self.pins {
            pins.unpin_gone(table, self.worker.buffers());
        }
        pinned.inspect_err(|errno| {
            tracing::warn!(device = %self.name, "guest memory cannot be pinned: {errno}{}", remedy(*errno));
        })
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        // A slot that a request may yet use is not given to another device: it is lost, with what it pins.
        if self.worker.remove()
            && let Some(pins) = &mut self.pins
        {
            pins.unpin_all(self.worker.buffers());
        }
    }
}

/// What can be done about a refused pin, for the log.
fn remedy(errno: Errno) -> String {
    match rlimit::memlock().soft {
        Some(bytes) if errno == Errno::NOMEM => format!(
            "; without CAP_IPC_LOCK this daemon may lock {bytes} bytes in all (RLIMIT_MEMLOCK): raise that, or add \
             the device with pin off"
        ),
        _ => String::new(),
    }
}

/// Copies a part of configuration space; the range was checked.
pub(super) fn copy_config(config: &BlkConfig, offset: u32, out: &mut [u8]) {
    let bytes = config.as_bytes();
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    if let Some(part) = bytes.get(from..).and_then(|rest| rest.get(..out.len())) {
        out.copy_from_slice(part);
    }
}
