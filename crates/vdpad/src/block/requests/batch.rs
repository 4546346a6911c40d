//! Which requests are taken from a ring in one pass over it, and how many.

use std::sync::Arc;

use vdpa_backend::worker::{DeviceRing, MemoryView, Popped, Queue, QueueHandler, Queues};
use vdpa_core::ring::{Chain, RingError};

use super::Requests;
use crate::block::disk::{Disk, Step};

/// Requests taken from one queue before the others are served.
const BUDGET: usize = 64;

/// Waiting requests are counted up to this number: a pass takes [`BUDGET`] of them at most, whatever is behind.
const COUNT_MAX: u16 = 128;
const _: () = assert!(COUNT_MAX as usize == 2 * BUDGET);

/// The smallest batch. Smaller ones do not pay: a signal costs as much as one or two requests.
const BATCH_MIN: usize = 16;

/// Bytes of requests after which a pass ends: data in the page cache, and data that must be copied, is moved by this thread.
const BUDGET_BYTES: u64 = 1 << 20;

impl<D: Disk> Requests<D> {
    /// Takes requests of one queue up to the budget. Returns whether there may be more.
    pub(super) fn serve_queue(
        &mut self,
        queues: &mut Queues,
        index: u16,
        queue: &mut Queue,
    ) -> Result<bool, RingError> {
        let mut chains = std::mem::take(&mut self.chains);
        let more = self.serve_requests(queues, index, queue, &mut chains);
        self.chains = chains;
        more
    }

    /// As [`serve_queue`](Self::serve_queue). Each request is popped before the previous one is started: the header was
    /// written by another processor, and its cache line is fetched while the previous request is worked on.
    fn serve_requests(
        &mut self,
        queues: &mut Queues,
        index: u16,
        queue: &mut Queue,
        [chain, next]: &mut [Chain; 2],
    ) -> Result<bool, RingError> {
        let view = queues.view(queue);
        queue.ring(&view)?.disable_kick()?;
        let waiting = queue.ring(&view)?.waiting(COUNT_MAX)?;
        let most = batch_size(queue.typical_depth(waiting));
        let mut bytes = 0;
        let mut following = None;
        for number in 1..=most {
            let found = match following.take() {
                Some(found) => {
                    std::mem::swap(chain, next);
                    found
                }
                None => pop(queue.ring(&view)?, &view, chain),
            };
            let found = found?;
            if found == Popped::None {
                queues.publish(queue)?;
                return queues.wait_for_kick(queue, &view);
            }
            if !self.has_room() || !self.admits(queues, index) {
                queue.ring(&view)?.abandon(chain)?;
                break;
            }
            let size = chain.readable().len() + chain.writable().len();
            self.limiter.take(size);
            bytes += size;
            if number < most && bytes < BUDGET_BYTES {
                following = Some(pop(queue.ring(&view)?, &view, next));
            }
            let alone = number == 1 && following == Some(Ok(Popped::None));
            let step = if found == Popped::Poison {
                self.refuse_request(queues, index, queue, &view, chain)
            } else {
                self.start_request(queues, index, queue, &view, chain, alone)
            };
            if let Some(step) = step {
                if matches!(following.take(), Some(Ok(Popped::Request | Popped::Poison))) {
                    queue.ring(&view)?.abandon(next)?;
                }
                if !return_chain(queue, &view, chain, &step)? {
                    queues.publish(queue)?;
                    return Ok(false);
                }
            }
            if bytes >= BUDGET_BYTES {
                break;
            }
        }
        queues.publish(queue)?;
        Ok(true)
    }
}

/// Requests of one pass, for a driver that keeps `depth` of them in the ring. Half of them: the driver then sees answers, and
/// makes new requests, while the device works on the other half. With all of them, driver and device would wait for each
/// other.
fn batch_size(depth: u16) -> usize {
    usize::from(depth).div_ceil(2).clamp(BATCH_MIN, BUDGET)
}

/// Pops the next chain of a ring, and prefetches its header.
#[inline]
fn pop(ring: &mut DeviceRing, view: &MemoryView, chain: &mut Chain) -> Result<Popped, RingError> {
    let found = ring.pop(view.snapshot(), chain)?;
    if found != Popped::None
        && let Some(header) = chain.readable.first()
    {
        view.snapshot().prefetch(header.iova);
    }
    Ok(found)
}

/// Disposes of a chain that was not started: one with memory out of reach goes back to the available ring, a malformed one
/// to the used ring. Returns whether to continue with the queue; if not, it is left alone until the next kick.
fn return_chain(
    queue: &mut Queue,
    view: &Arc<MemoryView>,
    chain: &Chain,
    step: &Step,
) -> Result<bool, RingError> {
    let call = queue.setup().call.clone();
    let ring = queue.ring(view)?;
    let Step::Malformed { notify } = step else {
        ring.abandon(chain)?;
        // The driver must kick again once its memory is mapped.
        ring.enable_kick()?;
        return Ok(false);
    };
    ring.push_used(chain.head, 0)?;
    let wanted = ring.publish()?;
    if *notify
        && wanted
        && let Some(call) = call
    {
        call.signal();
    }
    Ok(*notify)
}
