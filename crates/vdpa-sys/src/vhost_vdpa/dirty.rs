//! The requests of dirty tracking.

use vdpa_core::Errno;
use vdpa_core::dirty::{DirtyInfo, DirtyLimits, DirtyRange};
use vdpa_core::types::{Asid, IotlbMsg, Result, iotlb_type};
use zerocopy::{FromBytes, FromZeros};

use super::VhostVdpaFd;
use crate::dma::{self, Permission};
use crate::uapi::dirty::{self as uapi, Request, Sized32};

/// Bytes of a word of a bitmap.
const WORD: u64 = size_of::<u64>() as u64;

impl VhostVdpaFd {
    pub(super) fn get_dirty_info(&self) -> Result<DirtyInfo> {
        let mut info = uapi::DirtyInfo::new();
        self.dirty_request(Request::Info, &mut info)?;
        let uapi::DirtyInfo { page_sizes, max_pages, max_ranges, page_size, flags, .. } = info;
        let limits = DirtyLimits { page_sizes, pages: max_pages, ranges: max_ranges };
        Ok(DirtyInfo { limits, page_size: (flags & uapi::INFO_TRACKING != 0).then_some(page_size) })
    }

    pub(super) fn start_dirty(&self, page_size: u64, ranges: &[DirtyRange]) -> Result<()> {
        let range = |range: &DirtyRange| uapi::DirtyRange {
            iova: range.range.first(),
            length: range.range.size(),
            asid: range.asid.0,
            reserved: 0,
        };
        let ranges: Vec<_> = ranges.iter().map(range).collect();
        let mut start = uapi::DirtyStart {
            page_size,
            num_ranges: u32::try_from(ranges.len()).map_err(|_| Errno::TOOBIG)?,
            ranges: ranges.as_ptr().expose_provenance() as u64,
            ..uapi::DirtyStart::new()
        };
        self.dirty_request(Request::Start, &mut start)
    }

    pub(super) fn stop_dirty(&self) -> Result<()> {
        self.dirty_request(Request::Stop, &mut uapi::DirtyStop::new())
    }

    pub(super) fn get_dirty(
        &self,
        of: DirtyRange,
        page_size: u64,
        keep: bool,
        bitmap: &mut [u64],
    ) -> Result<()> {
        let flags = if keep { uapi::GET_KEEP } else { 0 };
        self.dirty_request(Request::Get, &mut uapi::DirtyGet { flags, ..get(of, page_size, bitmap) })
    }

    pub(super) fn unmap_dirty(&self, of: DirtyRange, page_size: u64, bitmap: &mut [u64]) -> Result<u64> {
        let mut argument = get(of, page_size, bitmap);
        let mut kept = self.kept.lock();
        self.dirty_request(Request::Unmap, &mut argument)?;
        let DirtyRange { asid: Asid(asid), range } = of;
        let (iova, size) = (range.first(), range.size());
        let removed = IotlbMsg { iova, size, kind: iotlb_type::INVALIDATE, ..IotlbMsg::default() };
        kept.accepted(asid, &removed, Permission::Harmless);
        Ok(argument.length)
    }

    fn dirty_request<T: Sized32>(&self, request: Request, argument: &mut T) -> Result<()> {
        // An argument names an array of ranges that the callers here borrow, or a bitmap that they borrow exclusively.
        self.sized_request(request.number(self.numbers.dirty), argument)
    }
}

/// Whether an argument of any bytes gives the device no memory that it must not write: a bitmap lies in memory that devices may be
/// told of, or where nothing can be mapped.
pub(super) fn is_harmless(request: Option<Request>, bytes: &[u8]) -> bool {
    if !matches!(request, Some(Request::Get | Request::Unmap)) {
        return true;
    }
    // A shorter one is followed by nothing that can be read.
    let Ok((get, _)) = uapi::DirtyGet::read_from_prefix(bytes) else { return true };
    is_known_memory(get.bitmap, get.bitmap_size)
}

/// Whether `size` bytes from an address on are memory that devices may be told of, or where nothing can be mapped.
pub(super) fn is_known_memory(address: u64, size: u64) -> bool {
    /// The first address that belongs to the kernel.
    const KERNEL: u64 = 1 << 63;
    address >= KERNEL || size == 0 || dma::hold(address, size).is_some()
}

fn get(of: DirtyRange, page_size: u64, bitmap: &mut [u64]) -> uapi::DirtyGet {
    uapi::DirtyGet {
        argsz: uapi::DirtyGet::MIN,
        iova: of.range.first(),
        length: of.range.size(),
        asid: of.asid.0,
        page_size,
        bitmap_size: bitmap.len() as u64 * WORD,
        bitmap: bitmap.as_mut_ptr().expose_provenance() as u64,
        ..uapi::DirtyGet::new_zeroed()
    }
}
