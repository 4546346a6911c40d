//! Virtio network configuration, packet header and control commands (virtio 1.2 section 5.1), and the [`loopback`] device of
//! the kernel's simulator.

pub mod card;
pub mod loopback;
pub mod transmit;

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::features::{Bit, Features};

/// Bytes of an Ethernet address.
pub const MAC_BYTES: usize = 6;

/// Bit 0 of [`NetConfig::status`]: `VIRTIO_NET_S_LINK_UP`.
pub const LINK_UP: u16 = 1;

/// Bit 1 of [`NetConfig::status`]: `VIRTIO_NET_S_ANNOUNCE`.
pub const ANNOUNCE: u16 = 2;

/// Configuration space: `struct virtio_net_config`, 24 bytes.
///
/// A field is valid if the device offers the feature in parentheses, and 0 otherwise.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct NetConfig {
    /// Ethernet address (`MAC`).
    pub mac: [u8; MAC_BYTES],
    /// [`LINK_UP`] and [`ANNOUNCE`] (`STATUS`).
    pub status: U16,
    /// Pairs of data queues (`MQ`).
    pub max_virtqueue_pairs: U16,
    /// Bytes of the largest packet, without the Ethernet header (`MTU`).
    pub mtu: U16,
    /// Mbit/s; all ones when unknown (`SPEED_DUPLEX`).
    pub speed: U32,
    /// 1: full, 0: half, 0xff: unknown (`SPEED_DUPLEX`).
    pub duplex: u8,
    /// Bytes of the longest hash key (`RSS`).
    pub rss_max_key_size: u8,
    /// Entries of the longest indirection table (`RSS`).
    pub rss_max_indirection_table_length: U16,
    /// Hash types (`RSS`).
    pub supported_hash_types: U32,
}

impl NetConfig {
    /// Where [`status`](Self::status) is: what a device changes by itself.
    pub(crate) const STATUS: std::ops::Range<usize> = {
        let at = std::mem::offset_of!(Self, status);
        at..at + size_of::<U16>()
    };
}

/// The header before each packet in a data queue: `struct virtio_net_hdr_v1`, 12 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct NetHeader {
    /// `VIRTIO_NET_HDR_F_*`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`.
    pub gso_type: u8,
    /// Bytes of the packet's own headers.
    pub hdr_len: U16,
    /// Bytes of payload in a segment.
    pub gso_size: U16,
    /// Offset at which the checksummed bytes begin.
    pub csum_start: U16,
    /// Offset of the checksum itself, from there.
    pub csum_offset: U16,
    /// Number of receive buffers of the packet; absent without `VERSION_1` (and `MRG_RXBUF`).
    pub num_buffers: U16,
}

/// Bytes of the packet header under these features: 12 with `VERSION_1`, else 10 (virtio 1.2 section 5.1.6.1).
#[must_use]
pub const fn header_len(features: Features) -> usize {
    if features.has(Features::VERSION_1) { size_of::<NetHeader>() } else { size_of::<NetHeader>() - 2 }
}

/// The header of a command of the control queue (virtio 1.2 section 5.1.6.5): `struct virtio_net_ctrl_hdr`.
///
/// ```
/// use vdpa_core::net::{ControlHeader, class, mac};
/// use zerocopy::{FromBytes, IntoBytes};
///
/// let header = ControlHeader { class: class::MAC, command: mac::ADDR_SET };
/// assert_eq!(header.as_bytes(), [1, 1]);
/// assert_eq!(ControlHeader::read_from_bytes(&[1, 1]).ok(), Some(header));
/// ```
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ControlHeader {
    /// See [`class`].
    pub class: u8,
    /// Depends on the class.
    pub command: u8,
}

/// [`ControlHeader::class`]: `VIRTIO_NET_CTRL_*`.
pub mod class {
    /// Receive filter modes.
    pub const RX: u8 = 0;
    /// MAC addresses: see [`mac`](super::mac).
    pub const MAC: u8 = 1;
}

/// [`ControlHeader::command`] in [`class::MAC`]: `VIRTIO_NET_CTRL_MAC_*`.
pub mod mac {
    /// Sets the two lists of addresses to receive.
    pub const TABLE_SET: u8 = 0;
    /// Sets the address of the device, of [`MAC_BYTES`](super::MAC_BYTES) bytes.
    pub const ADDR_SET: u8 = 1;
}

/// The status byte of a command: `VIRTIO_NET_OK`, `VIRTIO_NET_ERR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ack {
    /// The command succeeded.
    Ok = 0,
    /// The command failed.
    Err = 1,
}

impl Ack {
    /// The byte the device writes.
    #[must_use]
    pub const fn byte(self) -> u8 {
        self as u8
    }

    /// Decodes a status byte; `None` for any other value.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Ok),
            1 => Some(Self::Err),
            _ => None,
        }
    }
}

/// A feature that one of `features` needs and that is not among them (virtio 1.2 section 5.1.3.1); `None` when nothing is missing.
#[must_use]
pub fn missing_dependency(features: Features) -> Option<Bit> {
    const NEEDS: [(Bit, &[Bit]); 18] = [
        (Features::NET_GUEST_TSO4, &[Features::NET_GUEST_CSUM]),
        (Features::NET_GUEST_TSO6, &[Features::NET_GUEST_CSUM]),
        (Features::NET_GUEST_USO4, &[Features::NET_GUEST_CSUM]),
        (Features::NET_GUEST_USO6, &[Features::NET_GUEST_CSUM]),
        (Features::NET_GUEST_ECN, &[Features::NET_GUEST_TSO4, Features::NET_GUEST_TSO6]),
        (Features::NET_HOST_TSO4, &[Features::NET_CSUM]),
        (Features::NET_HOST_TSO6, &[Features::NET_CSUM]),
        (Features::NET_HOST_USO, &[Features::NET_CSUM]),
        (Features::NET_HOST_ECN, &[Features::NET_HOST_TSO4, Features::NET_HOST_TSO6]),
        (Features::NET_CTRL_RX, &[Features::NET_CTRL_VQ]),
        (Features::NET_CTRL_VLAN, &[Features::NET_CTRL_VQ]),
        (Features::NET_CTRL_RX_EXTRA, &[Features::NET_CTRL_VQ]),
        (Features::NET_GUEST_ANNOUNCE, &[Features::NET_CTRL_VQ]),
        (Features::NET_MQ, &[Features::NET_CTRL_VQ]),
        (Features::NET_CTRL_MAC_ADDR, &[Features::NET_CTRL_VQ]),
        (Features::NET_CTRL_GUEST_OFFLOADS, &[Features::NET_CTRL_VQ]),
        (Features::NET_RSS, &[Features::NET_CTRL_VQ]),
        (Features::NET_GUEST_ANNOUNCE, &[Features::NET_STATUS]),
    ];
    NEEDS
        .iter()
        .find(|(bit, one_of)| features.has(*bit) && !one_of.iter().any(|needed| features.has(*needed)))
        .and_then(|(_, one_of)| one_of.first().copied())
}

/// Whether an Ethernet address is a group address: multicast or broadcast.
#[must_use]
pub const fn is_multicast(address: [u8; MAC_BYTES]) -> bool {
    address[0] & 1 != 0
}

/// Whether a device can have this Ethernet address: neither zero nor a group address (the kernel's
/// `is_valid_ether_addr`).
#[must_use]
pub fn is_valid_address(address: [u8; MAC_BYTES]) -> bool {
    !is_multicast(address) && address != [0; MAC_BYTES]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_has_the_fields_where_virtio_has_them() {
        let config = NetConfig {
            mac: [1, 2, 3, 4, 5, 6],
            status: 0x0807.into(),
            max_virtqueue_pairs: 0x0a09.into(),
            mtu: 0x0c0b.into(),
            speed: 0x100f_0e0d.into(),
            duplex: 17,
            rss_max_key_size: 18,
            rss_max_indirection_table_length: 0x1413.into(),
            supported_hash_types: 0x1817_1615.into(),
        };
        assert_eq!(config.as_bytes(), (1..=24).collect::<Vec<u8>>());
    }

    #[test]
    fn the_header_is_longer_by_num_buffers_with_version_1() {
        assert_eq!(header_len(Features::NONE), 10);
        assert_eq!(header_len(Features::of(&[Features::VERSION_1])), 12);
        let header = NetHeader { num_buffers: 0x0201.into(), ..NetHeader::default() };
        assert_eq!(header.as_bytes()[10..], [1, 2]);
    }

    #[test]
    fn groups_have_the_lowest_bit_of_the_first_byte_set() {
        assert!(is_multicast([0xff; 6]) && is_multicast([1, 0, 0x5e, 0, 0, 1]));
        assert!(!is_multicast([2, 1, 1, 1, 1, 1]));
        assert!(is_valid_address([2, 1, 1, 1, 1, 1]) && is_valid_address([0, 0, 0, 0, 0, 1]));
        assert!(!is_valid_address([0; 6]) && !is_valid_address([0xff; 6]));
    }

    #[test]
    fn features_need_others() {
        let of = |bits: &[Bit]| missing_dependency(Features::of(bits));
        assert_eq!(of(&[Features::NET_MQ]), Some(Features::NET_CTRL_VQ));
        assert_eq!(of(&[Features::NET_MQ, Features::NET_CTRL_VQ]), None);
        assert_eq!(of(&[Features::NET_HOST_TSO4]), Some(Features::NET_CSUM));
        assert_eq!(of(&[Features::NET_HOST_ECN]), Some(Features::NET_HOST_TSO4));
        assert_eq!(of(&[Features::NET_HOST_ECN, Features::NET_HOST_TSO6, Features::NET_CSUM]), None);
        assert_eq!(missing_dependency(Features(u64::MAX)), None);
    }

    #[test]
    fn an_answer_is_one_byte() {
        for ack in [Ack::Ok, Ack::Err] {
            assert_eq!(Ack::from_byte(ack.byte()), Some(ack));
        }
        assert_eq!(Ack::from_byte(2), None);
    }
}
