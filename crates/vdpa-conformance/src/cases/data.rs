//! Cases about the data path: how a block device accesses memory, shown with reads.

use vdpa_core::Errno;
use vdpa_core::features::{BackendFeatures, Features, Status};
use vdpa_core::types::{Perm, iotlb_type};

use crate::blk_driver::BlkDriver;
use crate::case::{Case, Ctx, Need, Outcome, check, prepare};
use crate::device::MESSAGE_SIZE;
use crate::request::Request;
use crate::ring::{Format, IOVA, QUIET_TIME};

/// A block device whose ring is large enough for the driver.
const BLK: [Need; 2] = [Need::DeviceId(2), Need::RingSize(8)];
const SUSPEND: Need = Need::Backend(BackendFeatures::SUSPEND);
const RESUME: Need = Need::Backend(BackendFeatures::RESUME);
const PERSIST: Need = Need::Backend(BackendFeatures::IOTLB_PERSIST);

/// Defines the cases once for each ring format. A line has name, section, requests, further needs and check.
macro_rules! cases {
    ($($name:literal, $spec:literal, [$($request:ident),+], [$($need:expr),*], $run:ident;)+) => {
        pub(super) const CASES: &[Case] = &[$(Case {
            id: concat!("data.", $name),
            spec: $spec,
            covers: &[$(Request::$request),+],
            needs: &[BLK[0], BLK[1], $($need),*],
            run: |ctx| $run(ctx, Format::Split),
        }),+];

        pub(super) const PACKED_CASES: &[Case] = &[$(Case {
            id: concat!("packed.", $name),
            spec: $spec,
            covers: &[$(Request::$request),+],
            needs: &[BLK[0], BLK[1], Need::Feature(Features::RING_PACKED), $($need),*],
            run: |ctx| $run(ctx, Format::Packed),
        }),+];
    };
}

cases! {
    "read", "6.3", [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ADDR], [], read;
    "kick-counter-stays", "1.6", [SET_VRING_KICK], [], kick_counter;
    "kick-before-install", "1.6", [SET_VRING_KICK], [Need::DeviceFile], kick_before_install;
    "disabled-queue", "1.6", [SET_VRING_KICK, SET_VRING_ENABLE], [], disabled_queue;
    "invalidate-stops-access", "2.5", [IOTLB_INVALIDATE], [], invalidate;
    "read-only-memory", "6.1", [IOTLB_UPDATE], [], read_only;
    "suspend", "1.8, 8.7", [SUSPEND, RESUME, GET_VRING_BASE], [SUSPEND, RESUME], suspend;
    "suspend-enable", "1.8, 8.7", [SUSPEND, SET_VRING_ENABLE], [SUSPEND], suspend_enable;
    "base-continues", "1.6", [GET_VRING_BASE, SET_VRING_BASE], [SUSPEND, PERSIST], base_continues;
    "reset-stops", "8.7", [SET_STATUS], [], reset_stops;
    "reset-persist", "4.5, 9.4 vector 45", [SET_STATUS], [PERSIST], reset_persist;
    "reset-clean-map", "4.5, 9.4 vector 46", [SET_STATUS, IOTLB_BATCH_END], [PERSIST], reset_clean_map;
}

fn read(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let mut driver = BlkDriver::start_with_format(ctx, format, BackendFeatures::NONE)?;
    for round in 0..20 {
        driver.read_sector(&format!("read number {round}"))?;
    }
    let base = driver.vring_base();
    check("GET_VRING_BASE when idle", driver.device.vring(Request::GET_VRING_BASE, 0, 0), Ok(base))
}

fn kick_counter(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let mut driver = BlkDriver::start_with_format(ctx, format, BackendFeatures::NONE)?;
    let _ = driver.read_kick_counter();
    for round in 1..=3 {
        driver.read_sector(&format!("read number {round}"))?;
    }
    check("counter of the kick eventfd after three kicks", driver.read_kick_counter(), 3)
}

fn kick_before_install(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let mut driver = BlkDriver::start_with_format(ctx, format, BackendFeatures::NONE)?;
    driver.read_sector("before")?;
    let remove = driver.device.set_fd(Request::SET_VRING_KICK, 0, None);
    prepare("VHOST_SET_VRING_KICK", remove)?;
    let_polling_end();
    driver.submit()?;
    driver.expect_no_completion("no kick eventfd installed")?;
    driver.install_kick()?;
    driver.expect_completion("an eventfd installed that had been written")
}

/// The server of a queue may still poll its ring for a while after a request: that of a VDUSE device is not told that the queue was
/// disabled or lost its eventfd, it only gets no more kicks.
fn let_polling_end() {
    std::thread::sleep(QUIET_TIME);
}

fn disabled_queue(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let mut driver = BlkDriver::start_with_format(ctx, format, BackendFeatures::NONE)?;
    driver.read_sector("before")?;
    let enable = |num| driver.device.set_vring(Request::SET_VRING_ENABLE, 0, num);
    prepare("VHOST_VDPA_SET_VRING_ENABLE", enable(0))?;
    let_polling_end();
    driver.submit()?;
    driver.expect_no_completion("queue disabled")
}

fn invalidate(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let mut driver = BlkDriver::start_with_format(ctx, format, BackendFeatures::NONE)?;
    driver.read_sector("mapped")?;
    check("INVALIDATE", driver.device.unmap(IOVA, driver.region.size()), Ok(MESSAGE_SIZE))?;
    driver.submit()?;
    driver.expect_no_completion("not mapped")?;
    check("UPDATE", driver.device.map(IOVA, &driver.region, Perm::RW), Ok(MESSAGE_SIZE))?;
    check("status: an unmapped ring is no reason to reset", driver.device.status(), Ok(0xf))?;
    driver.kick();
    driver.expect_completion("mapped again and kicked")
}

fn read_only(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let mut driver = BlkDriver::start_with_format(ctx, format, BackendFeatures::NONE)?;
    check("INVALIDATE", driver.device.unmap(IOVA, driver.region.size()), Ok(MESSAGE_SIZE))?;
    check(
        "UPDATE, device may only read",
        driver.device.map(IOVA, &driver.region, Perm::RO),
        Ok(MESSAGE_SIZE),
    )?;
    driver.submit()?;
    driver.expect_no_completion("memory the device may not write")
}

fn suspend(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let mut driver = BlkDriver::start_with_format(ctx, format, BackendFeatures::NONE)?;
    driver.read_sector("before SUSPEND")?;
    check("SUSPEND", driver.device.call(Request::SUSPEND), Ok(()))?;
    let base = driver.vring_base();
    driver.submit()?;
    driver.expect_no_completion("suspended, kicked")?;
    check("GET_VRING_BASE, suspended", driver.device.vring(Request::GET_VRING_BASE, 0, 0), Ok(base))?;
    check("RESUME", driver.device.call(Request::RESUME), Ok(()))?;
    driver.expect_completion("the kick while suspended, after RESUME")?;
    driver.read_sector("after RESUME")
}

fn suspend_enable(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let mut driver = BlkDriver::start_with_format(ctx, format, BackendFeatures::NONE)?;
    check("SUSPEND", driver.device.call(Request::SUSPEND), Ok(()))?;
    driver.submit()?;
    let enable = driver.device.set_vring(Request::SET_VRING_ENABLE, 0, 1);
    check("SET_VRING_ENABLE, suspended", enable, Ok(()))?;
    driver.kick();
    driver.expect_no_completion("suspended, enabled, kicked")
}

fn base_continues(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let mut driver = BlkDriver::start_with_format(ctx, format, ctx.probe().backend)?;
    for round in 0..3 {
        driver.read_sector(&format!("read number {round}"))?;
    }
    check("SUSPEND", driver.device.call(Request::SUSPEND), Ok(()))?;
    let base = prepare("VHOST_GET_VRING_BASE", driver.device.vring(Request::GET_VRING_BASE, 0, 0))?;
    check("GET_VRING_BASE", base, driver.vring_base())?;
    prepare("SET_STATUS 0", driver.device.set_status(Status::RESET))?;
    driver.set_up_at(ctx, base)?;
    driver.set_driver_ok()?;
    driver.read_sector("continued at its base")?;
    check("GET_VRING_BASE", driver.device.vring(Request::GET_VRING_BASE, 0, 0), Ok(driver.vring_base()))
}

fn reset_stops(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let mut driver = BlkDriver::start_with_format(ctx, format, ctx.probe().backend)?;
    driver.read_sector("before the reset")?;
    check("SET_STATUS 0", driver.device.set_status(Status::RESET), Ok(()))?;
    driver.set_up(ctx)?;
    driver.submit()?;
    driver.expect_no_completion("set up, enabled and kicked, without DRIVER_OK")?;
    driver.set_driver_ok()?;
    driver.kick();
    driver.expect_completion("DRIVER_OK and a kick")
}

fn reset_persist(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let persist = BackendFeatures::of(&[BackendFeatures::IOTLB_PERSIST]);
    let mut driver = BlkDriver::start_with_format(ctx, format, persist)?;
    driver.read_sector("before the reset")?;
    check("SET_STATUS 0", driver.device.set_status(Status::RESET), Ok(()))?;
    driver.set_up(ctx)?;
    driver.set_driver_ok()?;
    driver.read_sector("after a reset with PERSIST, nothing mapped again")
}

fn reset_clean_map(ctx: &mut Ctx<'_>, format: Format) -> Outcome {
    let mut driver = BlkDriver::start_with_format(ctx, format, BackendFeatures::NONE)?;
    driver.read_sector("before the reset")?;
    check("SET_STATUS 0", driver.device.set_status(Status::RESET), Ok(()))?;
    let again = driver.device.map(IOVA, &driver.region, Perm::RW);
    check("UPDATE after a reset without PERSIST", again, Err(Errno::FAULT))?;
    driver.set_up(ctx)?;
    driver.set_driver_ok()?;
    driver.submit()?;
    driver.expect_no_completion("after a reset without PERSIST")?;
    check("BATCH_BEGIN", driver.device.message_of_type(0, iotlb_type::BATCH_BEGIN), Ok(MESSAGE_SIZE))?;
    check("BATCH_END", driver.device.message_of_type(0, iotlb_type::BATCH_END), Ok(MESSAGE_SIZE))?;
    driver.kick();
    driver.expect_completion("after an empty batch")
}
