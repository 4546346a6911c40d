//! The requests of a device that moves: `VDPA_STATE_SAVE` and `VDPA_STATE_LOAD`.

use vdpa_core::Errno;
use vdpa_core::device::Device;
use vdpa_core::device::moving::{MoveError, STATE_MAX};
use vdpa_core::types::Result;
use vdpa_sys::process::ProcessCaller;
use vdpa_sys::uapi::state::{DeviceState, Request};
use zerocopy::IntoBytes;

use super::dirty::argument;
use super::{AnyParent, done};
use crate::front::fuse::{IoctlCall, IoctlReply};

/// Which request an ioctl is, for a device that can move.
pub(super) fn request(device: &Device<AnyParent>, request: Option<Request>) -> Option<Request> {
    request.filter(|_| device.profile().moves)
}

/// Both requests, for the owner. `name` is the device's, for the log, which says why: a client gets an errno.
pub(super) fn owned(
    device: &mut Device<AnyParent>,
    call: &IoctlCall<'_>,
    caller: &ProcessCaller<'_>,
    (name, request): (&str, Request),
) -> Result<IoctlReply> {
    let given: DeviceState = argument(call, caller.caller)?;
    let refused = |error: MoveError| {
        tracing::warn!(device = %name, tid = call.tid, request = request.name(), "refused: {error}");
        error.errno()
    };
    match request {
        Request::Save => {
            let state = device.state_save(caller).map_err(refused)?;
            let size = state.len() as u64;
            let at = std::mem::offset_of!(DeviceState, size) as u64;
            let at = call.arg.checked_add(at).ok_or(Errno::FAULT)?;
            caller.caller.write_mem(at, size.as_bytes())?;
            if size > given.size {
                return Err(Errno::TOOBIG);
            }
            done(caller.caller.write_mem(given.data, &state))
        }
        Request::Load => {
            let len = usize::try_from(given.size).ok().filter(|len| *len <= STATE_MAX);
            let mut state = vec![0; len.ok_or(Errno::TOOBIG)?];
            caller.caller.read_mem(given.data, &mut state)?;
            done(device.state_load(caller, &state).map_err(refused))
        }
    }
}
