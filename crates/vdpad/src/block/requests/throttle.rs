//! Waiting for the limits of a device.

use vdpa_backend::worker::Queues;

use super::{InFlight, Requests};
use crate::block::disk::Disk;

impl<D: Disk> Requests<D> {
    /// Whether the limits of the device admit a request of a queue now. If not, nothing is taken until they do.
    #[inline]
    pub(super) fn admits(&mut self, queues: &mut Queues, index: u16) -> bool {
        if self.limiter.admits() {
            return true;
        }
        self.wait_for_limits(queues, index);
        false
    }

    #[cold]
    fn wait_for_limits(&mut self, queues: &mut Queues, index: u16) {
        self.first = (index + 1) % queues.count().max(1);
        let started = self.limiter.start();
        let failed = started.map(|op| self.submit(queues, op, InFlight::Limits).is_some());
        if failed != Ok(false) {
            // The next pass tries again.
            self.limiter.end();
        }
    }
}
