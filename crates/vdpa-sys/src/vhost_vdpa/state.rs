//! The requests of a device that moves.

use vdpa_core::Errno;
use vdpa_core::device::moving::STATE_MAX;
use vdpa_core::types::Result;
use zerocopy::FromBytes;

use super::VhostVdpaFd;
use super::dirty::is_known_memory;
use crate::ioctl;
use crate::uapi::dirty::Sized32;
use crate::uapi::state::{DeviceState, Request};

/// Bytes that the state of most devices fits in.
const USUAL: usize = 16 << 10;

impl VhostVdpaFd {
    pub(super) fn save_state(&self) -> Result<Vec<u8>> {
        let mut state = vec![0; USUAL];
        loop {
            let mut argument = DeviceState {
                size: state.len() as u64,
                data: state.as_mut_ptr().expose_provenance() as u64,
                ..DeviceState::new()
            };
            let result = self.sized_request(Request::Save.number(self.numbers.state), &mut argument);
            let needed = usize::try_from(argument.size).unwrap_or(usize::MAX);
            match result {
                Err(Errno::TOOBIG) if needed > state.len() && needed <= STATE_MAX => state.resize(needed, 0),
                Ok(()) if needed > state.len() => return Err(Errno::IO),
                result => {
                    state.truncate(needed);
                    return result.map(|()| state);
                }
            }
        }
    }

    pub(super) fn load_state(&self, state: &[u8]) -> Result<()> {
        let mut argument = DeviceState {
            size: state.len() as u64,
            data: state.as_ptr().expose_provenance() as u64,
            ..DeviceState::new()
        };
        self.sized_request(Request::Load.number(self.numbers.state), &mut argument)
    }

    /// Makes a request whose argument says its size. What the argument names is borrowed by the caller, exclusively where the
    /// request writes it.
    pub(super) fn sized_request<T: Sized32>(&self, number: u32, argument: &mut T) -> Result<()> {
        self.check_kind()?;
        let address = argument.as_mut_bytes().as_mut_ptr().expose_provenance();
        // SAFETY: the request reads and writes the argument, of which `argsz` says the size, and what it names: memory that the
        // callers of this private function borrow, exclusively where it is written (a bitmap, the buffer of a state). A server that
        // does not know the request reads at most a 4-byte index from the start of the argument.
        unsafe { ioctl::call(&self.fd, number, address) }.map(drop)
    }
}

/// Whether an argument of any bytes gives the device no memory that it must not write.
pub(super) fn is_harmless(request: Option<Request>, bytes: &[u8]) -> bool {
    if request != Some(Request::Save) {
        return true;
    }
    // A shorter one is followed by nothing that can be read.
    let Ok((save, _)) = DeviceState::read_from_prefix(bytes) else { return true };
    is_known_memory(save.data, save.size)
}
