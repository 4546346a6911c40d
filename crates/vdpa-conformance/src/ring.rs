//! [`Ring`]: the driver side of a ring, for the drivers of the suite.
//!
//! The suite has its own implementation and does not use the one of vdpa-core, since that is part of what it checks.

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

/// I/O virtual address at which memory is mapped for the device.
pub(crate) const IOVA: u64 = 0x10_0000;
/// Pages of a ring: one for each area.
pub(crate) const RING_PAGES: u64 = 3;

// Offsets of the areas.
const DESC: usize = 0;
const AVAIL: usize = 0x1000;
const USED: usize = 0x2000;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
/// A flag of the available ring: the driver wants no calls.
const NO_INTERRUPT: u16 = 1;

/// How long a working device may take for one request.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait before concluding that an event that must not occur does not occur.
pub(crate) const QUIET_TIME: Duration = Duration::from_millis(300);
/// How long to wait for a call before reading the ring again. A device need not call.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Format of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Split,
    Packed,
}

/// A segment of a request, for which the ring gets one descriptor: consecutive bytes of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Offset into the region.
    pub(crate) offset: usize,
    /// Length in bytes.
    pub(crate) len: u32,
    /// Whether it is writable for the device, and not readable.
    pub(crate) write: bool,
}

impl Segment {
    pub(crate) const fn readable(offset: usize, len: u32) -> Self {
        Self { offset, len, write: false }
    }

    pub(crate) const fn writable(offset: usize, len: u32) -> Self {
        Self { offset, len, write: true }
    }
}

/// A ring in a region that is mapped at [`IOVA`] in some address space of the device.
#[derive(Debug)]
pub(crate) struct Ring {
    queue: u32,
    /// Entries, a power of two of at most 256.
    size: u16,
    /// Offset of the ring in its region.
    at: usize,
    kick: EventFd,
    call: EventFd,
    /// Free-running number of requests made available.
    avail_idx: u16,
    /// Free-running number of completions read.
    used_idx: u16,
    /// Position in a packed ring; `None` for a split ring.
    packed: Option<packed::Position>,
}

impl Ring {
    pub(crate) fn new(queue: u32, size: u16, at: usize) -> Result<Self, Stop> {
        let (kick, call) = (prepare("eventfd", EventFd::new())?, prepare("eventfd", EventFd::new())?);
        Ok(Self { queue, size, at, kick, call, avail_idx: 0, used_idx: 0, packed: None })
    }

    /// Returns the same ring in the given format. No request may have been submitted.
    pub(crate) fn in_format(self, format: Format) -> Self {
        Self { packed: (format == Format::Packed).then(packed::Position::start), ..self }
    }

    /// Format of the ring.
    pub(crate) fn format(&self) -> Format {
        if self.packed.is_some() { Format::Packed } else { Format::Split }
    }

    /// The result of GET_VRING_BASE for a device that has completed every request.
    pub(crate) fn vring_base(&self) -> u32 {
        self.packed.as_ref().map_or_else(|| self.avail_idx.into(), packed::Position::vring_base)
    }

    /// I/O virtual addresses of the ring's areas.
    pub(crate) fn addr(&self) -> VringAddr {
        let at = |area: usize| IOVA + (self.at + area) as u64;
        VringAddr { flags: 0, desc: at(DESC), used: at(USED), avail: at(AVAIL), log: 0 }
    }

    /// Pages of the region, by number, that a device which serves the ring writes.
    pub(crate) fn written_pages(&self) -> Vec<u64> {
        let page = |area: usize| ((self.at + area) / 0x1000) as u64;
        match self.format() {
            Format::Split => vec![page(USED)],
            // Used descriptors, and when the device wants kicks.
            Format::Packed => vec![page(DESC), page(USED)],
        }
    }

    /// Sets the queue up with vring base `base` and enables it. This process makes the requests, so it must be the owner.
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

    /// Installs the kick eventfd.
    pub(crate) fn install_kick(&self, device: &Device) -> Result<(), Stop> {
        let kick = Some(self.kick.as_fd());
        prepare("VHOST_SET_VRING_KICK", device.set_fd(Request::SET_VRING_KICK, self.queue, kick))
    }

    /// Empties the ring: indices and areas are as at the start.
    pub(crate) fn reset(&mut self, region: &Region) -> Result<(), Stop> {
        (self.avail_idx, self.used_idx) = (0, 0);
        self.packed = self.packed.take().map(|_| packed::Position::start());
        let _ = self.call.drain();
        for area in [DESC, AVAIL, USED] {
            region.write(self.at + area, &[0; AVAIL - DESC])?;
        }
        Ok(())
    }

    /// Writes a request into the descriptors from `head` on and makes it available, without a kick.
    pub(crate) fn submit(&mut self, region: &Region, head: u16, segments: &[Segment]) -> Result<(), Stop> {
        if let Some(position) = &mut self.packed {
            self.avail_idx = self.avail_idx.wrapping_add(1);
            return position.submit(region, self.at + DESC, self.size, segments);
        }
        let last = segments.len().saturating_sub(1);
        for ((index, slot), segment) in (0..).zip(head..).zip(segments) {
            let (slot, next) = (slot % self.size, (slot + 1) % self.size);
            let more = if index < last { DESC_F_NEXT } else { 0 };
            let flags = more | if segment.write { DESC_F_WRITE } else { 0 };
            let mut bytes = Vec::with_capacity(16);
            bytes.extend_from_slice(&(IOVA + segment.offset as u64).to_le_bytes());
            bytes.extend_from_slice(&segment.len.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
            bytes.extend_from_slice(&next.to_le_bytes());
            region.write(self.at + DESC + 16 * usize::from(slot), &bytes)?;
        }
        let slot = usize::from(self.avail_idx % self.size);
        region.write(self.at + AVAIL + 4 + 2 * slot, &(head % self.size).to_le_bytes())?;
        self.avail_idx = self.avail_idx.wrapping_add(1);
        fence(Ordering::SeqCst);
        region.write(self.at + AVAIL + 2, &self.avail_idx.to_le_bytes())?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Kicks the queue.
    pub(crate) fn kick(&self, device: &Device) {
        self.kick.signal();
        device.process_kick();
    }

    /// Reads the counter of the kick eventfd, which resets it to 0.
    pub(crate) fn read_kick_counter(&self) -> u64 {
        self.kick.drain()
    }

    /// Reads the counter of the call eventfd, which resets it to 0.
    pub(crate) fn read_call_counter(&self) -> u64 {
        self.call.drain()
    }

    /// Waits for a call. Returns whether the device called in time.
    pub(crate) fn wait_call(&self, timeout: Duration) -> bool {
        self.call.wait(Some(timeout))
    }

    /// Tells the device in the available ring's flags whether the driver wants calls.
    pub(crate) fn enable_calls(&self, region: &Region, enable: bool) -> Result<(), Stop> {
        let flags = if enable { 0 } else { NO_INTERRUPT };
        region.write(self.at + AVAIL, &flags.to_le_bytes())
    }

    /// Waits for the next completion and returns its head and length, or `None` if there is none in time. Resets the call
    /// eventfd only if it has to wait.
    pub(crate) fn completion(
        &mut self,
        region: &Region,
        timeout: Duration,
    ) -> Result<Option<(u16, u32)>, Stop> {
        if !self.wait(region, timeout, |used| used != self.used_idx)? {
            return Ok(None);
        }
        let slot = usize::from(self.used_idx % self.size);
        let element: [u8; 8] = region.read(self.at + USED + 4 + 8 * slot)?;
        let [a, b, _, _, len @ ..] = element;
        self.used_idx = self.used_idx.wrapping_add(1);
        Ok(Some((u16::from_le_bytes([a, b]), u32::from_le_bytes(len))))
    }

    /// Waits until the device has used every request. Returns whether it has in time.
    pub(crate) fn wait_all_used(&self, region: &Region, timeout: Duration) -> Result<bool, Stop> {
        match &self.packed {
            None => self.wait(region, timeout, |used| used == self.avail_idx),
            Some(position) => self.wait_until(timeout, || position.all_used(region, self.at + DESC)),
        }
    }

    /// Waits until `done` returns true for the used index. Returns whether it has in time.
    fn wait(&self, region: &Region, timeout: Duration, done: impl Fn(u16) -> bool) -> Result<bool, Stop> {
        self.wait_until(timeout, || Ok(done(u16::from_le_bytes(region.read(self.at + USED + 2)?))))
    }

    /// Waits until `done` returns true. Returns whether it has in time.
    fn wait_until(
        &self,
        timeout: Duration,
        mut done: impl FnMut() -> Result<bool, Stop>,
    ) -> Result<bool, Stop> {
        let deadline = Instant::now() + timeout;
        loop {
            if done()? {
                fence(Ordering::SeqCst);
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            if self.call.wait(Some(left.min(POLL_INTERVAL))) {
                let _ = self.call.drain();
            }
        }
    }
}
