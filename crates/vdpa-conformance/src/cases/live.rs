//! Cases about live update: NEW_OWNER and REMAP.
//!
//! A second process is either a new program with other virtual addresses, as after an exec, or a forked child, in which the
//! old addresses are valid. A device does not report whether it counts pinned memory. The cases that need this find it out,
//! and cannot be run on a device that does not count.

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Status};
use vdpa_core::types::{IotlbMsg, Perm, iotlb_type};

use crate::blk_driver::{BlkDriver, remap_message};
use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::child::Child;
use crate::device::{Device, MESSAGE_SIZE, V2, encode, pair};
use crate::memory::{PAGE, Region};
use crate::request::Request;
use crate::ring::IOVA;

const NEW_OWNER: Need = Need::Backend(BackendFeatures::NEW_OWNER);
const REMAP: Need = Need::Backend(BackendFeatures::IOTLB_REMAP);
const NO_REMAP: Need = Need::NoBackend(BackendFeatures::IOTLB_REMAP);
const BLK: Need = Need::DeviceId(2);
const RING: Need = Need::RingSize(8);
const SUSPEND: Need = Need::Backend(BackendFeatures::SUSPEND);
const RESUME: Need = Need::Backend(BackendFeatures::RESUME);
const MAPPED: Result<usize, Errno> = Ok(MESSAGE_SIZE);
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
    case!("live.fork-new-owner", "8.4, 9.4 vector L3", [NEW_OWNER, SET_VRING_NUM], fork_new_owner),
    case!("live.fork-stale", "8.5, 9.4 vector L10", [IOTLB_REMAP, NEW_OWNER], [REMAP, BLK, RING], fork_stale),
    case!("live.new-owner-memlock", "8.4, 9.4 vector L4", [NEW_OWNER], [Need::Child], memlock),
    case!("live.remap-fragments", "8.5, 9.4 vector L6", [IOTLB_REMAP], [REMAP], remap_fragments),
    case!("live.remap-gap", "3.2, 8.5", [IOTLB_REMAP], [REMAP], remap_gap),
    case!("live.remap-pinned", "8.5, 9.4 vector L9", [IOTLB_REMAP], [NO_REMAP, Need::Child], remap_pinned),
    Case {
        id: "live.new-owner-unoffered",
        spec: "8.1, 8.4",
        covers: &[Request::NEW_OWNER],
        needs: &[Need::NoBackend(BackendFeatures::NEW_OWNER)],
        run: unoffered,
    },
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
    let device = super::state::open_in(ctx, super::state::DeviceState::Suspended)?;
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
    driver.read_sector("before")?;
    // Above the last mapping of any process.
    let message = remap_message(0xffff_8000_0000_0000, driver.region.size());
    check("REMAP to an address where nothing is mapped", driver.device.message(0, message), REFUSED)?;
    driver.read_sector("after a REMAP that was refused")
}

fn remap_batch(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::new(1)?;
    let iovas = [0x1000, 0x3000, 0x5000];
    for iova in iovas {
        check("UPDATE", device.map(iova, &region, Perm::RW), MAPPED)?;
    }
    check("BATCH_BEGIN", device.message_of_type(0, iotlb_type::BATCH_BEGIN), MAPPED)?;
    for iova in iovas {
        let message = IotlbMsg { iova, ..remap_message(region.uaddr(), PAGE) };
        check("REMAP in a batch", device.message(0, message), MAPPED)?;
    }
    check("BATCH_END", device.message_of_type(0, iotlb_type::BATCH_END), MAPPED)
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

/// Has the child, which is the owner, map `region` and send a REMAP with its address there.
fn remap_in(child: &mut Child, region: &Region) -> Outcome {
    let uaddr = child.map(region)?;
    let message = encode(V2, 0, &remap_message(uaddr, region.size()));
    check("REMAP by the new owner", child.write(&message)?, MAPPED)
}

/// Opens a device whose owner is a second process, which has mapped a ring's memory for it.
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
    let mut driver = BlkDriver::new(device, region)?;
    driver.set_up(ctx)?;
    driver.set_driver_ok()?;
    driver.submit()?;
    driver.expect_no_completion("between NEW_OWNER and REMAP")?;
    let message = remap_message(driver.region.uaddr(), driver.region.size());
    check("REMAP", driver.device.message(0, message), MAPPED)?;
    driver.kick();
    driver.expect_completion("after REMAP and a kick")?;
    drop(child);
    driver.read_sector("after the old owner ended")
}

fn reset(ctx: &mut Ctx<'_>) -> Outcome {
    let (device, region, child) = owned_by_child(ctx)?;
    let acknowledged = ctx.probe().backend.without(BackendFeatures::IOTLB_PERSIST);
    prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(acknowledged))?;
    let mut driver = BlkDriver::new(device, region)?;
    driver.negotiate(ctx)?;
    driver.set_driver_ok()?;
    check("SUSPEND", driver.device.call(Request::SUSPEND), Ok(()))?;
    check("SET_STATUS 0", driver.device.set_status(Status::RESET), Ok(()))?;
    drop(child);
    check("NEW_OWNER", driver.device.call(Request::NEW_OWNER), Ok(()))?;
    driver.set_up(ctx)?;
    if ctx.probe().backend.has(BackendFeatures::IOTLB_REMAP) {
        let message = remap_message(driver.region.uaddr(), driver.region.size());
        check("REMAP", driver.device.message(0, message), MAPPED)?;
    }
    driver.set_driver_ok()?;
    driver.read_sector("after the sequence with a reset")
}

fn fork_new_owner(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let child = ctx.fork(&device)?;
    check("NEW_OWNER by a forked child", child.call(Request::NEW_OWNER)?, Ok(()))?;
    let old = device.set_vring(Request::SET_VRING_NUM, 0, 1);
    check("SET_VRING_NUM by its parent", old, Err(Errno::PERM))?;
    check("SET_VRING_NUM by the child", child.set(Request::SET_VRING_NUM, &pair(0, 1))?, Ok(()))?;
    check("NEW_OWNER again", child.call(Request::NEW_OWNER)?, Err(Errno::BUSY))?;
    check("NEW_OWNER back", device.call(Request::NEW_OWNER), Ok(()))
}

fn fork_stale(ctx: &mut Ctx<'_>) -> Outcome {
    let mut driver = BlkDriver::start(ctx, BackendFeatures::NONE)?;
    driver.read_sector("before")?;
    let child = ctx.fork(&driver.device)?;
    check("NEW_OWNER by a forked child", child.call(Request::NEW_OWNER)?, Ok(()))?;
    driver.submit()?;
    driver.expect_no_completion("between NEW_OWNER and REMAP, the old address valid")?;
    let message = encode(V2, 0, &remap_message(driver.region.uaddr(), driver.region.size()));
    check("REMAP by the child, to the same address", child.write(&message)?, MAPPED)?;
    driver.kick();
    driver.expect_completion("after REMAP and a kick")
}

/// Opens a device whose owner is a second process with a limit of `pages` locked pages, and has it map as many. Returns also
/// the memory and its address in that process. Fails with [`Stop::CannotRun`] if the device does not count pinned memory.
fn at_the_limit(ctx: &Ctx<'_>, pages: u64) -> Result<(Device, Child, Region, u64), Stop> {
    let device = ctx.open()?;
    let mut child = ctx.child(&device)?;
    child.limit_memlock(pages)?;
    check("SET_OWNER", child.call(Request::SET_OWNER)?, Ok(()))?;
    let region = Region::new(pages)?;
    let uaddr = child.map(&region)?;
    check("UPDATE up to the limit", child.write(&update_message(IOVA, pages, uaddr))?, MAPPED)?;
    if child.write(&update_message(0, 1, uaddr))? == MAPPED {
        return Err(Stop::CannotRun(
            "the device does not hold RLIMIT_MEMLOCK against pinned memory".to_owned(),
        ));
    }
    Ok((device, child, region, uaddr))
}

fn update_message(iova: u64, pages: u64, uaddr: u64) -> Vec<u8> {
    let size = pages * PAGE;
    encode(V2, 0, &IotlbMsg { iova, size, uaddr, perm: Perm::RW, kind: iotlb_type::UPDATE })
}

fn memlock(ctx: &mut Ctx<'_>) -> Outcome {
    let (device, mut owner, _region, uaddr) = at_the_limit(ctx, 4)?;
    let mut child = ctx.child(&device)?;
    child.limit_memlock(3)?;
    check("NEW_OWNER over the limit", child.call(Request::NEW_OWNER)?, Err(Errno::NOMEM))?;
    check("SET_VRING_NUM by it", child.set(Request::SET_VRING_NUM, &pair(0, 1))?, Err(Errno::PERM))?;
    check("SET_VRING_NUM by the owner", owner.set(Request::SET_VRING_NUM, &pair(0, 1))?, Ok(()))?;
    check("NEW_OWNER by the owner, at its limit", owner.call(Request::NEW_OWNER)?, Err(Errno::BUSY))?;
    child.limit_memlock(4)?;
    check("NEW_OWNER up to the limit", child.call(Request::NEW_OWNER)?, Ok(()))?;
    check("UPDATE by the new owner: it was charged", child.write(&update_message(0, 1, uaddr))?, REFUSED)
}

fn remap_fragments(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::in_two_mappings()?;
    check("UPDATE of two mappings", device.map(IOVA, &region, Perm::RW), MAPPED)?;
    let whole = remap_message(region.uaddr(), region.size());
    check("REMAP of both", device.message(0, whole), MAPPED)?;
    check("REMAP of the first", device.message(0, IotlbMsg { size: PAGE, ..whole }), MAPPED)?;
    let second = IotlbMsg { iova: IOVA + PAGE, size: PAGE, uaddr: region.uaddr() + PAGE, ..whole };
    check("REMAP of the second", device.message(0, second), MAPPED)?;
    let straddling = IotlbMsg { iova: IOVA, size: PAGE + 1, ..whole };
    check("REMAP of one and a bit", device.message(0, straddling), REFUSED)
}

/// The first UPDATE leaves a gap, since private memory is skipped, and a second UPDATE maps other memory there. A REMAP of
/// the first UPDATE must not affect the mapping of the second.
fn remap_gap(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let (region, other) = (Region::with_private_page()?, Region::new(1)?);
    check("UPDATE of a shared and a private page", device.map(IOVA, &region, Perm::RW), MAPPED)?;
    check("UPDATE in place of the private page", device.map(IOVA + PAGE, &other, Perm::RW), MAPPED)?;
    let both = remap_message(region.uaddr(), region.size());
    check("REMAP of the first UPDATE", device.message(0, both), MAPPED)?;
    let second = IotlbMsg { iova: IOVA + PAGE, ..remap_message(other.uaddr(), PAGE) };
    check("REMAP of the second", device.message(0, second), MAPPED)?;
    check("UPDATE again: still mapped", device.map(IOVA, &region, Perm::RW), REFUSED)
}

fn remap_pinned(ctx: &mut Ctx<'_>) -> Outcome {
    let (_device, mut owner, region, uaddr) = at_the_limit(ctx, 4)?;
    let remap = encode(V2, 0, &remap_message(uaddr, region.size()));
    check("REMAP", owner.write(&remap)?, REFUSED)?;
    check("UPDATE: as much is charged as before", owner.write(&update_message(0, 1, uaddr))?, REFUSED)?;
    let unmap =
        IotlbMsg { iova: IOVA, size: region.size(), kind: iotlb_type::INVALIDATE, ..IotlbMsg::default() };
    check("INVALIDATE", owner.write(&encode(V2, 0, &unmap))?, MAPPED)?;
    check("UPDATE up to the limit again", owner.write(&update_message(0, 4, uaddr))?, MAPPED)
}

fn unoffered(ctx: &mut Ctx<'_>) -> Outcome {
    let refused = ctx.open_owned()?.call(Request::NEW_OWNER);
    // A kernel without the live-update series handles the request as an unknown ioctl with argument 0.
    let known = refused == Err(Errno::OPNOTSUPP) || refused == Err(Errno::FAULT);
    check(&format!("NEW_OWNER {refused:?} is EOPNOTSUPP or EFAULT"), known, true)
}

fn keeps_running(ctx: &mut Ctx<'_>) -> Outcome {
    let mut driver = BlkDriver::start(ctx, BackendFeatures::NONE)?;
    driver.read_sector("before")?;
    let mut child = ctx.child(&driver.device)?;
    check("NEW_OWNER", child.call(Request::NEW_OWNER)?, Ok(()))?;
    if ctx.probe().backend.has(BackendFeatures::IOTLB_REMAP) {
        remap_in(&mut child, &driver.region)?;
    }
    driver.read_sector("running on, with another owner")
}

fn resume(ctx: &mut Ctx<'_>) -> Outcome {
    let mut driver = BlkDriver::start(ctx, BackendFeatures::NONE)?;
    driver.read_sector("before")?;
    check("SUSPEND", driver.device.call(Request::SUSPEND), Ok(()))?;
    driver.submit()?;
    let mut child = ctx.child(&driver.device)?;
    check("NEW_OWNER", child.call(Request::NEW_OWNER)?, Ok(()))?;
    if ctx.probe().backend.has(BackendFeatures::IOTLB_REMAP) {
        remap_in(&mut child, &driver.region)?;
    }
    check("RESUME by the new owner", child.call(Request::RESUME)?, Ok(()))?;
    driver.expect_completion("what was submitted while suspended")?;
    driver.read_sector("after RESUME")
}
