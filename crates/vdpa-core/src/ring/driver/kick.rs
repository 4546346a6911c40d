//! When a driver has to kick the device; the same for both ring formats.

use crate::ring::Fault;
use crate::ring::RingError;

/// Whether requests that were made available still need a decision about a kick, and what the last decision covered.
///
/// `P` is a position of the ring: the available index of a split ring, a descriptor of a packed ring.
#[derive(Debug)]
pub(super) struct Kick<P> {
    /// End of the requests that the last successful decision covered; `None` if it is unknown, and then an event index
    /// cannot rule out that the device waits for a kick.
    decided: Option<P>,
    /// Requests were made available since then.
    pending: bool,
}

impl<P> Default for Kick<P> {
    fn default() -> Self {
        Self { decided: None, pending: false }
    }
}

impl<P> Kick<P> {
    /// Requests were made available, or the last kick may have been lost.
    pub(super) const fn set_pending(&mut self) {
        self.pending = true;
    }

    /// Decides whether to kick for the requests up to `published`. `wants` gets the end of the requests decided before,
    /// and reads from memory whether the device wants a kick for those in between.
    ///
    /// # Errors
    /// Those of `wants`. The next call decides anew, without an earlier position, so that no kick is lost.
    pub(super) fn decide(
        &mut self,
        published: P,
        wants: impl FnOnce(Option<P>) -> Result<bool, Fault>,
    ) -> Result<bool, RingError> {
        if !self.pending {
            return Ok(false);
        }
        let kick = wants(self.decided.take())?;
        (self.decided, self.pending) = (Some(published), false);
        Ok(kick)
    }
}
