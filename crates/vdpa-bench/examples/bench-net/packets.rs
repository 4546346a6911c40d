//! Packets of IPv4 as a guest at 10.0.9.2 makes them.

use vdpa_core::net::NetHeader;
use zerocopy::IntoBytes as _;

use crate::client::HEADER;

pub(crate) const GUEST: [u8; 4] = [10, 0, 9, 2];
pub(crate) const HOST: [u8; 4] = [10, 0, 9, 1];
pub(crate) const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 9, 2];
pub(crate) const HOST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 9, 1];

const ETHERNET: usize = 14;
const IP: usize = 20;
/// Bytes of a packet before those of UDP or TCP, with the virtio header.
pub(crate) const BEFORE: usize = HEADER + ETHERNET + IP;
const UDP: u8 = 17;
const TCP: u8 = 6;

/// A frame of UDP of `len` bytes, behind a virtio header.
pub(crate) fn udp(from: u16, to: u16, len: usize) -> Vec<u8> {
    let len = len.max(ETHERNET + IP + 8);
    let payload = len - ETHERNET - IP;
    let mut packet = NetHeader::default().as_bytes().to_vec();
    before(&mut packet, UDP, payload);
    let length = u16::try_from(payload).unwrap_or(u16::MAX);
    // No checksum: IPv4 needs none.
    for field in [from, to, length, 0] {
        packet.extend(field.to_be_bytes());
    }
    packet.resize(HEADER + len, 0);
    packet
}

/// Most parts that a segment names.
pub(crate) const BLOCKS: usize = 3;

/// A segment of TCP.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Segment {
    pub(crate) from: u16,
    pub(crate) to: u16,
    pub(crate) sequence: u32,
    pub(crate) acknowledged: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    /// Bytes of data behind the headers, which are zeros.
    pub(crate) data: usize,
    /// Parts of what comes behind `acknowledged` that have arrived, each as its first byte and the one behind it (SACK, RFC 2018).
    pub(crate) blocks: [Option<(u32, u32)>; BLOCKS],
    /// The receiver has to cut the data into segments of this size, and to make their checksums.
    pub(crate) cut: Option<u16>,
}

pub(crate) mod flag {
    pub(crate) const FIN: u8 = 1;
    pub(crate) const SYN: u8 = 2;
    pub(crate) const RST: u8 = 4;
    pub(crate) const PSH: u8 = 8;
    pub(crate) const ACK: u8 = 16;
}

/// Scale of the windows of a driver.
pub(crate) const SCALE: u8 = 8;

impl Segment {
    fn options(&self, mss: u16) -> Vec<u8> {
        if self.flags & flag::SYN != 0 {
            let [high, low] = mss.to_be_bytes();
            // MSS, SACK permitted, three times no operation, scale of the window.
            return vec![2, 4, high, low, 4, 2, 1, 1, 1, 3, 3, SCALE];
        }
        let blocks: Vec<u8> = self
            .blocks
            .iter()
            .flatten()
            .flat_map(|(first, behind)| [first.to_be_bytes(), behind.to_be_bytes()].concat())
            .collect();
        match u8::try_from(blocks.len()) {
            Ok(len @ 1..) => [&[1, 1, 5, 2 + len], &blocks[..]].concat(),
            _ => Vec::new(),
        }
    }

    /// All headers, the virtio header first. The data comes behind them.
    pub(crate) fn headers(&self, mss: u16) -> Vec<u8> {
        let options = self.options(mss);
        let tcp = 20 + options.len();
        let mut header = NetHeader::default();
        if let Some(size) = self.cut {
            const NEEDS_CSUM: u8 = 1;
            const TCPV4: u8 = 1;
            let all = u16::try_from(ETHERNET + IP + tcp).unwrap_or(0);
            header.flags = NEEDS_CSUM;
            header.csum_start = u16::try_from(ETHERNET + IP).unwrap_or(0).into();
            header.csum_offset = 16.into();
            header.hdr_len = all.into();
            if self.data > usize::from(size) {
                header.gso_type = TCPV4;
                header.gso_size = size.into();
            }
        }
        let mut packet = header.as_bytes().to_vec();
        before(&mut packet, TCP, tcp + self.data);
        packet.extend(self.from.to_be_bytes());
        packet.extend(self.to.to_be_bytes());
        packet.extend(self.sequence.to_be_bytes());
        packet.extend(self.acknowledged.to_be_bytes());
        packet.extend([u8::try_from(tcp / 4).unwrap_or(0) << 4, self.flags]);
        packet.extend(self.window.to_be_bytes());
        packet.extend([0; 4]);
        packet.extend(&options);
        let length = u32::try_from(tcp + self.data).unwrap_or(0);
        let pseudo = sum(&GUEST) + sum(&HOST) + u32::from(TCP) + length;
        let checksum = match self.cut {
            // The rest is added by whoever makes it.
            Some(_) => fold(pseudo),
            // The data adds nothing: it is zeros.
            None => !fold(pseudo + packet.get(BEFORE..).map_or(0, sum)),
        };
        if let Some(field) = packet.get_mut(BEFORE + 16..BEFORE + 18) {
            field.copy_from_slice(&checksum.to_be_bytes());
        }
        packet
    }
}

/// What a segment of the other side says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heard {
    pub(crate) to: u16,
    pub(crate) sequence: u32,
    pub(crate) acknowledged: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) data: u32,
    /// Scale of its windows, of a segment with SYN.
    pub(crate) scale: u8,
}

impl Heard {
    /// Reads the start of a packet, from its virtio header on; `None` for what is no TCP.
    pub(crate) fn parse(packet: &[u8]) -> Option<Self> {
        let tcp = packet.get(BEFORE..).filter(|tcp| tcp.len() >= 20)?;
        if packet.get(HEADER + 12..HEADER + 15)? != [8, 0, 0x45] || packet.get(HEADER + ETHERNET + 9)? != &TCP
        {
            return None;
        }
        let two = |bytes: &[u8], at: usize| Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let four = |bytes: &[u8], at: usize| Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
        let all = u32::from(two(packet, HEADER + ETHERNET + 2)?);
        let headers = u32::from(tcp.get(12)? >> 4) * 4;
        Some(Self {
            to: two(tcp, 2)?,
            sequence: four(tcp, 4)?,
            acknowledged: four(tcp, 8)?,
            flags: *tcp.get(13)?,
            window: two(tcp, 14)?,
            data: all.checked_sub(u32::try_from(IP).ok()? + headers)?,
            scale: scale(tcp.get(20..usize::try_from(headers).ok()?.min(tcp.len()))?),
        })
    }
}

/// The scale among options of TCP.
fn scale(mut options: &[u8]) -> u8 {
    loop {
        options = match options {
            [3, 3, scale, ..] => return *scale,
            [1, rest @ ..] => rest,
            [0, ..] | [] | [_] => return 0,
            [_, len, ..] => options.get(usize::from(*len).max(2)..).unwrap_or_default(),
        }
    }
}

/// The port that a packet of UDP is for; `None` for what is none.
pub(crate) fn udp_to(packet: &[u8]) -> Option<u16> {
    (packet.get(HEADER + ETHERNET + 9)? == &UDP)
        .then(|| packet.get(BEFORE + 2..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes)))?
}

/// Adds the headers of Ethernet and IP for `payload` bytes.
fn before(packet: &mut Vec<u8>, protocol: u8, payload: usize) {
    packet.extend(HOST_MAC);
    packet.extend(GUEST_MAC);
    packet.extend([8, 0]);
    let at = packet.len();
    packet.extend([0x45, 0]);
    packet.extend(u16::try_from(IP + payload).unwrap_or(u16::MAX).to_be_bytes());
    // No fragments, 64 hops.
    packet.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    packet.extend(GUEST);
    packet.extend(HOST);
    let checksum = !fold(packet.get(at..).map_or(0, sum));
    if let Some(field) = packet.get_mut(at + 10..at + 12) {
        field.copy_from_slice(&checksum.to_be_bytes());
    }
}

fn sum(bytes: &[u8]) -> u32 {
    let pairs = bytes.chunks(2);
    pairs.map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0))).sum()
}

const fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded just now")]
    let short = sum as u16;
    short
}
