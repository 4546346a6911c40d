//! One running queue of a worker.

use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::features::Features;
use vdpa_core::ring::split::{SplitQueue, area_sizes};
use vdpa_core::ring::{Memory, RingError};
use vdpa_core::types::{Perm, Result};
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::snapshot::GuestArea;

use super::{Reply, View};

/// A queue between START and STOP.
pub(crate) struct Queue {
    pub(crate) setup: QueueSetup<LinuxHost>,
    /// The ring, once its memory could be reached: a client may map it later than it starts the queue.
    ring: Option<SplitQueue<GuestArea>>,
    /// Where the ring is to begin, while there is none.
    state: QueueState,
    /// There may be something to do.
    pub(crate) pending: bool,
    /// Requests popped and not answered.
    pub(super) in_flight: u16,
    /// Names this run of the queue, so that a late kick of an earlier run is not taken for one of this.
    pub(super) generation: u32,
    /// A STOP waits for the requests in flight.
    pub(super) stopping: Option<Reply<Result<Option<QueueState>>>>,
    /// Requests taken before the present ring was resolved that will never be answered.
    pub(super) abandoned: u16,
    /// A violation was reported; the queue rests until it is started anew.
    pub(super) retired: bool,
}

impl Queue {
    pub(super) fn new(setup: QueueSetup<LinuxHost>, state: QueueState, generation: u32) -> Result<Self> {
        if !matches!(state, QueueState::Split { .. }) || setup.features.has(Features::RING_PACKED) {
            return Err(Errno::OPNOTSUPP);
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
            retired: false,
        })
    }

    /// Whether there may be requests that could be taken now.
    pub(super) const fn has_work(&self) -> bool {
        self.pending && self.is_running()
    }

    /// Whether it is neither retired nor about to stop.
    pub(crate) const fn is_running(&self) -> bool {
        !self.retired && self.stopping.is_none()
    }

    /// The ring, resolved through `view` if it was not yet.
    pub(crate) fn ring(&mut self, view: &Arc<View>) -> Result<&mut SplitQueue<GuestArea>, RingError> {
        match &mut self.ring {
            Some(ring) => Ok(ring),
            none => Ok(none.insert(resolve(&self.setup, self.state, self.abandoned, view)?)),
        }
    }

    /// The ring, if it was resolved.
    pub(super) fn resolved(&mut self) -> Option<&mut SplitQueue<GuestArea>> {
        self.ring.as_mut()
    }

    /// Forgets where the ring's memory is, because the translation has changed; the position stays. Nothing may
    /// be in flight.
    pub(super) fn unresolve(&mut self) {
        debug_assert_eq!(self.in_flight, 0);
        if let Some(ring) = self.ring.take() {
            (self.state, self.abandoned) = (ring.state(), ring.in_flight());
        }
    }

    /// Where the queue is.
    pub(super) fn state(&self) -> QueueState {
        self.ring.as_ref().map_or(self.state, SplitQueue::state)
    }

    /// Requests taken that will never be answered; meaningful while nothing is in flight.
    pub(super) fn abandoned(&self) -> u16 {
        self.ring.as_ref().map_or(self.abandoned, SplitQueue::in_flight)
    }

    /// Whether the driver uses the flush command, so that writes need not be stable at once
    /// (virtio 1.2 section 5.2.6.2).
    pub(super) fn write_back(&self) -> bool {
        self.setup.features.has(Features::BLK_FLUSH)
    }
}

fn resolve(
    setup: &QueueSetup<LinuxHost>,
    state: QueueState,
    abandoned: u16,
    view: &View,
) -> Result<SplitQueue<GuestArea>, RingError> {
    let sizes = area_sizes(setup.size, setup.features.has(Features::RING_EVENT_IDX));
    let memory = view.snapshot();
    let desc = memory.area(setup.desc, sizes.desc as u64, Perm::RO)?;
    let avail = memory.area(setup.avail, sizes.avail as u64, Perm::RO)?;
    let used = memory.area(setup.used, sizes.used as u64, Perm::RW)?;
    let ring = SplitQueue::new(setup.size, setup.features, desc, avail, used, state)?;
    Ok(ring.with_in_flight(abandoned))
}
