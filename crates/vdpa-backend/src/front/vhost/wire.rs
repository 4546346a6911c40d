//! Decodes IOTLB messages and ioctl arguments.

use vdpa_core::Errno;
use vdpa_core::faults::{self, Fault};
use vdpa_core::features::BackendFeatures;
use vdpa_core::types::{Asid, IotlbMsg, Perm, Result};
use vdpa_sys::uapi::vhost as uapi;
use zerocopy::FromBytes;

/// Minimum length of a message in bytes; bytes after these are ignored.
const MESSAGE_MIN: usize = 40;

/// Return value of a successful IOTLB write of any length (uapi-spec 2.2).
pub(super) const MESSAGE_SIZE: u32 = 72;

/// Decodes one `write` (uapi-spec 2.2): versions 1 and 2 at any time; version 2 carries an asid if IOTLB_ASID was
/// acknowledged.
///
/// # Errors
/// `EINVAL` when the message is too short or of another version.
pub(super) fn iotlb_message(bytes: &[u8], acked: BackendFeatures) -> Result<(Asid, IotlbMsg)> {
    let (version, rest) = u32::read_from_prefix(bytes).map_err(|_| Errno::INVAL)?;
    let asid = match version {
        uapi::VHOST_IOTLB_MSG => 0,
        uapi::VHOST_IOTLB_MSG_V2
            if !acked.has(BackendFeatures::IOTLB_ASID) && !faults::is(Fault::AsidUnasked) =>
        {
            0
        }
        uapi::VHOST_IOTLB_MSG_V2 => u32::read_from_prefix(rest).map_err(|_| Errno::INVAL)?.0,
        _ if faults::is(Fault::VersionUnchecked) => 0,
        _ => return Err(Errno::INVAL),
    };
    let payload = bytes.get(8..MESSAGE_MIN).ok_or(Errno::INVAL)?;
    let msg = uapi::IotlbMsg::read_from_bytes(payload).map_err(|_| Errno::INVAL)?;
    let msg =
        IotlbMsg { iova: msg.iova, size: msg.size, uaddr: msg.uaddr, perm: Perm(msg.perm), kind: msg.kind };
    Ok((Asid(asid), msg))
}

/// Decodes an argument that the kernel has copied as a whole. Its length is that of the request number, so a shorter argument
/// comes with another request number: `EFAULT`.
pub(super) fn argument<T: FromBytes>(input: &[u8]) -> Result<T> {
    T::read_from_prefix(input).map(|(value, _)| value).map_err(|_| Errno::FAULT)
}

#[cfg(test)]
mod tests {
    use zerocopy::IntoBytes;

    use super::*;

    fn message(kind: u32, second: u32) -> Vec<u8> {
        let iotlb =
            uapi::IotlbMsg { iova: 0x1000, size: 0x2000, uaddr: 0x3000, perm: 3, kind: 2, padding: [9; 6] };
        uapi::MsgV2 { kind, asid: second, iotlb, padding: [7; 32] }.as_bytes().to_vec()
    }

    #[test]
    fn both_versions_decode_and_only_an_acknowledged_asid_counts() {
        let with_asid = BackendFeatures::NONE.with(BackendFeatures::IOTLB_ASID);
        let expected = IotlbMsg { iova: 0x1000, size: 0x2000, uaddr: 0x3000, perm: Perm::RW, kind: 2 };
        assert_eq!(iotlb_message(&message(1, 0xdead), with_asid), Ok((Asid(0), expected)));
        assert_eq!(iotlb_message(&message(2, 1), BackendFeatures::NONE), Ok((Asid(0), expected)));
        assert_eq!(iotlb_message(&message(2, 1), with_asid), Ok((Asid(1), expected)));
    }

    #[test]
    fn forty_bytes_are_enough_and_thirty_nine_are_not() {
        let whole = message(2, 0);
        assert!(iotlb_message(&whole[..40], BackendFeatures::NONE).is_ok());
        for len in [0, 3, 4, 8, 39] {
            assert_eq!(iotlb_message(&whole[..len], BackendFeatures::NONE), Err(Errno::INVAL), "{len}");
        }
        for version in [0, 3, u32::MAX] {
            assert_eq!(iotlb_message(&message(version, 0), BackendFeatures::NONE), Err(Errno::INVAL));
        }
    }
}
