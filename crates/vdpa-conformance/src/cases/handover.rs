//! Cases about a device with the attribute `handover open`: a successor can open it a second time. The kernel has no such
//! devices.

use std::mem;

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Status};
use vdpa_core::types::Perm;

use crate::blk_driver::BlkDriver;
use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::device::{Device, MESSAGE_SIZE};
use crate::request::Request;
use crate::ring::IOVA;

/// A block device whose ring is large enough for the driver, and that can be opened twice.
const NEEDS: &[Need] = &[
    Need::SecondOpen,
    Need::DeviceId(2),
    Need::RingSize(8),
    Need::Backend(BackendFeatures::SUSPEND),
    Need::Backend(BackendFeatures::RESUME),
];

pub(super) const CASES: &[Case] = &[
    Case {
        id: "handover.second-open",
        spec: "4.2",
        covers: &[Request::OPEN, Request::CLOSE],
        needs: &[Need::SecondOpen],
        run: second_open,
    },
    Case {
        id: "handover.takes-over",
        spec: "4.2, 1.8",
        covers: &[Request::OPEN, Request::SET_STATUS, Request::SUSPEND],
        needs: NEEDS,
        run: takes_over,
    },
    Case {
        id: "handover.gives-up",
        spec: "4.2, 4.7",
        covers: &[Request::OPEN, Request::CLOSE, Request::RESUME],
        needs: NEEDS,
        run: gives_up,
    },
    Case {
        id: "handover.first-closes",
        spec: "4.2, 4.7",
        covers: &[Request::OPEN, Request::CLOSE],
        needs: NEEDS,
        run: first_closes,
    },
];

fn second_open(ctx: &mut Ctx<'_>) -> Outcome {
    let first = ctx.open_owned()?;
    prepare("VHOST_VDPA_SET_STATUS", first.set_status(Status::ACKNOWLEDGE))?;
    let second = ctx.open()?;
    check("GET_STATUS of the second", second.status(), Ok(0))?;
    check("a third open", ctx.try_open().map(drop), Err(Errno::BUSY))?;
    check("SET_OWNER by the second", second.call(Request::SET_OWNER), Ok(()))?;
    check("SET_OWNER by the first, once more", first.call(Request::SET_OWNER), Err(Errno::BUSY))?;
    check("GET_STATUS of the first", first.status(), Ok(Status::ACKNOWLEDGE.0))?;
    drop(second);
    check("an open after the second was closed", ctx.try_open().map(drop), Ok(()))
}

/// Starts a driver, and opens its device a second time with the driver's memory mapped.
fn driver_and_second_open(ctx: &Ctx<'_>) -> Result<(BlkDriver, Device), Stop> {
    let mut driver = BlkDriver::start(ctx, BackendFeatures::NONE)?;
    driver.read_sector("before the second open")?;
    let second = ctx.open_owned()?;
    check("UPDATE by the second", second.map(IOVA, &driver.region, Perm::RW), Ok(MESSAGE_SIZE))?;
    Ok((driver, second))
}

fn takes_over(ctx: &mut Ctx<'_>) -> Outcome {
    let (mut driver, second) = driver_and_second_open(ctx)?;
    driver.read_sector("with a successor that has mapped memory")?;
    let base = driver.vring_base();
    let first = mem::replace(&mut driver.device, second);
    driver.set_up_at(ctx, base)?;
    let running = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::DRIVER_OK;
    let early = driver.device.set_status(running);
    check("DRIVER_OK by the second while a queue of the first runs", early, Err(Errno::BUSY))?;
    check("GET_STATUS of the first", first.status(), Ok(running.0))?;
    check("SUSPEND by the first", first.call(Request::SUSPEND), Ok(()))?;
    check("GET_VRING_BASE of the first", first.vring(Request::GET_VRING_BASE, 0, 0), Ok(base))?;
    driver.set_driver_ok()?;
    driver.read_sector("taken over")?;
    check("GET_STATUS of the first", first.status().map(drop), Err(Errno::IO))?;
    check("RESUME by the first", first.call(Request::RESUME), Err(Errno::IO))?;
    drop(first);
    driver.read_sector("after the first was closed")
}

fn gives_up(ctx: &mut Ctx<'_>) -> Outcome {
    let (mut driver, second) = driver_and_second_open(ctx)?;
    drop(second);
    driver.read_sector("after the second was closed")?;
    let second = ctx.open()?;
    check("SUSPEND by the first", driver.device.call(Request::SUSPEND), Ok(()))?;
    driver.submit()?;
    drop(second);
    driver.expect_no_completion("suspended, the second was closed")?;
    check("RESUME by the first", driver.device.call(Request::RESUME), Ok(()))?;
    driver.expect_completion("after RESUME")
}

fn first_closes(ctx: &mut Ctx<'_>) -> Outcome {
    let (mut driver, second) = driver_and_second_open(ctx)?;
    drop(mem::replace(&mut driver.device, second));
    check("GET_STATUS of the second", driver.device.status(), Ok(0))?;
    driver.set_up_at(ctx, driver.vring_base())?;
    driver.set_driver_ok()?;
    driver.read_sector("after the first was closed")
}
