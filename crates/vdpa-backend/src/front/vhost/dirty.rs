//! The requests of dirty tracking: `VDPA_DIRTY_*`.

use vdpa_core::Errno;
use vdpa_core::device::Device;
use vdpa_core::dirty::{DirtyLimits, DirtyRange};
use vdpa_core::faults::{self, Fault};
use vdpa_core::types::{Asid, IovaRange, Result};
use vdpa_sys::process::{Caller, ProcessCaller};
use vdpa_sys::uapi::dirty::{self as uapi, Request, Sized32};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::{AnyParent, done};
use crate::front::fuse::{IoctlCall, IoctlReply};

/// Bytes of a word of a bitmap.
const WORD: u64 = size_of::<u64>() as u64;

/// Which request an ioctl is, for a device that can track what it writes.
pub(super) fn request(device: &Device<AnyParent>, request: Option<Request>) -> Option<Request> {
    request.filter(|_| device.dirty_limits().is_some())
}

/// `VDPA_DIRTY_INFO`, for any process that has the device open.
pub(super) fn info(device: &Device<AnyParent>, call: &IoctlCall<'_>, process: &Caller) -> Result<IoctlReply> {
    let asked: uapi::DirtyInfo = argument(call, process)?;
    let DirtyLimits { page_sizes, pages, ranges } = device.dirty_limits().ok_or(Errno::NOTTY)?;
    let tracked = device.dirty_tracked();
    let info = uapi::DirtyInfo {
        argsz: uapi::DirtyInfo::MIN,
        flags: if tracked.is_some() { uapi::INFO_TRACKING } else { 0 },
        page_sizes,
        max_pages: pages,
        max_ranges: ranges,
        reserved: 0,
        page_size: tracked.map_or(0, |tracked| tracked.page_size),
    };
    let len = info.as_bytes().len().min(usize::try_from(asked.argsz).unwrap_or(usize::MAX));
    done(process.write_mem(call.arg, info.as_bytes().get(..len).unwrap_or_default()))
}

/// The other requests, for the owner. `unique` is the number of the request.
pub(super) fn owned(
    device: &mut Device<AnyParent>,
    call: &IoctlCall<'_>,
    caller: &ProcessCaller<'_>,
    request: Request,
    unique: u64,
) -> Result<IoctlReply> {
    match request {
        Request::Info => info(device, call, caller.caller),
        Request::Start => {
            let start: uapi::DirtyStart = argument(call, caller.caller)?;
            let ranges = ranges(&start, caller.caller)?;
            done(device.dirty_start(caller, start.page_size, &ranges, unique))
        }
        Request::Stop => {
            let uapi::DirtyStop { .. } = argument(call, caller.caller)?;
            done(device.dirty_stop(caller))
        }
        Request::Get => {
            let get: uapi::DirtyGet = argument(call, caller.caller)?;
            let of = bitmap(device, &get, caller.caller)?;
            let clear = get.flags & uapi::GET_KEEP == 0;
            done(device.dirty_report(caller, of, clear, &mut |bits| caller.caller.set_bits(get.bitmap, bits)))
        }
        Request::Unmap => {
            let get: uapi::DirtyGet = argument(call, caller.caller)?;
            if get.flags != 0 {
                return Err(Errno::INVAL);
            }
            let of = bitmap(device, &get, caller.caller)?;
            let at = std::mem::offset_of!(uapi::DirtyGet, length) as u64;
            let at = call.arg.checked_add(at).ok_or(Errno::FAULT)?;
            // Before anything is removed.
            caller.caller.check_writable(at, WORD)?;
            let sink = &mut |bits: &[(u64, u64)]| caller.caller.set_bits(get.bitmap, bits);
            let bytes = device.dirty_unmap(caller, of, sink)?;
            done(caller.caller.write_mem(at, bytes.as_bytes()))
        }
    }
}

/// Reads an argument: what the first version of it has.
pub(super) fn argument<T: Sized32>(call: &IoctlCall<'_>, process: &Caller) -> Result<T> {
    let mut bytes = vec![0; size_of::<T>()];
    let head = size_of::<u32>() * 2;
    // The size first: a shorter argument is refused for its size, whatever is behind it.
    let first = bytes.get_mut(..head).ok_or(Errno::FAULT)?;
    process.read_mem(call.arg, first)?;
    let (argsz, _) = u32::read_from_prefix(first).map_err(|_| Errno::FAULT)?;
    if argsz < T::MIN {
        return Err(Errno::INVAL);
    }
    process.read_mem(call.arg, &mut bytes)?;
    match uapi::decode(&bytes) {
        Err(Errno::INVAL) if faults::is(Fault::DirtyFlagsIgnored) => {
            T::read_from_bytes(&bytes).map_err(|_| Errno::FAULT)
        }
        result => result,
    }
}

/// The ranges that are to be tracked.
fn ranges(start: &uapi::DirtyStart, process: &Caller) -> Result<Vec<DirtyRange>> {
    if start.reserved != 0 || start.num_ranges == 0 {
        return Err(Errno::INVAL);
    }
    if start.num_ranges > DirtyLimits::MAP.ranges {
        return Err(Errno::TOOBIG);
    }
    let count = usize::try_from(start.num_ranges).map_err(|_| Errno::TOOBIG)?;
    let mut ranges = vec![uapi::DirtyRange::new_zeroed(); count];
    process.read_mem(start.ranges, ranges.as_mut_bytes())?;
    ranges.iter().map(|range| checked(range.asid, range.iova, range.length, range.reserved)).collect()
}

fn checked(asid: u32, iova: u64, length: u64, reserved: u32) -> Result<DirtyRange> {
    if length == 0 || reserved != 0 {
        return Err(Errno::INVAL);
    }
    let range = IovaRange::from_size(iova, length).ok_or(Errno::OVERFLOW)?;
    Ok(DirtyRange { asid: Asid(asid), range })
}

/// Checks a range as it crosses the interface, for the fuzz target.
#[cfg(fuzzing)]
pub(super) fn check_range(input: &[u8]) -> Result<()> {
    let (range, _) = uapi::DirtyRange::read_from_prefix(input).map_err(|_| Errno::FAULT)?;
    let of = checked(range.asid, range.iova, range.length, range.reserved)?;
    assert_eq!((of.range.first(), of.range.size()), (range.iova, range.length));
    vdpa_core::dirty::check_pages(of.range, 4096)
}

/// The range of a bitmap that the caller has given, with room for it.
fn bitmap(device: &Device<AnyParent>, get: &uapi::DirtyGet, process: &Caller) -> Result<DirtyRange> {
    let of = checked(get.asid, get.iova, get.length, get.reserved)?;
    let page_size = device.dirty_tracked().ok_or(Errno::INVAL)?.page_size;
    vdpa_core::dirty::check_pages(of.range, page_size)?;
    let words = (get.length / page_size).div_ceil(64);
    let largest = DirtyLimits::MAP.pages / 8;
    let fits = get.bitmap_size >= words * WORD && get.bitmap_size.is_multiple_of(WORD);
    if get.page_size != page_size || !fits || get.bitmap_size > largest {
        return Err(Errno::INVAL);
    }
    process.check_writable(get.bitmap, words * WORD)?;
    Ok(of)
}
