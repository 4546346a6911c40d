//! Cases about the arguments of dirty tracking: requests of this project, by the rules of the VFIO precedent.
//!
//! The structures have their own declaration here: with a shared one, the suite could not find a wrong field.

use vdpa_core::Errno;
use vdpa_core::features::BackendFeatures;
use vdpa_core::types::{IotlbMsg, Perm, iotlb_type};
use vdpa_sys::vhost_vdpa::RawArg;

use crate::case::{Case, Ctx, Need, Outcome, Stop, check, prepare};
use crate::device::{Device, MESSAGE_SIZE};
use crate::memory::{PAGE, Region};
use crate::request::Request;

/// Where nothing can be mapped.
const BAD: u64 = !0xfff;
/// First address that the cases track.
pub(super) const BASE: u64 = 0x100_0000;
/// Pages that they track.
const PAGES: u64 = 128;

pub(super) const NEEDS: &[Need] = &[Need::Backend(BackendFeatures::DIRTY_LOG), Need::DeviceFile];

macro_rules! cases {
    ($($name:literal, [$($request:ident),+], $run:ident;)+) => {
        pub(super) const CASES: &[Case] = &[$(Case {
            id: concat!("dirty.", $name),
            spec: "8.9",
            covers: &[$(Request::$request),+],
            needs: NEEDS,
            run: $run,
        }),+];
    };
}

cases! {
    "info", [DIRTY_INFO], info;
    "owner", [DIRTY_START, DIRTY_STOP, DIRTY_GET, DIRTY_UNMAP], owner;
    "sizes-and-flags", [DIRTY_INFO, DIRTY_START, DIRTY_STOP, DIRTY_GET, DIRTY_UNMAP], sizes_and_flags;
    "bad-pointer", [DIRTY_INFO, DIRTY_START, DIRTY_STOP, DIRTY_GET, DIRTY_UNMAP], bad_pointer;
    "start", [DIRTY_START, DIRTY_STOP], start;
    "start-ranges", [DIRTY_START], start_ranges;
    "get-arguments", [DIRTY_GET, DIRTY_UNMAP], get_arguments;
    "unmap-mappings", [DIRTY_UNMAP], unmap_mappings;
    "forgets", [DIRTY_START, DIRTY_GET], forgets;
}

/// Bytes of the first version of each argument.
const INFO: u32 = 40;
const START: u32 = 32;
const STOP: u32 = 8;
const GET: u32 = 56;

fn words(head: [u32; 2], rest: &[u64]) -> Vec<u8> {
    let mut bytes: Vec<u8> = head.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.extend(rest.iter().flat_map(|word| word.to_ne_bytes()));
    bytes
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let (words, _) = bytes.as_chunks::<8>();
    words.get(at).map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

/// `VDPA_DIRTY_INFO`; the words of the answer.
fn get_info(device: &Device) -> Result<Vec<u64>, Errno> {
    let mut bytes = words([INFO, 0], &[0; 4]);
    device.request(Request::DIRTY_INFO, RawArg::Bytes(&mut bytes))?;
    Ok((0..5).map(|at| word(&bytes, at)).collect())
}

/// Ranges in memory that a device may be told of: `(iova, length, asid)`.
fn ranges(list: &[(u64, u64, u32)]) -> Result<Region, Stop> {
    let region = Region::new((list.len() as u64 * 24).div_ceil(PAGE).max(1))?;
    for (number, (iova, length, asid)) in list.iter().enumerate() {
        let bytes = [iova.to_ne_bytes(), length.to_ne_bytes(), u64::from(*asid).to_ne_bytes()].concat();
        region.write(number * 24, &bytes)?;
    }
    Ok(region)
}

/// `VDPA_DIRTY_START` of this page size and these ranges.
fn start_with(device: &Device, page_size: u64, list: &[(u64, u64, u32)]) -> Result<Result<(), Errno>, Stop> {
    let region = ranges(list)?;
    let mut bytes = words([START, 0], &[page_size, list.len() as u64, region.uaddr()]);
    Ok(device.request(Request::DIRTY_START, RawArg::Bytes(&mut bytes)))
}

/// Tracks [`PAGES`] pages from [`BASE`] on.
fn track(device: &Device) -> Outcome {
    check("DIRTY_START", start_with(device, PAGE, &[(BASE, PAGES * PAGE, 0)])?, Ok(()))
}

/// The argument of GET and UNMAP.
#[derive(Clone, Copy, Debug)]
pub(super) struct Get {
    pub(super) flags: u32,
    pub(super) iova: u64,
    pub(super) length: u64,
    pub(super) asid: u64,
    pub(super) page_size: u64,
    pub(super) bitmap_size: u64,
    pub(super) bitmap: u64,
}

impl Get {
    /// Makes the request; the length after it.
    pub(super) fn request(self, device: &Device, request: Request) -> Result<u64, Errno> {
        let rest = [self.iova, self.length, self.asid, self.page_size, self.bitmap_size, self.bitmap];
        let mut bytes = words([GET, self.flags], &rest);
        device.request(request, RawArg::Bytes(&mut bytes))?;
        Ok(word(&bytes, 2))
    }
}

/// All that is tracked, in a bitmap of the right size.
fn all(bitmap: &Region) -> Get {
    Get {
        flags: 0,
        iova: BASE,
        length: PAGES * PAGE,
        asid: 0,
        page_size: PAGE,
        bitmap_size: PAGES / 8,
        bitmap: bitmap.uaddr(),
    }
}

fn info(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let got = get_info(&device).map(|words| words.first().copied().unwrap_or(0));
    check("DIRTY_INFO without an owner: size and flags", got, Ok(INFO.into()))?;
    let words = prepare("VDPA_DIRTY_INFO", get_info(&device))?;
    let [_, page_sizes, max_pages, max_ranges, page_size] = words[..] else {
        return Err(Stop::Failed("set-up: the answer has five words".to_owned()));
    };
    check("the smallest page size", page_sizes & page_sizes.wrapping_neg(), PAGE)?;
    check("at least a bitmap for 1 TiB", max_pages >= 1 << 28, true)?;
    check("ranges, and a reserved word of 0", (1..=1 << 16).contains(&max_ranges), true)?;
    check("page size when nothing is tracked", page_size, 0)?;
    prepare("VHOST_SET_OWNER", device.call(Request::SET_OWNER))?;
    track(&device)?;
    let words = prepare("VDPA_DIRTY_INFO", get_info(&device))?;
    check("flags while tracking", words.first().map(|word| word >> 32), Some(1))?;
    check("page size while tracking", words.last(), Some(&PAGE))
}

fn owner(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open()?;
    let bitmap = Region::new(1)?;
    for when in ["without an owner", "after a reset of the status"] {
        check(
            &format!("DIRTY_START {when}"),
            start_with(&device, PAGE, &[(BASE, PAGE, 0)])?,
            Err(Errno::PERM),
        )?;
        let stop = device.set(Request::DIRTY_STOP, &words([STOP, 0], &[]));
        check(&format!("DIRTY_STOP {when}"), stop, Err(Errno::PERM))?;
        for request in [Request::DIRTY_GET, Request::DIRTY_UNMAP] {
            let what = format!("{} {when}", request.name);
            check(&what, all(&bitmap).request(&device, request), Err(Errno::PERM))?;
            check(&what, device.bad_pointer(request), Err(Errno::PERM))?;
        }
        prepare("VHOST_VDPA_SET_STATUS", device.set_status(vdpa_core::features::Status::RESET))?;
    }
    Ok(())
}

fn sizes_and_flags(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let list = ranges(&[(BASE, PAGES * PAGE, 0)])?;
    let bitmap = Region::new(1)?;
    let start = [PAGE, 1, list.uaddr()];
    let get = [BASE, PAGES * PAGE, 0, PAGE, PAGES / 8, bitmap.uaddr()];
    for (request, size, known, rest) in [
        (Request::DIRTY_INFO, INFO, 0, &[0; 4][..]),
        (Request::DIRTY_START, START, 0, &start),
        (Request::DIRTY_GET, GET, 1, &get),
        (Request::DIRTY_UNMAP, GET, 0, &get),
        (Request::DIRTY_STOP, STOP, 0, &[]),
    ] {
        let set = |argsz: u32, flags: u32| {
            // As long as the size says, so that nothing but the size can be wrong.
            let mut bytes = words([argsz, flags], rest);
            bytes.resize(bytes.len().max(usize::try_from(argsz).unwrap_or(0)), 0xa5);
            device.set(request, &bytes)
        };
        let what = |what: &str| format!("{}: {what}", request.name);
        for argsz in [0, 4, size - 1] {
            check(&what(&format!("argsz {argsz}")), set(argsz, 0), Err(Errno::INVAL))?;
        }
        for bit in (0..32).filter(|bit| known >> bit & 1 == 0) {
            check(&what(&format!("flag {bit}")), set(size, 1 << bit), Err(Errno::INVAL))?;
        }
        check(&what("argsz of a later version"), set(size + 64, 0), Ok(()))?;
    }
    Ok(())
}

fn bad_pointer(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    for (request, size) in [
        (Request::DIRTY_INFO, INFO),
        (Request::DIRTY_START, START),
        (Request::DIRTY_STOP, STOP),
        (Request::DIRTY_GET, GET),
        (Request::DIRTY_UNMAP, GET),
    ] {
        let what = |what: &str| format!("{}: {what}", request.name);
        check(&what("bad pointer"), device.bad_pointer(request), Err(Errno::FAULT))?;
        if size > STOP {
            check(&what("half in memory"), device.set(request, &words([size, 0], &[])), Err(Errno::FAULT))?;
        }
    }
    let bad = words([START, 0], &[PAGE, 1, BAD]);
    check("DIRTY_START, ranges out of reach", device.set(Request::DIRTY_START, &bad), Err(Errno::FAULT))?;
    track(&device)?;
    let bitmap = Region::new(1)?;
    for request in [Request::DIRTY_GET, Request::DIRTY_UNMAP] {
        let bad = Get { bitmap: BAD, ..all(&bitmap) };
        check(
            &format!("{}: bitmap out of reach", request.name),
            bad.request(&device, request),
            Err(Errno::FAULT),
        )?;
        check("a bitmap in reach", all(&bitmap).request(&device, request).map(drop), Ok(()))?;
    }
    Ok(())
}

fn start(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let stop = || device.set(Request::DIRTY_STOP, &words([STOP, 0], &[]));
    check("DIRTY_STOP when nothing is tracked", stop(), Ok(()))?;
    for page_size in [0, 1, 2048, PAGE + 1, 3 * PAGE, 1 << 63] {
        let what = format!("DIRTY_START, page size {page_size}");
        check(&what, start_with(&device, page_size, &[(0, 1 << 63, 0)])?, Err(Errno::INVAL))?;
    }
    track(&device)?;
    check("DIRTY_START while tracking", start_with(&device, PAGE, &[(0, PAGE, 0)])?, Err(Errno::BUSY))?;
    check("DIRTY_STOP", stop(), Ok(()))?;
    check("larger pages", start_with(&device, 2 << 20, &[(0, 2 << 20, 0)])?, Ok(()))?;
    check("DIRTY_STOP", stop(), Ok(()))
}

fn start_ranges(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let spaces = ctx.probe().address_spaces;
    for (what, list, errno) in [
        ("no range", vec![], Errno::INVAL),
        ("length 0", vec![(BASE, 0, 0)], Errno::INVAL),
        ("half a page", vec![(BASE, PAGE / 2, 0)], Errno::INVAL),
        ("begins in a page", vec![(BASE + 8, PAGE, 0)], Errno::INVAL),
        ("beyond 2^64", vec![(u64::MAX - PAGE + 1, 2 * PAGE, 0)], Errno::OVERFLOW),
        ("overlap", vec![(BASE, 2 * PAGE, 0), (BASE + PAGE, PAGE, 0)], Errno::INVAL),
        ("twice the same", vec![(BASE, PAGE, 0), (BASE, PAGE, 0)], Errno::INVAL),
        ("too many pages", vec![(0, 1 << 62, 0)], Errno::INVAL),
        ("no such address space", vec![(BASE, PAGE, spaces)], Errno::INVAL),
    ] {
        check(&format!("DIRTY_START, {what}"), start_with(&device, PAGE, &list)?, Err(errno))?;
    }
    let max = prepare("VDPA_DIRTY_INFO", get_info(&device))?.get(3).copied().unwrap_or(0);
    let many: Vec<_> = (0..max + 1).map(|number| (BASE + 2 * PAGE * number, PAGE, 0)).collect();
    check("DIRTY_START, one range too many", start_with(&device, PAGE, &many)?, Err(Errno::TOOBIG))?;
    let reserved = ranges(&[(BASE, PAGE, 0)])?;
    reserved.write(20, &1_u32.to_ne_bytes())?;
    let bytes = words([START, 0], &[PAGE, 1, reserved.uaddr()]);
    check("DIRTY_START, reserved field", device.set(Request::DIRTY_START, &bytes), Err(Errno::INVAL))?;
    let most = many.get(1..).unwrap_or_default();
    check("DIRTY_START, as many ranges as there may be", start_with(&device, PAGE, most)?, Ok(()))
}

fn get_arguments(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let bitmap = Region::new(1)?;
    let right = all(&bitmap);
    for request in [Request::DIRTY_GET, Request::DIRTY_UNMAP] {
        let what = format!("{} when nothing is tracked", request.name);
        check(&what, right.request(&device, request), Err(Errno::INVAL))?;
    }
    track(&device)?;
    for request in [Request::DIRTY_GET, Request::DIRTY_UNMAP] {
        for (what, get, errno) in [
            ("length 0", Get { length: 0, ..right }, Errno::INVAL),
            ("half a page", Get { length: PAGE / 2, ..right }, Errno::INVAL),
            ("begins in a page", Get { iova: BASE + 8, length: PAGE, ..right }, Errno::INVAL),
            ("beyond 2^64", Get { iova: u64::MAX - PAGE + 1, ..right }, Errno::OVERFLOW),
            ("before the range", Get { iova: BASE - PAGE, ..right }, Errno::INVAL),
            ("behind the range", Get { iova: BASE + PAGE, ..right }, Errno::INVAL),
            ("another address space", Get { asid: 1, ..right }, Errno::INVAL),
            ("reserved field", Get { asid: 1 << 32, ..right }, Errno::INVAL),
            ("page size 0", Get { page_size: 0, ..right }, Errno::INVAL),
            ("another page size", Get { page_size: 2 * PAGE, ..right }, Errno::INVAL),
            ("bitmap too small", Get { bitmap_size: PAGES / 8 - 8, ..right }, Errno::INVAL),
            ("half a word", Get { bitmap_size: PAGES / 8 + 4, ..right }, Errno::INVAL),
        ] {
            check(&format!("{}: {what}", request.name), get.request(&device, request), Err(errno))?;
        }
        let larger = Get { bitmap_size: PAGE, ..right };
        check("a larger bitmap", larger.request(&device, request).map(drop), Ok(()))?;
    }
    check("bits of pages that nobody wrote", bitmap.read::<16>(0)?, [0; 16])
}

fn unmap_mappings(ctx: &mut Ctx<'_>) -> Outcome {
    let device = ctx.open_owned()?;
    let (bitmap, region) = (Region::new(1)?, Region::new(4)?);
    track(&device)?;
    let part =
        |first: u64, pages: u64| Get { iova: BASE + first * PAGE, length: pages * PAGE, ..all(&bitmap) };
    let unmap = |get: Get| get.request(&device, Request::DIRTY_UNMAP);
    check("DIRTY_UNMAP of nothing", unmap(part(0, 8)), Ok(0))?;
    check("UPDATE", device.map(BASE, &region, Perm::RW), Ok(MESSAGE_SIZE))?;
    check("UPDATE", device.map(BASE + 8 * PAGE, &region, Perm::RO), Ok(MESSAGE_SIZE))?;
    for (first, pages) in [(0, 2), (2, 2), (1, 2), (2, 8)] {
        check("DIRTY_UNMAP of a part of a mapping", unmap(part(first, pages)), Err(Errno::INVAL))?;
    }
    let bad = Get { bitmap: BAD, ..part(0, 4) };
    check("DIRTY_UNMAP, bitmap out of reach", unmap(bad), Err(Errno::FAULT))?;
    check("BATCH_BEGIN", device.message_of_type(0, iotlb_type::BATCH_BEGIN), Ok(MESSAGE_SIZE))?;
    check("DIRTY_UNMAP in a batch", unmap(part(0, 4)), Err(Errno::BUSY))?;
    check("BATCH_END", device.message_of_type(0, iotlb_type::BATCH_END), Ok(MESSAGE_SIZE))?;
    let again = IotlbMsg {
        iova: BASE,
        size: region.size(),
        uaddr: region.uaddr(),
        perm: Perm::RW,
        kind: iotlb_type::UPDATE,
    };
    check("UPDATE of what is still mapped", device.message(0, again), Err(Errno::FAULT))?;
    check("DIRTY_UNMAP of one", unmap(part(0, 8)), Ok(4 * PAGE))?;
    check("UPDATE of what is not mapped any more", device.message(0, again), Ok(MESSAGE_SIZE))?;
    check("DIRTY_UNMAP of two", unmap(part(0, PAGES)), Ok(8 * PAGE))?;
    check("DIRTY_UNMAP of nothing", unmap(part(0, PAGES)), Ok(0))
}

fn forgets(ctx: &mut Ctx<'_>) -> Outcome {
    let tracking = |device: &Device| {
        let words = prepare("VDPA_DIRTY_INFO", get_info(device))?;
        Ok::<_, Stop>(words.first().is_some_and(|word| word >> 32 == 1))
    };
    {
        let device = ctx.open_owned()?;
        track(&device)?;
        prepare("VHOST_VDPA_SET_STATUS", device.set_status(vdpa_core::features::Status::RESET))?;
        check("tracking after a reset", tracking(&device)?, true)?;
    }
    let device = ctx.open_owned()?;
    check("tracking after close and open", tracking(&device)?, false)?;
    let bitmap = Region::new(1)?;
    check("DIRTY_GET then", all(&bitmap).request(&device, Request::DIRTY_GET), Err(Errno::INVAL))
}
