//! Checks of a packet header that a driver has written, before a kernel acts on it (virtio 1.2 section 5.1.6.2).

use super::NetHeader;
use crate::features::{Bit, Features};

/// Bits of [`NetHeader::flags`]: `VIRTIO_NET_HDR_F_*`.
pub mod flags {
    /// The checksum of the packet is to be completed.
    pub const NEEDS_CSUM: u8 = 1;
    /// The checksum was checked.
    pub const DATA_VALID: u8 = 2;
}

/// Values of [`NetHeader::gso_type`]: `VIRTIO_NET_HDR_GSO_*`.
pub mod gso {
    /// One packet.
    pub const NONE: u8 = 0;
    /// TCP over IPv4, to be segmented.
    pub const TCPV4: u8 = 1;
    /// UDP, to be fragmented.
    pub const UDP: u8 = 3;
    /// TCP over IPv6, to be segmented.
    pub const TCPV6: u8 = 4;
    /// UDP, to be segmented.
    pub const UDP_L4: u8 = 5;
    /// A bit beside one of TCP: it has ECN.
    pub const ECN: u8 = 0x80;
}

/// Bytes of an Ethernet header.
pub const ETHERNET: u64 = 14;

/// Bytes of the largest packet, without its virtio header: 64 KiB of IP behind an Ethernet header with two VLAN tags.
pub const FRAME_MAX: u64 = ETHERNET + 8 + 65535;

/// Why a packet is not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Shorter than an Ethernet header, or longer than [`FRAME_MAX`].
    #[error("a packet of {0} bytes")]
    Length(u64),
    /// The checksum would be outside of the packet, or in its Ethernet header.
    #[error("the checksum is outside of the packet")]
    Checksum,
    /// The headers would be longer than the packet.
    #[error("the headers are longer than the packet")]
    Headers,
    /// Segments without a size or a checksum, or of a kind that there is not.
    #[error("segments that cannot be")]
    Segments,
    /// The driver has not negotiated what the header asks for.
    #[error("an offload that was not negotiated")]
    NotNegotiated,
}

/// Checks the header of a packet whose bytes behind the header are `frame`, and returns the header for the kernel: fields that have no
/// meaning are zero.
///
/// # Errors
/// [`Refused`]; the packet must be dropped.
pub fn check(header: NetHeader, frame: u64, features: Features) -> Result<NetHeader, Refused> {
    if !(ETHERNET..=FRAME_MAX).contains(&frame) {
        return Err(Refused::Length(frame));
    }
    let mut checked = NetHeader::default();
    let needs = |bit: Bit| if features.has(bit) { Ok(()) } else { Err(Refused::NotNegotiated) };
    let checksum = header.flags & flags::NEEDS_CSUM != 0;
    if checksum {
        needs(Features::NET_CSUM)?;
        let start = u64::from(header.csum_start.get());
        let end = start + u64::from(header.csum_offset.get()) + 2;
        if start < ETHERNET || end > frame {
            return Err(Refused::Checksum);
        }
        checked.flags = flags::NEEDS_CSUM;
        (checked.csum_start, checked.csum_offset) = (header.csum_start, header.csum_offset);
    }
    if u64::from(header.hdr_len.get()) > frame {
        return Err(Refused::Headers);
    }
    if header.gso_type == gso::NONE {
        return Ok(checked);
    }
    match header.gso_type & !gso::ECN {
        gso::TCPV4 => needs(Features::NET_HOST_TSO4)?,
        gso::TCPV6 => needs(Features::NET_HOST_TSO6)?,
        gso::UDP_L4 if header.gso_type == gso::UDP_L4 => needs(Features::NET_HOST_USO)?,
        _ => return Err(Refused::Segments),
    }
    if header.gso_type & gso::ECN != 0 {
        needs(Features::NET_HOST_ECN)?;
    }
    let size = u64::from(header.gso_size.get());
    if !checksum || size == 0 || size > frame {
        return Err(Refused::Segments);
    }
    (checked.gso_type, checked.gso_size, checked.hdr_len) =
        (header.gso_type, header.gso_size, header.hdr_len);
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Features = Features(u64::MAX);

    fn tso() -> NetHeader {
        NetHeader {
            flags: flags::NEEDS_CSUM,
            gso_type: gso::TCPV4,
            hdr_len: 54.into(),
            gso_size: 1448.into(),
            csum_start: 34.into(),
            csum_offset: 16.into(),
            num_buffers: 0.into(),
        }
    }

    #[test]
    fn what_a_driver_asks_for_is_passed_on() {
        assert_eq!(check(tso(), 60000, ALL), Ok(tso()));
        let plain = NetHeader { gso_type: gso::NONE, ..tso() };
        let checksum = NetHeader { hdr_len: 0.into(), gso_size: 0.into(), ..plain };
        assert_eq!(check(plain, 60, ALL), Ok(checksum), "sizes without segments mean nothing");
        let other = NetHeader { flags: 0xfe, num_buffers: 7.into(), ..NetHeader::default() };
        assert_eq!(check(other, 14, Features::NONE), Ok(NetHeader::default()));
        let ecn = NetHeader { gso_type: gso::TCPV6 | gso::ECN, ..tso() };
        assert_eq!(check(ecn, FRAME_MAX, ALL), Ok(ecn));
    }

    #[test]
    fn fields_that_do_not_fit_are_refused() {
        let refused = |header, frame| check(header, frame, ALL).unwrap_err();
        assert_eq!(refused(NetHeader::default(), 13), Refused::Length(13));
        assert_eq!(refused(tso(), FRAME_MAX + 1), Refused::Length(FRAME_MAX + 1));
        assert_eq!(refused(tso(), 51), Refused::Checksum);
        assert_eq!(refused(NetHeader { csum_start: 13.into(), ..tso() }, 60000), Refused::Checksum);
        let beyond = NetHeader { csum_start: u16::MAX.into(), csum_offset: u16::MAX.into(), ..tso() };
        assert_eq!(refused(beyond, FRAME_MAX), Refused::Checksum);
        assert_eq!(refused(NetHeader { hdr_len: 61.into(), ..tso() }, 60), Refused::Headers);
        for wrong in [gso::UDP, 2, 0x7f, gso::ECN, gso::ECN | gso::UDP_L4] {
            assert_eq!(
                refused(NetHeader { gso_type: wrong, ..tso() }, 60000),
                Refused::Segments,
                "{wrong:#x}"
            );
        }
        assert_eq!(refused(NetHeader { gso_size: 0.into(), ..tso() }, 60000), Refused::Segments);
        assert_eq!(refused(NetHeader { gso_size: 61.into(), ..tso() }, 60), Refused::Segments);
        assert_eq!(refused(NetHeader { flags: 0, ..tso() }, 60000), Refused::Segments);
    }

    #[test]
    fn what_was_not_negotiated_is_refused() {
        let without = |bit, gso_type| check(NetHeader { gso_type, ..tso() }, 60000, ALL.without(bit));
        for (bit, kind) in [
            (Features::NET_CSUM, gso::NONE),
            (Features::NET_HOST_TSO4, gso::TCPV4),
            (Features::NET_HOST_TSO6, gso::TCPV6),
            (Features::NET_HOST_ECN, gso::TCPV4 | gso::ECN),
            (Features::NET_HOST_USO, gso::UDP_L4),
        ] {
            assert_eq!(without(bit, kind), Err(Refused::NotNegotiated), "{kind:#x}");
        }
    }
}
