//! Errors of rings.

use thiserror::Error;

use super::Fault;
use crate::features::Features;

/// The first protocol violation of the other side, which stops this side of the ring for good.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Latch(Option<RingError>);

impl Latch {
    /// The recorded violation; `None` while there is none.
    pub(super) const fn violation(self) -> Option<RingError> {
        self.0
    }

    /// Returns the recorded violation as an error.
    #[inline]
    pub(super) const fn check(&self) -> Result<(), RingError> {
        match self.0 {
            None => Ok(()),
            Some(violation) => Err(violation),
        }
    }

    /// Records the error of `result` if it is a violation and not a fault; returns `result`.
    #[inline]
    pub(super) fn record<T>(&mut self, result: Result<T, RingError>) -> Result<T, RingError> {
        if let Err(error) = &result
            && !error.is_fault()
        {
            self.0 = Some(*error);
        }
        result
    }
}

/// Why a ring cannot be set up or used.
///
/// A [`Fault`](Self::Fault) is temporary: the call may be repeated once the memory is mapped again. Every other error that
/// the other side causes is a violation of the protocol, after which the ring stays stopped: see
/// [`is_fault`](Self::is_fault).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RingError {
    /// A ring area or an indirect table cannot be accessed at present.
    #[error(transparent)]
    Fault(#[from] Fault),

    /// The number of entries is not valid for a split ring.
    #[error("ring of {size} entries: a split ring has a power of two, 1 to 32768")]
    Size {
        /// Entries asked for.
        size: u16,
    },

    /// The number of entries is not valid for a packed ring.
    #[error("ring of {size} entries: a packed ring has 1 to 32768")]
    PackedSize {
        /// Entries asked for.
        size: u16,
    },

    /// The features ask for another ring.
    #[error("features {features}: {unsupported} is not supported by this side of a split ring")]
    Features {
        /// Features in force.
        features: Features,
        /// The feature in the way.
        unsupported: &'static str,
    },

    /// The saved position is one of a packed ring.
    #[error("the position given is one of a packed ring, but the ring is split")]
    PackedState,

    /// The features ask for a split ring.
    #[error("features {features}: a packed ring needs RING_PACKED")]
    NotPacked {
        /// Features in force.
        features: Features,
    },

    /// The saved position is one of a split ring.
    #[error("the position given is one of a split ring, but the ring is packed")]
    SplitState,

    /// The saved position is outside the ring or has more than a lap between its places.
    #[error("available place {avail} and used place {used} are not both within one lap of a ring of {size}")]
    Place {
        /// Next descriptor to read.
        avail: u16,
        /// Next descriptor to write as used.
        used: u16,
        /// Entries of the ring.
        size: u16,
    },

    /// An area is too small for the ring.
    #[error("{area} area has {size} bytes, the ring needs {needed}")]
    AreaSize {
        /// Which: "descriptor", "available" or "used".
        area: &'static str,
        /// Bytes there are.
        size: usize,
        /// Bytes the ring needs.
        needed: usize,
    },

    /// The available index went backwards or passed what the ring can hold.
    #[error("available index {index} is out of range: {first} to {first} + {room} (mod 65536) are possible")]
    AvailIndex {
        /// Index read.
        index: u16,
        /// Smallest index possible.
        first: u16,
        /// How far it may be ahead of that.
        room: u16,
    },

    /// The used index went backwards or passed the buffers in flight.
    #[error("used index {index} is out of range: {first} to {first} + {room} (mod 65536) are possible")]
    UsedIndex {
        /// Index read.
        index: u16,
        /// Smallest index possible.
        first: u16,
        /// How far it may be ahead of that.
        room: u16,
    },

    /// A descriptor outside the table is referred to.
    #[error("descriptor {index} is outside the table of {entries}")]
    DescriptorIndex {
        /// Index read, or given by the device.
        index: u32,
        /// Entries of the table.
        entries: u32,
    },

    /// A chain has more descriptors than the table: it has a loop.
    #[error("chain from descriptor {head} does not end within {entries} descriptors: it has a loop")]
    Loop {
        /// First descriptor of the chain.
        head: u16,
        /// Entries of the table.
        entries: u32,
    },

    /// A chain of a packed ring runs into descriptors that are not the driver's to make available.
    #[error("chain from descriptor {head} does not end within the {room} descriptors that are free")]
    Room {
        /// First descriptor of the chain.
        head: u16,
        /// Descriptors the driver may use.
        room: u32,
    },

    /// A request was made available again before it was used, where the order of requests is kept.
    #[error("descriptor {head} was made available again while in flight")]
    Again {
        /// First descriptor of the chain.
        head: u16,
    },

    /// An indirect table is empty, no whole number of descriptors, or in a packed ring of more than 65536.
    #[error("indirect table of {len} bytes: 1 to 65536 descriptors of 16 bytes are required")]
    IndirectSize {
        /// Bytes of the table.
        len: u32,
    },

    /// Indirect descriptors are used in a place or without a feature that allows them.
    #[error("chain from descriptor {head}: {reason}")]
    Indirect {
        /// First descriptor of the chain.
        head: u16,
        /// What was wrong.
        reason: &'static str,
    },

    /// A buffer for the device to read follows one for it to write.
    #[error("chain from descriptor {head} has a readable buffer after a writable one")]
    Order {
        /// First descriptor of the chain.
        head: u16,
    },

    /// A buffer or table passes the end of the address space.
    #[error("{len} bytes at {iova:#x} pass the end of the address space")]
    Wraps {
        /// First address.
        iova: u64,
        /// Bytes.
        len: u32,
    },

    /// The buffers of a chain have more than 2^32 bytes (virtio 1.2 section 2.7.5.2).
    #[error("chain from descriptor {head} has more than 2^32 bytes")]
    Length {
        /// First descriptor of the chain.
        head: u16,
    },

    /// A buffer was used that is not in flight.
    #[error("descriptor {head} was used, but no buffer that starts there is in flight")]
    NotInFlight {
        /// First descriptor of the chain.
        head: u16,
    },

    /// The device used a buffer id of a packed ring that is not in flight.
    #[error("buffer id {id} was used, but no request of that id is in flight")]
    BufferId {
        /// The id.
        id: u16,
    },

    /// The device claims to have written more than it could.
    #[error("device wrote {len} bytes into the {writable} writable ones of descriptor {head}")]
    UsedLength {
        /// First descriptor of the chain.
        head: u16,
        /// Bytes the device claims.
        len: u32,
        /// Bytes it could write.
        writable: u32,
    },
}

impl RingError {
    /// Whether the same call may succeed later: memory was out of reach, the ring itself is not broken.
    #[must_use]
    pub const fn is_fault(&self) -> bool {
        matches!(self, Self::Fault(_))
    }
}
