//! [`DevConfig`]: the configuration of a device, decoded (uapi-spec 7.3).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use vdpa_core::features::Features;

use super::api::{CtlError, ID_BLOCK, ID_NET};
use vdpa_core::Errno;

/// The configuration of a device, decoded from its configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DevConfig {
    /// Device name.
    pub name: String,
    /// Virtio device id.
    pub device_id: u32,
    /// Features offered.
    #[serde(with = "super::api::hex")]
    pub device_features: Features,
    /// Negotiated features; `None` before FEATURES_OK.
    #[serde(default, with = "super::api::hex::option", skip_serializing_if = "Option::is_none")]
    pub negotiated_features: Option<Features>,
    /// The part that depends on the class of the device.
    #[serde(flatten)]
    pub class: ClassConfig,
}

/// The part of [`DevConfig`] that depends on the class.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClassConfig {
    /// A network device.
    Net(NetConfig),
    /// A block device.
    Block(BlockConfig),
}

/// Configuration of a network device (virtio 1.2 section 5.1.4); a field is present when its feature is offered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetConfig {
    /// MAC address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// `VIRTIO_NET_S_*`: bit 0 link up, bit 1 announce.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Pairs of data queues.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_vq_pairs: Option<u16>,
    /// Largest packet, in bytes without the Ethernet header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
}

/// Configuration of a block device (virtio 1.2 section 5.2.4); an optional field is present when its feature is
/// offered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BlockConfig {
    /// Size in sectors of 512 bytes.
    pub capacity: u64,
    /// Largest segment, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_max: Option<u32>,
    /// Most segments of a request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seg_max: Option<u32>,
    /// Logical block size, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blk_size: Option<u32>,
    /// Number of request queues.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// Topology.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<BlockTopology>,
    /// Limits of discard.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discard: Option<DiscardLimits>,
    /// Limits of write-zeroes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_zeroes: Option<WriteZeroesLimits>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether the flush command is supported.
    pub flush: bool,
}

/// Topology of a block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockTopology {
    /// Logical blocks per physical block, as a power of two.
    pub physical_block_exp: u8,
    /// Offset of the first aligned logical block.
    pub alignment_offset: u8,
    /// Smallest I/O without a penalty, in logical blocks.
    pub min_io_size: u16,
    /// Best size of a long transfer, in logical blocks.
    pub opt_io_size: u32,
}

/// Limits of discard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscardLimits {
    /// Most sectors of 512 bytes in a segment.
    pub max_sectors: u32,
    /// Most segments in a command.
    pub max_segments: u32,
    /// Alignment, in sectors of 512 bytes.
    pub sector_alignment: u32,
}

/// Limits of write-zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteZeroesLimits {
    /// Most sectors of 512 bytes in a segment.
    pub max_sectors: u32,
    /// Most segments in a command.
    pub max_segments: u32,
}

impl DevConfig {
    /// Decodes the configuration space `space` of a device that offers `offered`.
    ///
    /// Fields beyond the end of `space` are 0: a device can have less configuration space than its class defines.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when the device is neither network nor block (uapi-spec 7.3).
    pub fn decode(
        name: impl Into<String>,
        device_id: u32,
        offered: Features,
        negotiated: Option<Features>,
        space: &[u8],
    ) -> Result<Self, CtlError> {
        let space = Space(space);
        let class = match device_id {
            ID_NET => ClassConfig::Net(NetConfig::decode(offered, space)),
            ID_BLOCK => ClassConfig::Block(BlockConfig::decode(offered, space)),
            other => {
                return Err(CtlError::new(Errno::OPNOTSUPP, "unsupported device class").with_hint(format!(
                    "The device has virtio id {other}; configuration is shown for network ({ID_NET}) and \
                     block ({ID_BLOCK}) devices."
                )));
            }
        };
        Ok(Self {
            name: name.into(),
            device_id,
            device_features: offered,
            negotiated_features: negotiated,
            class,
        })
    }
}

/// Configuration space, little-endian (virtio 1.2 section 2.5.3).
#[derive(Clone, Copy)]
struct Space<'a>(&'a [u8]);

impl Space<'_> {
    fn bytes<const N: usize>(self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        for (byte, found) in bytes.iter_mut().zip(self.0.iter().skip(offset)) {
            *byte = *found;
        }
        bytes
    }

    fn u8(self, offset: usize) -> u8 {
        u8::from_le_bytes(self.bytes(offset))
    }

    fn u16(self, offset: usize) -> u16 {
        u16::from_le_bytes(self.bytes(offset))
    }

    fn u32(self, offset: usize) -> u32 {
        u32::from_le_bytes(self.bytes(offset))
    }

    fn u64(self, offset: usize) -> u64 {
        u64::from_le_bytes(self.bytes(offset))
    }
}

impl NetConfig {
    /// Offsets: virtio 1.2 section 5.1.4.
    fn decode(offered: Features, space: Space<'_>) -> Self {
        Self {
            mac: offered.has(Features::NET_MAC).then(|| MacAddr(space.bytes(0))),
            status: offered.has(Features::NET_STATUS).then(|| space.u16(6)),
            max_vq_pairs: (offered.has(Features::NET_MQ) || offered.has(Features::NET_RSS))
                .then(|| space.u16(8)),
            mtu: offered.has(Features::NET_MTU).then(|| space.u16(10)),
        }
    }
}

impl BlockConfig {
    /// Offsets: virtio 1.2 section 5.2.4.
    fn decode(offered: Features, space: Space<'_>) -> Self {
        Self {
            capacity: space.u64(0),
            size_max: offered.has(Features::BLK_SIZE_MAX).then(|| space.u32(8)),
            seg_max: offered.has(Features::BLK_SEG_MAX).then(|| space.u32(12)),
            blk_size: offered.has(Features::BLK_BLK_SIZE).then(|| space.u32(20)),
            num_queues: offered.has(Features::BLK_MQ).then(|| space.u16(34)),
            topology: offered.has(Features::BLK_TOPOLOGY).then(|| BlockTopology {
                physical_block_exp: space.u8(24),
                alignment_offset: space.u8(25),
                min_io_size: space.u16(26),
                opt_io_size: space.u32(28),
            }),
            discard: offered.has(Features::BLK_DISCARD).then(|| DiscardLimits {
                max_sectors: space.u32(36),
                max_segments: space.u32(40),
                sector_alignment: space.u32(44),
            }),
            write_zeroes: offered
                .has(Features::BLK_WRITE_ZEROES)
                .then(|| WriteZeroesLimits { max_sectors: space.u32(48), max_segments: space.u32(52) }),
            read_only: offered.has(Features::BLK_RO),
            flush: offered.has(Features::BLK_FLUSH),
        }
    }
}

/// An Ethernet address; as text `00:11:22:33:44:55`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

/// The error for a text that is not an Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not an Ethernet address; 00:11:22:33:44:55 would be one")]
pub struct NotMacAddr {
    text: String,
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddr {
    type Err = NotMacAddr;

    fn from_str(text: &str) -> Result<Self, NotMacAddr> {
        let byte = |part: &str| {
            let digits = (1..=2).contains(&part.len()) && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            u8::from_str_radix(part, 16).ok().filter(|_| digits)
        };
        text.split(':')
            .map(byte)
            .collect::<Option<Vec<_>>>()
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| NotMacAddr { text: text.into() })
    }
}

impl TryFrom<String> for MacAddr {
    type Error = NotMacAddr;

    fn try_from(text: String) -> Result<Self, NotMacAddr> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulated_network_device() {
        let mut space = [0; 12];
        space[..8].copy_from_slice(&[0, 0x11, 0x22, 0x33, 0x44, 0x55, 1, 0]);
        space[10..].copy_from_slice(&1500_u16.to_le_bytes());
        let config = DevConfig::decode("vdpa0", ID_NET, Features(0x3_0883_0028), None, &space).unwrap();
        let ClassConfig::Net(net) = config.class else { panic!("{config:?}") };
        let mac = "00:11:22:33:44:55".parse().ok();
        assert_eq!(net, NetConfig { mac, status: Some(1), max_vq_pairs: None, mtu: Some(1500) });
    }

    #[test]
    fn every_field_of_a_block_device_is_read_at_its_offset() {
        // Byte i has value i, so each field names its offset (virtio 1.2 section 5.2.4).
        let space: Vec<u8> = (0..60).collect();
        let offered = Features(u64::MAX);
        let config = DevConfig::decode("blk0", ID_BLOCK, offered, Some(offered), &space).unwrap();
        let ClassConfig::Block(block) = config.class else { panic!("{config:?}") };
        let at = |offset: u32| offset * 0x0101_0101 + 0x0302_0100;
        let expected = BlockConfig {
            capacity: 0x0706_0504_0302_0100,
            size_max: Some(at(8)),
            seg_max: Some(at(12)),
            blk_size: Some(at(20)),
            num_queues: Some(0x2322),
            topology: Some(BlockTopology {
                physical_block_exp: 24,
                alignment_offset: 25,
                min_io_size: 0x1b1a,
                opt_io_size: at(28),
            }),
            discard: Some(DiscardLimits {
                max_sectors: at(36),
                max_segments: at(40),
                sector_alignment: at(44),
            }),
            write_zeroes: Some(WriteZeroesLimits { max_sectors: at(48), max_segments: at(52) }),
            read_only: true,
            flush: true,
        };
        assert_eq!(block, expected);
    }

    #[test]
    fn fields_not_offered_or_out_of_range_are_absent_or_zero() {
        let config = DevConfig::decode("blk0", ID_BLOCK, Features::NONE, None, &[1]).unwrap();
        let block = BlockConfig { capacity: 1, ..BlockConfig::default() };
        assert_eq!(config.class, ClassConfig::Block(block));
        let other = DevConfig::decode("fs0", 26, Features::NONE, None, &[]).unwrap_err();
        assert_eq!(other.errno, Errno::OPNOTSUPP);
    }

    #[test]
    fn addresses() {
        assert_eq!("0:1:A:b:c:ff".parse(), Ok(MacAddr([0, 1, 10, 11, 12, 255])));
        for wrong in ["", "0:1:2:3:4", "0:1:2:3:4:5:6", "0:1:2:3:4:100", "0:1:2:3:4:+5", "00-11-22-33-44-55"]
        {
            assert!(wrong.parse::<MacAddr>().is_err(), "{wrong}");
        }
    }
}
