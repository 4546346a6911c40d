//! The bytes of IOTLB messages, and the kind of the file they go to.

use std::os::fd::OwnedFd;

use rustix::fs::FileType;
use vdpa_core::Errno;
use vdpa_core::features::BackendFeatures;
use vdpa_core::types::{Asid, IotlbMsg, Perm, Result};

use super::MSG_SIZE;
use crate::uapi::vhost as uapi;

/// Whether the file is a vhost device of the kernel other than vhost-vdpa. Those are misc devices; vhost-vdpa has a class of
/// its own, and one of a server in user space is a regular file or of the class cuse.
pub(super) fn is_other_vhost(fd: &OwnedFd) -> bool {
    let Ok(stat) = rustix::fs::fstat(fd) else { return false };
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice {
        return false;
    }
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    let link = std::fs::read_link(format!("/sys/dev/char/{major}:{minor}")).unwrap_or_default();
    let name = link.file_name().unwrap_or_default().as_encoded_bytes();
    name.starts_with(b"vhost-") && link.parent().is_some_and(|class| class.ends_with("misc"))
}

/// Address space and message of the bytes of a message of either version; bytes that are missing count as 0.
pub(super) fn decode_iotlb(bytes: &[u8]) -> (u32, IotlbMsg) {
    let mut whole = [0; MSG_SIZE];
    whole.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    let uapi::MsgV2 { kind, asid, iotlb, .. } = zerocopy::transmute!(whole);
    let uapi::IotlbMsg { iova, size, uaddr, perm, kind: request, .. } = iotlb;
    let asid = if kind == uapi::VHOST_IOTLB_MSG_V2 { asid } else { 0 };
    (asid, IotlbMsg { iova, size, uaddr, perm: Perm(perm), kind: request })
}

/// The bytes of a message in the version that `acknowledged` calls for.
///
/// # Errors
/// `EINVAL` for an address space other than 0 when messages cannot carry one.
pub(super) fn encode_iotlb(
    acknowledged: BackendFeatures,
    asid: Asid,
    msg: &IotlbMsg,
) -> Result<[u8; MSG_SIZE]> {
    let with_asid = acknowledged.has(BackendFeatures::IOTLB_ASID);
    if asid.0 != 0 && !with_asid {
        return Err(Errno::INVAL);
    }
    let iotlb = uapi::IotlbMsg {
        iova: msg.iova,
        size: msg.size,
        uaddr: msg.uaddr,
        perm: msg.perm.0,
        kind: msg.kind,
        padding: [0; 6],
    };
    let padding = [0; 32];
    Ok(if with_asid || acknowledged.has(BackendFeatures::IOTLB_MSG_V2) {
        zerocopy::transmute!(uapi::MsgV2 { kind: uapi::VHOST_IOTLB_MSG_V2, asid: asid.0, iotlb, padding })
    } else {
        zerocopy::transmute!(uapi::Msg { kind: uapi::VHOST_IOTLB_MSG.cast_signed(), hole: 0, iotlb, padding })
    })
}
