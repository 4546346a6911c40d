//! Requests whose argument is a vring state.

use vdpa_core::Errno;
use vdpa_core::device::Device;
use vdpa_core::faults::{self, Fault};
use vdpa_core::types::{Asid, GroupIndex, QueueIndex, Result};
use vdpa_sys::process::ProcessCaller;
use vdpa_sys::uapi::vhost as uapi;
use zerocopy::IntoBytes;

use super::{AnyParent, done, reply, wire};
use crate::front::fuse::{IoctlCall, IoctlReply};

/// Vring requests whose argument is a `vhost_vring_state`; any other is `ENOTTY`.
pub(super) fn state(
    device: &mut Device<AnyParent>,
    call: &IoctlCall<'_>,
    caller: &ProcessCaller<'_>,
    index: QueueIndex,
) -> Result<IoctlReply> {
    let argument = || wire::argument::<uapi::VringState>(call.input);
    let answer = |num| reply(&uapi::VringState { index: u32::from(index.0), num });
    match call.cmd {
        uapi::VHOST_SET_VRING_NUM => done(device.set_vring_num(caller, index, argument()?.num)),
        uapi::VHOST_SET_VRING_BASE => done(device.set_vring_base(caller, index, argument()?.num)),
        uapi::VHOST_GET_VRING_BASE => answer(device.vring_base(caller, index)?),
        uapi::VHOST_VDPA_SET_VRING_ENABLE => {
            done(device.set_vring_enable(caller, index, argument()?.num != 0))
        }
        uapi::VHOST_SET_VRING_BUSYLOOP_TIMEOUT => {
            done(device.set_busyloop_timeout(caller, index, argument()?.num))
        }
        // The request is _IOW, so the kernel copies nothing out: the reply is written to the caller's memory.
        uapi::VHOST_GET_VRING_BUSYLOOP_TIMEOUT => {
            let num = device.busyloop_timeout(caller, index)?;
            let state = uapi::VringState { index: u32::from(index.0), num };
            done(caller.caller.write_mem(call.arg, state.as_bytes()))
        }
        uapi::VHOST_VDPA_GET_VRING_GROUP => answer(device.vring_group(caller, index)?.0),
        uapi::VHOST_VDPA_GET_VRING_DESC_GROUP => answer(device.vring_desc_group(caller, index)?.0),
        uapi::VHOST_VDPA_GET_VRING_SIZE => answer(device.vring_size(caller, index)?),
        uapi::VHOST_VDPA_SET_GROUP_ASID => {
            let state = argument()?;
            done(device.set_group_asid(caller, GroupIndex(state.index), Asid(state.num)))
        }
        _ if faults::is(Fault::UnknownRequestErrno) => Err(Errno::INVAL),
        _ => Err(Errno::NOTTY),
    }
}
