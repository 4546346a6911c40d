//! [`Ring`]: the driver side of a ring, for the drivers of the suite.
//!
//! Written out here and not taken from the library of rings, which is among the things checked.

mod packed;

use std::os::fd::AsFd;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vdpa_core::types::VringAddr;
use vdpa_sys::eventfd::EventFd;

use crate::case::{Stop, prepare};
use crate::device::Device;
use crate::memory::Region;
use crate::request::Request;

/// Where memory is mapped for the device.
pub(crate) const IOVA: u64 = 0x10_0000;
/// Pages of a ring: one for each area.
pub(crate) const RING_PAGES: u64 = 3;

// Offsets of the areas.
const DESC: usize = 0;
const AVAIL: usize = 0x1000;
const USED: usize = 0x2000;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
/// A flag of the available ring: no call is wanted.
const NO_INTERRUPT: u16 = 1;

/// How long a device that works may take for one request.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for what should not come.
pub(crate) const SILENCE: Duration = Duration::from_millis(300);
/// How long to wait for a call before looking again: there may be none.
const TICK: Duration = Duration::from_millis(20);

/// What a ring looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Split,
    Packed,
}

/// A part of a request: bytes of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Offset into the region.
    pub(crate) offset: usize,
    /// Bytes.
    pub(crate) len: u32,
    /// Whether the device writes them.
    pub(crate) write: bool,
}

impl Part {
    pub(crate) const fn readable(offset: usize, len: u32) -> Self {
        Self { offset, len, write: false }
    }

    pub(crate) const fn writable(offset: usize, len: u32) -> Self {
        Self { offset, len, write: true }
    }
}

/// A ring in the memory of some region that is mapped at [`IOVA`], in whichever address space.
#[derive(Debug)]
pub(crate) struct Ring {
    queue: u32,
    /// Entries, a power of two of at most 256.
    size: u16,
    /// Offset of the ring in its region.
    at: usize,
    kick: EventFd,
    call: EventFd,
    /// Requests made available so far.
    submitted: u16,
    /// Completions seen so far.
    seen: u16,
    /// Where it goes on, if it is packed.
    packed: Option<packed::Place>,
}

impl Ring {
    pub(crate) fn new(queue: u32, size: u16, at: usize) -> Result<Self, Stop> {
        let (kick, call) = (prepare("eventfd", EventFd::new())?, prepare("eventfd", EventFd::new())?);
        Ok(Self { queue, size, at, kick, call, submitted: 0, seen: 0, packed: None })
    }

    /// The same ring in the format given; nothing has been submitted.
    pub(crate) fn in_format(self, format: Format) -> Self {
        Self { packed: (format == Format::Packed).then(packed::Place::start), ..self }
    }

    /// Which format it has.
    pub(crate) fn format(&self) -> Format {
        if self.packed.is_some() { Format::Packed } else { Format::Split }
    }

    /// Where a device is that has completed everything, as GET_VRING_BASE tells it.
    pub(crate) fn base(&self) -> u32 {
        self.packed.as_ref().map_or_else(|| self.submitted.into(), packed::Place::base)
    }

    /// Where its areas are for the device.
    pub(crate) fn addr(&self) -> VringAddr {
        let at = |area: usize| IOVA + (self.at + area) as u64;
        VringAddr { flags: 0, desc: at(DESC), used: at(USED), avail: at(AVAIL), log: 0 }
    }

    /// Tells the device all about the queue, which begins at `base`, and enables it. Made by this process, which must be
    /// the owner.
    pub(crate) fn set_up(&self, device: &Device, base: u32) -> Result<(), Stop> {
        let Self { queue, .. } = *self;
        prepare("VHOST_SET_VRING_NUM", device.set_vring(Request::SET_VRING_NUM, queue, self.size.into()))?;
        prepare("VHOST_SET_VRING_BASE", device.set_vring(Request::SET_VRING_BASE, queue, base))?;
        prepare("VHOST_SET_VRING_ADDR", device.set_addr(queue, &self.addr()))?;
        self.install_kick(device)?;
        let call = device.set_fd(Request::SET_VRING_CALL, queue, Some(self.call.as_fd()));
        prepare("VHOST_SET_VRING_CALL", call)?;
        prepare("VHOST_VDPA_SET_VRING_ENABLE", device.set_vring(Request::SET_VRING_ENABLE, queue, 1))
    }

    /// Makes the device listen to the kicks.
    pub(crate) fn install_kick(&self, device: &Device) -> Result<(), Stop> {
        let kick = Some(self.kick.as_fd());
        prepare("VHOST_SET_VRING_KICK", device.set_fd(Request::SET_VRING_KICK, self.queue, kick))
    }

    /// As at its start; what was submitted is forgotten.
    pub(crate) fn clear(&mut self, region: &Region) -> Result<(), Stop> {
        (self.submitted, self.seen) = (0, 0);
        self.packed = self.packed.take().map(|_| packed::Place::start());
        let _ = self.call.drain();
        for area in [DESC, AVAIL, USED] {
            region.write(self.at + area, &[0; AVAIL - DESC])?;
        }
        Ok(())
    }

    /// Writes a request into the descriptors from `head` on, and makes it available. No kick.
    pub(crate) fn submit(&mut self, region: &Region, head: u16, parts: &[Part]) -> Result<(), Stop> {
        if let Some(place) = &mut self.packed {
            self.submitted = self.submitted.wrapping_add(1);
            return place.submit(region, self.at + DESC, self.size, parts);
        }
        let last = parts.len().saturating_sub(1);
        for ((index, slot), part) in (0..).zip(head..).zip(parts) {
            let (slot, next) = (slot % self.size, (slot + 1) % self.size);
            let more = if index < last { DESC_F_NEXT } else { 0 };
            let flags = more | if part.write { DESC_F_WRITE } else { 0 };
            let mut bytes = Vec::with_capacity(16);
            bytes.extend_from_slice(&(IOVA + part.offset as u64).to_le_bytes());
            bytes.extend_from_slice(&part.len.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
            bytes.extend_from_slice(&next.to_le_bytes());
            region.write(self.at + DESC + 16 * usize::from(slot), &bytes)?;
        }
        let slot = usize::from(self.submitted % self.size);
        region.write(self.at + AVAIL + 4 + 2 * slot, &(head % self.size).to_le_bytes())?;
        self.submitted = self.submitted.wrapping_add(1);
        fence(Ordering::SeqCst);
        region.write(self.at + AVAIL + 2, &self.submitted.to_le_bytes())?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Kicks.
    pub(crate) fn kick(&self, device: &Device) {
        self.kick.signal();
        device.kicked();
    }

    /// The counter of the kick eventfd, which is set to 0 by that.
    pub(crate) fn kick_count(&self) -> u64 {
        self.kick.drain()
    }

    /// The counter of the call eventfd, which is set to 0 by that.
    pub(crate) fn call_count(&self) -> u64 {
        self.call.drain()
    }

    /// Waits for a call; whether it came.
    pub(crate) fn wait_call(&self, patience: Duration) -> bool {
        self.call.wait(Some(patience))
    }

    /// Wants calls, or none.
    pub(crate) fn want_calls(&self, region: &Region, want: bool) -> Result<(), Stop> {
        let flags = if want { 0 } else { NO_INTERRUPT };
        region.write(self.at + AVAIL, &flags.to_le_bytes())
    }

    /// The next completion, head and length, if it comes in time. Leaves the call eventfd alone unless it has to wait.
    pub(crate) fn completion(
        &mut self,
        region: &Region,
        patience: Duration,
    ) -> Result<Option<(u16, u32)>, Stop> {
        if !self.wait(region, patience, |used| used != self.seen)? {
            return Ok(None);
        }
        let slot = usize::from(self.seen % self.size);
        let element: [u8; 8] = region.read(self.at + USED + 4 + 8 * slot)?;
        let [a, b, _, _, len @ ..] = element;
        self.seen = self.seen.wrapping_add(1);
        Ok(Some((u16::from_le_bytes([a, b]), u32::from_le_bytes(len))))
    }

    /// Waits until everything submitted was used; whether it was.
    pub(crate) fn wait_all(&self, region: &Region, patience: Duration) -> Result<bool, Stop> {
        match &self.packed {
            None => self.wait(region, patience, |used| used == self.submitted),
            Some(place) => self.wait_until(patience, || place.all_used(region, self.at + DESC)),
        }
    }

    /// Waits until the used index is what is waited for; whether it is.
    fn wait(&self, region: &Region, patience: Duration, done: impl Fn(u16) -> bool) -> Result<bool, Stop> {
        self.wait_until(patience, || Ok(done(u16::from_le_bytes(region.read(self.at + USED + 2)?))))
    }

    /// Waits until something is so; whether it is.
    fn wait_until(
        &self,
        patience: Duration,
        mut done: impl FnMut() -> Result<bool, Stop>,
    ) -> Result<bool, Stop> {
        let deadline = Instant::now() + patience;
        loop {
            if done()? {
                fence(Ordering::SeqCst);
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            if self.call.wait(Some(left.min(TICK))) {
                let _ = self.call.drain();
            }
        }
    }
}
