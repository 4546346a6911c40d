//! [`BlkDriver`]: the smallest driver that proves whether a block device reaches its memory.
//!
//! One split ring with one request at a time, read of sector 0. Written out here and not taken from the library of
//! rings, which is among the things checked.

use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use std::os::fd::AsFd;

use vdpa_core::features::{BackendFeatures, Status};
use vdpa_core::types::{IotlbMsg, Perm, VringAddr, iotlb_type};
use vdpa_sys::eventfd::EventFd;

use crate::case::{Ctx, Stop, check, prepare};
use crate::device::{Device, WRITTEN};
use crate::memory::Region;
use crate::request::Request;

/// Entries of the ring.
const SIZE: u16 = 8;
/// Where the memory is mapped for the device.
pub(crate) const IOVA: u64 = 0x10_0000;

// Offsets into the region: one page for each area.
const DESC: usize = 0;
const AVAIL: usize = 0x1000;
const USED: usize = 0x2000;
const HEADER: usize = 0x3000;
const STATUS: usize = 0x3010;
const DATA: usize = 0x4000;
const PAGES: u64 = 5;
const SECTOR: u32 = 512;

const DESC_F_NEXT: u16 = 1;
const DESC_F_WRITE: u16 = 2;
/// Not a status of virtio-blk: still there when the device has not written.
const UNANSWERED: u8 = 0xff;

/// How long a device that works may take for one request.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long to wait for what should not come.
const SILENCE: Duration = Duration::from_millis(300);

/// A driver of a block device, set up and running.
#[derive(Debug)]
pub(crate) struct BlkDriver {
    pub(crate) device: Device,
    pub(crate) region: Region,
    kick: EventFd,
    call: EventFd,
    /// Requests made available so far.
    submitted: u16,
}

impl BlkDriver {
    /// Opens the device, becomes its owner, acknowledges `backend`, maps memory and starts queue 0.
    pub(crate) fn start(ctx: &Ctx<'_>, backend: BackendFeatures) -> Result<Self, Stop> {
        let device = ctx.open_owned()?;
        prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(backend))?;
        let region = Self::memory()?;
        check("UPDATE of the ring's memory", device.map(IOVA, &region, Perm::RW), Ok(WRITTEN))?;
        let mut driver = Self::over(device, region)?;
        driver.set_up(ctx)?;
        driver.go()?;
        Ok(driver)
    }

    /// A driver of a device whose owner has mapped `region` at [`IOVA`]; nothing is set up.
    pub(crate) fn over(device: Device, region: Region) -> Result<Self, Stop> {
        let (kick, call) = (prepare("eventfd", EventFd::new())?, prepare("eventfd", EventFd::new())?);
        Ok(Self { device, region, kick, call, submitted: 0 })
    }

    /// Memory for a ring.
    pub(crate) fn memory() -> Result<Region, Stop> {
        Region::new(PAGES)
    }

    /// Features and queue 0, up to just before DRIVER_OK, as after a reset: with an empty ring from index 0.
    ///
    /// Vring requests are made by this process, which must be the owner.
    pub(crate) fn set_up(&mut self, ctx: &Ctx<'_>) -> Result<(), Stop> {
        self.clear_ring()?;
        self.set_up_at(ctx, 0)
    }

    /// As [`set_up`](Self::set_up), with the ring as it is, from index `base`.
    pub(crate) fn set_up_at(&self, ctx: &Ctx<'_>, base: u32) -> Result<(), Stop> {
        self.negotiate(ctx)?;
        let device = &self.device;
        prepare("VHOST_SET_VRING_NUM", device.set_vring(Request::SET_VRING_NUM, 0, SIZE.into()))?;
        prepare("VHOST_SET_VRING_BASE", device.set_vring(Request::SET_VRING_BASE, 0, base))?;
        prepare("VHOST_SET_VRING_ADDR", device.set_addr(0, &ring_addr()))?;
        prepare("VHOST_SET_VRING_KICK", device.set_fd(Request::SET_VRING_KICK, 0, Some(self.kick.as_fd())))?;
        prepare("VHOST_SET_VRING_CALL", device.set_fd(Request::SET_VRING_CALL, 0, Some(self.call.as_fd())))?;
        prepare("VHOST_VDPA_SET_VRING_ENABLE", device.set_vring(Request::SET_VRING_ENABLE, 0, 1))
    }

    /// Status and features, up to FEATURES_OK.
    pub(crate) fn negotiate(&self, ctx: &Ctx<'_>) -> Result<(), Stop> {
        let device = &self.device;
        let known = Status::ACKNOWLEDGE | Status::DRIVER;
        prepare("VHOST_VDPA_SET_STATUS", device.set_status(known))?;
        prepare("VHOST_SET_FEATURES", device.set_features(ctx.plain_features()))?;
        prepare("VHOST_VDPA_SET_STATUS", device.set_status(known | Status::FEATURES_OK))
    }

    /// DRIVER_OK.
    pub(crate) fn go(&self) -> Result<(), Stop> {
        let running = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
        prepare("VHOST_VDPA_SET_STATUS", self.device.set_status(running))?;
        check("status after DRIVER_OK", self.device.status(), Ok(running.0))
    }

    /// The ring as at its start; what was submitted is forgotten.
    fn clear_ring(&mut self) -> Result<(), Stop> {
        self.submitted = 0;
        let _ = self.call.drain();
        for area in [DESC, AVAIL, USED] {
            self.region.write(area, &[0; AVAIL - DESC])?;
        }
        Ok(())
    }

    /// Submits a read of sector 0 and waits for it: the device reaches the memory.
    pub(crate) fn works(&mut self, when: &str) -> Result<(), Stop> {
        self.submit()?;
        self.completes(when)
    }

    /// What was submitted completes, with status OK.
    pub(crate) fn completes(&self, when: &str) -> Result<(), Stop> {
        if !self.wait(PATIENCE)? {
            return Err(Stop::Failed(format!(
                "{when}: a read did not complete within {} s",
                PATIENCE.as_secs()
            )));
        }
        check(&format!("{when}: status of the read"), self.status_byte()?, 0)
    }

    /// Nothing of what was submitted completes.
    pub(crate) fn stays_silent(&self, when: &str) -> Result<(), Stop> {
        if self.wait(SILENCE)? {
            return Err(Stop::Failed(format!("{when}: a read completed, none should")));
        }
        check(&format!("{when}: status byte in memory"), self.status_byte()?, UNANSWERED)
    }

    /// Makes a read of sector 0 available and kicks.
    pub(crate) fn submit(&mut self) -> Result<(), Stop> {
        self.region.write(HEADER, &[0; 16])?;
        self.region.write(STATUS, &[UNANSWERED])?;
        self.describe(0, HEADER, 16, DESC_F_NEXT, 1)?;
        self.describe(1, DATA, SECTOR, DESC_F_NEXT | DESC_F_WRITE, 2)?;
        self.describe(2, STATUS, 1, DESC_F_WRITE, 0)?;
        let slot = usize::from(self.submitted % SIZE);
        self.region.write(AVAIL + 4 + 2 * slot, &0_u16.to_le_bytes())?;
        self.submitted = self.submitted.wrapping_add(1);
        fence(Ordering::SeqCst);
        self.region.write(AVAIL + 2, &self.submitted.to_le_bytes())?;
        fence(Ordering::SeqCst);
        self.kick();
        Ok(())
    }

    /// Kicks once more.
    pub(crate) fn kick(&self) {
        self.kick.signal();
        self.device.kicked();
    }

    /// The counter of the kick eventfd, which is set to 0 by that.
    pub(crate) fn kick_count(&self) -> u64 {
        self.kick.drain()
    }

    /// Requests made available so far.
    pub(crate) fn submitted(&self) -> u16 {
        self.submitted
    }

    fn describe(&self, index: usize, offset: usize, len: u32, flags: u16, next: u16) -> Result<(), Stop> {
        let mut bytes = Vec::with_capacity(16);
        bytes.extend_from_slice(&(IOVA + offset as u64).to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        self.region.write(DESC + 16 * index, &bytes)
    }

    /// Waits until everything submitted was used; whether it was.
    fn wait(&self, patience: Duration) -> Result<bool, Stop> {
        let deadline = std::time::Instant::now() + patience;
        loop {
            if u16::from_le_bytes(self.region.read(USED + 2)?) == self.submitted {
                fence(Ordering::SeqCst);
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            if self.call.wait(Some(left)) {
                let _ = self.call.drain();
            }
        }
    }

    fn status_byte(&self) -> Result<u8, Stop> {
        self.region.read(STATUS).map(u8::from_ne_bytes)
    }
}

/// Where the areas of the ring are for the device.
pub(crate) fn ring_addr() -> VringAddr {
    let at = |offset: usize| IOVA + offset as u64;
    VringAddr { flags: 0, desc: at(DESC), used: at(USED), avail: at(AVAIL), log: 0 }
}

/// `REMAP` of the region as this process has it.
pub(crate) fn remap_message(uaddr: u64, size: u64) -> IotlbMsg {
    IotlbMsg { iova: IOVA, size, uaddr, perm: Perm::NONE, kind: iotlb_type::REMAP }
}
