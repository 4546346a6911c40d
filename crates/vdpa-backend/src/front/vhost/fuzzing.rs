//! The decoders, for fuzz targets.

use vdpa_core::features::BackendFeatures;
use vdpa_core::types::IotlbMsg;

use super::{Asid, Result, uapi, wire};

/// Decodes one `write`, with these backend features acknowledged.
///
/// # Errors
/// As for a client.
pub fn iotlb_message(bytes: &[u8], acked: BackendFeatures) -> Result<(Asid, IotlbMsg)> {
    wire::iotlb_message(bytes, acked)
}

/// Decodes `input` as the arguments of dirty tracking.
fn dirty_arguments(input: &[u8]) -> Result<()> {
    use vdpa_sys::uapi::dirty::{DirtyGet, DirtyInfo, DirtyStart, DirtyStop, Sized32, decode};
    fn check<T: Sized32>(input: &[u8]) {
        if let Ok(argument) = decode::<T>(input) {
            let (argsz, flags) = argument.head();
            assert!(argsz >= T::MIN && flags & !T::FLAGS == 0);
        }
    }
    check::<DirtyInfo>(input);
    check::<DirtyStart>(input);
    check::<DirtyStop>(input);
    check::<DirtyGet>(input);
    super::dirty::check_range(input)
}

/// Decodes `input` as every kind of argument there is.
pub fn arguments(input: &[u8]) {
    let _ = wire::argument::<u8>(input);
    let _ = wire::argument::<i32>(input);
    let _ = wire::argument::<u64>(input);
    let _ = dirty_arguments(input);
    if let Ok(report) = wire::argument::<vdpa_sys::uapi::report::UpdateReport>(input) {
        let _ = (report.check(), report.reason());
    }
    let _ = wire::argument::<uapi::ConfigHeader>(input);
    let _ = wire::argument::<uapi::MemoryHeader>(input);
    let _ = wire::argument::<uapi::VringAddr>(input);
    let _ = wire::argument::<uapi::VringFile>(input);
    let _ = wire::argument::<uapi::VringState>(input);
}
