//! The turn of one queue: which requests are taken from its ring, and how many.

use std::sync::Arc;

use vdpa_backend::worker::{MemoryView, Queue, QueueHandler, Queues};
use vdpa_core::ring::{Chain, Ring, RingError};
use vdpa_sys::snapshot::GuestArea;

use super::Requests;
use crate::block::disk::{Disk, Verdict};

/// Requests taken from one queue before the others have their turn.
const BUDGET: usize = 64;

/// Waiting requests that are counted: of more, a turn has its budget anyway.
const COUNTED: u16 = 128;
const _: () = assert!(COUNTED as usize == 2 * BUDGET);

/// Requests for which a turn is not divided: a signal costs as much as one or two of them.
const UNDIVIDED: usize = 16;

/// Bytes of requests after which a turn ends: what is in the page cache, or has to be copied, is moved by this thread.
const BUDGET_BYTES: u64 = 1 << 20;

impl<D: Disk> Requests<D> {
    /// Takes requests of one queue up to the budget; whether there may be more.
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

    /// As [`serve_queue`](Self::serve_queue). Each request is taken before the one in front of it is begun: what the driver has
    /// written is in its processor's cache, and comes while the other one is worked on.
    fn serve_requests(
        &mut self,
        queues: &mut Queues,
        index: u16,
        queue: &mut Queue,
        [chain, next]: &mut [Chain; 2],
    ) -> Result<bool, RingError> {
        let view = queues.view(queue);
        queue.ring(&view)?.disable_kick()?;
        let waiting = queue.ring(&view)?.waiting(COUNTED)?;
        let most = share(queue.typical_depth(waiting));
        let mut bytes = 0;
        let mut following = None;
        for number in 1..=most {
            let found = match following.take() {
                Some(found) => {
                    std::mem::swap(chain, next);
                    found
                }
                None => take(queue.ring(&view)?, &view, chain),
            };
            if !found? {
                queues.publish(queue)?;
                return queues.wait_for_kick(queue, &view);
            }
            if !self.has_room() {
                queue.ring(&view)?.abandon(chain)?;
                break;
            }
            bytes += chain.readable().len() + chain.writable().len();
            if number < most && bytes < BUDGET_BYTES {
                following = Some(take(queue.ring(&view)?, &view, next));
            }
            let alone = number == 1 && following == Some(Ok(false));
            if let Some(verdict) = self.begin(queues, index, queue, &view, chain, alone) {
                if following.take() == Some(Ok(true)) {
                    queue.ring(&view)?.abandon(next)?;
                }
                if !unusual(queue, &view, chain, &verdict)? {
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

/// How many requests are done in a turn, of a driver that has `depth` of them: half of them, so that it sees answers, and
/// makes new requests of them, while the other half is done. All at once, driver and device would wait for each other.
fn share(depth: u16) -> usize {
    usize::from(depth).div_ceil(2).clamp(UNDIVIDED, BUDGET)
}

/// Takes the next request of a ring, and has its header fetched.
#[inline]
fn take(ring: &mut Ring<GuestArea>, view: &MemoryView, chain: &mut Chain) -> Result<bool, RingError> {
    let found = ring.pop(view.snapshot(), chain)?;
    if found && let Some(header) = chain.readable.first() {
        view.snapshot().prefetch(header.iova);
    }
    Ok(found)
}

/// A chain that is not served as a request; whether the queue goes on, and does not rest until the next kick.
fn unusual(
    queue: &mut Queue,
    view: &Arc<MemoryView>,
    chain: &Chain,
    verdict: &Verdict,
) -> Result<bool, RingError> {
    let call = queue.setup().call.clone();
    let ring = queue.ring(view)?;
    let Verdict::Misshapen { notify } = verdict else {
        ring.abandon(chain)?;
        // The driver must kick again once its memory is back.
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
