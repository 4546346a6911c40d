//! The queues of a session.

use vdpa_core::features::Features;
use vdpa_core::ops::VdpaOps;
use vdpa_core::types::QueueIndex;
use vdpa_core::vq::QueueState;
use vdpa_sys::eventfd::EventFd;

use super::Session;
use crate::device::PresentQueue;
use crate::dma::problem;
use crate::error::{Error, QueueProblem, RegionProblem};
use crate::queue::{Queue, RingLayout, Slot, queue};
use crate::vring::{GuestQueue, GuestRing, Vring, check_guest_ring};

/// The caller asked for a queue to drive it, but a guest drives it.
const A_GUESTS: QueueProblem = QueueProblem::Kind { owner: "a guest", asked: "this program" };
/// The caller asked for a queue of a guest, but this program drives it.
const OURS: QueueProblem = QueueProblem::Kind { owner: "this program", asked: "a guest" };

impl<D: VdpaOps<Event = EventFd>> Session<D> {
    /// Sets up a ring of `size` entries, split or packed as negotiated, in a region, from byte `offset` on.
    ///
    /// # Errors
    /// [`Error::Queue`], [`Error::Region`], [`Error::Request`].
    pub fn add_queue(
        &mut self,
        index: QueueIndex,
        size: u16,
        region: &str,
        offset: u64,
    ) -> Result<(), Error> {
        self.check_new_queue(index, size, true)?;
        let layout = RingLayout::at(offset, size);
        let memory = self.region(region).ok_or_else(|| problem(region, RegionProblem::Unknown))?;
        let new = Queue::new(index, memory, layout, self.setup.features)?;
        new.vring.set_up(&self.ops, QueueState::initial(self.setup.features))?;
        self.setup.generation += 1;
        self.setup.queues.push(Slot::new(new));
        Ok(())
    }

    /// Sets up a ring that belongs to a guest, split or packed as negotiated. A guest has placed it in memory that is
    /// mapped already; the caller gives the events, which the session keeps.
    ///
    /// # Errors
    /// [`Error::Queue`], [`Error::Request`].
    pub fn add_guest_queue(
        &mut self,
        index: QueueIndex,
        ring: GuestRing,
        kick: EventFd,
        call: EventFd,
    ) -> Result<(), Error> {
        let base = QueueState::initial(self.setup.features);
        self.add_guest_queue_at(index, ring, kick, call, base, true)
    }

    /// As [`add_guest_queue`](Self::add_guest_queue), for a ring that a guest has driven before (a restored snapshot, the
    /// destination of a migration): the device begins at `base`. With `enabled` false the device does not serve it until
    /// [`set_queue_enabled`](Self::set_queue_enabled), as those of a network device beyond the pairs in use.
    ///
    /// # Errors
    /// As [`add_guest_queue`](Self::add_guest_queue).
    pub fn add_guest_queue_at(
        &mut self,
        index: QueueIndex,
        ring: GuestRing,
        kick: EventFd,
        call: EventFd,
        base: QueueState,
        enabled: bool,
    ) -> Result<(), Error> {
        let packed = self.setup.features.has(Features::RING_PACKED);
        self.check_new_queue(index, ring.size, !packed)?;
        let vring = self.guest_vring(index, ring, kick, call, enabled)?;
        vring.set_up(&self.ops, base)?;
        self.setup.generation += 1;
        self.setup.guest_queues.push(GuestQueue(vring));
        Ok(())
    }

    fn guest_vring(
        &self,
        index: QueueIndex,
        ring: GuestRing,
        kick: EventFd,
        call: EventFd,
        enabled: bool,
    ) -> Result<Vring, Error> {
        let regions = &self.setup.regions;
        let addr = check_guest_ring(index, ring, self.setup.features, |area| regions.cover(area))?;
        Ok(Vring { index, size: ring.size, addr, kick, call, enabled })
    }

    /// Adds a ring that the device has already.
    pub(crate) fn add_present_queue(&mut self, present: PresentQueue) -> Result<(), Error> {
        let PresentQueue { index, ring, kick, call, enabled } = present;
        if self.setup.vrings().any(|vring| vring.index == index) {
            return Err(queue(index, QueueProblem::Exists));
        }
        let vring = self.guest_vring(index, ring, kick, call, enabled)?;
        self.setup.guest_queues.push(GuestQueue(vring));
        Ok(())
    }

    /// Makes the device serve a queue or not (`VHOST_VDPA_SET_VRING_ENABLE`). An update keeps it.
    ///
    /// # Errors
    /// [`Error::Queue`] when it is not set up; [`Error::Request`].
    pub fn set_queue_enabled(&mut self, index: QueueIndex, enabled: bool) -> Result<(), Error> {
        let vring = self.setup.vrings_mut().find(|vring| vring.index == index);
        let vring = vring.ok_or_else(|| queue(index, QueueProblem::Unknown))?;
        self.ops.set_vring_enable(index, enabled).map_err(Error::request("VHOST_VDPA_SET_VRING_ENABLE"))?;
        vring.enabled = enabled;
        Ok(())
    }

    fn check_new_queue(&self, index: QueueIndex, size: u16, power_of_two: bool) -> Result<(), Error> {
        if self.setup.running {
            return Err(queue(index, QueueProblem::Running));
        }
        if self.setup.vrings().any(|vring| vring.index == index) {
            return Err(queue(index, QueueProblem::Exists));
        }
        let count = self.ops.vqs_count().map_err(Error::request("VHOST_VDPA_GET_VQS_COUNT"))?;
        if u32::from(index.0) >= count {
            return Err(queue(index, QueueProblem::Index { count }));
        }
        let max = self.ops.vring_num().map_err(Error::request("VHOST_VDPA_GET_VRING_NUM"))?;
        let shape = if power_of_two { size >= 2 && size.is_power_of_two() } else { size >= 1 };
        let problem = QueueProblem::Size { size, power_of_two, max };
        if shape && size <= max { Ok(()) } else { Err(queue(index, problem)) }
    }

    /// A queue that this program drives.
    ///
    /// # Errors
    /// [`Error::Queue`] when it is not set up, taken, or a guest's.
    pub fn queue(&self, index: QueueIndex) -> Result<&Queue, Error> {
        let slot = self.setup.queues.iter().find(|slot| slot.vring.index == index);
        let slot = slot.ok_or_else(|| self.no_queue(index, A_GUESTS))?;
        slot.queue.as_ref().ok_or_else(|| queue(index, QueueProblem::Taken))
    }

    /// Takes a queue out of the session, so that a thread of its own can drive it. Give it back with
    /// [`put_queue`](Self::put_queue) before an update is switched; prepare needs it not.
    ///
    /// # Errors
    /// [`Error::Queue`] when it is not set up, taken already, or a guest's.
    pub fn take_queue(&mut self, index: QueueIndex) -> Result<Queue, Error> {
        let at = self.setup.queues.iter().position(|slot| slot.vring.index == index);
        let at = at.ok_or_else(|| self.no_queue(index, A_GUESTS))?;
        let slot = self.setup.queues.get_mut(at);
        slot.and_then(|slot| slot.queue.take()).ok_or_else(|| queue(index, QueueProblem::Taken))
    }

    /// Takes a queue back that [`take_queue`](Self::take_queue) has given.
    ///
    /// # Errors
    /// [`Error::Queue`] for a queue of another session, or of this one before a [`reset`](Self::reset); it is dropped.
    pub fn put_queue(&mut self, taken: Queue) -> Result<(), Error> {
        let index = taken.index();
        let slot = self.setup.queues.iter_mut().find(|slot| slot.vring.index == index);
        if slot.is_some_and(|slot| slot.put(taken)) {
            Ok(())
        } else {
            Err(queue(index, QueueProblem::Foreign))
        }
    }

    /// A queue of a guest.
    ///
    /// # Errors
    /// [`Error::Queue`] when it is not set up, or driven by this program.
    pub fn guest_queue(&self, index: QueueIndex) -> Result<&GuestQueue, Error> {
        self.setup.guest_queues.iter().find(|q| q.index() == index).ok_or_else(|| self.no_queue(index, OURS))
    }

    /// Why there is no queue of the requested kind: `other`, if the queue is of the other kind.
    fn no_queue(&self, index: QueueIndex, other: QueueProblem) -> Error {
        let there = self.setup.vrings().any(|vring| vring.index == index);
        queue(index, if there { other } else { QueueProblem::Unknown })
    }

    /// A queue that this program drives, mutable: to submit and reap requests.
    ///
    /// # Errors
    /// [`Error::Queue`] when it is not set up, taken, or a guest's.
    pub fn queue_mut(&mut self, index: QueueIndex) -> Result<&mut Queue, Error> {
        let at = self.setup.queues.iter().position(|slot| slot.vring.index == index);
        // Build the error only on failure: a driver calls this for each request.
        let Some(at) = at else { return Err(self.no_queue(index, A_GUESTS)) };
        let slot = self.setup.queues.get_mut(at);
        slot.and_then(|slot| slot.queue.as_mut()).ok_or_else(|| queue(index, QueueProblem::Taken))
    }
}
