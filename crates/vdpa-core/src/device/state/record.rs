//! [`Record`]: what is saved of a device, one statement at a time.

use crate::features::{BackendFeatures, Features, Status};
use crate::parent::{AddressMode, Profile};
use crate::types::{Asid, GroupIndex, IovaRange, Perm, QueueIndex, VringAddr};
use crate::vq::QueueState;

/// Where a piece of memory is: an object that the [`StateSink`](super::StateSink) has named, and a place in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemoryRef {
    /// The object.
    pub id: u64,
    /// Bytes from its beginning to the first byte of the piece.
    pub offset: u64,
}

/// A statement "this part of the device is now so".
///
/// A sequence of records describes a device when it begins with [`Device`](Self::Device) or
/// [`Handover`](Self::Handover), which forget everything before them, and when it is applied in order: see
/// [`Image`](super::Image). To apply a record twice in a row is the same as to apply it once. `docs/daemon-state.md` has
/// the kinds as a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// What the device was: the beginning of a snapshot.
    Device(Shape),
    /// Whether a client has it open, and whether [`Device::fail`](crate::device::Device::fail) was called.
    Open {
        /// A client has it open.
        open: bool,
        /// What was behind it has been taken away.
        failed: bool,
    },
    /// Negotiated features.
    Features {
        /// Those in force; `None` before the driver has set them.
        in_force: Option<Features>,
        /// Those that decide the encoding of vring bases; they survive a reset.
        base: Features,
    },
    /// Backend features that the client acknowledged.
    BackendFeatures {
        /// The word.
        acked: BackendFeatures,
    },
    /// Device status.
    Status {
        /// As the client set it.
        status: Status,
        /// SUSPEND is in force.
        suspended: bool,
        /// The queues are stopped although DRIVER_OK is set. Implies `suspended`.
        paused: bool,
        /// Entries of the largest ring; 0 after a reset that failed.
        ring_max: u16,
    },
    /// `VHOST_SET_FORK_FROM_OWNER`.
    ForkFromOwner {
        /// 0 or 1.
        value: u8,
    },
    /// The owner.
    Owner {
        /// Its address space, as the sink has named it.
        space: Option<u64>,
    },
    /// The event of configuration changes.
    ConfigCall {
        /// As the sink has named it.
        event: Option<u64>,
    },
    /// The open batch of IOTLB messages.
    Batch {
        /// Its address space; `None` when no batch is open.
        asid: Option<Asid>,
    },
    /// Pages charged to the owner for this device.
    Pinned {
        /// Pages of [`PAGE_SIZE`](crate::host::PAGE_SIZE) bytes.
        pages: u64,
    },
    /// The address space of a group of queues.
    Group {
        /// The group.
        group: GroupIndex,
        /// Its address space.
        asid: Asid,
    },
    /// What the parent translates an address space with.
    Translation {
        /// The address space.
        asid: Asid,
        /// Addresses pass through: nothing was mapped yet (uapi-spec 6.1).
        passthrough: bool,
        /// The parent refused the table it was offered last.
        refused: bool,
    },
    /// The log of vhost, of a device that offers one.
    Log(LogState),
    /// One queue.
    Vring(VringState),
    /// What the parent saved: see [`Parent::save_state`](crate::parent::Parent::save_state).
    Parent {
        /// Its own encoding.
        bytes: Vec<u8>,
    },
    /// What two opens of one parent share: the beginning of a snapshot of a [`Handover`](crate::handover::Handover).
    Handover(HandoverState),
    /// One of the opens of a [`Handover`](crate::handover::Handover).
    Handle(HandleState),
    /// A table exists.
    Table {
        /// The table.
        table: TableId,
        /// The number of its next UPDATE: higher than that of every mapping in it.
        next_update: u64,
    },
    /// A table has the contents of another one, instead of its own.
    TableCopied {
        /// The table to copy.
        from: TableId,
        /// The table that is replaced.
        to: TableId,
    },
    /// A table does not exist.
    TableRemoved {
        /// The table.
        table: TableId,
    },
    /// A mapping, in place of one that begins at the same address.
    Mapping(MappingState),
    /// No mapping of a table begins in a range.
    Unmapped {
        /// The table.
        table: TableId,
        /// First addresses of what is not there.
        firsts: IovaRange,
    },
    /// All mappings of a table wait for a REMAP.
    Stale {
        /// The table.
        table: TableId,
    },
    /// A part of an UPDATE was removed by an INVALIDATE.
    Broken {
        /// The table.
        table: TableId,
        /// The number of the UPDATE.
        update: u64,
        /// What the UPDATE covered.
        range: IovaRange,
    },
    /// The whole configuration space, of a device that [moves](crate::device::moving): what a driver has read of it must
    /// be so where the device goes.
    Config {
        /// From its first byte on.
        bytes: Vec<u8>,
    },
}

/// What a device was when it was saved. The device that takes its place must be able to do as much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Virtio device id.
    pub device_id: u32,
    /// Virtqueues.
    pub queues: u16,
    /// Entries of the largest ring.
    pub queue_size_max: u16,
    /// Groups of queues.
    pub groups: u32,
    /// Address spaces.
    pub address_spaces: u32,
    /// Bytes of configuration space.
    pub config_size: u32,
    /// Features offered.
    pub features: Features,
    /// Backend features offered.
    pub backend_features: BackendFeatures,
    /// I/O virtual addresses that can be mapped.
    pub iova_range: IovaRange,
    /// How client memory is reached.
    pub address_mode: AddressMode,
}

impl Shape {
    pub(crate) const fn of(profile: &Profile, backend_features: BackendFeatures) -> Self {
        Self {
            device_id: profile.device_id,
            queues: profile.queues,
            queue_size_max: profile.queue_size_max,
            groups: profile.groups,
            address_spaces: profile.address_spaces,
            config_size: profile.config_size,
            features: profile.offered_features(),
            backend_features,
            iova_range: profile.iova_range,
            address_mode: profile.address_mode,
        }
    }
}

/// The log of vhost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogState {
    /// Where the bits are: address in the owner when it was set, bytes, and memory.
    pub base: Option<(u64, u64, MemoryRef)>,
    /// The event of the log, as the sink has named it.
    pub event: Option<u64>,
    /// `VHOST_F_LOG_ALL` is in force.
    pub all: bool,
}

/// One queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VringState {
    /// Its index.
    pub index: QueueIndex,
    /// Its group. Fixed in the device; saved to see whether it has changed.
    pub group: GroupIndex,
    /// Entries of the ring; 0 before the driver has set it.
    pub num: u16,
    /// Where the ring is.
    pub addr: Option<VringAddr>,
    /// Where the queue is in its ring, as far as it was stopped or set since the last reset. Not exact while it runs.
    pub state: Option<QueueState>,
    /// `VHOST_SET_VRING_BUSYLOOP_TIMEOUT`.
    pub busyloop_timeout: u32,
    /// The driver has enabled it.
    pub enabled: bool,
    /// It ran, or would run were the device not [quiesced](crate::device::Device::quiesce).
    pub running: bool,
    /// The ring it runs with, where another one was set since it was started. Not in version 1.
    pub started: Option<Ring>,
    /// The call event was installed since the last reset.
    pub call_installed: bool,
    /// The kick event, as the sink has named it.
    pub kick: Option<u64>,
    /// The call event.
    pub call: Option<u64>,
    /// The error event.
    pub err: Option<u64>,
}

/// What a queue is started with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// Entries.
    pub size: u16,
    /// Where it is.
    pub addr: VringAddr,
    /// Features in force.
    pub features: Features,
}

/// Names a translation table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TableId {
    /// Whose it is.
    pub role: TableRole,
    /// The address space it translates.
    pub asid: Asid,
}

/// What a translation table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TableRole {
    /// What the interface has mapped.
    Interface,
    /// What a failing BATCH_END goes back to, from the first REMAP of the batch on.
    Rollback,
    /// What the parent translates with, while that is not what the interface has mapped: inside a batch, or after a
    /// reset that dropped the translation.
    Parent,
    /// What the parent of a [`Handover`](crate::handover::Handover) translates with.
    Installed,
    /// What one [`Handle`](crate::handover::Handle) has asked for.
    Handle(u64),
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappingState {
    /// The table it is in.
    pub table: TableId,
    /// I/O virtual addresses.
    pub range: IovaRange,
    /// Where it was in the owner's address space when it was mapped or last remapped.
    pub uaddr: u64,
    /// What the device may do.
    pub perm: Perm,
    /// It waits for a REMAP.
    pub stale: bool,
    /// The memory.
    pub memory: MemoryRef,
    /// The number of the UPDATE that made it.
    pub update: u64,
    /// What that UPDATE covered.
    pub update_range: IovaRange,
    /// A part of that UPDATE was removed.
    pub broken: bool,
}

/// Bytes that the driver has written into configuration space, each with its place.
pub type ConfigBytes = Vec<(u32, u8)>;

/// What two opens of one parent share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandoverState {
    /// What the parent was.
    pub shape: Shape,
    /// The handle whose queues run.
    pub active: Option<u64>,
    /// Somebody's mappings are not with the parent yet.
    pub deferred: bool,
    /// The next handle gets this number: higher than that of every handle.
    pub next_handle: u64,
    /// What the driver has written since the device was reset.
    pub written: ConfigBytes,
    /// What it had written before a reset by the program that is replaced.
    pub written_before: ConfigBytes,
    /// What the parent saved.
    pub parent: Vec<u8>,
}

/// One of the opens of a parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HandleState {
    /// Its number.
    pub id: u64,
    /// Features it has asked for.
    pub features: Option<Features>,
    /// Its owner.
    pub owner: Option<u64>,
    /// Another handle has claimed the parent since.
    pub superseded: bool,
    /// What its driver has written and the parent has not seen.
    pub written: ConfigBytes,
}
