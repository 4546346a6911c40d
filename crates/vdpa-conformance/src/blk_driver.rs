//! [`BlkDriver`]: a minimal driver that shows whether a block device can access its memory.
//!
//! It has one ring and one request at a time, a read of sector 0.

use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::types::{IotlbMsg, Perm, VringAddr, iotlb_type};

use crate::case::{Ctx, Stop, check, prepare};
use crate::device::{Device, MESSAGE_SIZE};
use crate::memory::{PAGE, Region};
use crate::ring::{Format, IOVA, QUIET_TIME, RING_PAGES, Ring, Segment, TIMEOUT};

/// Entries of the ring.
const SIZE: u16 = 8;

// Offsets in the region, after the ring.
const HEADER: usize = 0x3000;
const STATUS: usize = 0x3010;
const DATA: usize = 0x4000;
const PAGES: u64 = RING_PAGES + 2;
const SECTOR: u32 = 512;

/// The value of the status byte before the request. Virtio-blk has no such status, so it shows that the device has not
/// written.
const UNWRITTEN: u8 = 0xff;

/// A driver of a block device.
#[derive(Debug)]
pub(crate) struct BlkDriver {
    pub(crate) device: Device,
    pub(crate) region: Region,
    ring: Ring,
}

impl BlkDriver {
    /// Opens the device, becomes its owner, acknowledges `backend`, maps memory and starts queue 0, a split ring.
    pub(crate) fn start(ctx: &Ctx<'_>, backend: BackendFeatures) -> Result<Self, Stop> {
        Self::start_with_format(ctx, Format::Split, backend)
    }

    /// As [`start`](Self::start), with a ring in this format.
    pub(crate) fn start_with_format(
        ctx: &Ctx<'_>,
        format: Format,
        backend: BackendFeatures,
    ) -> Result<Self, Stop> {
        let device = ctx.open_owned()?;
        prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(backend))?;
        let region = Self::memory()?;
        check("UPDATE of the ring's memory", device.map(IOVA, &region, Perm::RW), Ok(MESSAGE_SIZE))?;
        let Self { device, region, ring } = Self::new(device, region)?;
        let mut driver = Self { device, region, ring: ring.in_format(format) };
        driver.set_up(ctx)?;
        driver.set_driver_ok()?;
        Ok(driver)
    }

    /// Makes a driver of a device whose owner has mapped `region` at [`IOVA`]. Sets nothing up.
    pub(crate) fn new(device: Device, region: Region) -> Result<Self, Stop> {
        Ok(Self { device, region, ring: Ring::new(0, SIZE, 0)? })
    }

    /// Memory for the driver: its ring and buffers.
    pub(crate) fn memory() -> Result<Region, Stop> {
        Region::new(PAGES)
    }

    /// Negotiates features and sets queue 0 up with an empty ring, as after a reset. Does everything but DRIVER_OK.
    ///
    /// This process makes the vring requests, so it must be the owner.
    pub(crate) fn set_up(&mut self, ctx: &Ctx<'_>) -> Result<(), Stop> {
        self.ring.reset(&self.region)?;
        self.set_up_at(ctx, self.vring_base())
    }

    /// As [`set_up`](Self::set_up), but keeps the ring's contents, with vring base `base`.
    pub(crate) fn set_up_at(&self, ctx: &Ctx<'_>, base: u32) -> Result<(), Stop> {
        self.negotiate(ctx)?;
        self.ring.set_up(&self.device, base)
    }

    /// Sets status and features up to FEATURES_OK.
    pub(crate) fn negotiate(&self, ctx: &Ctx<'_>) -> Result<(), Stop> {
        let features = match self.ring.format() {
            Format::Split => ctx.base_features(),
            Format::Packed => ctx.base_features().with(Features::RING_PACKED),
        };
        negotiate(&self.device, features)
    }

    /// Sets DRIVER_OK.
    pub(crate) fn set_driver_ok(&self) -> Result<(), Stop> {
        set_driver_ok(&self.device)
    }

    /// Submits a read of sector 0 and waits for its completion, which shows that the device can access the memory.
    pub(crate) fn read_sector(&mut self, when: &str) -> Result<(), Stop> {
        self.submit()?;
        self.expect_completion(when)
    }

    /// Waits for the completion of the submitted read. Fails if it does not complete in time with status OK.
    pub(crate) fn expect_completion(&self, when: &str) -> Result<(), Stop> {
        if !self.ring.wait_all_used(&self.region, TIMEOUT)? {
            return Err(Stop::Failed(format!(
                "{when}: a read did not complete within {} s",
                TIMEOUT.as_secs()
            )));
        }
        check(&format!("{when}: status of the read"), self.status_byte()?, 0)
    }

    /// Fails if the submitted read completes within [`QUIET_TIME`].
    pub(crate) fn expect_no_completion(&self, when: &str) -> Result<(), Stop> {
        if self.ring.wait_all_used(&self.region, QUIET_TIME)? {
            return Err(Stop::Failed(format!("{when}: a read completed, none should")));
        }
        check(&format!("{when}: status byte in memory"), self.status_byte()?, UNWRITTEN)
    }

    /// Makes a read of sector 0 available and kicks.
    pub(crate) fn submit(&mut self) -> Result<(), Stop> {
        self.region.write(HEADER, &[0; 16])?;
        self.region.write(STATUS, &[UNWRITTEN])?;
        let segments =
            [Segment::readable(HEADER, 16), Segment::writable(DATA, SECTOR), Segment::writable(STATUS, 1)];
        self.ring.submit(&self.region, 0, &segments)?;
        self.kick();
        Ok(())
    }

    /// Installs the kick eventfd again.
    pub(crate) fn install_kick(&self) -> Result<(), Stop> {
        self.ring.install_kick(&self.device)
    }

    /// Kicks the queue.
    pub(crate) fn kick(&self) {
        self.ring.kick(&self.device);
    }

    /// Reads the counter of the kick eventfd, which resets it to 0.
    pub(crate) fn read_kick_counter(&self) -> u64 {
        self.ring.read_kick_counter()
    }

    /// I/O virtual addresses of its ring.
    pub(crate) fn ring_addr(&self) -> VringAddr {
        self.ring.addr()
    }

    /// The pages of its memory, by number, that the device writes for one read: those of the ring, of the data and of the status.
    pub(crate) fn written_pages(&self) -> Vec<u64> {
        let page = |offset: usize| offset as u64 / PAGE;
        let mut pages = self.ring.written_pages();
        pages.extend([page(DATA), page(STATUS)]);
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    /// The result of GET_VRING_BASE for a device that has completed every request.
    pub(crate) fn vring_base(&self) -> u32 {
        self.ring.vring_base()
    }

    fn status_byte(&self) -> Result<u8, Stop> {
        self.region.read(STATUS).map(u8::from_ne_bytes)
    }
}

/// Sets status and features up to FEATURES_OK.
pub(crate) fn negotiate(device: &Device, features: Features) -> Result<(), Stop> {
    let known = Status::ACKNOWLEDGE | Status::DRIVER;
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(known))?;
    prepare("VHOST_SET_FEATURES", device.set_features(features))?;
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(known | Status::FEATURES_OK))
}

/// Sets DRIVER_OK.
pub(crate) fn set_driver_ok(device: &Device) -> Result<(), Stop> {
    let running = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
    prepare("VHOST_VDPA_SET_STATUS", device.set_status(running))?;
    check("status after DRIVER_OK", device.status(), Ok(running.0))
}

/// A `REMAP` message for memory at [`IOVA`]: it is at `uaddr` in the process that writes the message.
pub(crate) fn remap_message(uaddr: u64, size: u64) -> IotlbMsg {
    IotlbMsg { iova: IOVA, size, uaddr, perm: Perm::NONE, kind: iotlb_type::REMAP }
}
