//! The requests that only the owner may make, for the cases that check this and the order of checks.

use vdpa_core::Errno;
use vdpa_core::types::VringAddr;

use crate::device::{Device, pair, vring_file};
use crate::request::Request;

/// All requests of the owner. Those of one queue come first.
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

/// The requests whose argument begins with a queue index, or with a number that is checked as one.
pub(super) const VRING: &[Request] = ALL.split_at(13).0;

/// Makes a request of [`VRING`] for queue `index`. If `valid`, the rest of the argument is valid, otherwise all of it is
/// wrong.
pub(super) fn vring(device: &Device, request: Request, index: u32, valid: bool) -> Result<(), Errno> {
    match request {
        Request::SET_VRING_ADDR if valid => device.set_addr(index, &VringAddr::default()),
        Request::SET_VRING_ADDR => {
            device.set_addr(index, &VringAddr { flags: 2, used: 1, ..VringAddr::default() })
        }
        Request::SET_VRING_KICK | Request::SET_VRING_CALL | Request::SET_VRING_ERR => {
            device.set(request, &vring_file(index, if valid { -1 } else { 999_999 }))
        }
        _ if valid => device.set(request, &pair(index, 0)),
        // 0 is no valid size, and u32::MAX is no valid base or address space.
        Request::SET_VRING_NUM => device.set_vring(request, index, 0),
        _ => device.set_vring(request, index, u32::MAX),
    }
}
