//! Feature words: device features, backend features and the device status.
//!
//! A bit *number* and a *mask* are different types here, because some clients confuse them: one acknowledges
//! `features & 1` instead of bit 1.

use std::fmt;
use std::ops::{BitAnd, BitOr};

use serde::{Deserialize, Serialize};

/// The number of a feature bit, 0 to 63.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bit(pub u8);

macro_rules! word {
    ($(#[$doc:meta])* $name:ident($inner:ty) { $($(#[$bdoc:meta])* $bit:ident = $value:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            $($(#[$bdoc])* pub const $bit: Bit = Bit($value);)*

            /// No bit set.
            pub const NONE: Self = Self(0);

            /// The word with exactly these bits.
            #[must_use]
            pub const fn of(bits: &[Bit]) -> Self {
                let mut word = 0;
                let mut i = 0;
                while i < bits.len() {
                    word |= 1 << bits[i].0;
                    i += 1;
                }
                Self(word)
            }

            /// Whether `bit` is set.
            #[must_use]
            pub const fn has(self, bit: Bit) -> bool {
                self.0 >> bit.0 & 1 == 1
            }

            /// This word with `bit` set.
            #[must_use]
            pub const fn with(self, bit: Bit) -> Self {
                Self(self.0 | 1 << bit.0)
            }

            /// This word without `bit`.
            #[must_use]
            pub const fn without(self, bit: Bit) -> Self {
                Self(self.0 & !(1 << bit.0))
            }

            /// Whether every bit of `other` is set here.
            #[must_use]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }
        }

        impl BitOr for $name {
            type Output = Self;
            fn bitor(self, other: Self) -> Self { Self(self.0 | other.0) }
        }

        impl BitAnd for $name {
            type Output = Self;
            fn bitand(self, other: Self) -> Self { Self(self.0 & other.0) }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, "{:#x}", self.0) }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, "{:#x}", self.0) }
        }
    };
}

word! {
    /// Virtio device features (virtio 1.2 sections 2.2, 5.1.3, 5.2.3 and 6).
    Features(u64) {
        /// Block: largest segment size is given.
        BLK_SIZE_MAX = 1;
        /// Block: largest number of segments is given.
        BLK_SEG_MAX = 2;
        /// Block: device is read-only.
        BLK_RO = 5;
        /// Block: logical block size is given.
        BLK_BLK_SIZE = 6;
        /// Block: flush command.
        BLK_FLUSH = 9;
        /// Block: topology is given.
        BLK_TOPOLOGY = 10;
        /// Block: the driver may switch the write cache.
        BLK_CONFIG_WCE = 11;
        /// Block: several request queues.
        BLK_MQ = 12;
        /// Block: discard command.
        BLK_DISCARD = 13;
        /// Block: write-zeroes command.
        BLK_WRITE_ZEROES = 14;
        /// Network: the device takes packets without a checksum.
        NET_CSUM = 0;
        /// Network: the driver takes packets without a checksum.
        NET_GUEST_CSUM = 1;
        /// Network: the driver may change its offloads with a command.
        NET_CTRL_GUEST_OFFLOADS = 2;
        /// Network: the largest packet is given.
        NET_MTU = 3;
        /// Network: a MAC address is given.
        NET_MAC = 5;
        /// Network: the driver takes TCP over IPv4 that is not segmented.
        NET_GUEST_TSO4 = 7;
        /// Network: the driver takes TCP over IPv6 that is not segmented.
        NET_GUEST_TSO6 = 8;
        /// Network: the driver takes such TCP with ECN.
        NET_GUEST_ECN = 9;
        /// Network: the device takes TCP over IPv4 that is not segmented.
        NET_HOST_TSO4 = 11;
        /// Network: the device takes TCP over IPv6 that is not segmented.
        NET_HOST_TSO6 = 12;
        /// Network: the device takes such TCP with ECN.
        NET_HOST_ECN = 13;
        /// Network: a packet may be received in several buffers.
        NET_MRG_RXBUF = 15;
        /// Network: the link status is given.
        NET_STATUS = 16;
        /// Network: control queue.
        NET_CTRL_VQ = 17;
        /// Network: the driver sets what is received.
        NET_CTRL_RX = 18;
        /// Network: the driver sets the VLANs that are received.
        NET_CTRL_VLAN = 19;
        /// Network: further modes of what is received.
        NET_CTRL_RX_EXTRA = 20;
        /// Network: the device can ask the driver to announce itself.
        NET_GUEST_ANNOUNCE = 21;
        /// Network: several pairs of data queues.
        NET_MQ = 22;
        /// Network: the driver may set the MAC address with a command.
        NET_CTRL_MAC_ADDR = 23;
        /// Network: the driver takes UDP over IPv4 that is not segmented.
        NET_GUEST_USO4 = 54;
        /// Network: the driver takes UDP over IPv6 that is not segmented.
        NET_GUEST_USO6 = 55;
        /// Network: the device takes UDP that is not segmented.
        NET_HOST_USO = 56;
        /// Network: receive-side scaling.
        NET_RSS = 60;
        /// The device marks the pages that it writes in a log of the client: not a feature of virtio, but of vhost.
        LOG_ALL = 26;
        /// Arbitrary descriptor layouts (legacy bit, offered by the kernel's simulator).
        ANY_LAYOUT = 27;
        /// Indirect descriptor tables.
        RING_INDIRECT_DESC = 28;
        /// Used and available event indices.
        RING_EVENT_IDX = 29;
        /// Virtio 1.
        VERSION_1 = 32;
        /// Addresses are I/O virtual addresses.
        ACCESS_PLATFORM = 33;
        /// Packed rings.
        RING_PACKED = 34;
        /// Buffers are used in the order in which they were made available.
        IN_ORDER = 35;
    }
}

word! {
    /// Features of the vhost-vdpa interface itself: `VHOST_BACKEND_F_*`.
    BackendFeatures(u64) {
        /// Version-2 IOTLB messages.
        IOTLB_MSG_V2 = 1;
        /// IOTLB batches.
        IOTLB_BATCH = 2;
        /// Version-2 messages carry an address-space identifier.
        IOTLB_ASID = 3;
        /// `VHOST_VDPA_SUSPEND`.
        SUSPEND = 4;
        /// `VHOST_VDPA_RESUME`.
        RESUME = 5;
        /// Queues may be enabled after DRIVER_OK.
        ENABLE_AFTER_DRIVER_OK = 6;
        /// Descriptor areas have a group of their own.
        DESC_ASID = 7;
        /// Mappings survive a device reset.
        IOTLB_PERSIST = 8;
        /// `VHOST_NEW_OWNER` (live update).
        NEW_OWNER = 9;
        /// `VHOST_IOTLB_REMAP` is supported and required after a change of owner (live update).
        IOTLB_REMAP = 10;
        /// The requests of dirty tracking: which pages the device has written.
        DIRTY_LOG = 48;
        /// The requests that move a device to another daemon: its state can be saved and loaded.
        DEVICE_STATE = 49;
    }
}

/// The device status register (virtio 1.2 section 2.1).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Status(pub u8);

impl Status {
    /// The reset state.
    pub const RESET: Self = Self(0);
    /// The driver has noticed the device.
    pub const ACKNOWLEDGE: Self = Self(1);
    /// The driver knows how to drive the device.
    pub const DRIVER: Self = Self(2);
    /// The driver is ready.
    pub const DRIVER_OK: Self = Self(4);
    /// The driver has acknowledged its features.
    pub const FEATURES_OK: Self = Self(8);
    /// The device has met an error it cannot recover from.
    pub const NEEDS_RESET: Self = Self(0x40);
    /// The driver has given up.
    pub const FAILED: Self = Self(0x80);

    /// Whether every bit of `other` is set here.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Status {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [(Status, &str); 6] = [
            (Status::ACKNOWLEDGE, "acknowledge"),
            (Status::DRIVER, "driver"),
            (Status::FEATURES_OK, "features_ok"),
            (Status::DRIVER_OK, "driver_ok"),
            (Status::NEEDS_RESET, "needs_reset"),
            (Status::FAILED, "failed"),
        ];
        let mut separator = "";
        for (bit, name) in NAMES {
            if self.contains(bit) {
                write!(f, "{separator}{name}")?;
                separator = "|";
            }
        }
        if separator.is_empty() { write!(f, "{:#x}", self.0) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn simulator_words_have_the_kernel_values() {
        let blk = Features::of(&[
            Features::BLK_SIZE_MAX,
            Features::BLK_SEG_MAX,
            Features::BLK_BLK_SIZE,
            Features::BLK_FLUSH,
            Features::BLK_TOPOLOGY,
            Features::BLK_MQ,
            Features::BLK_DISCARD,
            Features::BLK_WRITE_ZEROES,
            Features::ANY_LAYOUT,
            Features::VERSION_1,
            Features::ACCESS_PLATFORM,
        ]);
        assert_eq!(blk.0, 0x3_0800_7646);
        let net = Features::of(&[
            Features::NET_MTU,
            Features::NET_MAC,
            Features::NET_STATUS,
            Features::NET_CTRL_VQ,
            Features::NET_CTRL_MAC_ADDR,
            Features::ANY_LAYOUT,
            Features::VERSION_1,
            Features::ACCESS_PLATFORM,
        ]);
        assert_eq!(net.0, 0x3_0883_0028);
        let live = BackendFeatures(0x17e).with(BackendFeatures::NEW_OWNER).with(BackendFeatures::IOTLB_REMAP);
        assert_eq!(live.0, 0x77e);
        assert!(!live.without(BackendFeatures::IOTLB_REMAP).has(BackendFeatures::IOTLB_REMAP));
    }

    #[test]
    fn status_reads_as_words() {
        assert_eq!((Status::ACKNOWLEDGE | Status::DRIVER).to_string(), "acknowledge|driver");
        assert_eq!(Status::RESET.to_string(), "0x0");
    }
}
