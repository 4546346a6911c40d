//! The driver side of one virtqueue.

use std::time::Duration;

use vdpa_core::features::Features;
use vdpa_core::ring::driver::{AddError, Completion, Driver, PackedDriver, SplitDriver};
use vdpa_core::ring::{Buffer, RingError};
use vdpa_core::types::{Perm, QueueIndex, VringAddr};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::mmap::MapArea;

use crate::dma::Region;
use crate::error::{Error, QueueProblem};
use crate::state::{packed, v1};
use crate::vring::Vring;

/// Offsets of the three areas of a ring in a region, in bytes (virtio 1.2 section 2.7).
///
/// Both formats fit: a packed ring has its event suppression structures of 4 bytes at the beginning of the driver area and
/// of the device area (virtio 1.2 section 2.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Entries; a power of two.
    pub size: u16,
    /// Descriptor area; 16 bytes per entry, aligned to 16.
    pub desc: u64,
    /// Driver area (available ring), with the event index.
    pub avail: u64,
    /// Device area (used ring), with the event index; aligned to 4.
    pub used: u64,
}

impl RingLayout {
    /// The three areas one after the other from `offset`, the device area on a cache line of its own.
    ///
    /// ```
    /// use vdpa_client::queue::RingLayout;
    ///
    /// let layout = RingLayout::at(0, 256);
    /// assert_eq!((layout.desc, layout.avail, layout.used), (0, 4096, 4672));
    /// assert_eq!(layout.end(), 4672 + 6 + 8 * 256);
    /// ```
    #[must_use]
    pub const fn at(offset: u64, size: u16) -> Self {
        let avail = offset.saturating_add(Self::desc_len(size));
        let used = avail.saturating_add(Self::avail_len(size)).saturating_add(63) & !63;
        Self { size, desc: offset, avail, used }
    }

    /// The first byte behind the ring.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.used.saturating_add(Self::used_len(self.size))
    }

    pub(crate) const fn desc_len(size: u16) -> u64 {
        16 * size as u64
    }

    pub(crate) const fn avail_len(size: u16) -> u64 {
        6 + 2 * size as u64
    }

    pub(crate) const fn used_len(size: u16) -> u64 {
        6 + 8 * size as u64
    }
}

/// A queue that this program drives, as the session knows it while the queue is here or taken.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) vring: Vring,
    pub(crate) region: String,
    pub(crate) layout: RingLayout,
    /// `None` while it is taken.
    pub(crate) queue: Option<Queue>,
}

impl Slot {
    pub(crate) fn new(queue: Queue) -> Self {
        let Queue { vring, region, layout, .. } = &queue;
        Self { vring: vring.clone(), region: region.clone(), layout: *layout, queue: Some(queue) }
    }

    /// Takes the queue back; returns whether it is the one that was taken.
    pub(crate) fn put(&mut self, queue: Queue) -> bool {
        let it_is = self.queue.is_none() && queue.vring.kick.is_same(&self.vring.kick);
        if it_is {
            self.queue = Some(queue);
        }
        it_is
    }
}

/// One virtqueue: a ring in a region, its events, and the requests in flight.
///
/// A thread of its own can drive it: [`Session::take_queue`](crate::Session::take_queue).
///
/// Requests are known by a token of the caller's choice, which comes back with the completion.
#[derive(Debug)]
pub struct Queue {
    pub(crate) vring: Vring,
    region: String,
    layout: RingLayout,
    ring: Driver<MapArea>,
}

impl Queue {
    /// A fresh queue; its ring memory is cleared.
    pub(crate) fn new(
        index: QueueIndex,
        region: &Region,
        layout: RingLayout,
        features: Features,
    ) -> Result<Self, Error> {
        let [desc, avail, used] = areas(index, region, layout)?;
        let ring = Driver::new(layout.size, features, desc, avail, used).map_err(driver(index))?;
        let event = || EventFd::new().map_err(Error::request("eventfd"));
        let events = (event()?, event()?);
        Ok(Self {
            vring: vring(index, region, layout, events),
            region: region.name().to_owned(),
            layout,
            ring,
        })
    }

    /// A queue that the predecessor was driving.
    pub(crate) fn adopt(
        index: QueueIndex,
        region: &Region,
        layout: RingLayout,
        features: Features,
        events: (EventFd, EventFd),
        state: SavedDriver,
    ) -> Result<Self, Error> {
        let [desc, avail, used] = areas(index, region, layout)?;
        let ring = match state {
            SavedDriver::Split(state) => {
                let state = state.restore(layout.size, features);
                Driver::Split(SplitDriver::adopt(state, desc, avail, used).map_err(driver(index))?)
            }
            SavedDriver::Packed(state) => {
                let state = state.restore(layout.size, features);
                Driver::Packed(PackedDriver::adopt(&state, desc, avail, used).map_err(driver(index))?)
            }
        };
        Ok(Self {
            vring: vring(index, region, layout, events),
            region: region.name().to_owned(),
            layout,
            ring,
        })
    }

    /// Which virtqueue of the device it is.
    #[must_use]
    pub const fn index(&self) -> QueueIndex {
        self.vring.index
    }

    /// Name of the region the ring lies in.
    #[must_use]
    pub fn region(&self) -> &str {
        &self.region
    }

    /// Offsets of the ring in its region.
    #[must_use]
    pub const fn layout(&self) -> RingLayout {
        self.layout
    }

    /// The call eventfd. The device signals it when it has used buffers, unless the driver suppresses that.
    #[must_use]
    pub const fn call(&self) -> &EventFd {
        &self.vring.call
    }

    /// The kick eventfd, which the device waits for.
    #[must_use]
    pub const fn kick(&self) -> &EventFd {
        &self.vring.kick
    }

    /// Adds one request: first the buffers the device reads, then those it writes.
    ///
    /// The device sees it with the next [`notify`](Self::notify).
    ///
    /// # Errors
    /// [`AddError`]; [`AddError::Full`] is the one to expect.
    pub fn submit(&mut self, readable: &[Buffer], writable: &[Buffer], token: u64) -> Result<(), AddError> {
        self.ring.add(readable, writable, token)
    }

    /// Publishes all submitted requests to the device, and kicks it unless the device suppresses kicks. Does not block.
    ///
    /// # Errors
    /// A fault: the ring memory is not accessible any more.
    pub fn notify(&mut self) -> Result<(), RingError> {
        if self.ring.publish()? {
            self.vring.kick.signal();
        }
        Ok(())
    }

    /// The next completed request, if any.
    ///
    /// # Errors
    /// When the device used a buffer that was not in flight, or the ring memory is gone.
    pub fn reap(&mut self) -> Result<Option<Completion>, RingError> {
        self.ring.pop_used()
    }

    /// Prepares for waiting on [`call`](Self::call): asks for a signal at the next completion. Returns whether
    /// there is a completion already, for which no signal may come.
    ///
    /// # Errors
    /// As [`reap`](Self::reap).
    pub fn arm(&mut self) -> Result<bool, RingError> {
        let _ = self.vring.call.drain();
        self.ring.enable_interrupts()
    }

    /// Blocks until there is a completion or `timeout` has passed; `None` waits without a limit. Returns whether there may be
    /// a completion.
    ///
    /// # Errors
    /// As [`reap`](Self::reap).
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<bool, RingError> {
        Ok(self.arm()? || self.vring.call.wait(timeout))
    }

    /// Number of requests in flight.
    #[must_use]
    pub const fn in_flight(&self) -> u16 {
        self.ring.in_flight()
    }

    /// The state of the driver side, for saving.
    pub(crate) fn saved(&self) -> SavedDriver {
        match &self.ring {
            Driver::Split(ring) => SavedDriver::Split(v1::Driver::save(ring.state())),
            Driver::Packed(ring) => SavedDriver::Packed(packed::Driver::save(ring.state())),
        }
    }
}

/// The driver side of a ring, as it is saved.
#[derive(Debug)]
pub(crate) enum SavedDriver {
    Split(v1::Driver),
    Packed(packed::Driver),
}

fn areas(index: QueueIndex, region: &Region, layout: RingLayout) -> Result<[MapArea; 3], Error> {
    let size = layout.size;
    let needed = layout.end().saturating_sub(layout.desc);
    let placement =
        || queue(index, QueueProblem::Placement { offset: layout.desc, needed, size: region.range().size() });
    if region.perm() != Perm::RW {
        return Err(queue(index, QueueProblem::Access { perm: region.perm() }));
    }
    if !layout.desc.is_multiple_of(16) || !layout.avail.is_multiple_of(2) || !layout.used.is_multiple_of(4) {
        return Err(placement());
    }
    let area = |offset, len| region.area(offset, len).ok_or_else(placement);
    Ok([
        area(layout.desc, RingLayout::desc_len(size))?,
        area(layout.avail, RingLayout::avail_len(size))?,
        area(layout.used, RingLayout::used_len(size))?,
    ])
}

fn vring(index: QueueIndex, region: &Region, layout: RingLayout, (kick, call): (EventFd, EventFd)) -> Vring {
    let base = region.range().first();
    // `areas` has shown that all three lie inside the region.
    let addr = VringAddr {
        desc: base + layout.desc,
        avail: base + layout.avail,
        used: base + layout.used,
        ..VringAddr::default()
    };
    Vring { index, size: layout.size, addr, kick, call, enabled: true }
}

pub(crate) fn queue(index: QueueIndex, problem: QueueProblem) -> Error {
    Error::Queue { index, problem }
}

fn driver<E: std::fmt::Display>(index: QueueIndex) -> impl Fn(E) -> Error {
    move |error| queue(index, QueueProblem::Driver { reason: error.to_string() })
}
