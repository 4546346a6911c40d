//! The requests of the owner, for the cases about who may make them and about the order of their checks.

use vdpa_core::Errno;
use vdpa_core::types::VringAddr;

use crate::device::{Device, pair, vring_file};
use crate::request::Request;

/// All of them. Those of one queue come first.
pub(super) const ALL: &[Request] = &[
    Request::SET_VRING_NUM,
    Request::SET_VRING_ADDR,
    Request::SET_VRING_BASE,
    Request::GET_VRING_BASE,
    Request::SET_VRING_KICK,
    Request::SET_VRING_CALL,
    Request::SET_VRING_ERR,
    Request::SET_VRING_BUSYLOOP_TIMEOUT,
    Request::SET_VRING_ENABLE,
    Request::GET_VRING_GROUP,
    Request::GET_VRING_DESC_GROUP,
    Request::GET_VRING_SIZE,
    Request::SET_GROUP_ASID,
    Request::SET_MEM_TABLE,
    Request::IOTLB_UPDATE,
    Request::IOTLB_BATCH_BEGIN,
];

/// Those whose argument begins with the index of a queue, or is checked as one.
pub(super) const VRING: &[Request] = ALL.split_at(13).0;

/// Makes one of [`VRING`] for queue `index`, with a sound argument or one of which everything else is wrong.
pub(super) fn vring(device: &Device, request: Request, index: u32, sound: bool) -> Result<(), Errno> {
    match request {
        Request::SET_VRING_ADDR if sound => device.set_addr(index, &VringAddr::default()),
        Request::SET_VRING_ADDR => {
            device.set_addr(index, &VringAddr { flags: 2, used: 1, ..VringAddr::default() })
        }
        Request::SET_VRING_KICK | Request::SET_VRING_CALL | Request::SET_VRING_ERR => {
            device.set(request, &vring_file(index, if sound { -1 } else { 999_999 }))
        }
        _ if sound => device.set(request, &pair(index, 0)),
        // No size, and no base or address space that there is.
        Request::SET_VRING_NUM => device.set_vring(request, index, 0),
        _ => device.set_vring(request, index, u32::MAX),
    }
}
