//! Devices that move to another host.

use vdpa_control::api::CtlError;
use vdpa_core::Errno;
use vdpa_core::device::moving::MoveError;

use super::Bus;

impl Bus {
    /// The state of a device whose queues rest.
    pub(super) fn state_of(&self, name: &str) -> Result<Vec<u8>, CtlError> {
        let entry = self.find(name)?;
        let state = entry.lock()?.save_to_move().map_err(|error| refused(&error))?;
        tracing::info!(device = %name, bytes = state.len(), "state saved");
        Ok(state)
    }

    /// Makes a device what another one was.
    pub(super) fn make_moved(&self, name: &str, state: &[u8]) -> Result<(), CtlError> {
        let _change = self.begin_change()?;
        let entry = self.find(name)?;
        entry.check_client()?;
        let loaded = entry.lock()?.load_moved(state);
        // Also after an error: the device was reset.
        entry.file.log_change();
        loaded.map_err(|error| refused(&error))?;
        tracing::info!(device = %name, bytes = state.len(), "state loaded");
        Ok(())
    }
}

fn refused(error: &MoveError) -> CtlError {
    let errno = if *error == MoveError::Unsupported { Errno::OPNOTSUPP } else { error.errno() };
    CtlError::new(errno, error.to_string())
}
