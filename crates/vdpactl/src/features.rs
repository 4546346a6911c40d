//! Names of feature bits, as iproute2 prints them (uapi-spec 7.4).

use std::ops::RangeInclusive;

use serde_json::Value;
use vdpa_core::features::{Bit, Features};

/// Bits of the transport, which do not depend on the device type (`VIRTIO_TRANSPORT_F_START`, `_END`).
const TRANSPORT: RangeInclusive<u8> = 28..=42;

/// Which bits have names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Names {
    /// Bits of the transport and of network devices.
    Net,
    /// Bits of the transport and of block devices. iproute2 has no names for the latter, so they are used only in output that it does
    /// not have.
    Block,
    /// Bits of the transport only.
    Transport,
    /// None (`--no-nice-names`).
    Numbers,
}

impl Names {
    fn name(self, bit: u8) -> Option<&'static str> {
        match self {
            Self::Numbers => None,
            _ if TRANSPORT.contains(&bit) => transport(bit),
            Self::Net => net(bit),
            Self::Block => block(bit),
            Self::Transport => None,
        }
    }

    /// The names of the bits of `features`, each after a space; `bit_N` for a bit without a name.
    pub(crate) fn plain(self, features: Features) -> String {
        bits(features)
            .map(|bit| match self.name(bit) {
                Some(name) => format!(" {name}"),
                None => format!(" bit_{bit}"),
            })
            .collect()
    }

    /// The names of the bits of `features`; the number for a bit without a name.
    pub(crate) fn json(self, features: Features) -> Value {
        bits(features).map(|bit| self.name(bit).map_or_else(|| Value::from(bit), Value::from)).collect()
    }
}

fn bits(features: Features) -> impl Iterator<Item = u8> {
    (0..64).filter(move |bit| features.has(Bit(*bit)))
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
    fn the_simulator_has_the_names_iproute2_gives_it() {
        assert_eq!(
            Names::Net.plain(Features(0x3_0883_0028)),
            " MTU MAC STATUS CTRL_VQ CTRL_MAC_ADDR ANY_LAYOUT VERSION_1 ACCESS_PLATFORM"
        );
    }

    #[test]
    fn bits_without_a_name_are_numbers() {
        let features = Features::of(&[Bit(3), Bit(30), Bit(32), Bit(50)]);
        assert_eq!(Names::Transport.plain(features), " bit_3 bit_30 VERSION_1 bit_50");
        assert_eq!(Names::Transport.json(features).to_string(), r#"[3,30,"VERSION_1",50]"#);
        assert_eq!(Names::Numbers.json(features).to_string(), "[3,30,32,50]");
    }
}
