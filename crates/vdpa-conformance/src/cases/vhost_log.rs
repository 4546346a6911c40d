//! Cases about vhost's own log of dirty pages, as vhost-net writes it: the attribute `vhost_log on` of this project's devices.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features};
use vdpa_core::types::{Perm, VringAddr};
use vdpa_sys::eventfd::EventFd;
use vdpa_sys::vhost_vdpa::RawArg;

use crate::blk_driver::{BlkDriver, negotiate};
use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::device::{Device, MESSAGE_SIZE};
use crate::memory::{PAGE, Region};
use crate::request::Request;
use crate::ring::{IOVA, TIMEOUT};

/// `VHOST_F_LOG_ALL`.
const LOG_ALL: Features = Features(1 << 26);
/// `VHOST_VRING_F_LOG`.
const F_LOG: u32 = 1;
/// Where nothing can be mapped.
const BAD: u64 = !0xfff;
/// Guest address of the used ring, for the log.
const USED: u64 = 0x300_0000;
/// Pages that a log of one page has bits for.
const PAGES: u64 = 8 * PAGE;
/// Bytes of it: a page.
const BYTES: usize = 0x1000;

const OFFERED: Need = Need::Feature(vdpa_core::features::Bit(26));
const NEEDS: &[Need] = &[OFFERED, Need::DeviceFile];
const DATA: &[Need] = &[OFFERED, Need::DeviceFile, Need::DeviceId(2), Need::RingSize(8)];

macro_rules! case {
    ($name:literal, [$($request:ident),+], $needs:expr, $run:ident) => {
        Case {
            id: concat!("vhost-log.", $name),
            spec: "1.1",
            covers: &[$(Request::$request),+],
            needs: $needs,
            run: $run,
        }
    };
}

pub(super) const CASES: &[Case] = &[
    case!("arguments", [SET_LOG_BASE, SET_LOG_FD], NEEDS, arguments),
    case!("too-short", [SET_LOG_BASE, SET_FEATURES], NEEDS, too_short),
    case!("toggled", [SET_FEATURES], NEEDS, toggled),
    case!("read", [SET_LOG_BASE, SET_LOG_FD, SET_VRING_ADDR, SET_FEATURES], DATA, read),
];

fn set_base(device: &Device, base: u64) -> Result<(), Errno> {
    device.set_u64(Request::SET_LOG_BASE, base)
}

fn set_fd(device: &Device, fd: RawFd) -> Result<(), Errno> {
    device.set(Request::SET_LOG_FD, &fd.to_ne_bytes())
}

/// The pages whose bits are set; they are clear afterwards.
fn take(log: &Region) -> Result<Vec<u64>, Stop> {
    let bytes: [u8; BYTES] = log.read(0)?;
    log.write(0, &[0; BYTES])?;
    let bits = (0..)
        .zip(bytes)
        .flat_map(|(at, byte): (u64, u8)| (0..8).map(move |bit| (at * 8 + bit, byte >> bit & 1)));
    Ok(bits.filter(|(_, bit)| *bit != 0).map(|(page, _)| page).collect())
}

fn arguments(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let log = Region::new(1)?;
    check("SET_LOG_BASE without an owner", set_base(&device, log.uaddr()), Err(Errno::PERM))?;
    check("SET_LOG_FD without an owner", set_fd(&device, -1), Err(Errno::PERM))?;
    prepare("VHOST_SET_OWNER", device.call(Request::SET_OWNER))?;
    check("SET_LOG_BASE", set_base(&device, log.uaddr()), Ok(()))?;
    for (what, base) in [("at 0", 0), ("where nothing can be mapped", BAD)] {
        check(&format!("SET_LOG_BASE {what}"), set_base(&device, base), Err(Errno::FAULT))?;
    }
    let pointer = device.request(Request::SET_LOG_BASE, RawArg::BadPointer);
    check("SET_LOG_BASE, bad pointer", pointer, Err(Errno::FAULT))?;
    let private = prepare("mmap", vdpa_sys::mmap::PrivateMap::new(4096))?;
    let private: vdpa_sys::mmap::SharedMap = private.into();
    check("SET_LOG_BASE, private memory", set_base(&device, private.addr() as u64), Err(Errno::FAULT))?;
    let event = prepare("eventfd", EventFd::new())?;
    check("SET_LOG_FD", set_fd(&device, event.as_fd().as_raw_fd()), Ok(()))?;
    check("SET_LOG_FD -1", set_fd(&device, -1), Ok(()))?;
    check("SET_LOG_FD of no descriptor", set_fd(&device, 9999), Err(Errno::BADF))?;
    check("SET_LOG_FD of the device", set_fd(&device, device.file()?.as_fd().as_raw_fd()), Err(Errno::INVAL))
}

fn too_short(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let (log, longer, region) = (Region::new(1)?, Region::new(2)?, Region::new(2)?);
    let all = ctx.base_features() | LOG_ALL;
    let last = PAGES * PAGE - region.size();
    check("SET_LOG_BASE", set_base(&device, log.uaddr()), Ok(()))?;
    check("UPDATE in front of the end", device.map(last, &region, Perm::RW), Ok(MESSAGE_SIZE))?;
    check("SET_FEATURES", device.set_features(all), Ok(()))?;
    check("UPDATE behind the end", device.map(PAGES * PAGE, &region, Perm::RW), Err(Errno::FAULT))?;
    check("SET_LOG_BASE of a longer one", set_base(&device, longer.uaddr()), Ok(()))?;
    check(
        "UPDATE behind the end of the first",
        device.map(PAGES * PAGE, &region, Perm::RW),
        Ok(MESSAGE_SIZE),
    )?;
    check("SET_LOG_BASE of the first", set_base(&device, log.uaddr()), Err(Errno::FAULT))?;
    check("SET_FEATURES without it", device.set_features(ctx.base_features()), Ok(()))?;
    check("SET_LOG_BASE of the first", set_base(&device, log.uaddr()), Ok(()))?;
    check("SET_FEATURES with it", device.set_features(all), Err(Errno::FAULT))
}

fn toggled(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let base = ctx.base_features();
    let log = Region::new(1)?;
    check("SET_LOG_BASE", set_base(&device, log.uaddr()), Ok(()))?;
    negotiate(&device, base)?;
    check("SET_FEATURES with LOG_ALL", device.set_features(base | LOG_ALL), Ok(()))?;
    let other = Features(base.0 ^ (1 << 32)) | LOG_ALL;
    check("SET_FEATURES with another bit, too", device.set_features(other), Err(Errno::BUSY))?;
    check("SET_FEATURES without", device.set_features(base), Ok(()))?;
    check("status", device.status(), Ok(0xb))
}

fn read(ctx: &mut Ctx<'_>) -> Outcome {
    let mut driver = BlkDriver::start(ctx, BackendFeatures::NONE)?;
    let (log, event) = (Region::new(1)?, prepare("eventfd", EventFd::new())?);
    let base = ctx.base_features();
    check("SET_LOG_BASE", set_base(&driver.device, log.uaddr()), Ok(()))?;
    check("SET_LOG_FD", set_fd(&driver.device, event.as_fd().as_raw_fd()), Ok(()))?;
    driver.read_sector("nothing is logged")?;
    check("pages, with neither flag nor feature", take(&log)?, vec![])?;
    // The ring first, while it runs.
    let addr = driver.ring_addr();
    let logged = VringAddr { flags: F_LOG, log: USED, ..addr };
    check("SET_VRING_ADDR with another log address", driver.device.set_addr(0, &logged), Ok(()))?;
    let moved = VringAddr { desc: addr.desc + 0x1000, ..logged };
    check("SET_VRING_ADDR of a ring that runs", driver.device.set_addr(0, &moved), Err(Errno::INVAL))?;
    let beyond = VringAddr { log: PAGES * PAGE, ..logged };
    check("SET_VRING_ADDR beyond the log", driver.device.set_addr(0, &beyond), Err(Errno::INVAL))?;
    driver.read_sector("the ring is logged")?;
    check("pages of the ring", take(&log)?, vec![USED / PAGE])?;
    check("the event", event.wait(Some(TIMEOUT)), true)?;
    let _ = event.drain();
    // Then everything.
    check("SET_FEATURES", driver.device.set_features(base | LOG_ALL), Ok(()))?;
    driver.read_sector("everything is logged")?;
    let ring = (addr.used - IOVA) / PAGE;
    let data = driver.written_pages().into_iter().filter(|page| *page != ring).map(|page| IOVA / PAGE + page);
    let mut pages: Vec<u64> = data.chain([USED / PAGE]).collect();
    pages.sort_unstable();
    check("pages of the ring and of the data", take(&log)?, pages)?;
    check("the event", event.wait(Some(TIMEOUT)), true)?;
    check("SET_FEATURES", driver.device.set_features(base), Ok(()))?;
    check("SET_VRING_ADDR without", driver.device.set_addr(0, &addr), Ok(()))?;
    // Before it slept the device may have asked for notifications, which is a write to the ring like any other.
    let _ = take(&log)?;
    driver.read_sector("nothing is logged any more")?;
    check("pages", take(&log)?, vec![])
}
