//! Live update: NEW_OWNER and REMAP.
//!
//! The second process is a program of its own and not a fork, so its addresses differ from those of the suite. Not
//! covered for that reason, or because the device does not say what it would take to know: vectors L4 and L9 of
//! uapi-spec 9.4 as far as they concern pinned pages, and L6.

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Status};
use vdpa_core::types::{IotlbMsg, Perm, iotlb_type};

use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::child::Child;
use crate::device::{Device, V2, WRITTEN, encode, pair};
use crate::memory::{PAGE, Region};
use crate::request::Request;
use crate::ring::{BlkDriver, IOVA, remap_message};

const NEW_OWNER: Need = Need::Backend(BackendFeatures::NEW_OWNER);
const REMAP: Need = Need::Backend(BackendFeatures::IOTLB_REMAP);
const NO_REMAP: Need = Need::NoBackend(BackendFeatures::IOTLB_REMAP);
const BLK: Need = Need::DeviceId(2);
const RING: Need = Need::RingSize(8);
const SUSPEND: Need = Need::Backend(BackendFeatures::SUSPEND);
const RESUME: Need = Need::Backend(BackendFeatures::RESUME);
const MAPPED: Result<usize, Errno> = Ok(WRITTEN);
const REFUSED: Result<usize, Errno> = Err(Errno::FAULT);

macro_rules! case {
    ($id:literal, $spec:literal, [$($request:ident),+], [$($need:expr),+], $run:ident) => {
        Case { id: $id, spec: $spec, covers: &[$(Request::$request),+], needs: &[NEW_OWNER, $($need),+], run: $run }
    };
    ($id:literal, $spec:literal, [$($request:ident),+], $run:ident) => {
        Case { id: $id, spec: $spec, covers: &[$(Request::$request),+], needs: &[NEW_OWNER], run: $run }
    };
}

pub(super) const CASES: &[Case] = &[
    case!("live.new-owner-without-owner", "8.4, 9.4 vector L1", [NEW_OWNER], without_owner),
    case!("live.new-owner-by-owner", "8.4, 9.4 vector L2", [NEW_OWNER], by_owner),
    case!("live.new-owner", "8.4, 9.4 vector L3", [NEW_OWNER, SET_VRING_NUM], [Need::Child], new_owner),
    case!("live.new-owner-keeps-state", "8.4", [NEW_OWNER], [Need::Child, SUSPEND], keeps_state),
    case!("live.new-owner-of-dead", "8.4", [NEW_OWNER], [Need::Child], of_dead),
    case!("live.remap", "8.5, 9.4 vector L5", [IOTLB_REMAP], [REMAP], remap),
    case!("live.remap-refused", "8.5", [IOTLB_REMAP], [REMAP, BLK, RING], remap_refused),
    case!("live.remap-batch", "8.5, 9.4 vector L7", [IOTLB_REMAP], [REMAP], remap_batch),
    case!("live.remap-by-old-owner", "8.5, 9.4 vector L8", [IOTLB_REMAP], [REMAP, Need::Child], remap_by_old),
    case!("live.remap-unsupported", "8.5, 9.4 vector L9", [IOTLB_REMAP], [NO_REMAP], remap_unsupported),
    case!(
        "live.stale",
        "8.5, 9.4 vector L10",
        [IOTLB_REMAP, NEW_OWNER],
        [REMAP, Need::Child, BLK, RING],
        stale
    ),
    case!(
        "live.reset",
        "8.3, 8.8, 9.4 vector L11",
        [NEW_OWNER, SET_STATUS],
        [Need::Child, BLK, RING, SUSPEND],
        reset
    ),
    case!("live.keeps-running", "8.4, 8.6", [NEW_OWNER], [Need::Child, BLK, RING], keeps_running),
    case!(
        "live.resume",
        "8.3",
        [NEW_OWNER, SUSPEND, RESUME],
        [Need::Child, BLK, RING, SUSPEND, RESUME],
        resume
    ),
];

fn without_owner(ctx: &mut Ctx<'_>) -> Outcome {
    check("NEW_OWNER without an owner", ctx.open()?.call(Request::NEW_OWNER), Err(Errno::INVAL))
}

fn by_owner(ctx: &mut Ctx<'_>) -> Outcome {
    check("NEW_OWNER by the owner", ctx.open_owned()?.call(Request::NEW_OWNER), Err(Errno::BUSY))
}

fn new_owner(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let mut child = ctx.child(&device)?;
    check("NEW_OWNER", child.call(Request::NEW_OWNER)?, Ok(()))?;
    check(
        "SET_VRING_NUM by the old owner",
        device.set_vring(Request::SET_VRING_NUM, 0, 1),
        Err(Errno::PERM),
    )?;
    check("SET_VRING_NUM by the new owner", child.set(Request::SET_VRING_NUM, &pair(0, 1))?, Ok(()))?;
    check("NEW_OWNER again", child.call(Request::NEW_OWNER)?, Err(Errno::BUSY))?;
    check("NEW_OWNER back", device.call(Request::NEW_OWNER), Ok(()))?;
    check("SET_VRING_NUM", device.set_vring(Request::SET_VRING_NUM, 0, 1), Ok(()))
}

fn keeps_state(ctx: &mut Ctx<'_>) -> Outcome {
    let device = super::state::reach(ctx, super::state::Stage::Suspended)?;
    let region = Region::new(1)?;
    check("UPDATE", device.map(0x1000, &region, Perm::RW), MAPPED)?;
    prepare("VHOST_SET_VRING_BASE", device.set_vring(Request::SET_VRING_BASE, 0, 9))?;
    let status = device.status();
    let mut child = ctx.child(&device)?;
    check("NEW_OWNER", child.call(Request::NEW_OWNER)?, Ok(()))?;
    check("status after NEW_OWNER", device.status(), status)?;
    check("SET_VRING_BASE: still suspended", child.set(Request::SET_VRING_BASE, &pair(0, 9))?, Ok(()))?;
    let uaddr = child.map(&region)?;
    let update = IotlbMsg { iova: 0x1000, size: PAGE, uaddr, perm: Perm::RW, kind: iotlb_type::UPDATE };
    check("UPDATE: still mapped", child.write(&encode(V2, 0, &update))?, REFUSED)?;
    check("NEW_OWNER back", device.call(Request::NEW_OWNER), Ok(()))?;
    check("GET_VRING_BASE", device.vring(Request::GET_VRING_BASE, 0, 0), Ok(9))
}

fn of_dead(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let mut child = ctx.child(&device)?;
    check("SET_OWNER", child.call(Request::SET_OWNER)?, Ok(()))?;
    drop(child);
    check("NEW_OWNER after the owner ended", device.call(Request::NEW_OWNER), Ok(()))?;
    check("SET_VRING_NUM", device.set_vring(Request::SET_VRING_NUM, 0, 1), Ok(()))
}

fn remap(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::new(2)?;
    check("UPDATE", device.map(IOVA, &region, Perm::RW), MAPPED)?;
    let exact = remap_message(region.uaddr(), region.size());
    for (what, message, want) in [
        ("exact", exact, MAPPED),
        ("the same again", exact, MAPPED),
        ("shorter", IotlbMsg { size: PAGE, ..exact }, REFUSED),
        ("longer", IotlbMsg { size: 3 * PAGE, ..exact }, REFUSED),
        ("not mapped", IotlbMsg { iova: 0x1000, ..exact }, REFUSED),
        ("with a permission", IotlbMsg { perm: Perm::RW, ..exact }, REFUSED),
        ("of size 0", IotlbMsg { size: 0, ..exact }, REFUSED),
        ("of everything", IotlbMsg { iova: 0, size: 0, ..exact }, REFUSED),
    ] {
        check(&format!("REMAP {what}"), device.message(0, message), want)?;
    }
    check("UPDATE: still mapped", device.map(IOVA, &region, Perm::RW), REFUSED)
}

fn remap_refused(ctx: &mut Ctx<'_>) -> Outcome {
    let mut driver = BlkDriver::start(ctx, BackendFeatures::NONE)?;
    driver.works("before")?;
    // Above the last mapping of any process.
    let message = remap_message(0xffff_8000_0000_0000, driver.region.size());
    check("REMAP to an address where nothing is mapped", driver.device.message(0, message), REFUSED)?;
    driver.works("after a REMAP that was refused")
}

fn remap_batch(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::new(1)?;
    let iovas = [0x1000, 0x3000, 0x5000];
    for iova in iovas {
        check("UPDATE", device.map(iova, &region, Perm::RW), MAPPED)?;
    }
    check("BATCH_BEGIN", device.plain(0, iotlb_type::BATCH_BEGIN), MAPPED)?;
    for iova in iovas {
        let message = IotlbMsg { iova, ..remap_message(region.uaddr(), PAGE) };
        check("REMAP in a batch", device.message(0, message), MAPPED)?;
    }
    check("BATCH_END", device.plain(0, iotlb_type::BATCH_END), MAPPED)
}

fn remap_by_old(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::new(1)?;
    check("UPDATE", device.map(IOVA, &region, Perm::RW), MAPPED)?;
    let mut child = ctx.child(&device)?;
    check("NEW_OWNER", child.call(Request::NEW_OWNER)?, Ok(()))?;
    let old = device.message(0, remap_message(region.uaddr(), PAGE));
    check("REMAP by the old owner", old, REFUSED)?;
    remap_in(&mut child, &region)
}

fn remap_unsupported(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::new(1)?;
    check("UPDATE", device.map(IOVA, &region, Perm::RW), MAPPED)?;
    check("REMAP", device.message(0, remap_message(region.uaddr(), PAGE)), REFUSED)
}

/// The child, which is the owner, maps `region` and gives its address to the device.
fn remap_in(child: &mut Child, region: &Region) -> Outcome {
    let uaddr = child.map(region)?;
    let message = encode(V2, 0, &remap_message(uaddr, region.size()));
    check("REMAP by the new owner", child.write(&message)?, MAPPED)
}

/// A device whose owner is a second process that has mapped a ring's memory.
fn owned_by_child(ctx: &Ctx<'_>) -> Result<(Device, Region, Child), Stop> {
    let device = ctx.open()?;
    let region = BlkDriver::memory()?;
    let mut child = ctx.child(&device)?;
    check("SET_OWNER", child.call(Request::SET_OWNER)?, Ok(()))?;
    let uaddr = child.map(&region)?;
    let message =
        IotlbMsg { iova: IOVA, size: region.size(), uaddr, perm: Perm::RW, kind: iotlb_type::UPDATE };
    check("UPDATE by the first owner", child.write(&encode(V2, 0, &message))?, MAPPED)?;
    Ok((device, region, child))
}

fn stale(ctx: &mut Ctx<'_>) -> Outcome {
    let (device, region, child) = owned_by_child(ctx)?;
    check("NEW_OWNER", device.call(Request::NEW_OWNER), Ok(()))?;
    let mut driver = BlkDriver::over(device, region)?;
    driver.set_up(ctx)?;
    driver.go()?;
    driver.submit()?;
    driver.stays_silent("between NEW_OWNER and REMAP")?;
    let message = remap_message(driver.region.uaddr(), driver.region.size());
    check("REMAP", driver.device.message(0, message), MAPPED)?;
    driver.kick();
    driver.completes("after REMAP and a kick")?;
    drop(child);
    driver.works("after the old owner ended")
}

fn reset(ctx: &mut Ctx<'_>) -> Outcome {
    let (device, region, child) = owned_by_child(ctx)?;
    let acknowledged = ctx.probe().backend.without(BackendFeatures::IOTLB_PERSIST);
    prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(acknowledged))?;
    let mut driver = BlkDriver::over(device, region)?;
    driver.negotiate(ctx)?;
    driver.go()?;
    check("SUSPEND", driver.device.call(Request::SUSPEND), Ok(()))?;
    check("SET_STATUS 0", driver.device.set_status(Status::RESET), Ok(()))?;
    drop(child);
    check("NEW_OWNER", driver.device.call(Request::NEW_OWNER), Ok(()))?;
    driver.set_up(ctx)?;
    if ctx.probe().backend.has(BackendFeatures::IOTLB_REMAP) {
        let message = remap_message(driver.region.uaddr(), driver.region.size());
        check("REMAP", driver.device.message(0, message), MAPPED)?;
    }
    driver.go()?;
    driver.works("after the sequence with a reset")
}

fn keeps_running(ctx: &mut Ctx<'_>) -> Outcome {
    let mut driver = BlkDriver::start(ctx, BackendFeatures::NONE)?;
    driver.works("before")?;
    let mut child = ctx.child(&driver.device)?;
    check("NEW_OWNER", child.call(Request::NEW_OWNER)?, Ok(()))?;
    if ctx.probe().backend.has(BackendFeatures::IOTLB_REMAP) {
        remap_in(&mut child, &driver.region)?;
    }
    driver.works("running on, with another owner")
}

fn resume(ctx: &mut Ctx<'_>) -> Outcome {
    let mut driver = BlkDriver::start(ctx, BackendFeatures::NONE)?;
    driver.works("before")?;
    check("SUSPEND", driver.device.call(Request::SUSPEND), Ok(()))?;
    driver.submit()?;
    let mut child = ctx.child(&driver.device)?;
    check("NEW_OWNER", child.call(Request::NEW_OWNER)?, Ok(()))?;
    if ctx.probe().backend.has(BackendFeatures::IOTLB_REMAP) {
        remap_in(&mut child, &driver.region)?;
    }
    check("RESUME by the new owner", child.call(Request::RESUME)?, Ok(()))?;
    driver.completes("what was submitted while suspended")?;
    driver.works("after RESUME")
}
