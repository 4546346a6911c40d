//! [`Parent`]: the interface that a device implements.

mod boxed;
mod pin_limit;

use std::fmt::Debug;
use std::sync::Arc;

use crate::dirty::DirtyTracking;
use crate::errno::Errno;
use crate::features::{BackendFeatures, Features};
use crate::host::Host;
use crate::iotlb::{Mapping, Table};
use crate::net::MAC_BYTES;
use crate::ops::VdpaOps;
use crate::types::{Asid, GroupIndex, IovaRange, QueueIndex, Result};
use crate::vq::{QueueSetup, QueueState};

pub use pin_limit::PinLimit;

/// A vDPA device implementation (the kernel calls it a vDPA parent).
///
/// [`Device`](crate::device::Device) has the state of the vhost-vdpa interface (status, negotiation, vring setup, IOTLB,
/// ownership, suspend) and calls a parent only for what differs between devices. It makes one call at a time, under the
/// device's lock. A method may block only where its description says so.
///
/// ```text
///            start_queue(i)                 DRIVER_OK, queue enabled and set up, not suspended
///   stopped ----------------> running
///           <----------------
///            stop_queue(i)                  SUSPEND, reset, ENABLE 0, or a change of the queue's setup
/// ```
///
/// Suspend, reset, `GET`/`SET_VRING_BASE` and live update all use `start_queue` and `stop_queue`. Both are idempotent.
pub trait Parent: Debug + Send {
    /// The platform it runs on.
    type Host: Host;

    /// The constants of the device. They must not change while the device exists.
    fn profile(&self) -> &Profile;

    /// Copies configuration space from `offset` into `out`. The range is within [`Profile::config_size`].
    fn read_config(&self, offset: u32, out: &mut [u8]);

    /// Handles a write of the driver to configuration space. The range is within [`Profile::config_size`]; a device may
    /// ignore it.
    fn write_config(&mut self, offset: u32, data: &[u8]);

    /// Handles the driver's choice of features; returns the features in force.
    ///
    /// # Errors
    /// Any error becomes `EINVAL` for the client.
    fn negotiate(&mut self, features: Features) -> Result<Features>;

    /// Starts processing a queue at `state`. No effect while it runs.
    ///
    /// The parent must check the ring once after the start even without a kick, since the driver may have kicked before.
    ///
    /// # Errors
    /// Any error, when ring memory cannot be accessed or the setup of the ring is invalid; the queue stays stopped.
    fn start_queue(
        &mut self,
        index: QueueIndex,
        setup: &QueueSetup<Self::Host>,
        state: QueueState,
    ) -> Result<()>;

    /// Stops processing a queue and returns its position; `None` if it was not running.
    ///
    /// May block until requests in flight are done. When it returns, no access to client memory is in progress
    /// or will start for this queue, and no used entry and no call signal is pending.
    ///
    /// # Errors
    /// `EIO` when requests in flight do not end; the queue counts as running.
    fn stop_queue(&mut self, index: QueueIndex) -> Result<Option<QueueState>>;

    /// How the device receives mappings. The variant must not change while the device exists.
    fn dma(&mut self) -> Dma<'_, Self::Host>;

    /// Resets the device (status 0, open or close). All queues are stopped already.
    fn reset(&mut self) {}

    /// Called when the driver sets DRIVER_OK or resumes, before queues start. For parents that two devices
    /// [share](crate::handover).
    ///
    /// # Errors
    /// Any error is returned to the client, and the device does not run.
    fn claim(&mut self) -> Result<()> {
        Ok(())
    }

    /// Releases the back end of the device for good: from now on every request completes with an error. Blocks until requests
    /// in flight are completed.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for devices that cannot do this; their client loses the device file. `ETIMEDOUT` when requests in flight
    /// take too long, for example on a disk that hangs: the back end is released once they complete.
    fn fail(&mut self) -> Result<()> {
        Err(Errno::OPNOTSUPP)
    }

    /// Whether the device had an error, such as a broken ring, after which it needs a reset (virtio 1.2 section 2.1.2). False again after [`reset`](Self::reset). Does not block.
    fn needs_reset(&self) -> bool {
        false
    }

    /// Sets the event to signal when [`needs_reset`](Self::needs_reset) becomes true or the device changes its configuration
    /// (`set_config_cb`); `None` for no event. Does not block.
    fn set_config_call(&mut self, _event: Option<&<Self::Host as Host>::Event>) {}

    /// Statistics of a queue since the device was created. Does not block.
    fn queue_stats(&self, _index: QueueIndex) -> QueueStats {
        QueueStats::default()
    }

    /// Vendor statistics of a queue, with the vendor's names and in its order (`get_vendor_vq_stats`). Does not block.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the device has no such statistics; `EINVAL` for a queue without them.
    fn vendor_stats(&self, _index: QueueIndex) -> Result<Vec<(&'static str, u64)>> {
        Err(Errno::OPNOTSUPP)
    }

    /// Sets the Ethernet address for the management side (`dev_set_attr`). The address is neither zero nor a group address.
    /// Does not block.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for a device that cannot change it, or has none.
    fn set_mac(&mut self, _mac: [u8; MAC_BYTES]) -> Result<()> {
        Err(Errno::OPNOTSUPP)
    }

    /// Sets whether the link is up, for the management side. Does not block for long.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for a device without a link, or with one that cannot be changed.
    fn set_link(&mut self, _up: bool) -> Result<()> {
        Err(Errno::OPNOTSUPP)
    }

    /// What this device keeps that the interface does not know of and a client would miss: the cache mode that a driver
    /// has set, for example, or the commands of a control queue. Features, owner, events, mappings and positions of
    /// queues are saved by the interface. For [`restore_state`](Self::restore_state), which may run in a later version
    /// of the program. Asked often; does not block.
    fn save_state(&self) -> Vec<u8> {
        Vec::new()
    }

    /// A device that was just made takes the place of one that saved `state`: owner and features are set already,
    /// mappings and queues follow. The bytes are as untrusted as a client's.
    ///
    /// # Errors
    /// `EINVAL` for what this device cannot have saved; it is not used then.
    fn restore_state(&mut self, state: &[u8]) -> Result<()> {
        if state.is_empty() { Ok(()) } else { Err(Errno::INVAL) }
    }

    /// The device was [moved](crate::device::moving) here from another host, and [`restore_state`](Self::restore_state) has
    /// been called: a network card asks its driver to announce itself, for example. Does not block.
    fn moved(&mut self) {}

    /// Whether owner, features, own state and mappings have been restored before the
    /// [`Device`](crate::device::Device) around it is. True for handles of a restored [`handover`](crate::handover).
    fn is_restored(&self) -> bool {
        false
    }

    /// The device behind this one, for a parent that serves a vhost-vdpa device on, as a broker. It gets each request that changes
    /// a queue, the status or a group, when [`Device`](crate::device::Device) has found it legal, and its error is the client's.
    /// Features, mappings and configuration space reach it by the other methods of the parent, and starting and stopping a queue is
    /// its own affair. `None` for every other parent, and for a broker that has lost its device.
    ///
    /// Called for each such request. Does not block; the requests of the device behind may.
    fn upstream(&mut self) -> Option<Upstream<'_, Self::Host>> {
        None
    }

    /// Called when a device that was [restored](crate::device::Device::restore) has been told everything, and its queues have been
    /// started: what comes from now on is new. Does not block for long.
    fn resumed(&mut self) {}

    /// Called when the owner changes: the new owner's address space, or `None`.
    ///
    /// # Errors
    /// Any error refuses the owner and is returned to the client. Ignored for `None`.
    fn bind_owner(&mut self, _owner: Option<&<Self::Host as Host>::AddressSpace>) -> Result<()> {
        Ok(())
    }
}

/// The device behind a parent: see [`Parent::upstream`].
pub type Upstream<'a, H> = &'a dyn VdpaOps<Event = <H as Host>::Event>;

/// Counters of a queue; they survive resets and changes of owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Completed requests.
    pub requests: u64,
    /// Bytes of data transferred by them, in both directions.
    pub bytes: u64,
    /// Requests completed with an error.
    pub errors: u64,
    /// Requests that were refused because processes had begun them, and died.
    pub poison: u64,
}

/// How a parent receives mappings (uapi-spec 3.1).
#[derive(Debug)]
pub enum Dma<'a, H: Host> {
    /// Whole tables (`set_map`).
    SetMap(&'a mut dyn SetMap<H>),
    /// Single entries (`dma_map`, `dma_unmap`).
    DmaMap(&'a mut dyn DmaMap<H>),
    /// Nothing: the device uses the core's table directly, as a kernel device uses the platform IOMMU.
    Platform,
}

/// Takes whole translation tables.
pub trait SetMap<H: Host>: Debug {
    /// Replaces the translation of `asid` by `table`.
    ///
    /// Blocks until no request uses an entry that was removed or changed. After an error the device uses the previous table
    /// or an empty one; the core then passes the previous table once more.
    ///
    /// # Errors
    /// `ENOMEM`, `ENOSPC` or what the device reports.
    fn set_map(&mut self, asid: Asid, table: &Table<H::Memory>) -> Result<()>;

    /// What tracks the pages that the device writes; `None` for a device that cannot. Asked once. Does not block.
    fn dirty_tracking(&self) -> Option<Arc<dyn DirtyTracking>> {
        None
    }
}

/// Takes single mappings.
pub trait DmaMap<H: Host>: Debug {
    /// Adds one mapping.
    ///
    /// # Errors
    /// `ENOMEM`, `ENOSPC` or what the device reports; the mapping does not exist then.
    fn dma_map(&mut self, asid: Asid, mapping: &Mapping<H::Memory>) -> Result<()>;

    /// Removes one mapping; blocks until no request uses it.
    fn dma_unmap(&mut self, asid: Asid, range: IovaRange);

    /// As [`SetMap::dirty_tracking`].
    fn dirty_tracking(&self) -> Option<Arc<dyn DirtyTracking>> {
        None
    }
}

/// How the device accesses client memory (uapi-spec 3.2, 3.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressMode {
    /// By the owner's virtual addresses: after a change of owner a mapping is stale until it is remapped.
    OwnerAddresses,
    /// By the memory objects behind the addresses: a change of owner touches no mapping.
    Objects,
    /// As [`Objects`](Self::Objects), with the pages pinned and charged to the owner.
    Pinned,
    /// As [`Pinned`](Self::Pinned), by the kernel's rule: a mapping consists of whole pages, each of which is charged, and
    /// the offset of the user address in its page is ignored (uapi-spec 3.3).
    PinnedPages,
}

/// How to treat private memory, which no other process can map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrivateMemory {
    /// Access it by copying while its address space exists.
    Copy,
    /// Leave it unmapped without an error, as the kernel does for parents that use virtual addresses.
    Skip,
    /// Refuse to map it: whoever accesses the memory can do so only by a mapping of its own.
    Refuse,
}

/// What a reset without `IOTLB_PERSIST` does to the parent's translation (uapi-spec 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompatReset {
    /// Mappings stay, with or without acknowledged PERSIST.
    Keep,
    /// The translation is dropped, as old parents did, unless PERSIST or NEW_OWNER was acknowledged.
    Clean,
}

/// The constants of a device.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Virtio device id (1 network, 2 block).
    pub device_id: u32,
    /// Vendor id.
    pub vendor_id: u32,
    /// Features offered.
    pub features: Features,
    /// Backend features that this device adds to those of the interface.
    pub backend_features: BackendFeatures,
    /// Number of virtqueues, 1 to 65535.
    pub queues: u16,
    /// Largest ring, in entries.
    pub queue_size_max: u16,
    /// Group of each queue; queues beyond the end are in group 0.
    pub queue_groups: Vec<GroupIndex>,
    /// Group of each queue's descriptor area, where it can be another one (`get_vq_desc_group`); empty if not.
    pub descriptor_groups: Vec<GroupIndex>,
    /// Number of groups, at least 1.
    pub groups: u32,
    /// Number of address spaces, at least 1.
    pub address_spaces: u32,
    /// I/O virtual addresses the device can use.
    pub iova_range: IovaRange,
    /// Bytes of configuration space.
    pub config_size: u32,
    /// Whether it can suspend.
    pub suspend: bool,
    /// Whether it can resume.
    pub resume: bool,
    /// Whether `GET_VRING_SIZE` works.
    pub vring_size: bool,
    /// Whether the parent can restore a default translation (`reset_map`); offers IOTLB_PERSIST.
    pub reset_map: bool,
    /// See [`CompatReset`].
    pub compat_reset: CompatReset,
    /// See [`AddressMode`].
    pub address_mode: AddressMode,
    /// See [`PinLimit`].
    pub pin_limit: PinLimit,
    /// See [`PrivateMemory`].
    pub private_memory: PrivateMemory,
    /// Entries per IOTLB table (`max_iotlb_entries`).
    pub max_iotlb_entries: usize,
    /// Whether to refuse REMAP to memory that is not the same object at the same offset.
    pub verify_remap: bool,
    /// Whether an address space without mappings has an identity map, in which an I/O virtual address is the same virtual
    /// address of the owner. It ends with the first mapping and returns with a reset that cleans the map (uapi-spec 6.1).
    /// Requires [`AddressMode::OwnerAddresses`] and [`reset_map`](Self::reset_map).
    pub identity_map: bool,
    /// Whether `SET_MEM_TABLE` maps the regions of the table in address space 0; in the kernel it has no effect (uapi-spec 1.6a).
    pub mem_table: bool,
    /// Whether the log of vhost works, and `VHOST_F_LOG_ALL` is offered; in the kernel's vhost-vdpa it does not (uapi-spec 1.1).
    pub vhost_log: bool,
    /// Whether RESET_OWNER works; in the kernel it does not (uapi-spec 1.1).
    pub reset_owner: bool,
    /// Whether to refuse NEW_OWNER while the device runs (uapi-spec 8.4, strict mode).
    pub strict_new_owner: bool,
    /// Whether a status write with DRIVER_OK restarts a suspended device, as the kernel's simulator does.
    pub status_unsuspends: bool,
    /// Whether BATCH_END fails when the parent refuses the translation; the kernel ignores that (uapi-spec 2.6).
    pub report_batch_errors: bool,
    /// Whether the device can [move](crate::device::moving) to another daemon, and offers the requests for that: whether
    /// [`Parent::save_state`] has all that a driver would miss. The kernel's devices do not.
    pub moves: bool,
}

impl Profile {
    /// The default profile of the kernel's simulators (uapi-spec 6.1), with one group and one address space.
    #[must_use]
    pub const fn simulator(device_id: u32, features: Features, queues: u16, config_size: u32) -> Self {
        Self {
            device_id,
            vendor_id: 0,
            features,
            backend_features: BackendFeatures::of(&[BackendFeatures::ENABLE_AFTER_DRIVER_OK]),
            queues,
            queue_size_max: 256,
            queue_groups: Vec::new(),
            descriptor_groups: Vec::new(),
            groups: 1,
            address_spaces: 1,
            iova_range: IovaRange::ALL,
            config_size,
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
            mem_table: false,
            vhost_log: false,
            reset_owner: false,
            strict_new_owner: false,
            status_unsuspends: true,
            report_batch_errors: false,
            moves: false,
        }
    }

    /// A device that reaches client memory by its objects (memfd, tmpfs, hugetlb, file) and runs queues by itself. It can
    /// suspend and resume, and a change of owner touches nothing (`NEW_OWNER`). `features` are those of the device type;
    /// what every such device offers is added: `VERSION_1`, `ACCESS_PLATFORM`, `INDIRECT_DESC` and `EVENT_IDX`.
    #[must_use]
    pub fn on_objects(device_id: u32, features: Features, queues: u16) -> Self {
        let transport = Features::of(&[
            Features::VERSION_1,
            Features::ACCESS_PLATFORM,
            Features::RING_INDIRECT_DESC,
            Features::RING_EVENT_IDX,
        ]);
        Self {
            backend_features: BackendFeatures::of(&[
                BackendFeatures::ENABLE_AFTER_DRIVER_OK,
                BackendFeatures::NEW_OWNER,
            ]),
            vring_size: true,
            compat_reset: CompatReset::Keep,
            address_mode: AddressMode::Objects,
            private_memory: PrivateMemory::Copy,
            identity_map: false,
            status_unsuspends: false,
            report_batch_errors: true,
            ..Self::simulator(device_id, features | transport, queues, 0)
        }
    }

    /// The features in force after a simulator's negotiation: those of `features` that it offers (uapi-spec 6.1). For
    /// [`Parent::negotiate`].
    ///
    /// # Errors
    /// `EINVAL` without ACCESS_PLATFORM.
    pub fn mask_features(&self, features: Features) -> Result<Features> {
        if features.has(Features::ACCESS_PLATFORM) { Ok(features & self.features) } else { Err(Errno::INVAL) }
    }

    /// The features offered to the client: those of the device, and the one of vhost's log where that works.
    #[must_use]
    pub const fn offered_features(&self) -> Features {
        if self.vhost_log { self.features.with(Features::LOG_ALL) } else { self.features }
    }

    /// The group of `queue`.
    #[must_use]
    pub fn group_of(&self, queue: QueueIndex) -> GroupIndex {
        self.queue_groups.get(usize::from(queue.0)).copied().unwrap_or_default()
    }
}
