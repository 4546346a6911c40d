//! Requests for configuration space.

use crate::device::{Device, EventOf};
use crate::errno::Errno;
use crate::faults::{self, Fault};
use crate::features::Features;
use crate::parent::Parent;
use crate::types::Result;

impl<P: Parent> Device<P> {
    /// `VHOST_VDPA_GET_CONFIG` (uapi-spec 1.5): fills `out` from `offset`.
    ///
    /// # Errors
    /// `EINVAL` for an empty or out-of-range request.
    pub fn config(&mut self, offset: u32, out: &mut [u8]) -> Result<()> {
        self.check_config(offset, out.len())?;
        if self.features.is_none() {
            // As in the kernel, features count as set even if the parent refuses the empty word.
            self.features = Some(self.parent.negotiate(Features::NONE).unwrap_or(Features::NONE));
        }
        self.parent.read_config(offset, out);
        Ok(())
    }

    /// Reads configuration space for the management side. Unlike [`config`](Self::config) it never negotiates features.
    ///
    /// # Errors
    /// `EINVAL` for an empty or out-of-range request.
    pub fn peek_config(&self, offset: u32, out: &mut [u8]) -> Result<()> {
        self.check_config(offset, out.len())?;
        self.parent.read_config(offset, out);
        Ok(())
    }

    /// `VHOST_VDPA_SET_CONFIG`.
    ///
    /// # Errors
    /// `EINVAL` for an empty or out-of-range request.
    pub fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<()> {
        self.check_config(offset, data.len())?;
        self.parent.write_config(offset, data);
        Ok(())
    }

    /// Checks a configuration request of `len` bytes; the front end calls it before it allocates or reads `len`
    /// bytes.
    ///
    /// # Errors
    /// `EINVAL` for an empty or out-of-range request.
    pub fn check_config(&self, offset: u32, len: usize) -> Result<()> {
        let size = self.parent.profile().config_size;
        let fits = u32::try_from(len).is_ok_and(|len| len > 0 && offset <= size && len <= size - offset);
        if fits || faults::is(Fault::ConfigBeyondEnd) { Ok(()) } else { Err(Errno::INVAL) }
    }

    /// `VHOST_VDPA_SET_CONFIG_CALL`.
    pub fn set_config_call(&mut self, event: Option<EventOf<P>>) {
        self.parent.set_config_call(event.as_ref());
        self.config_call = event;
    }

    /// The event to signal when the configuration changes.
    pub const fn config_call(&self) -> Option<&EventOf<P>> {
        self.config_call.as_ref()
    }
}
