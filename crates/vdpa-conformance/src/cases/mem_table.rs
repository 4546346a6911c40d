//! Cases about a memory table that maps memory: the attribute `mem_table on` of this project's devices.

use vdpa_core::Errno;
use vdpa_core::features::BackendFeatures;
use vdpa_core::types::{Perm, iotlb_type};

use crate::blk_driver::BlkDriver;
use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::device::{Device, MESSAGE_SIZE, pair};
use crate::memory::{PAGE, Region};
use crate::request::Request;
use crate::ring::IOVA;

/// Where the cases map more than the memory of the driver.
const ELSEWHERE: u64 = 0x4000_0000;

const NEEDS: &[Need] = &[Need::MemTable, Need::DeviceFile];

macro_rules! case {
    ($name:literal, $needs:expr, $run:ident) => {
        Case {
            id: concat!("mem-table.", $name),
            spec: "1.6a",
            covers: &[Request::SET_MEM_TABLE],
            needs: $needs,
            run: $run,
        }
    };
}

pub(super) const CASES: &[Case] = &[
    case!("refused", NEEDS, refused),
    case!("is-the-iotlb", NEEDS, is_the_iotlb),
    case!("data", &[Need::MemTable, Need::DeviceFile, Need::DeviceId(2), Need::RingSize(8)], data),
];

/// `VHOST_SET_MEM_TABLE`: first address, bytes, address in this process.
pub(super) fn set(device: &Device, regions: &[(u64, u64, u64)]) -> Result<(), Errno> {
    let mut bytes = pair(u32::try_from(regions.len()).unwrap_or(u32::MAX), 0).to_vec();
    for &(iova, size, uaddr) in regions {
        bytes.extend([iova, size, uaddr, 0].iter().flat_map(|word| word.to_ne_bytes()));
    }
    device.set(Request::SET_MEM_TABLE, &bytes)
}

fn refused(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let region = Region::new(4)?;
    let (at, size) = (region.uaddr(), region.size());
    check("without an owner", set(&device, &[(IOVA, size, at)]), Err(Errno::PERM))?;
    prepare("VHOST_SET_OWNER", device.call(Request::SET_OWNER))?;
    check("a region", set(&device, &[(IOVA, size, at)]), Ok(()))?;
    let last = !0xfff;
    for (what, regions) in [
        ("no memory", vec![(IOVA, size, 0)]),
        ("more than the memory", vec![(IOVA, 2 * size, at)]),
        ("one of two has no memory", vec![(ELSEWHERE, size, at), (IOVA, size, 0)]),
        ("two that overlap", vec![(IOVA, size, at), (IOVA + PAGE, PAGE, at)]),
        ("beyond 2^64", vec![(last, 2 * PAGE, at)]),
        ("size 0", vec![(IOVA, 0, at)]),
    ] {
        check(what, set(&device, &regions), Err(Errno::FAULT))?;
        // The first one is still there.
        check("UPDATE of what is mapped", device.map(IOVA, &region, Perm::RW), Err(Errno::FAULT))?;
    }
    check("BATCH_BEGIN", device.message_of_type(0, iotlb_type::BATCH_BEGIN), Ok(MESSAGE_SIZE))?;
    check("in a batch", set(&device, &[]), Err(Errno::BUSY))?;
    check("BATCH_END", device.message_of_type(0, iotlb_type::BATCH_END), Ok(MESSAGE_SIZE))?;
    check("no regions", set(&device, &[]), Ok(()))?;
    check("UPDATE of what is not mapped any more", device.map(IOVA, &region, Perm::RW), Ok(MESSAGE_SIZE))
}

fn is_the_iotlb(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::new(2)?;
    let table = |regions: &[u64]| {
        let regions: Vec<_> = regions.iter().map(|iova| (*iova, region.size(), region.uaddr())).collect();
        set(&device, &regions)
    };
    check("UPDATE", device.map(IOVA, &region, Perm::RW), Ok(MESSAGE_SIZE))?;
    check("a table without it", table(&[ELSEWHERE]), Ok(()))?;
    check("UPDATE of what the table has not", device.map(IOVA, &region, Perm::RW), Ok(MESSAGE_SIZE))?;
    check("UPDATE of what the table has", device.map(ELSEWHERE, &region, Perm::RW), Err(Errno::FAULT))?;
    check("INVALIDATE of what the table has", device.unmap(ELSEWHERE, PAGE), Ok(MESSAGE_SIZE))?;
    check("UPDATE of it", device.map(ELSEWHERE, &region, Perm::RW), Ok(MESSAGE_SIZE))?;
    check("a table of both", table(&[IOVA, ELSEWHERE]), Ok(()))?;
    check("the same once more", table(&[ELSEWHERE, IOVA]), Ok(()))
}

fn data(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(BackendFeatures::NONE))?;
    let region = BlkDriver::memory()?;
    let own = (IOVA, region.size(), region.uaddr());
    check("the driver's memory", set(&device, &[own]), Ok(()))?;
    let mut driver = BlkDriver::new(device, region)?;
    driver.set_up(ctx)?;
    driver.set_driver_ok()?;
    driver.read_sector("mapped by a table")?;
    let other = Region::new(4)?;
    let more = (ELSEWHERE, other.size(), other.uaddr());
    let table = |driver: &BlkDriver, regions: &[_]| -> Result<(), Stop> {
        check("a table", set(&driver.device, regions), Ok(()))
    };
    table(&driver, &[more, own])?;
    driver.read_sector("with another region")?;
    table(&driver, &[more])?;
    driver.submit()?;
    driver.expect_no_completion("without the driver's memory")?;
    table(&driver, &[own])?;
    driver.kick();
    driver.expect_completion("with it again")
}
