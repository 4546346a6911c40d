//! Cases about IOTLB messages.

use vdpa_core::Errno;
use vdpa_core::features::BackendFeatures;
use vdpa_core::types::{IotlbMsg, Perm, iotlb_type};
use vdpa_sys::mmap::{PrivateMap, SharedMap};

use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::device::{Device, MESSAGE_SIZE, V1, V2, encode, errno};
use crate::memory::{PAGE, Region};
use crate::request::Request;

const MAPPED: Result<usize, Errno> = Ok(MESSAGE_SIZE);
const REFUSED: Result<usize, Errno> = Err(Errno::FAULT);

macro_rules! case {
    ($id:literal, $spec:literal, [$($request:ident),+], $run:expr) => {
        case!($id, $spec, [$($request),+], [], $run)
    };
    ($id:literal, $spec:literal, [$($request:ident),+], [$($need:ident),*], $run:expr) => {
        Case {
            id: $id,
            spec: $spec,
            covers: &[$(Request::$request),+],
            needs: &[$(Need::$need),*],
            run: $run,
        }
    };
}

pub(super) const CASES: &[Case] = &[
    case!(
        "iotlb.invalidate-first",
        "2.3, 9.4 vector 27",
        [IOTLB_INVALIDATE, IOTLB_BATCH_END],
        invalidate_first
    ),
    case!("iotlb.update-size-0", "2.2, 9.4 vector 28", [IOTLB_UPDATE], update_size_0),
    case!("iotlb.update-again", "2.4, 9.4 vectors 29 and 30", [IOTLB_UPDATE], update_again),
    case!("iotlb.update-range", "2.4", [IOTLB_UPDATE], update_range),
    case!("iotlb.update-hole", "3.2", [IOTLB_UPDATE], update_hole),
    case!("iotlb.permissions", "2.4", [IOTLB_UPDATE], permissions),
    case!("iotlb.fragments", "3.2", [IOTLB_UPDATE, IOTLB_INVALIDATE], fragments),
    Case {
        id: "iotlb.pin-limit",
        spec: "3.3",
        covers: &[Request::IOTLB_UPDATE, Request::IOTLB_INVALIDATE],
        needs: &[Need::Child],
        run: pin_limit,
    },
    case!("iotlb.private-memory", "3.2, 9.4 vector 31", [IOTLB_UPDATE], private_memory),
    case!("iotlb.invalidate-whole-entry", "2.5, 9.4 vector 32", [IOTLB_INVALIDATE], invalidate_whole_entry),
    case!("iotlb.invalidate-all", "2.5, 9.4 vector 39", [IOTLB_INVALIDATE], invalidate_all),
    case!("iotlb.invalidate-odd", "2.5", [IOTLB_INVALIDATE], invalidate_odd),
    case!("iotlb.length", "2.2, 9.4 vector 33", [IOTLB_BATCH_BEGIN], [DeviceFile], length),
    case!("iotlb.short-message", "2.2, 9.4 vector 33", [IOTLB_BATCH_BEGIN], [DeviceFile], short_message),
    case!("iotlb.first-word", "2.2, 9.4 vector 38", [IOTLB_OTHER], first_word),
    case!("iotlb.version-1", "2.1, 2.2", [IOTLB_UPDATE, IOTLB_INVALIDATE], version_1),
    case!("iotlb.types", "2.3, 9.4 vector 37", [IOTLB_OTHER], types),
    case!("iotlb.asid", "2.2, 9.4 vector 34", [IOTLB_UPDATE, SET_BACKEND_FEATURES], asid),
    case!("iotlb.reset-keeps", "4.5", [IOTLB_UPDATE, SET_STATUS], reset_keeps),
    case!("iotlb.limit", "2.4", [IOTLB_UPDATE], limit),
    case!(
        "batch.other-asid",
        "2.6, 9.4 vector 35",
        [IOTLB_BATCH_BEGIN, IOTLB_BATCH_END, IOTLB_UPDATE],
        batch_asid
    ),
    case!("iotlb.writev", "2.2", [IOTLB_BATCH_BEGIN], [DeviceFile], writev),
    case!("batch.survives-reset", "2.6", [IOTLB_BATCH_BEGIN, SET_STATUS, CLOSE], batch_survives_reset),
    case!("batch.end-without-begin", "2.6, 9.4 vector 36", [IOTLB_BATCH_END], batch_end),
    case!("batch.begin-again", "2.6", [IOTLB_BATCH_BEGIN], batch_begin_again),
    case!("batch.no-rollback", "2.6", [IOTLB_BATCH_BEGIN, IOTLB_BATCH_END, IOTLB_UPDATE], batch_no_rollback),
];

fn update(iova: u64, size: u64, uaddr: u64, perm: Perm) -> IotlbMsg {
    IotlbMsg { iova, size, uaddr, perm, kind: iotlb_type::UPDATE }
}

/// Whether the page at `iova` is mapped, in which case an UPDATE there is refused.
fn is_mapped(device: &Device, iova: u64) -> Result<bool, Stop> {
    let region = Region::new(1)?;
    match device.map(iova, &region, Perm::RW) {
        Ok(_) => prepare("INVALIDATE of the probe", device.unmap(iova, PAGE)).map(|_| false),
        Err(Errno::FAULT) => Ok(true),
        Err(errno) => Err(Stop::setup("UPDATE as a probe", errno)),
    }
}

/// Whether the device limits the memory it pins by the owner's `RLIMIT_MEMLOCK` (uapi-spec 3.3).
fn counts_pins(ctx: &Ctx<'_>) -> Result<bool, Stop> {
    let device = ctx.open()?;
    let region = Region::new(2)?;
    let owner = ctx.fork(&device)?;
    owner.limit_memlock(PAGE)?;
    check("SET_OWNER", owner.call(Request::SET_OWNER)?, Ok(()))?;
    let message = update(0x1000, region.size(), region.uaddr(), Perm::RW);
    Ok(owner.write(&encode(V2, 0, &message))? != MAPPED)
}

fn invalidate_first(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    check("INVALIDATE before any UPDATE", device.unmap(0, PAGE), REFUSED)?;
    check("BATCH_END before any UPDATE", device.message_of_type(0, iotlb_type::BATCH_END), REFUSED)
}

fn update_size_0(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::new(1)?;
    let message = update(0x1000, 0, region.uaddr(), Perm::RW);
    check("UPDATE of size 0", device.message(0, message), Err(Errno::INVAL))
}

fn update_again(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::new(1)?;
    check("UPDATE with no permission", device.map(0x1000, &region, Perm::NONE), MAPPED)?;
    check("the same UPDATE again", device.map(0x1000, &region, Perm::NONE), REFUSED)?;
    let other = Region::new(2)?;
    check("UPDATE that overlaps at its end", device.map(0, &other, Perm::RW), REFUSED)?;
    check("UPDATE right after it", device.map(0x2000, &other, Perm::RW), MAPPED)
}

fn update_range(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::new(1)?;
    let last_page = u64::MAX - (PAGE - 1);
    let beyond = update(last_page, 2 * PAGE, region.uaddr(), Perm::RW);
    check("UPDATE beyond 2^64", device.message(0, beyond), REFUSED)?;
    let range: [u8; 16] = prepare("GET_IOVA_RANGE", device.get(Request::GET_IOVA_RANGE))?;
    if range == *[[0; 8], [0xff; 8]].as_flattened() {
        check("UPDATE that ends at 2^64", device.map(last_page, &region, Perm::RW), MAPPED)?;
        check("INVALIDATE of it", device.unmap(last_page, PAGE), MAPPED)?;
        check("it is gone", is_mapped(&device, last_page), Ok(false))?;
    }
    Ok(())
}

fn update_hole(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    // Above the last mapping of any process.
    let message = update(0x1000, PAGE, 0xffff_8000_0000_0000, Perm::RW);
    check("UPDATE of an address where nothing is mapped", device.message(0, message), REFUSED)?;
    check("nothing is mapped for the device then", is_mapped(&device, 0x1000), Ok(false))
}

fn permissions(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    for perm in [0, 1, 2, 3, 7] {
        let region = Region::new(1)?;
        let iova = u64::from(perm) * PAGE;
        check(&format!("UPDATE with permission {perm}"), device.map(iova, &region, Perm(perm)), MAPPED)?;
        check(&format!("mapping with permission {perm} is there"), is_mapped(&device, iova), Ok(true))?;
    }
    Ok(())
}

fn fragments(ctx: &mut Ctx<'_>) -> Outcome {
    // If the device pins memory, an entry is a run of physically adjacent pages, and the pages of two mappings are sometimes
    // adjacent: pages that are allocated in a row are so, upwards or downwards.
    let tries = if counts_pins(ctx)? { 16 } else { 1 };
    let device = ctx.open_owned()?;
    let mut second = Ok(false);
    // The regions are kept, so that the next one gets other pages.
    let mut regions = Vec::new();
    for iova in (1..=tries).map(|number| number * 0x10_000) {
        let region = Region::in_two_mappings()?;
        let upwards = iova & 0x1_0000 == 0;
        let page = rustix::param::page_size();
        for offset in if upwards { [0, page] } else { [page, 0] } {
            region.write(offset, &[0])?;
        }
        check("UPDATE of two mappings", device.map(iova, &region, Perm::RW), MAPPED)?;
        check("INVALIDATE of a byte of the first", device.unmap(iova, 1), MAPPED)?;
        check("the first is mapped", is_mapped(&device, iova), Ok(false))?;
        second = is_mapped(&device, iova + PAGE);
        if second == Ok(true) {
            break;
        }
        regions.push(region);
    }
    check("the second is mapped", second, Ok(true))
}

fn pin_limit(ctx: &mut Ctx<'_>) -> Outcome {
    if !counts_pins(ctx)? {
        return Err(Stop::CannotRun(
            "the device does not hold RLIMIT_MEMLOCK against pinned memory".to_owned(),
        ));
    }
    let device = ctx.open()?;
    let mut owner = ctx.child(&device)?;
    owner.limit_memlock(4)?;
    check("SET_OWNER", owner.call(Request::SET_OWNER)?, Ok(()))?;
    let region = Region::new(4)?;
    let uaddr = owner.map(&region)?;
    let mut map = |iova, pages| owner.write(&encode(V2, 0, &update(iova, pages * PAGE, uaddr, Perm::RW)));
    check("UPDATE of 5 pages, 4 are allowed", map(0, 5)?, REFUSED)?;
    check("UPDATE of 3 pages, 4 are allowed", map(0, 3)?, MAPPED)?;
    check("UPDATE of 2 more", map(0x10_000, 2)?, REFUSED)?;
    check("UPDATE of the first page once more, which counts again", map(0x10_000, 1)?, MAPPED)?;
    check("UPDATE of one more", map(0x20_000, 1)?, REFUSED)?;
    let unmap = IotlbMsg { iova: 0x10_000, size: PAGE, kind: iotlb_type::INVALIDATE, ..IotlbMsg::default() };
    check("INVALIDATE of one", owner.write(&encode(V2, 0, &unmap))?, MAPPED)?;
    let again = update(0x20_000, PAGE, uaddr, Perm::RW);
    check("UPDATE in its place", owner.write(&encode(V2, 0, &again))?, MAPPED)
}

fn private_memory(ctx: &mut Ctx<'_>) -> Outcome {
    let pinned = counts_pins(ctx)?;
    let device = ctx.open_owned()?;
    let private = SharedMap::from(prepare("mmap", PrivateMap::new(4096))?);
    let message = update(0x1000, PAGE, private.addr() as u64, Perm::RW);
    check("UPDATE of private anonymous memory", device.message(0, message), MAPPED)?;
    check("it is mapped", is_mapped(&device, 0x1000), Ok(pinned))
}

fn invalidate_whole_entry(ctx: &mut Ctx<'_>) -> Outcome {
    // If the device pins memory, an entry is a run of physically adjacent pages, whose length is not known.
    let pages: &[u64] = if counts_pins(ctx)? { &[0x18_000] } else { &[0x10_000, 0x18_000, 0x1f_000] };
    let device = ctx.open_owned()?;
    let region = Region::new(16)?;
    check("UPDATE of 16 pages", device.map(0x10_000, &region, Perm::RW), MAPPED)?;
    check("INVALIDATE of one byte in it", device.unmap(0x18_123, 1), MAPPED)?;
    for &iova in pages {
        check(&format!("page {iova:#x} is mapped"), is_mapped(&device, iova), Ok(false))?;
    }
    Ok(())
}

fn invalidate_all(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    for iova in [0, 0x10_000, 0x7fff_0000] {
        check("UPDATE", device.map(iova, &Region::new(1)?, Perm::RW), MAPPED)?;
    }
    check("INVALIDATE of address 0, size 0", device.unmap(0, 0), MAPPED)?;
    for iova in [0, 0x10_000, 0x7fff_0000] {
        check(&format!("page {iova:#x} is mapped"), is_mapped(&device, iova), Ok(false))?;
    }
    Ok(())
}

fn invalidate_odd(ctx: &mut Ctx<'_>) -> Outcome {
    let pinned = counts_pins(ctx)?;
    let device = ctx.open_owned()?;
    let region = Region::new(2)?;
    check("UPDATE of two pages", device.map(0x10_000, &region, Perm::RW), MAPPED)?;
    check("INVALIDATE of nothing mapped", device.unmap(0x20_000, PAGE), MAPPED)?;
    check("INVALIDATE that passes 2^64", device.unmap(u64::MAX, 2), MAPPED)?;
    check("INVALIDATE (first page, 0)", device.unmap(0x10_000, 0), MAPPED)?;
    check("still mapped", is_mapped(&device, 0x10_000), Ok(true))?;
    check("INVALIDATE (second page, 0): the entry spans that boundary", device.unmap(0x11_000, 0), MAPPED)?;
    if !pinned {
        check("still mapped", is_mapped(&device, 0x10_000), Ok(false))?;
    }
    check("INVALIDATE (0, 2^64 - 1)", device.unmap(0, u64::MAX), MAPPED)
}

fn length(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let mut bytes = encode(V2, 0, &IotlbMsg { kind: iotlb_type::BATCH_BEGIN, ..IotlbMsg::default() });
    bytes.resize(200, 0xff);
    for (length, want) in
        [(72, MAPPED), (200, MAPPED), (39, Err(Errno::INVAL)), (4, Err(Errno::INVAL)), (3, Err(Errno::INVAL))]
    {
        let message = bytes.get(..length).unwrap_or_default();
        check(&format!("message of {length} bytes"), device.write(message), want)?;
    }
    Ok(())
}

fn short_message(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let bytes = encode(V2, 0, &IotlbMsg { kind: iotlb_type::BATCH_BEGIN, ..IotlbMsg::default() });
    check("message of 40 bytes", device.write(bytes.get(..40).unwrap_or_default()), MAPPED)
}

fn writev(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let bytes = encode(V2, 0, &IotlbMsg { kind: iotlb_type::BATCH_BEGIN, ..IotlbMsg::default() });
    let (head, tail) = bytes.split_at(5);
    let pieces = [std::io::IoSlice::new(head), std::io::IoSlice::new(tail)];
    check("message in two pieces", rustix::io::writev(device.file()?, &pieces).map_err(errno), MAPPED)
}

fn first_word(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let begin = IotlbMsg { kind: iotlb_type::BATCH_BEGIN, ..IotlbMsg::default() };
    for version in [0, 3, u32::MAX] {
        let what = format!("message of version {version}");
        check(&what, device.write(&encode(version, 0, &begin)), Err(Errno::INVAL))?;
    }
    Ok(())
}

fn version_1(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let offered = BackendFeatures::of(&[BackendFeatures::IOTLB_MSG_V2, BackendFeatures::IOTLB_ASID]);
    prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(offered))?;
    let region = Region::new(1)?;
    let message = update(0x1000, region.size(), region.uaddr(), Perm::RW);
    // The padding after the version may have any value.
    check("UPDATE, version 1", device.write(&encode(V1, 0xdead, &message)), MAPPED)?;
    check("it is in address space 0", is_mapped(&device, 0x1000), Ok(true))?;
    let message = IotlbMsg { kind: iotlb_type::INVALIDATE, ..message };
    check("INVALIDATE, version 1", device.write(&encode(V1, 0xdead, &message)), MAPPED)?;
    check("it is gone", is_mapped(&device, 0x1000), Ok(false))
}

fn types(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    check("BATCH_BEGIN, to have a table", device.message_of_type(0, iotlb_type::BATCH_BEGIN), MAPPED)?;
    check("BATCH_END", device.message_of_type(0, iotlb_type::BATCH_END), MAPPED)?;
    let remap = iotlb_type::REMAP;
    for kind in [iotlb_type::MISS, iotlb_type::ACCESS_FAIL, remap, 0, 8, 200] {
        let message = IotlbMsg { iova: 0x1000, size: PAGE, uaddr: 0x1000, kind, ..IotlbMsg::default() };
        check(&format!("message of type {kind}, nothing mapped"), device.message(0, message), REFUSED)?;
    }
    Ok(())
}

fn asid(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::new(1)?;
    let message = update(0x1000, region.size(), region.uaddr(), Perm::RW);
    let beyond = ctx.probe().address_spaces;
    check("UPDATE with an ASID too many, not acknowledged", device.message(beyond, message), MAPPED)?;
    check("it went to address space 0", is_mapped(&device, 0x1000), Ok(true))?;
    let acknowledged = BackendFeatures::of(&[BackendFeatures::IOTLB_ASID]);
    prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(acknowledged))?;
    let message = IotlbMsg { iova: 0x2000, ..message };
    check("UPDATE with an ASID too many, acknowledged", device.message(beyond, message), REFUSED)?;
    check("UPDATE with the last ASID", device.message(beyond - 1, message), MAPPED)
}

fn reset_keeps(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::new(1)?;
    check("UPDATE", device.map(0x1000, &region, Perm::RW), MAPPED)?;
    prepare("SET_STATUS 0", device.set_status(vdpa_core::features::Status::RESET))?;
    check("mapped after a reset", is_mapped(&device, 0x1000), Ok(true))
}

fn limit(ctx: &mut Ctx<'_>) -> Outcome {
    let entries = u64::from(ctx.iotlb_entries());
    // The case checks the limit of the table and not that of pinned memory. If raising RLIMIT_MEMLOCK is refused, the device
    // must count pinned memory against another limit.
    let _ = vdpa_sys::rlimit::raise_memlock(Some(4 * entries * PAGE));
    let device = ctx.open_owned()?;
    let region = Region::new(1)?;
    // Every second page, so that no two entries can be merged.
    for entry in 0..entries {
        check(&format!("UPDATE number {entry}"), device.map(2 * entry * PAGE, &region, Perm::RO), MAPPED)?;
    }
    check(
        &format!("one UPDATE more than the {entries} that the table holds"),
        device.map(2 * entries * PAGE, &region, Perm::RO),
        REFUSED,
    )?;
    check("INVALIDATE of one", device.unmap(0, 1), MAPPED)?;
    check("UPDATE in its place", device.map(2 * entries * PAGE, &region, Perm::RO), MAPPED)
}

fn batch_asid(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let acknowledged = BackendFeatures::of(&[BackendFeatures::IOTLB_ASID]);
    prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(acknowledged))?;
    let region = Region::new(1)?;
    check("BATCH_BEGIN of 0", device.message_of_type(0, iotlb_type::BATCH_BEGIN), MAPPED)?;
    let message = update(0x1000, region.size(), region.uaddr(), Perm::RW);
    check("UPDATE of 1", device.message(1, message), REFUSED)?;
    check("BATCH_BEGIN of 1", device.message_of_type(1, iotlb_type::BATCH_BEGIN), REFUSED)?;
    check("BATCH_END of 1", device.message_of_type(1, iotlb_type::BATCH_END), REFUSED)?;
    check("BATCH_END of 0", device.message_of_type(0, iotlb_type::BATCH_END), MAPPED)
}

fn batch_end(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    check("UPDATE", device.map(0x1000, &Region::new(1)?, Perm::RW), MAPPED)?;
    check("BATCH_END without BATCH_BEGIN", device.message_of_type(0, iotlb_type::BATCH_END), MAPPED)
}

fn batch_survives_reset(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let acknowledged = BackendFeatures::of(&[BackendFeatures::IOTLB_ASID]);
    prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(acknowledged))?;
    check("BATCH_BEGIN", device.message_of_type(0, iotlb_type::BATCH_BEGIN), MAPPED)?;
    prepare("SET_STATUS 0", device.set_status(vdpa_core::features::Status::RESET))?;
    let other = if ctx.probe().address_spaces > 1 { 1 } else { 0 };
    // Only a device with a second address space shows this: it refuses messages for it while a batch of the first is open.
    let want = if other == 1 { REFUSED } else { MAPPED };
    check(
        "BATCH_BEGIN of the last address space after a reset",
        device.message_of_type(other, iotlb_type::BATCH_BEGIN),
        want,
    )?;
    drop(device);
    let device = ctx.open_owned()?;
    prepare("VHOST_SET_BACKEND_FEATURES", device.set_backend(acknowledged))?;
    check(
        "BATCH_BEGIN of it after another open",
        device.message_of_type(other, iotlb_type::BATCH_BEGIN),
        MAPPED,
    )
}

fn batch_begin_again(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    for round in ["first", "second"] {
        check(&format!("{round} BATCH_BEGIN"), device.message_of_type(0, iotlb_type::BATCH_BEGIN), MAPPED)?;
    }
    for round in ["first", "second"] {
        check(&format!("{round} BATCH_END"), device.message_of_type(0, iotlb_type::BATCH_END), MAPPED)?;
    }
    Ok(())
}

fn batch_no_rollback(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let region = Region::new(1)?;
    check("BATCH_BEGIN", device.message_of_type(0, iotlb_type::BATCH_BEGIN), MAPPED)?;
    check("UPDATE", device.map(0x1000, &region, Perm::RW), MAPPED)?;
    check("the same again, refused", device.map(0x1000, &region, Perm::RW), REFUSED)?;
    check("UPDATE after a refusal", device.map(0x3000, &region, Perm::RW), MAPPED)?;
    check("BATCH_END", device.message_of_type(0, iotlb_type::BATCH_END), MAPPED)?;
    for iova in [0x1000, 0x3000] {
        check(&format!("page {iova:#x} is mapped"), is_mapped(&device, iova), Ok(true))?;
    }
    Ok(())
}
