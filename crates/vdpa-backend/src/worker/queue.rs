//! [`Queue`]: a virtqueue between start and stop.

use std::fmt;
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_core::crash_points::{CrashPoint, reach};
use vdpa_core::features::Features;
use vdpa_core::iotlb::Removed;
use vdpa_core::ring::inflight::LogError;
use vdpa_core::ring::{Fault, RingError, area_sizes};
use vdpa_core::types::Result;
use vdpa_core::vq::{QueueSetup, QueueState};
use vdpa_sys::dirty::DirtyMemory;
use vdpa_sys::guest::LinuxHost;
use vdpa_sys::shared_words::SharedWords;

use super::dirty::RingWrites;
use super::ring::clear_log;
use super::{DeviceRing, MemoryView, Reply};

/// A virtqueue that runs: the ring, and what its device's worker thread knows of it.
///
/// A [`QueueHandler`](super::QueueHandler) [takes](super::Queues::take) it from its [`Queues`](super::Queues) to serve it, on
/// the device's thread. No method blocks.
pub struct Queue {
    pub(super) setup: QueueSetup<LinuxHost>,
    /// The ring, once its memory was resolved: a client may map it later than it starts the queue.
    ring: Option<DeviceRing>,
    /// Memory of the in-flight log, if the device keeps logs.
    log: Option<SharedWords>,
    /// The ring is to be continued from the log, as soon as its memory can be resolved: see [`recover`](Self::recover).
    pub(super) recovering: bool,
    /// The position of the queue while `ring` is `None`.
    state: QueueState,
    /// The ring may hold requests that were not popped.
    pub(super) pending: bool,
    /// Requests that were popped and are not completed.
    pub(super) in_flight: u16,
    /// Number of this run of the queue: completions of the kick poll carry it, so that a late one of an earlier run is told
    /// apart.
    pub(super) generation: u32,
    /// A STOP command, answered when no request is in flight.
    pub(super) stopping: Option<Reply<Result<Option<QueueState>>>>,
    /// Requests that were popped before the present ring was resolved and will never be completed. A ring counts them as in
    /// flight.
    pub(super) unanswered: u16,
    /// The kick is disabled, because the thread busy-polls the ring.
    pub(super) busy_polled: bool,
    /// The memory of the ring was removed from the translation: no request is popped until nothing is in flight and the
    /// ring was released, to be resolved again.
    pub(super) ring_removed: bool,
    /// See [`typical_depth`](Self::typical_depth).
    depth: u16,
    /// The driver has broken the protocol of the ring: the queue is not served until it is started again.
    pub(super) broken: bool,
    dirty: Arc<DirtyMemory>,
    /// What requests write is recorded.
    tracking: bool,
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
    /// What requests write is marked in `dirty`, if that is `tracking`.
    pub(super) fn new(
        setup: QueueSetup<LinuxHost>,
        state: QueueState,
        generation: u32,
        dirty: Arc<DirtyMemory>,
        tracking: bool,
    ) -> Result<Self> {
        let packed = setup.features.has(Features::RING_PACKED);
        if matches!(state, QueueState::Packed { .. }) != packed {
            return Err(Errno::INVAL);
        }
        let pending = setup.kick.is_some();
        Ok(Self {
            setup,
            ring: None,
            log: None,
            recovering: false,
            state,
            // The driver may have kicked before the start. Without an eventfd it cannot have.
            pending,
            in_flight: 0,
            generation,
            stopping: None,
            unanswered: 0,
            busy_polled: false,
            ring_removed: false,
            depth: 0,
            broken: false,
            dirty,
            tracking,
        })
    }

    /// Gives the queue memory for its log. With `recover` it is to be continued from the log that is in there; without, that
    /// one ends.
    pub(super) fn set_log(&mut self, log: SharedWords, recover: bool) {
        if recover {
            (self.recovering, self.pending) = (true, true);
        } else {
            // A crash before the ring is resolved starts the queue where it is started now.
            clear_log(&log);
        }
        self.log = Some(log);
    }

    /// Continues the ring from its log if that is to be done; then publishes and signals, since a notification may have been
    /// lost. After a fault the ring stays to be continued, after any other error the queue is broken.
    ///
    /// # Errors
    /// [`LogError`], but not [`LogError::Absent`]: then the queue starts at the position given.
    pub(super) fn recover(&mut self, view: &MemoryView) -> Result<(), LogError> {
        let Some(log) = self.log.as_ref().filter(|_| self.recovering) else { return Ok(()) };
        match DeviceRing::recover(&self.setup, log, view, self.writes()) {
            Ok(ring) => {
                reach(CrashPoint::RingRecovered);
                self.pending = self.setup.kick.is_some() || ring.repeats() > 0;
                self.ring = Some(ring);
                if self.stopping.is_some() {
                    self.stop_taking();
                }
            }
            Err(LogError::Absent) => self.pending = self.setup.kick.is_some(),
            Err(error) => {
                let is_fault = matches!(error, LogError::Ring(error) if error.is_fault());
                (self.recovering, self.broken, self.pending) = (is_fault, !is_fault, false);
                return Err(error);
            }
        }
        self.recovering = false;
        self.publish().map_err(LogError::Ring)
    }

    /// Whether the ring must be continued from its log when the queue is started again at the same position: requests that
    /// are to be repeated are still in it.
    pub(super) fn is_to_recover(&self) -> bool {
        self.recovering || self.ring.as_ref().is_some_and(|ring| ring.repeats() > 0)
    }

    /// The queue is being stopped: requests to be repeated are still done, and no others are taken.
    pub(super) fn stop_taking(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.stop();
            // A device that had no use for them yet, such as buffers for what may arrive, gives them back now.
            self.pending |= ring.repeats() > 0;
        }
    }

    fn writes(&self) -> RingWrites {
        RingWrites::new(Arc::clone(&self.dirty), self.setup.asid, self.tracking)
    }

    /// Begins or ends to record what requests write.
    pub(super) fn set_tracking(&mut self, on: bool) {
        self.tracking = on;
        if let Some(ring) = &mut self.ring {
            ring.set_tracking(on, self.in_flight);
        }
    }

    /// Whether a request is being done of which is not known what it writes, although that is recorded.
    pub(super) fn has_unrecorded(&self) -> bool {
        self.in_flight > 0 && self.ring.as_ref().is_some_and(DeviceRing::has_unrecorded)
    }

    /// The queue was stopped. Requests in flight that nobody completes are not repeated by a successor.
    pub(super) fn forget_in_flight(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.mark_in_flight();
        }
        if !self.is_to_recover()
            && let Some(ring) = &mut self.ring
        {
            ring.forget_in_flight();
        }
    }

    /// What the client has set up: size, ring addresses, eventfds, negotiated features.
    #[must_use]
    pub const fn setup(&self) -> &QueueSetup<LinuxHost> {
        &self.setup
    }

    /// Whether the queue [runs](Self::is_running) and its ring may hold requests. Also `true` while a stop waits for requests
    /// that are repeated after a crash.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.pending && (self.is_running() || self.stopping.is_some() && self.has_repeats())
    }

    /// Whether there are requests to be repeated that can be popped now.
    fn has_repeats(&self) -> bool {
        !self.broken && !self.ring_removed && self.ring.as_ref().is_some_and(|ring| ring.repeats() > 0)
    }

    /// Sets whether the ring may hold more requests. With `true` the device is served again without a kick, after the other
    /// devices of its thread.
    pub const fn set_pending(&mut self, pending: bool) {
        self.pending = pending;
    }

    /// Counts a request that was popped and completes later. A stop waits until each of these
    /// [has ended](Self::request_ended). Not for a request that completes before `serve` returns.
    #[inline]
    pub const fn request_started(&mut self) {
        self.in_flight += 1;
    }

    /// Ends the count of a request that had [started](Self::request_started), whose used element was pushed.
    #[inline]
    pub fn request_ended(&mut self) {
        self.in_flight -= 1;
        if self.in_flight == 0 && self.ring.as_mut().is_some_and(DeviceRing::take_held_back) {
            self.pending = true;
        }
    }

    /// About how many requests the driver keeps in the ring: the maximum of `waiting`, those in the ring now, and of earlier
    /// calls, each of which loses 1/64 per call. The driver may not have replaced yet those that were completed last.
    pub const fn typical_depth(&mut self, waiting: u16) -> u16 {
        let before = self.depth - self.depth.div_ceil(64);
        self.depth = if waiting > before { waiting } else { before };
        self.depth
    }

    /// Whether requests may be popped: the driver has not broken the protocol, no stop is in progress, the memory of the
    /// ring was not removed, and the ring was continued from its log if it has to be.
    pub const fn is_running(&self) -> bool {
        !self.broken && !self.ring_removed && !self.recovering && self.stopping.is_none()
    }

    /// Whether the ring is resolved and is in removed memory.
    pub(super) fn uses(&self, removed: &Removed) -> bool {
        let sizes = area_sizes(self.setup.size, self.setup.features);
        let areas =
            [(self.setup.desc, sizes.desc), (self.setup.avail, sizes.avail), (self.setup.used, sizes.used)];
        self.ring.is_some() && areas.iter().any(|&(iova, size)| removed.touches(iova, size as u64))
    }

    /// The ring, which is resolved through `view` first when it is not yet.
    ///
    /// # Errors
    /// [`RingError`]: a fault when a part of the ring is not mapped in `view`; hand it to
    /// [`Queues::ring_failed`](super::Queues::ring_failed).
    #[inline]
    pub fn ring(&mut self, view: &Arc<MemoryView>) -> Result<&mut DeviceRing, RingError> {
        match &mut self.ring {
            Some(ring) => Ok(ring),
            // Only `recover` may resolve it: a new log would end the one that is to be continued.
            None if self.recovering => Err(Fault { addr: self.setup.desc }.into()),
            none => {
                let log = self.log.as_ref();
                let writes = RingWrites::new(Arc::clone(&self.dirty), self.setup.asid, self.tracking);
                let ring = DeviceRing::new(&self.setup, self.state, self.unanswered, log, view, writes)?;
                Ok(none.insert(ring))
            }
        }
    }

    /// The ring, if it is resolved. Always the case while a request is in flight.
    #[inline]
    pub fn resolved(&mut self) -> Option<&mut DeviceRing> {
        self.ring.as_mut()
    }

    /// Releases the ring's memory, because the translation has changed, and keeps the position. No request may be in flight.
    /// A ring with a log is continued from it: there is no moment at which a crash finds no log.
    pub(super) fn release_ring(&mut self) {
        debug_assert_eq!(self.in_flight, 0);
        (self.busy_polled, self.ring_removed) = (false, false);
        if let Some(mut ring) = self.ring.take() {
            ring.mark_in_flight();
            (self.state, self.unanswered) = (ring.state(), ring.in_flight());
            self.recovering = ring.has_log();
        }
    }

    /// The position of the queue: next available and used descriptor.
    pub(super) fn state(&self) -> QueueState {
        self.ring.as_ref().map_or(self.state, DeviceRing::state)
    }

    /// Number of requests that were popped and will never be completed; valid while `in_flight` is 0.
    pub(super) fn unanswered(&self) -> u16 {
        self.ring.as_ref().map_or(self.unanswered, DeviceRing::in_flight)
    }

    /// Whether a ring that is busy-polled has a request.
    pub(super) fn check_polled_ring(&mut self) -> Result<bool, RingError> {
        match &mut self.ring {
            Some(ring)
                if self.busy_polled && !self.broken && !self.ring_removed && self.stopping.is_none() =>
            {
                ring.has_request()
            }
            _ => Ok(false),
        }
    }

    /// Enables the kick of a ring that was busy-polled; whether a request has arrived meanwhile.
    pub(super) fn enable_kick(&mut self) -> Result<bool, RingError> {
        match &mut self.ring {
            Some(ring) if std::mem::take(&mut self.busy_polled) && !self.broken => ring.enable_kick(),
            _ => Ok(false),
        }
    }

    /// Publishes used descriptors and signals the call eventfd, unless the driver suppresses that.
    pub(super) fn publish(&mut self) -> Result<(), RingError> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let signals = ring.publish()?;
        ring.signal_log();
        if signals && let Some(call) = &self.setup.call {
            reach(CrashPoint::SignalBegun);
            call.signal();
            reach(CrashPoint::Signalled);
        }
        Ok(())
    }
}
