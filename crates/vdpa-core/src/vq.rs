//! Virtqueue state and setup.

use serde::{Deserialize, Serialize};

use crate::features::Features;
use crate::host::Host;
use crate::types::Asid;

/// The position of a stopped queue, at which it can be started again.
///
/// Source: `struct vdpa_vq_state`; the 32-bit encodings are those of `VHOST_GET_VRING_BASE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum QueueState {
    /// Split ring.
    Split {
        /// The next entry of the available ring to process, free running.
        avail_index: u16,
    },
    /// Packed ring: two 15-bit positions with their wrap counters.
    Packed {
        /// Next descriptor to read.
        last_avail_idx: u16,
        /// Its wrap counter.
        last_avail_wrap: bool,
        /// Next descriptor to write as used.
        last_used_idx: u16,
        /// Its wrap counter.
        last_used_wrap: bool,
    },
}

impl QueueState {
    /// The state of a new ring with these features.
    #[must_use]
    pub const fn initial(features: Features) -> Self {
        if features.has(Features::RING_PACKED) {
            Self::Packed { last_avail_idx: 0, last_avail_wrap: true, last_used_idx: 0, last_used_wrap: true }
        } else {
            Self::Split { avail_index: 0 }
        }
    }

    /// Decodes the `num` of `VHOST_SET_VRING_BASE`; `None` when a split index exceeds 16 bits.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "masked to 15 bits, or checked")]
    pub const fn decode(num: u32, features: Features) -> Option<Self> {
        if features.has(Features::RING_PACKED) {
            return Some(Self::Packed {
                last_avail_idx: (num & 0x7fff) as u16,
                last_avail_wrap: num >> 15 & 1 == 1,
                last_used_idx: (num >> 16 & 0x7fff) as u16,
                last_used_wrap: num >> 31 == 1,
            });
        }
        if num > u16::MAX as u32 { None } else { Some(Self::Split { avail_index: num as u16 }) }
    }

    /// Whether [`encode`](Self::encode) keeps all of it: positions of a packed ring have 15 bits.
    pub(crate) const fn is_encodable(self) -> bool {
        match self {
            Self::Split { .. } => true,
            Self::Packed { last_avail_idx, last_used_idx, .. } => {
                last_avail_idx <= 0x7fff && last_used_idx <= 0x7fff
            }
        }
    }

    /// Encodes as the `num` of `VHOST_GET_VRING_BASE`.
    #[must_use]
    pub const fn encode(self) -> u32 {
        match self {
            Self::Split { avail_index } => avail_index as u32,
            Self::Packed { last_avail_idx, last_avail_wrap, last_used_idx, last_used_wrap } => {
                (last_avail_idx & 0x7fff) as u32
                    | (last_avail_wrap as u32) << 15
                    | ((last_used_idx & 0x7fff) as u32) << 16
                    | (last_used_wrap as u32) << 31
            }
        }
    }
}

/// The setup of one queue, which a parent needs to start it.
#[derive(Clone, Debug)]
pub struct QueueSetup<H: Host> {
    /// Entries of the ring; a power of two for a split ring.
    pub size: u16,
    /// I/O virtual address of the descriptor area.
    pub desc: u64,
    /// I/O virtual address of the driver area (available ring).
    pub avail: u64,
    /// I/O virtual address of the device area (used ring).
    pub used: u64,
    /// Address space that translates the addresses of this queue.
    pub asid: Asid,
    /// Guest address at which writes to the used ring, or to the descriptors of a packed ring, are marked in the [log of
    /// vhost](crate::dirty::VhostLog); `None` when they are not.
    pub log_used: Option<u64>,
    /// Negotiated features.
    pub features: Features,
    /// Signalled by the client when it has made buffers available. Its counter is never read (uapi-spec 1.6).
    pub kick: Option<H::Event>,
    /// Signalled for the client when buffers were used.
    pub call: Option<H::Event>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_encoding_round_trips() {
        let packed = Features::NONE.with(Features::RING_PACKED);
        for num in [0, 0x8000_8000, 0x1234_5678, u32::MAX] {
            assert_eq!(QueueState::decode(num, packed).unwrap().encode(), num);
        }
        assert_eq!(QueueState::decode(0xffff, Features::NONE).unwrap().encode(), 0xffff);
        assert!(QueueState::decode(0x1_0000, Features::NONE).is_none());
        assert_eq!(QueueState::initial(packed).encode(), 0x8000_8000);
    }
}
