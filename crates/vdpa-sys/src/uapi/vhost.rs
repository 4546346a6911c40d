//! `uapi/linux/vhost.h` and `uapi/linux/vhost_types.h`, Linux 7.3, with the live-update additions.
//!
//! Structures are in the byte order of the machine. Where a flexible array ends a structure of the kernel, only
//! the header is declared.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::ioctl::{io, ior, iow, iowr};

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident = $value:expr;)*) => {
        $($(#[$doc])* pub const $name: u32 = $value;)*

        /// Every request of this header by name, for tables and logs.
        pub const REQUESTS: &[(&str, u32)] = &[$((stringify!($name), $name)),*];
    };
}

/// The type byte of all vhost requests.
pub const VHOST_VIRTIO: u8 = 0xaf;
/// As a descriptor: unbind.
pub const VHOST_FILE_UNBIND: i32 = -1;
/// First word of a version-1 IOTLB message.
pub const VHOST_IOTLB_MSG: u32 = 1;
/// First word of a version-2 IOTLB message.
pub const VHOST_IOTLB_MSG_V2: u32 = 2;
/// Bit of [`VringAddr::flags`]: log writes to the used ring.
pub const VHOST_VRING_F_LOG: u32 = 0;

numbers! {
    /// The kernel writes: `u64`.
    VHOST_GET_FEATURES = ior::<u64>(VHOST_VIRTIO, 0x00);
    /// The kernel reads: `u64`.
    VHOST_SET_FEATURES = iow::<u64>(VHOST_VIRTIO, 0x00);
    /// No argument.
    VHOST_SET_OWNER = io(VHOST_VIRTIO, 0x01);
    /// No argument.
    VHOST_RESET_OWNER = io(VHOST_VIRTIO, 0x02);
    /// The kernel reads: [`MemoryHeader`].
    VHOST_SET_MEM_TABLE = iow::<MemoryHeader>(VHOST_VIRTIO, 0x03);
    /// The kernel reads: `u64`.
    VHOST_SET_LOG_BASE = iow::<u64>(VHOST_VIRTIO, 0x04);
    /// The kernel reads: `i32`.
    VHOST_SET_LOG_FD = iow::<i32>(VHOST_VIRTIO, 0x07);
    /// The kernel writes: [`WorkerState`].
    VHOST_NEW_WORKER = ior::<WorkerState>(VHOST_VIRTIO, 0x08);
    /// The kernel reads: [`WorkerState`].
    VHOST_FREE_WORKER = iow::<WorkerState>(VHOST_VIRTIO, 0x09);
    /// The kernel reads: [`VringState`].
    VHOST_SET_VRING_NUM = iow::<VringState>(VHOST_VIRTIO, 0x10);
    /// The kernel reads: [`VringAddr`].
    VHOST_SET_VRING_ADDR = iow::<VringAddr>(VHOST_VIRTIO, 0x11);
    /// The kernel reads: [`VringState`].
    VHOST_SET_VRING_BASE = iow::<VringState>(VHOST_VIRTIO, 0x12);
    /// The kernel reads, then writes: [`VringState`].
    VHOST_GET_VRING_BASE = iowr::<VringState>(VHOST_VIRTIO, 0x12);
    /// The kernel reads: [`VringState`].
    VHOST_SET_VRING_ENDIAN = iow::<VringState>(VHOST_VIRTIO, 0x13);
    /// The kernel reads: [`VringState`].
    VHOST_GET_VRING_ENDIAN = iow::<VringState>(VHOST_VIRTIO, 0x14);
    /// The kernel reads: [`VringWorker`].
    VHOST_ATTACH_VRING_WORKER = iow::<VringWorker>(VHOST_VIRTIO, 0x15);
    /// The kernel reads, then writes: [`VringWorker`].
    VHOST_GET_VRING_WORKER = iowr::<VringWorker>(VHOST_VIRTIO, 0x16);
    /// The kernel reads: [`VringFile`].
    VHOST_SET_VRING_KICK = iow::<VringFile>(VHOST_VIRTIO, 0x20);
    /// The kernel reads: [`VringFile`].
    VHOST_SET_VRING_CALL = iow::<VringFile>(VHOST_VIRTIO, 0x21);
    /// The kernel reads: [`VringFile`].
    VHOST_SET_VRING_ERR = iow::<VringFile>(VHOST_VIRTIO, 0x22);
    /// The kernel reads: [`VringState`].
    VHOST_SET_VRING_BUSYLOOP_TIMEOUT = iow::<VringState>(VHOST_VIRTIO, 0x23);
    /// The kernel reads: [`VringState`].
    VHOST_GET_VRING_BUSYLOOP_TIMEOUT = iow::<VringState>(VHOST_VIRTIO, 0x24);
    /// The kernel reads: `u64`.
    VHOST_SET_BACKEND_FEATURES = iow::<u64>(VHOST_VIRTIO, 0x25);
    /// The kernel writes: `u64`.
    VHOST_GET_BACKEND_FEATURES = ior::<u64>(VHOST_VIRTIO, 0x26);
    /// No argument. Not in Linux 7.3: the number of the posted live-update series (uapi-spec 8.2).
    VHOST_NEW_OWNER = io(VHOST_VIRTIO, 0x27);
    /// The kernel reads: [`VringFile`].
    VHOST_NET_SET_BACKEND = iow::<VringFile>(VHOST_VIRTIO, 0x30);
    /// The kernel writes: `u32`.
    VHOST_VDPA_GET_DEVICE_ID = ior::<u32>(VHOST_VIRTIO, 0x70);
    /// The kernel writes: `u8`.
    VHOST_VDPA_GET_STATUS = ior::<u8>(VHOST_VIRTIO, 0x71);
    /// The kernel reads: `u8`.
    VHOST_VDPA_SET_STATUS = iow::<u8>(VHOST_VIRTIO, 0x72);
    /// The kernel writes: [`ConfigHeader`].
    VHOST_VDPA_GET_CONFIG = ior::<ConfigHeader>(VHOST_VIRTIO, 0x73);
    /// The kernel reads: [`ConfigHeader`].
    VHOST_VDPA_SET_CONFIG = iow::<ConfigHeader>(VHOST_VIRTIO, 0x74);
    /// The kernel reads: [`VringState`].
    VHOST_VDPA_SET_VRING_ENABLE = iow::<VringState>(VHOST_VIRTIO, 0x75);
    /// The kernel writes: `u16`.
    VHOST_VDPA_GET_VRING_NUM = ior::<u16>(VHOST_VIRTIO, 0x76);
    /// The kernel reads: `i32`.
    VHOST_VDPA_SET_CONFIG_CALL = iow::<i32>(VHOST_VIRTIO, 0x77);
    /// The kernel writes: [`IovaRange`].
    VHOST_VDPA_GET_IOVA_RANGE = ior::<IovaRange>(VHOST_VIRTIO, 0x78);
    /// The kernel writes: `u32`.
    VHOST_VDPA_GET_CONFIG_SIZE = ior::<u32>(VHOST_VIRTIO, 0x79);
    /// The kernel writes: `u32`.
    VHOST_VDPA_GET_AS_NUM = ior::<u32>(VHOST_VIRTIO, 0x7a);
    /// The kernel reads, then writes: [`VringState`].
    VHOST_VDPA_GET_VRING_GROUP = iowr::<VringState>(VHOST_VIRTIO, 0x7b);
    /// The kernel reads: [`VringState`].
    VHOST_VDPA_SET_GROUP_ASID = iow::<VringState>(VHOST_VIRTIO, 0x7c);
    /// No argument.
    VHOST_VDPA_SUSPEND = io(VHOST_VIRTIO, 0x7d);
    /// No argument.
    VHOST_VDPA_RESUME = io(VHOST_VIRTIO, 0x7e);
    /// The kernel reads, then writes: [`VringState`].
    VHOST_VDPA_GET_VRING_DESC_GROUP = iowr::<VringState>(VHOST_VIRTIO, 0x7f);
    /// The kernel writes: `u32`.
    VHOST_VDPA_GET_VQS_COUNT = ior::<u32>(VHOST_VIRTIO, 0x80);
    /// The kernel writes: `u32`.
    VHOST_VDPA_GET_GROUP_NUM = ior::<u32>(VHOST_VIRTIO, 0x81);
    /// The kernel reads, then writes: [`VringState`].
    VHOST_VDPA_GET_VRING_SIZE = iowr::<VringState>(VHOST_VIRTIO, 0x82);
    /// The kernel writes: [`FeaturesArrayHeader`].
    VHOST_GET_FEATURES_ARRAY = ior::<FeaturesArrayHeader>(VHOST_VIRTIO, 0x83);
    /// The kernel reads: [`FeaturesArrayHeader`].
    VHOST_SET_FEATURES_ARRAY = iow::<FeaturesArrayHeader>(VHOST_VIRTIO, 0x83);
    /// The kernel reads: `u8`.
    VHOST_SET_FORK_FROM_OWNER = iow::<u8>(VHOST_VIRTIO, 0x84);
    /// The kernel writes: `u8`.
    VHOST_GET_FORK_FROM_OWNER = ior::<u8>(VHOST_VIRTIO, 0x85);
}

/// The name of a request of this header.
#[must_use]
pub fn request_name(opcode: u32) -> Option<&'static str> {
    REQUESTS.iter().find(|(_, number)| *number == opcode).map(|(name, _)| *name)
}

/// `struct vhost_vring_state`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VringState {
    /// Index of the virtqueue (of the group for `SET_GROUP_ASID`).
    pub index: u32,
    /// What the request sets or gets.
    pub num: u32,
}
layout!(VringState, 8, index @ 0, num @ 4);

/// `struct vhost_vring_file`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VringFile {
    /// Index of the virtqueue.
    pub index: u32,
    /// Descriptor in the caller's table, or [`VHOST_FILE_UNBIND`].
    pub fd: i32,
}
layout!(VringFile, 8, index @ 0, fd @ 4);

/// `struct vhost_vring_addr`. Note the order: used before avail.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VringAddr {
    /// Index of the virtqueue.
    pub index: u32,
    /// `VHOST_VRING_F_*`.
    pub flags: u32,
    /// Descriptor area; an I/O virtual address for vhost-vdpa, as are the others.
    pub desc_user_addr: u64,
    /// Device area.
    pub used_user_addr: u64,
    /// Driver area.
    pub avail_user_addr: u64,
    /// Log.
    pub log_guest_addr: u64,
}
layout!(VringAddr, 40, index @ 0, flags @ 4, desc_user_addr @ 8, used_user_addr @ 16, avail_user_addr @ 24, log_guest_addr @ 32);

/// `struct vhost_worker_state`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct WorkerState {
    /// Worker.
    pub worker_id: u32,
}
layout!(WorkerState, 4, worker_id @ 0);

/// `struct vhost_vring_worker`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VringWorker {
    /// Index of the virtqueue.
    pub index: u32,
    /// Worker.
    pub worker_id: u32,
}
layout!(VringWorker, 8, index @ 0, worker_id @ 4);

/// `struct vhost_memory` without its regions.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MemoryHeader {
    /// Number of [`MemoryRegion`]s that follow.
    pub nregions: u32,
    /// Zero.
    pub padding: u32,
}
layout!(MemoryHeader, 8, nregions @ 0, padding @ 4);

/// `struct vhost_memory_region`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MemoryRegion {
    /// First guest physical address.
    pub guest_phys_addr: u64,
    /// Bytes.
    pub memory_size: u64,
    /// Address in the caller.
    pub userspace_addr: u64,
    /// Zero.
    pub flags_padding: u64,
}
layout!(MemoryRegion, 32, guest_phys_addr @ 0, memory_size @ 8, userspace_addr @ 16, flags_padding @ 24);

/// `struct vhost_features_array` without its words.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FeaturesArrayHeader {
    /// Number of 64-bit words that follow.
    pub count: u64,
}
layout!(FeaturesArrayHeader, 8, count @ 0);

/// `struct vhost_vdpa_config` without its bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ConfigHeader {
    /// Offset in configuration space.
    pub off: u32,
    /// Bytes that follow.
    pub len: u32,
}
layout!(ConfigHeader, 8, off @ 0, len @ 4);

/// `struct vhost_vdpa_iova_range`, both ends included.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IovaRange {
    /// First usable address.
    pub first: u64,
    /// Last usable address.
    pub last: u64,
}
layout!(IovaRange, 16, first @ 0, last @ 8);

/// `struct vhost_iotlb_msg`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IotlbMsg {
    /// First I/O virtual address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the caller.
    pub uaddr: u64,
    /// `VHOST_ACCESS_*`.
    pub perm: u8,
    /// `VHOST_IOTLB_*`; `type` in the header.
    pub kind: u8,
    /// Ignored.
    pub padding: [u8; 6],
}
layout!(IotlbMsg, 32, iova @ 0, size @ 8, uaddr @ 16, perm @ 24, kind @ 25, padding @ 26);

/// `struct vhost_msg`: a version-1 message, 72 bytes on 64-bit machines.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Msg {
    /// [`VHOST_IOTLB_MSG`]; `type` in the header.
    pub kind: i32,
    /// A hole that clients leave uninitialised.
    pub hole: u32,
    /// The message.
    pub iotlb: IotlbMsg,
    /// The rest of the union.
    pub padding: [u8; 32],
}
layout!(Msg, 72, kind @ 0, hole @ 4, iotlb @ 8, padding @ 40);

/// `struct vhost_msg_v2`: a version-2 message.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MsgV2 {
    /// [`VHOST_IOTLB_MSG_V2`]; `type` in the header.
    pub kind: u32,
    /// Address space, looked at when `IOTLB_ASID` is acknowledged.
    pub asid: u32,
    /// The message.
    pub iotlb: IotlbMsg,
    /// The rest of the union.
    pub padding: [u8; 32],
}
layout!(MsgV2, 72, kind @ 0, asid @ 4, iotlb @ 8, padding @ 40);
