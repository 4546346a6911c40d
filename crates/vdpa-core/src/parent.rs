//! [`Parent`]: what a device implements.

use std::fmt::Debug;

use crate::errno::Errno;
use crate::features::{BackendFeatures, Features};
use crate::host::Host;
use crate::iotlb::{Mapping, Table};
use crate::net::MAC_BYTES;
use crate::types::{Asid, GroupIndex, IovaRange, QueueIndex, Result};
use crate::vq::{QueueSetup, QueueState};

/// A vDPA device as its implementer sees it.
///
/// [`Device`](crate::device::Device) owns everything the interface remembers (status, negotiation, vring setup,
/// IOTLB, ownership, suspend) and calls a parent only for what differs between devices. All calls come from one
/// thread at a time, under the device's lock.
///
/// ```text
///            start_queue(i)                 DRIVER_OK, queue enabled and set up, not suspended
///   stopped ----------------> running
///           <----------------
///            stop_queue(i)                  SUSPEND, reset, ENABLE 0, or a change of the queue's setup
/// ```
///
/// `start_queue` and `stop_queue` are the one mechanism behind suspend, reset, `GET`/`SET_VRING_BASE` and live
/// update; both are idempotent.
pub trait Parent: Debug + Send {
    /// The platform it runs on.
    type Host: Host;

    /// What the device is. Constant while the device exists.
    fn profile(&self) -> &Profile;

    /// Copies configuration space from `offset` into `out`. The range is within [`Profile::config_size`].
    fn read_config(&self, offset: u32, out: &mut [u8]);

    /// The driver writes configuration space. The range is within [`Profile::config_size`]; a device may
    /// ignore it.
    fn write_config(&mut self, offset: u32, data: &[u8]);

    /// The driver chose these features; returns those in force.
    ///
    /// # Errors
    /// Any error becomes `EINVAL` for the client.
    fn negotiate(&mut self, features: Features) -> Result<Features>;

    /// Starts processing a queue, from `state` or from where it stopped. Running already: no effect.
    ///
    /// The ring must be looked at once after the start even without a kick: kicks may have come before.
    ///
    /// # Errors
    /// When the ring cannot be reached or its geometry is impossible; the queue stays stopped.
    fn start_queue(
        &mut self,
        index: QueueIndex,
        setup: &QueueSetup<Self::Host>,
        state: QueueState,
    ) -> Result<()>;

    /// Stops processing a queue and returns where it is; `None` if it was not running.
    ///
    /// May block until requests in flight are done. When it returns, no access to client memory is in progress
    /// or will start for this queue, and no used entry and no call signal is pending.
    ///
    /// # Errors
    /// `EIO` when the queue could not be brought to rest.
    fn stop_queue(&mut self, index: QueueIndex) -> Result<Option<QueueState>>;

    /// How the device learns of mappings. The kind must not change while the device exists.
    fn dma(&mut self) -> Dma<'_, Self::Host>;

    /// The device is reset (status 0, open or close); all queues are stopped already.
    fn reset(&mut self) {}

    /// The device is about to run: the driver sets DRIVER_OK, or resumes. Queues start after it. For parents that are
    /// [shared](crate::handover).
    ///
    /// # Errors
    /// Any error is the client's, and the device does not run.
    fn claim(&mut self) -> Result<()> {
        Ok(())
    }

    /// What is behind the device is taken away, for ever: every request from now on is answered with an error.
    /// Blocks until requests in flight are done.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for devices that cannot; their client loses the device file. `ETIMEDOUT` when requests in flight take
    /// too long, to a disk that hangs for example: it will be so once they are done.
    fn fail(&mut self) -> Result<()> {
        Err(Errno::OPNOTSUPP)
    }

    /// Whether the device met something, a broken ring for example, after which it cannot go on without a reset
    /// (virtio 1.2 section 2.1.2). False again after [`reset`](Self::reset). Does not block.
    fn needs_reset(&self) -> bool {
        false
    }

    /// What to signal when [`needs_reset`](Self::needs_reset) becomes true, or the configuration changes by itself
    /// (`set_config_cb`); `None` for nothing. Does not block.
    fn set_config_call(&mut self, _event: Option<&<Self::Host as Host>::Event>) {}

    /// What a queue has done since the device was made. Does not block.
    fn queue_stats(&self, _index: QueueIndex) -> QueueStats {
        QueueStats::default()
    }

    /// What the vendor counts for a queue, with the vendor's names and in its order (`get_vendor_vq_stats`). Does not
    /// block.
    ///
    /// # Errors
    /// `EOPNOTSUPP` without such statistics; `EINVAL` for a queue that has none.
    fn vendor_stats(&self, _index: QueueIndex) -> Result<Vec<(&'static str, u64)>> {
        Err(Errno::OPNOTSUPP)
    }

    /// The management side gives the device another Ethernet address, which is neither zero nor that of a group
    /// (`dev_set_attr`). Does not block.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for a device that cannot change it, or has none.
    fn set_mac(&mut self, _mac: [u8; MAC_BYTES]) -> Result<()> {
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

    /// Whether owner, features, own state and mappings have been restored before the
    /// [`Device`](crate::device::Device) around it is. True for handles of a restored [`handover`](crate::handover).
    fn is_restored(&self) -> bool {
        false
    }

    /// The device has a new owner address space, or none.
    ///
    /// # Errors
    /// Refuses the owner with the error given.
    fn bind_owner(&mut self, _owner: Option<&<Self::Host as Host>::AddressSpace>) -> Result<()> {
        Ok(())
    }
}

/// Counters of a queue; they survive resets and changes of owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStats {
    /// Requests answered.
    pub requests: u64,
    /// Bytes of data moved by them, in either direction.
    pub bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// The three ways in which a parent takes part in translation (uapi-spec 3.1).
#[derive(Debug)]
pub enum Dma<'a, H: Host> {
    /// Whole tables (`set_map`).
    SetMap(&'a mut dyn SetMap<H>),
    /// Single entries (`dma_map`, `dma_unmap`).
    DmaMap(&'a mut dyn DmaMap<H>),
    /// Nothing: the core's table is the translation (the place of a platform IOMMU).
    Platform,
}

/// Takes whole translation tables.
pub trait SetMap<H: Host>: Debug {
    /// Replaces the translation of `asid` by `table`.
    ///
    /// Blocks until no request uses an entry that is gone or changed. On an error the device uses the previous
    /// table or none; the core then offers the previous table once more.
    ///
    /// # Errors
    /// `ENOMEM`, `ENOSPC` or what the device reports.
    fn set_map(&mut self, asid: Asid, table: &Table<H::Memory>) -> Result<()>;
}

/// Takes single mappings.
pub trait DmaMap<H: Host>: Debug {
    /// Adds one mapping.
    ///
    /// # Errors
    /// `ENOMEM`, `ENOSPC` or what the device reports; the mapping is then not there.
    fn dma_map(&mut self, asid: Asid, mapping: &Mapping<H::Memory>) -> Result<()>;

    /// Removes one mapping; blocks until no request uses it.
    fn dma_unmap(&mut self, asid: Asid, range: IovaRange);
}

/// How the device reaches client memory (uapi-spec 3.2, 3.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressMode {
    /// By the owner's virtual addresses: after a change of owner a mapping is stale until it is remapped.
    OwnerAddresses,
    /// By the memory objects behind the addresses: a change of owner touches no mapping.
    Objects,
    /// As [`Objects`](Self::Objects), with the pages pinned and charged to the owner.
    Pinned,
    /// As [`Pinned`](Self::Pinned), by the kernel's rule: a mapping is made of whole pages, every one of which is
    /// charged, and what the request has of its first page is dropped from the address (uapi-spec 3.3).
    PinnedPages,
}

/// How many pages may be pinned for one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PinLimit {
    /// As many as the soft `RLIMIT_MEMLOCK` of the calling process allows, as in the kernel (uapi-spec 3.3).
    Rlimit,
    /// As many as whoever made the device allows, whatever the limit of its users.
    Pages(u64),
}

impl PinLimit {
    /// The limit in pages for a caller whose own is `rlimit` pages.
    #[must_use]
    pub const fn pages(self, rlimit: u64) -> u64 {
        match self {
            Self::Rlimit => rlimit,
            Self::Pages(pages) => pages,
        }
    }

    /// What sets the limit, for messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rlimit => "RLIMIT_MEMLOCK",
            Self::Pages(_) => "the device's memlock",
        }
    }
}

/// What to do with memory that no other process can see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrivateMemory {
    /// Reach it by copying while its address space lives.
    Copy,
    /// Leave it unmapped without an error, as the kernel does for parents that use virtual addresses.
    Skip,
}

/// What a reset without `IOTLB_PERSIST` does to the parent's translation (uapi-spec 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompatReset {
    /// Mappings stay, whatever was acknowledged.
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
    /// Backend features of its own, OR-ed into those of the interface.
    pub backend_features: BackendFeatures,
    /// Number of virtqueues, 1 to 65535.
    pub queues: u16,
    /// Largest ring, in entries.
    pub queue_size_max: u16,
    /// Group of each queue; queues beyond the end are in group 0.
    pub queue_groups: Vec<GroupIndex>,
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
    /// Refuse REMAP to memory that is not the same object at the same offset.
    pub verify_remap: bool,
    /// Whether an address space in which nothing was mapped yet passes addresses through: an I/O virtual address is
    /// the owner's virtual address, until the first mapping and again after a reset that cleans the map
    /// (uapi-spec 6.1). Only with [`AddressMode::OwnerAddresses`]; it goes with [`reset_map`](Self::reset_map).
    pub identity_map: bool,
    /// Whether RESET_OWNER works; in the kernel it does not (uapi-spec 1.1).
    pub reset_owner: bool,
    /// Refuse NEW_OWNER while the device runs (uapi-spec 8.4, strict mode).
    pub strict_new_owner: bool,
    /// Whether a status write with DRIVER_OK restarts a suspended device, as the kernel's simulator does.
    pub status_unsuspends: bool,
    /// Whether BATCH_END reports a translation the parent refused; the kernel ignores it (uapi-spec 2.6).
    pub report_batch_errors: bool,
}

impl Profile {
    /// A device as the kernel's simulators are by default (uapi-spec 6.1), with one group and one address space.
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
            reset_owner: false,
            strict_new_owner: false,
            status_unsuspends: true,
            report_batch_errors: false,
        }
    }

    /// What a simulator answers to features: those it offers, provided that ACCESS_PLATFORM is among them
    /// (uapi-spec 6.1). For [`Parent::negotiate`].
    ///
    /// # Errors
    /// `EINVAL`.
    pub fn mask_features(&self, features: Features) -> Result<Features> {
        if features.has(Features::ACCESS_PLATFORM) { Ok(features & self.features) } else { Err(Errno::INVAL) }
    }

    /// The group of `queue`.
    #[must_use]
    pub fn group_of(&self, queue: QueueIndex) -> GroupIndex {
        self.queue_groups.get(usize::from(queue.0)).copied().unwrap_or_default()
    }
}

impl<P: Parent + ?Sized> Parent for Box<P> {
    type Host = P::Host;

    fn profile(&self) -> &Profile {
        (**self).profile()
    }

    fn read_config(&self, offset: u32, out: &mut [u8]) {
        (**self).read_config(offset, out);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        (**self).write_config(offset, data);
    }

    fn negotiate(&mut self, features: Features) -> Result<Features> {
        (**self).negotiate(features)
    }

    fn start_queue(
        &mut self,
        index: QueueIndex,
        setup: &QueueSetup<Self::Host>,
        state: QueueState,
    ) -> Result<(), Errno> {
        (**self).start_queue(index, setup, state)
    }

    fn stop_queue(&mut self, index: QueueIndex) -> Result<Option<QueueState>> {
        (**self).stop_queue(index)
    }

    fn dma(&mut self) -> Dma<'_, Self::Host> {
        (**self).dma()
    }

    fn reset(&mut self) {
        (**self).reset();
    }

    fn claim(&mut self) -> Result<()> {
        (**self).claim()
    }

    fn fail(&mut self) -> Result<()> {
        (**self).fail()
    }

    fn needs_reset(&self) -> bool {
        (**self).needs_reset()
    }

    fn set_config_call(&mut self, event: Option<&<Self::Host as Host>::Event>) {
        (**self).set_config_call(event);
    }

    fn queue_stats(&self, index: QueueIndex) -> QueueStats {
        (**self).queue_stats(index)
    }

    fn vendor_stats(&self, index: QueueIndex) -> Result<Vec<(&'static str, u64)>> {
        (**self).vendor_stats(index)
    }

    fn set_mac(&mut self, mac: [u8; MAC_BYTES]) -> Result<()> {
        (**self).set_mac(mac)
    }

    fn save_state(&self) -> Vec<u8> {
        (**self).save_state()
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<()> {
        (**self).restore_state(state)
    }

    fn is_restored(&self) -> bool {
        (**self).is_restored()
    }

    fn bind_owner(&mut self, owner: Option<&<Self::Host as Host>::AddressSpace>) -> Result<()> {
        (**self).bind_owner(owner)
    }
}
