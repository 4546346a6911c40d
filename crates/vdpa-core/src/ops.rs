//! [`VdpaOps`]: the requests that a client makes of a device.

use crate::dirty::{DirtyInfo, DirtyRange};
use crate::errno::Errno;
use crate::features::{BackendFeatures, Features, Status};
use crate::types::{Asid, GroupIndex, IotlbMsg, IovaRange, Perm, QueueIndex, Result, VringAddr, iotlb_type};

/// The vhost-vdpa interface, one method per request.
///
/// Implemented by a device file (of this project or of the kernel) and by a device in the same process. Each error is the
/// errno of the kernel's vhost-vdpa; `docs/uapi.md` lists the requests. "owner" marks requests that only the owner may make
/// (`EPERM` otherwise); any process with the device open may make all others. Requests of one device never run in parallel,
/// so each of them may block until another one ends.
pub trait VdpaOps {
    /// The type of kick, call and config events (an eventfd for a device file).
    type Event;

    /// `VHOST_VDPA_GET_DEVICE_ID`: the virtio device id.
    ///
    /// # Errors
    /// Only those of the transport.
    fn device_id(&self) -> Result<u32>;

    /// `VHOST_VDPA_GET_STATUS`.
    ///
    /// # Errors
    /// Only those of the transport.
    fn status(&self) -> Result<Status>;

    /// `VHOST_VDPA_SET_STATUS`; 0 resets. A device may refuse a bit by leaving it clear, so read the status back.
    ///
    /// # Errors
    /// `EINVAL` when a value other than 0 clears a bit; for 0 an error of the reset.
    fn set_status(&self, status: Status) -> Result<()>;

    /// `VHOST_GET_FEATURES`: the features that the device offers.
    ///
    /// # Errors
    /// Only those of the transport.
    fn features(&self) -> Result<Features>;

    /// `VHOST_SET_FEATURES`.
    ///
    /// # Errors
    /// `EBUSY` after FEATURES_OK; `EINVAL` when the device refuses the word.
    fn set_features(&self, features: Features) -> Result<()>;

    /// `VHOST_GET_BACKEND_FEATURES`.
    ///
    /// # Errors
    /// Only those of the transport.
    fn backend_features(&self) -> Result<BackendFeatures>;

    /// `VHOST_SET_BACKEND_FEATURES`: replaces the acknowledged word, in any state.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for a bit that is not offered; `EINVAL` for DESC_ASID without IOTLB_ASID.
    fn set_backend_features(&self, features: BackendFeatures) -> Result<()>;

    /// `VHOST_VDPA_GET_VQS_COUNT`.
    ///
    /// # Errors
    /// Only those of the transport.
    fn vqs_count(&self) -> Result<u32>;

    /// `VHOST_VDPA_GET_GROUP_NUM`.
    ///
    /// # Errors
    /// Only those of the transport.
    fn group_num(&self) -> Result<u32>;

    /// `VHOST_VDPA_GET_AS_NUM`.
    ///
    /// # Errors
    /// Only those of the transport.
    fn as_num(&self) -> Result<u32>;

    /// `VHOST_VDPA_GET_IOVA_RANGE`.
    ///
    /// # Errors
    /// Only those of the transport.
    fn iova_range(&self) -> Result<IovaRange>;

    /// `VHOST_VDPA_GET_CONFIG_SIZE`, in bytes.
    ///
    /// # Errors
    /// Only those of the transport.
    fn config_size(&self) -> Result<u32>;

    /// `VHOST_VDPA_GET_CONFIG`: fills `out` from `offset`.
    ///
    /// # Errors
    /// `EINVAL` for an empty or out-of-range request.
    fn config(&self, offset: u32, out: &mut [u8]) -> Result<()>;

    /// `VHOST_VDPA_SET_CONFIG`. A device may ignore it.
    ///
    /// # Errors
    /// `EINVAL` for an empty or out-of-range request.
    fn set_config(&self, offset: u32, data: &[u8]) -> Result<()>;

    /// `VHOST_VDPA_SET_CONFIG_CALL`; `None` unbinds.
    ///
    /// # Errors
    /// `EBADF`, or `EINVAL` when it is no eventfd.
    fn set_config_call(&self, event: Option<&Self::Event>) -> Result<()>;

    /// `VHOST_VDPA_GET_VRING_NUM`: the largest ring.
    ///
    /// # Errors
    /// Only those of the transport.
    fn vring_num(&self) -> Result<u16>;

    /// `VHOST_SET_OWNER`: the caller becomes the owner.
    ///
    /// # Errors
    /// `EBUSY` when there is an owner, even if it is the caller.
    fn set_owner(&self) -> Result<()>;

    /// `VHOST_NEW_OWNER`: the caller takes over from the present owner; mappings and pins stay.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the device does not offer it; `EINVAL` without an owner; `EBUSY` when the caller is the
    /// owner (or, in strict mode, while the device runs); `ENOMEM` over the caller's `RLIMIT_MEMLOCK`.
    fn new_owner(&self) -> Result<()>;

    /// `VHOST_RESET_OWNER` (owner), without an argument: removes the owner and all mappings; the device stays open.
    ///
    /// # Errors
    /// `EPERM`; `EFAULT` where it is not supported; no kernel's vhost-vdpa supports it.
    fn reset_owner(&self) -> Result<()>;

    /// `VHOST_SET_VRING_NUM` (owner): entries of the ring.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS` for the index; `EINVAL` unless a power of two up to the maximum.
    fn set_vring_num(&self, index: QueueIndex, num: u32) -> Result<()>;

    /// `VHOST_SET_VRING_ADDR` (owner).
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EOPNOTSUPP` for unknown flags; `EINVAL` for alignment, or while running.
    fn set_vring_addr(&self, index: QueueIndex, addr: &VringAddr) -> Result<()>;

    /// `VHOST_SET_VRING_BASE` (owner): see [`QueueState`](crate::vq::QueueState) for the encoding.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EINVAL` for an index over 16 bits, or while running.
    fn set_vring_base(&self, index: QueueIndex, num: u32) -> Result<()>;

    /// `VHOST_GET_VRING_BASE` (owner). Accurate while the queue is stopped or the device is suspended.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`.
    fn vring_base(&self, index: QueueIndex) -> Result<u32>;

    /// `VHOST_VDPA_SET_VRING_ENABLE` (owner).
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`.
    fn set_vring_enable(&self, index: QueueIndex, enable: bool) -> Result<()>;

    /// `VHOST_SET_VRING_KICK` (owner); `None` unbinds.
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EBADF`; `EINVAL` when it is no eventfd.
    fn set_vring_kick(&self, index: QueueIndex, event: Option<&Self::Event>) -> Result<()>;

    /// `VHOST_SET_VRING_CALL` (owner); `None` unbinds.
    ///
    /// # Errors
    /// As [`set_vring_kick`](Self::set_vring_kick).
    fn set_vring_call(&self, index: QueueIndex, event: Option<&Self::Event>) -> Result<()>;

    /// `VHOST_SET_VRING_ERR` (owner); stored, never signalled.
    ///
    /// # Errors
    /// As [`set_vring_kick`](Self::set_vring_kick).
    fn set_vring_err(&self, index: QueueIndex, event: Option<&Self::Event>) -> Result<()>;

    /// `VHOST_VDPA_GET_VRING_GROUP` (owner).
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EOPNOTSUPP`; `EIO` when the device names a group it does not have.
    fn vring_group(&self, index: QueueIndex) -> Result<GroupIndex>;

    /// `VHOST_VDPA_GET_VRING_DESC_GROUP` (owner).
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EOPNOTSUPP` from a device whose descriptor areas are in the groups of their queues, which is this default.
    fn vring_desc_group(&self, _index: QueueIndex) -> Result<GroupIndex> {
        Err(Errno::OPNOTSUPP)
    }

    /// `VHOST_VDPA_SET_GROUP_ASID` (owner).
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS` when the group is not below the number of *queues*; `EINVAL` for group or asid;
    /// `EBUSY` after DRIVER_OK.
    fn set_group_asid(&self, group: GroupIndex, asid: Asid) -> Result<()>;

    /// `VHOST_VDPA_GET_VRING_SIZE` (owner).
    ///
    /// # Errors
    /// `EPERM`; `ENOBUFS`; `EOPNOTSUPP`.
    fn vring_size(&self, index: QueueIndex) -> Result<u32>;

    /// `VHOST_VDPA_SUSPEND`. When it returns, no request is in flight and vring bases are stable. No effect before DRIVER_OK.
    ///
    /// # Errors
    /// `EOPNOTSUPP`; `EIO` when a queue cannot be stopped.
    fn suspend(&self) -> Result<()>;

    /// `VHOST_VDPA_RESUME`: continues where SUSPEND stopped. Kicks that came meanwhile are served.
    ///
    /// # Errors
    /// `EOPNOTSUPP`.
    fn resume(&self) -> Result<()>;

    /// Writes one IOTLB message (owner), in the message version that the acknowledged backend features select.
    ///
    /// # Errors
    /// `EINVAL` for an UPDATE of size 0; `EFAULT` for every other refusal.
    fn iotlb(&self, asid: Asid, msg: &IotlbMsg) -> Result<()>;

    /// `VDPA_DIRTY_INFO`: what can be tracked of the pages that the device writes, and whether something is. Offered with
    /// [`DIRTY_LOG`](BackendFeatures::DIRTY_LOG); this default is of a device that does not.
    ///
    /// # Errors
    /// `ENOTTY` from a device without it.
    fn dirty_info(&self) -> Result<DirtyInfo> {
        Err(Errno::NOTTY)
    }

    /// `VDPA_DIRTY_START` (owner): begins to track, with no page dirty. Blocks until requests that were begun before are done.
    ///
    /// # Errors
    /// `EPERM`; those of [`DirtyTracking::start`](crate::dirty::DirtyTracking::start); `ENOTTY` from a device without it.
    fn dirty_start(&self, _page_size: u64, _ranges: &[DirtyRange]) -> Result<()> {
        Err(Errno::NOTTY)
    }

    /// `VDPA_DIRTY_STOP` (owner): ends the tracking and forgets what was found.
    ///
    /// # Errors
    /// `EPERM`; `EIO`; `ENOTTY` from a device without it.
    fn dirty_stop(&self) -> Result<()> {
        Err(Errno::NOTTY)
    }

    /// `VDPA_DIRTY_GET` (owner): sets the bits of the pages in `of` that are dirty: bit `n % 64` of word `n / 64` for page `n`. They
    /// are not dirty any more, unless `keep`. `page_size` is that of the start.
    ///
    /// # Errors
    /// `EPERM`; `EINVAL` for another page size, a range that is not tracked or not whole pages, or a bitmap that is too small;
    /// `ENOTTY` from a device without it.
    fn dirty_get(&self, _of: DirtyRange, _page_size: u64, _keep: bool, _bitmap: &mut [u64]) -> Result<()> {
        Err(Errno::NOTTY)
    }

    /// `VDPA_DIRTY_UNMAP` (owner): removes all mappings in `of`, then does as [`dirty_get`](Self::dirty_get) for its pages: the device
    /// writes none of them after that. Returns how many bytes were mapped.
    ///
    /// # Errors
    /// As [`dirty_get`](Self::dirty_get), and `EINVAL` for a range that has a part of a mapping; `EBUSY` inside a batch.
    fn dirty_unmap(&self, _of: DirtyRange, _page_size: u64, _bitmap: &mut [u64]) -> Result<u64> {
        Err(Errno::NOTTY)
    }

    /// `VDPA_STATE_SAVE` (owner): the state of a device whose queues rest (reset, not started, or suspended), for
    /// [`state_load`](Self::state_load) on another one. Offered with [`DEVICE_STATE`](BackendFeatures::DEVICE_STATE). Changes
    /// nothing.
    ///
    /// # Errors
    /// `EPERM`; `EBUSY` while a queue runs; `EIO` when what is behind the device was taken away; `ENOTTY` from a device without it.
    fn state_save(&self) -> Result<Vec<u8>> {
        Err(Errno::NOTTY)
    }

    /// `VDPA_STATE_LOAD` (owner): makes a device that was reset what another one was when its state was saved, up to FEATURES_OK:
    /// with features, rings and what a driver has set. Mappings stay as they are; events are set, and DRIVER_OK, by the client.
    ///
    /// # Errors
    /// `EPERM`; `EBUSY` unless the device is reset; `EINVAL` for a state that is none, or that this device cannot take: it is
    /// reset then; `E2BIG` for one that is longer than any; `ENOTTY` from a device without it.
    fn state_load(&self, _state: &[u8]) -> Result<()> {
        Err(Errno::NOTTY)
    }

    /// `UPDATE`: maps `size` bytes from `iova` to the caller's memory at `uaddr`.
    ///
    /// # Errors
    /// As [`iotlb`](Self::iotlb).
    fn dma_map(&self, asid: Asid, iova: u64, size: u64, uaddr: u64, perm: Perm) -> Result<()> {
        self.iotlb(asid, &IotlbMsg { iova, size, uaddr, perm, kind: iotlb_type::UPDATE })
    }

    /// `INVALIDATE`: removes every entry that overlaps `size` bytes from `iova`, also its parts outside.
    ///
    /// # Errors
    /// As [`iotlb`](Self::iotlb).
    fn dma_unmap(&self, asid: Asid, iova: u64, size: u64) -> Result<()> {
        self.iotlb(asid, &IotlbMsg { iova, size, kind: iotlb_type::INVALIDATE, ..IotlbMsg::default() })
    }

    /// `REMAP`: sets the address that the mapping of exactly this range has in the new owner.
    ///
    /// # Errors
    /// As [`iotlb`](Self::iotlb).
    fn dma_remap(&self, asid: Asid, iova: u64, size: u64, uaddr: u64) -> Result<()> {
        self.iotlb(asid, &IotlbMsg { iova, size, uaddr, perm: Perm::NONE, kind: iotlb_type::REMAP })
    }

    /// `BATCH_BEGIN`.
    ///
    /// # Errors
    /// As [`iotlb`](Self::iotlb).
    fn batch_begin(&self, asid: Asid) -> Result<()> {
        self.iotlb(asid, &IotlbMsg { kind: iotlb_type::BATCH_BEGIN, ..IotlbMsg::default() })
    }

    /// `BATCH_END`.
    ///
    /// # Errors
    /// As [`iotlb`](Self::iotlb).
    fn batch_end(&self, asid: Asid) -> Result<()> {
        self.iotlb(asid, &IotlbMsg { kind: iotlb_type::BATCH_END, ..IotlbMsg::default() })
    }
}

/// Reads the whole configuration space.
///
/// # Errors
/// Those of [`VdpaOps::config`].
pub fn read_all_config<D: VdpaOps + ?Sized>(device: &D) -> Result<Vec<u8>, Errno> {
    let size = usize::try_from(device.config_size()?).map_err(|_| Errno::INVAL)?;
    let mut config = vec![0; size];
    if size > 0 {
        device.config(0, &mut config)?;
    }
    Ok(config)
}
