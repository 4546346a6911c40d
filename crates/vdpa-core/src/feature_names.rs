//! Names of feature bits, as iproute2 prints them (uapi-spec 7.4).

use std::ops::RangeInclusive;

use crate::features::{BackendFeatures, Bit, Features};

/// Bits of the transport, which do not depend on the device type (`VIRTIO_TRANSPORT_F_START`, `_END`).
const TRANSPORT: RangeInclusive<u8> = 28..=42;
/// Virtio device id of a network device (virtio 1.2 section 5).
pub const NET: u32 = 1;
/// Virtio device id of a block device.
pub const BLOCK: u32 = 2;

/// The name of a bit of a device of this virtio device id, without its prefix `VIRTIO_F_`, `VIRTIO_NET_F_` or `VIRTIO_BLK_F_`. Of
/// devices other than network and block, only the bits of the transport have names.
#[must_use]
pub fn name(device_id: u32, Bit(bit): Bit) -> Option<&'static str> {
    match device_id {
        _ if TRANSPORT.contains(&bit) => transport(bit),
        NET => net(bit),
        BLOCK => block(bit),
        _ => None,
    }
}

/// Features for people: hexadecimal, and the names.
///
/// ```
/// use vdpa_core::feature_names::{BLOCK, text};
/// use vdpa_core::features::Features;
///
/// let features = Features::of(&[Features::BLK_FLUSH, Features::VERSION_1]);
/// assert_eq!(text(features, BLOCK), "0x100000200 (FLUSH VERSION_1)");
/// assert_eq!(text(Features::NONE, BLOCK), "0x0");
/// ```
#[must_use]
pub fn text(features: Features, device_id: u32) -> String {
    with_names(features.0, |bit| name(device_id, bit))
}

/// Backend features for people: hexadecimal, and the names without their prefix `VHOST_BACKEND_F_`.
#[must_use]
pub fn backend_text(features: BackendFeatures) -> String {
    with_names(features.0, |Bit(bit)| {
        Some(match bit {
            1 => "IOTLB_MSG_V2",
            2 => "IOTLB_BATCH",
            3 => "IOTLB_ASID",
            4 => "SUSPEND",
            5 => "RESUME",
            6 => "ENABLE_AFTER_DRIVER_OK",
            7 => "DESC_ASID",
            8 => "IOTLB_PERSIST",
            9 => "NEW_OWNER",
            10 => "IOTLB_REMAP",
            48 => "DIRTY_LOG",
            49 => "DEVICE_STATE",
            _ => return None,
        })
    })
}

fn with_names(word: u64, name: impl Fn(Bit) -> Option<&'static str>) -> String {
    let bits = (0..64).filter(|bit| word >> bit & 1 == 1).map(Bit);
    let names = bits.map(|bit| name(bit).map_or_else(|| format!("bit_{}", bit.0), str::to_owned));
    let names: Vec<_> = names.collect();
    if names.is_empty() { format!("{word:#x}") } else { format!("{word:#x} ({})", names.join(" ")) }
}

fn transport(bit: u8) -> Option<&'static str> {
    Some(match bit {
        28 => "RING_INDIRECT_DESC",
        29 => "RING_EVENT_IDX",
        32 => "VERSION_1",
        33 => "ACCESS_PLATFORM",
        34 => "RING_PACKED",
        35 => "IN_ORDER",
        36 => "ORDER_PLATFORM",
        37 => "SR_IOV",
        38 => "NOTIFICATION_DATA",
        _ => return None,
    })
}

fn net(bit: u8) -> Option<&'static str> {
    Some(match bit {
        0 => "CSUM",
        1 => "GUEST_CSUM",
        2 => "CTRL_GUEST_OFFLOADS",
        3 => "MTU",
        5 => "MAC",
        7 => "GUEST_TSO4",
        8 => "GUEST_TSO6",
        9 => "GUEST_ECN",
        10 => "GUEST_UFO",
        11 => "HOST_TSO4",
        12 => "HOST_TSO6",
        13 => "HOST_ECN",
        14 => "HOST_UFO",
        15 => "MRG_RXBUF",
        16 => "STATUS",
        17 => "CTRL_VQ",
        18 => "CTRL_RX",
        19 => "CTRL_VLAN",
        20 => "CTRL_RX_EXTRA",
        21 => "GUEST_ANNOUNCE",
        22 => "MQ",
        23 => "CTRL_MAC_ADDR",
        24 => "NOTIFY_ON_EMPTY",
        27 => "ANY_LAYOUT",
        54 => "GUEST_USO4",
        55 => "GUEST_USO6",
        56 => "HOST_USO",
        57 => "HASH_REPORT",
        60 => "RSS",
        61 => "RSC_EXT",
        62 => "STANDBY",
        63 => "SPEED_DUPLEX",
        _ => return None,
    })
}

fn block(bit: u8) -> Option<&'static str> {
    Some(match bit {
        1 => "SIZE_MAX",
        2 => "SEG_MAX",
        4 => "GEOMETRY",
        5 => "RO",
        6 => "BLK_SIZE",
        9 => "FLUSH",
        10 => "TOPOLOGY",
        11 => "CONFIG_WCE",
        12 => "MQ",
        13 => "DISCARD",
        14 => "WRITE_ZEROES",
        15 => "LIFETIME",
        16 => "SECURE_ERASE",
        17 => "ZONED",
        27 => "ANY_LAYOUT",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backend_features_have_the_names_of_their_constants() {
        let all = BackendFeatures(0x7fe);
        assert_eq!(
            backend_text(all),
            "0x7fe (IOTLB_MSG_V2 IOTLB_BATCH IOTLB_ASID SUSPEND RESUME ENABLE_AFTER_DRIVER_OK DESC_ASID IOTLB_PERSIST NEW_OWNER \
             IOTLB_REMAP)"
        );
        assert_eq!(BackendFeatures::IOTLB_REMAP, Bit(10));
        assert_eq!(BackendFeatures::DESC_ASID, Bit(7));
    }
}
