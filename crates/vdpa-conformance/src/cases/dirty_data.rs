//! Cases about what dirty tracking reports of a block device's reads.

use vdpa_core::features::{BackendFeatures, Features};

use super::dirty::{Get, NEEDS};
use crate::blk_driver::BlkDriver;
use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::memory::{PAGE, Region};
use crate::request::Request;
use crate::ring::{Format, IOVA};

/// Defines the cases once for each ring format.
macro_rules! cases {
    ($($name:literal, [$($request:ident),+], $run:ident;)+) => {
        pub(super) const CASES: &[Case] = &[$(
            Case {
                id: concat!("dirty.", $name),
                spec: "8.9",
                covers: &[$(Request::$request),+],
                needs: &[NEEDS[0], NEEDS[1], Need::DeviceId(2), Need::RingSize(8)],
                run: |ctx| $run(ctx, Format::Split),
            },
            Case {
                id: concat!("dirty-packed.", $name),
                spec: "8.9",
                covers: &[$(Request::$request),+],
                needs: &[
                    NEEDS[0],
                    NEEDS[1],
                    Need::DeviceId(2),
                    Need::RingSize(8),
                    Need::Feature(Features::RING_PACKED),
                ],
                run: |ctx| $run(ctx, Format::Packed),
            },
        )+];
    };
}

cases! {
    "read", [DIRTY_START, DIRTY_STOP, DIRTY_GET], read;
    "unmap", [DIRTY_UNMAP], unmap;
}

/// A driver whose memory is tracked, and a bitmap.
struct Tracked {
    driver: BlkDriver,
    bitmap: Region,
}

impl Tracked {
    fn start(ctx: &Ctx<'_>, format: Format) -> Result<Self, Stop> {
        let this = Self {
            driver: BlkDriver::start_with_format(ctx, format, BackendFeatures::NONE)?,
            bitmap: Region::new(1)?,
        };
        this.track()?;
        Ok(this)
    }

    fn track(&self) -> Outcome {
        let list = Region::new(1)?;
        let size = self.driver.region.size();
        list.write(0, &[IOVA.to_ne_bytes(), size.to_ne_bytes(), [0; 8]].concat())?;
        let words = [PAGE, 1, list.uaddr()];
        let mut argument = [32_u32.to_ne_bytes(), [0; 4]].concat();
        argument.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        check("DIRTY_START", self.driver.device.set(Request::DIRTY_START, &argument), Ok(()))
    }

    fn get(&self, flags: u32) -> Get {
        Get {
            flags,
            iova: IOVA,
            length: self.driver.region.size(),
            asid: 0,
            page_size: PAGE,
            bitmap_size: 8,
            bitmap: self.bitmap.uaddr(),
        }
    }

    /// Makes the request; the pages that it reports.
    fn pages(&self, get: Get, request: Request) -> Result<Vec<u64>, Stop> {
        self.bitmap.write(0, &[0; 8])?;
        prepare(request.name, get.request(&self.driver.device, request))?;
        let bits = u64::from_ne_bytes(self.bitmap.read(0)?);
        Ok((0..64).filter(|page| bits >> page & 1 != 0).collect())
    }
}

fn read(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let mut tracked = Tracked::start(ctx, format)?;
    let written = tracked.driver.written_pages();
    tracked.driver.read_sector("tracked")?;
    // In a ring the device may still ask for kicks.
    let keep = tracked.get(1);
    check("GET that keeps", tracked.pages(keep, Request::DIRTY_GET)?, written.clone())?;
    check("GET", tracked.pages(tracked.get(0), Request::DIRTY_GET)?, written.clone())?;
    tracked.driver.read_sector("once more")?;
    prepare("VHOST_VDPA_SUSPEND", tracked.driver.device.call(Request::SUSPEND))?;
    check("GET after SUSPEND", tracked.pages(tracked.get(0), Request::DIRTY_GET)?, written)?;
    check("GET of what was cleared", tracked.pages(tracked.get(0), Request::DIRTY_GET)?, vec![])?;
    let bits = 0x5a5a_u64.to_ne_bytes();
    tracked.bitmap.write(0, &bits)?;
    prepare("VDPA_DIRTY_GET", tracked.get(0).request(&tracked.driver.device, Request::DIRTY_GET))?;
    check("bits that were set before", tracked.bitmap.read::<8>(0)?, bits)?;
    let stop = [8_u32.to_ne_bytes(), [0; 4]].concat();
    check("DIRTY_STOP", tracked.driver.device.set(Request::DIRTY_STOP, &stop), Ok(()))?;
    tracked.track()?;
    check("GET after STOP and START", tracked.pages(tracked.get(0), Request::DIRTY_GET)?, vec![])
}

fn unmap(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let mut tracked = Tracked::start(ctx, format)?;
    let written = tracked.driver.written_pages();
    tracked.driver.read_sector("tracked")?;
    check("UNMAP", tracked.pages(tracked.get(0), Request::DIRTY_UNMAP)?, written)?;
    tracked.driver.submit()?;
    tracked.driver.expect_no_completion("not mapped")?;
    check("GET of what was not mapped", tracked.pages(tracked.get(0), Request::DIRTY_GET)?, vec![])
}
