//! One running queue of a worker.

use std::fmt;
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::features::Features;
use vdpa_core::iotlb::Removed;
use vdpa_core::ring::{Memory, Ring, RingError, area_sizes};
use vdpa_core::types::{Perm, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::snapshot::GuestArea;

use super::{MemoryView, Reply};

/// A queue between START and STOP.
pub struct Queue {
    pub(super) setup: QueueSetup<LinuxHost>,
    /// The ring, once its memory could be reached: a client may map it later than it starts the queue.
    ring: Option<Ring<GuestArea>>,
    /// Where the ring is to begin, while there is none.
    state: QueueState,
    /// There may be something to do.
    pub(super) pending: bool,
    /// Requests popped and not answered.
    pub(super) in_flight: u16,
    /// Names this run of the queue, so that a late kick of an earlier run is not taken for one of this.
    pub(super) generation: u32,
    /// A STOP waits for the requests in flight.
    pub(super) stopping: Option<Reply<Result<Option<QueueState>>>>,
    /// Requests taken before the present ring was resolved that will never be answered.
    pub(super) abandoned: u16,
    /// No kick is asked for, as the thread looks at the ring of itself.
    pub(super) polled: bool,
    /// The memory of its ring is being removed: nothing is taken from it, until it is found again.
    pub(super) leaving: bool,
    /// See [`typical_depth`](Self::typical_depth).
    depth: u16,
    /// A violation was reported; the queue rests until it is started anew.
    pub(super) retired: bool,
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("size", &self.setup.size)
            .field("state", &self.state())
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

impl Queue {
    pub(super) fn new(setup: QueueSetup<LinuxHost>, state: QueueState, generation: u32) -> Result<Self> {
        let packed = setup.features.has(Features::RING_PACKED);
        if matches!(state, QueueState::Packed { .. }) != packed {
            return Err(Errno::INVAL);
        }
        let pending = setup.kick.is_some();
        Ok(Self {
            setup,
            ring: None,
            state,
            // Kicks may have come before the start; without an eventfd there is nothing they could have come by.
            pending,
            in_flight: 0,
            generation,
            stopping: None,
            abandoned: 0,
            polled: false,
            leaving: false,
            depth: 0,
            retired: false,
        })
    }

    /// What the client has set up: size, addresses, eventfds, negotiated features.
    #[must_use]
    pub const fn setup(&self) -> &QueueSetup<LinuxHost> {
        &self.setup
    }

    /// Whether the ring may hold requests that can be taken now.
    #[must_use]
    pub const fn has_work(&self) -> bool {
        self.pending && self.is_running()
    }

    /// Says whether the ring may hold more requests: with `true` the device is served again, after the other devices of
    /// its thread, without a kick.
    pub const fn set_pending(&mut self, pending: bool) {
        self.pending = pending;
    }

    /// A request was taken from the ring and is answered later. A queue stops only when each of them
    /// [has ended](Self::request_ended).
    #[inline]
    pub const fn request_started(&mut self) {
        self.in_flight += 1;
    }

    /// A request that had [started](Self::request_started) was answered.
    #[inline]
    pub const fn request_ended(&mut self) {
        self.in_flight -= 1;
    }

    /// How many requests its driver keeps in the ring, about: `waiting` are there now, when it may not have made new ones
    /// of those that were answered last.
    pub const fn typical_depth(&mut self, waiting: u16) -> u16 {
        let before = self.depth - self.depth.div_ceil(64);
        self.depth = if waiting > before { waiting } else { before };
        self.depth
    }

    /// Whether it is neither retired, nor about to stop or to leave its ring.
    pub const fn is_running(&self) -> bool {
        !self.retired && !self.leaving && self.stopping.is_none()
    }

    /// Whether its ring was found, and is in removed memory.
    pub(super) fn uses(&self, removed: &Removed) -> bool {
        let sizes = area_sizes(self.setup.size, self.setup.features);
        let areas =
            [(self.setup.desc, sizes.desc), (self.setup.avail, sizes.avail), (self.setup.used, sizes.used)];
        self.ring.is_some() && areas.iter().any(|&(iova, size)| removed.touches(iova, size as u64))
    }

    /// The ring, resolved through `view` if it was not yet.
    #[inline]
    pub fn ring(&mut self, view: &Arc<MemoryView>) -> Result<&mut Ring<GuestArea>, RingError> {
        match &mut self.ring {
            Some(ring) => Ok(ring),
            none => Ok(none.insert(resolve(&self.setup, self.state, self.abandoned, view)?)),
        }
    }

    /// The ring, if it was resolved.
    #[inline]
    pub fn resolved(&mut self) -> Option<&mut Ring<GuestArea>> {
        self.ring.as_mut()
    }

    /// Forgets where the ring's memory is, because the translation has changed; the position stays. Nothing may
    /// be in flight.
    pub(super) fn unresolve(&mut self) {
        debug_assert_eq!(self.in_flight, 0);
        (self.polled, self.leaving) = (false, false);
        if let Some(ring) = self.ring.take() {
            (self.state, self.abandoned) = (ring.state(), ring.in_flight());
        }
    }

    /// Where the queue is.
    pub(super) fn state(&self) -> QueueState {
        self.ring.as_ref().map_or(self.state, Ring::state)
    }

    /// Requests taken that will never be answered; meaningful while nothing is in flight.
    pub(super) fn abandoned(&self) -> u16 {
        self.ring.as_ref().map_or(self.abandoned, Ring::in_flight)
    }

    /// Whether a request has come to a ring that is looked at without a kick.
    pub(super) fn look(&mut self) -> Result<bool, RingError> {
        match &mut self.ring {
            Some(ring) if self.polled && !self.retired && !self.leaving && self.stopping.is_none() => {
                ring.has_request()
            }
            _ => Ok(false),
        }
    }

    /// Asks for kicks again; whether a request has come meanwhile.
    pub(super) fn end_polling(&mut self) -> Result<bool, RingError> {
        match &mut self.ring {
            Some(ring) if std::mem::take(&mut self.polled) && !self.retired => ring.enable_kick(),
            _ => Ok(false),
        }
    }

    /// Shows the driver what was answered and signals it if it wants that.
    pub(super) fn publish(&mut self) -> Result<(), RingError> {
        if let Some(ring) = &mut self.ring
            && ring.publish()?
            && let Some(call) = &self.setup.call
        {
            call.signal();
        }
        Ok(())
    }
}

fn resolve(
    setup: &QueueSetup<LinuxHost>,
    state: QueueState,
    abandoned: u16,
    view: &MemoryView,
) -> Result<Ring<GuestArea>, RingError> {
    let packed = setup.features.has(Features::RING_PACKED);
    let sizes = area_sizes(setup.size, setup.features);
    let memory = view.snapshot();
    // In a packed ring the descriptors are written as used.
    let perm = if packed { Perm::RW } else { Perm::RO };
    let desc = memory.area(setup.desc, sizes.desc as u64, perm)?;
    let avail = memory.area(setup.avail, sizes.avail as u64, Perm::RO)?;
    let used = memory.area(setup.used, sizes.used as u64, Perm::RW)?;
    let state = if abandoned == 0 { drained(state, setup.size) } else { state };
    let ring = Ring::new(setup.size, setup.features, desc, avail, used, state)?;
    Ok(ring.with_in_flight(abandoned))
}

/// A base that says that a whole lap of a packed ring is in flight is one of which only the available half was set, as
/// DPDK sets it at the start (1 << 15): this side knows of nothing in flight.
fn drained(state: QueueState, size: u16) -> QueueState {
    match state {
        QueueState::Packed { last_avail_idx, last_avail_wrap, last_used_idx, last_used_wrap }
            if last_avail_idx == last_used_idx
                && last_avail_wrap != last_used_wrap
                && last_avail_idx < size =>
        {
            QueueState::Packed {
                last_avail_idx,
                last_avail_wrap,
                last_used_idx: last_avail_idx,
                last_used_wrap: last_avail_wrap,
            }
        }
        state => state,
    }
}
