//! [`BlkDriver`]: the smallest driver that proves whether a block device reaches its memory.
//!
//! One ring with one request at a time, read of sector 0.

use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::types::{IotlbMsg, Perm, iotlb_type};

use crate::case::{Ctx, Stop, check, prepare};
use crate::device::{Device, WRITTEN};
use crate::memory::Region;
use crate::ring::{Format, IOVA, PATIENCE, Part, RING_PAGES, Ring, SILENCE};

/// Entries of the ring.
const SIZE: u16 = 8;

// Offsets into the region, behind the ring.
const HEADER: usize = 0x3000;
const STATUS: usize = 0x3010;
const DATA: usize = 0x4000;
const PAGES: u64 = RING_PAGES + 2;
const SECTOR: u32 = 512;

/// Not a status of virtio-blk: still there when the device has not written.
const UNANSWERED: u8 = 0xff;

/// A driver of a block device, set up and running.
#[derive(Debug)]
pub(crate) struct BlkDriver {
    pub(crate) device: Device,
    pub(crate) region: Region,
    ring: Ring,
}

impl BlkDriver {
    /// Opens the device, becomes its owner, acknowledges `backend`, maps memory and starts queue 0.
    pub(crate) fn start(ctx: &Ctx<'_>, backend: BackendFeatures) -> Result<Self, Stop> {
        Self::start_over(ctx, Format::Split, backend)
    }

    /// As [`start`](Self::start), with a ring of this format.
    pub(crate) fn start_over(ctx: &Ctx<'_>, format: Format, backend: BackendFeatures) -> Result<Self, Stop> {
        let device = ctx.open_owned()?;
        prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(backend))?;
        let region = Self::memory()?;
        check("UPDATE of the ring's memory", device.map(IOVA, &region, Perm::RW), Ok(WRITTEN))?;
        let Self { device, region, ring } = Self::over(device, region)?;
        let mut driver = Self { device, region, ring: ring.in_format(format) };
        driver.set_up(ctx)?;
        driver.go()?;
        Ok(driver)
    }

    /// A driver of a device whose owner has mapped `region` at [`IOVA`]; nothing is set up.
    pub(crate) fn over(device: Device, region: Region) -> Result<Self, Stop> {
        Ok(Self { device, region, ring: Ring::new(0, SIZE, 0)? })
    }

    /// Memory for a ring.
    pub(crate) fn memory() -> Result<Region, Stop> {
        Region::new(PAGES)
    }

    /// Features and queue 0, up to just before DRIVER_OK, as after a reset: with an empty ring from its beginning.
    ///
    /// Vring requests are made by this process, which must be the owner.
    pub(crate) fn set_up(&mut self, ctx: &Ctx<'_>) -> Result<(), Stop> {
        self.ring.clear(&self.region)?;
        self.set_up_at(ctx, self.base())
    }

    /// As [`set_up`](Self::set_up), with the ring as it is, from index `base`.
    pub(crate) fn set_up_at(&self, ctx: &Ctx<'_>, base: u32) -> Result<(), Stop> {
        self.negotiate(ctx)?;
        self.ring.set_up(&self.device, base)
    }

    /// Status and features, up to FEATURES_OK.
    pub(crate) fn negotiate(&self, ctx: &Ctx<'_>) -> Result<(), Stop> {
        let features = match self.ring.format() {
            Format::Split => ctx.plain_features(),
            Format::Packed => ctx.plain_features().with(Features::RING_PACKED),
        };
        negotiate(&self.device, features)
    }

    /// DRIVER_OK.
    pub(crate) fn go(&self) -> Result<(), Stop> {
        go(&self.device)
    }

    /// Submits a read of sector 0 and waits for it: the device reaches the memory.
    pub(crate) fn works(&mut self, when: &str) -> Result<(), Stop> {
        self.submit()?;
        self.completes(when)
    }

    /// What was submitted completes, with status OK.
    pub(crate) fn completes(&self, when: &str) -> Result<(), Stop> {
        if !self.ring.wait_all(&self.region, PATIENCE)? {
            return Err(Stop::Failed(format!(
                "{when}: a read did not complete within {} s",
                PATIENCE.as_secs()
            )));
        }
        check(&format!("{when}: status of the read"), self.status_byte()?, 0)
    }

    /// Nothing of what was submitted completes.
    pub(crate) fn stays_silent(&self, when: &str) -> Result<(), Stop> {
        if self.ring.wait_all(&self.region, SILENCE)? {
            return Err(Stop::Failed(format!("{when}: a read completed, none should")));
        }
        check(&format!("{when}: status byte in memory"), self.status_byte()?, UNANSWERED)
    }

    /// Makes a read of sector 0 available and kicks.
    pub(crate) fn submit(&mut self) -> Result<(), Stop> {
        self.region.write(HEADER, &[0; 16])?;
        self.region.write(STATUS, &[UNANSWERED])?;
        let parts = [Part::readable(HEADER, 16), Part::writable(DATA, SECTOR), Part::writable(STATUS, 1)];
        self.ring.submit(&self.region, 0, &parts)?;
        self.kick();
        Ok(())
    }

    /// Makes the device listen to the kicks again.
    pub(crate) fn install_kick(&self) -> Result<(), Stop> {
        self.ring.install_kick(&self.device)
    }

    /// Kicks once more.
    pub(crate) fn kick(&self) {
        self.ring.kick(&self.device);
    }

    /// The counter of the kick eventfd, which is set to 0 by that.
    pub(crate) fn kick_count(&self) -> u64 {
        self.ring.kick_count()
    }

    /// Where a device is that has completed everything, as GET_VRING_BASE tells it.
    pub(crate) fn base(&self) -> u32 {
        self.ring.base()
    }

    fn status_byte(&self) -> Result<u8, Stop> {
        self.region.read(STATUS).map(u8::from_ne_bytes)
    }
}

/// Status and features, up to FEATURES_OK.
pub(crate) fn negotiate(device: &Device, features: Features) -> Result<(), Stop> {
    let known = Status::ACKNOWLEDGE | Status::DRIVER;
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(known))?;
    prepare("VHOST_SET_FEATURES", device.set_features(features))?;
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(known | Status::FEATURES_OK))
}

/// DRIVER_OK.
pub(crate) fn go(device: &Device) -> Result<(), Stop> {
    let running = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(running))?;
    check("status after DRIVER_OK", device.status(), Ok(running.0))
}

/// `REMAP` of the region as this process has it.
pub(crate) fn remap_message(uaddr: u64, size: u64) -> IotlbMsg {
    IotlbMsg { iova: IOVA, size, uaddr, perm: Perm::NONE, kind: iotlb_type::REMAP }
}
