//! [`Pending`]: a request that was taken from its ring and not answered yet.

use std::sync::Arc;

use vdpa_core::blk::{BlkRequest, kind};
use vdpa_core::iotlb::Removed;
use vdpa_core::ring::Buffer;

use super::View;
use super::claims::ClaimId;
use super::disk::After;

/// A request whose I/O is in flight.
pub(super) struct Pending {
    pub(super) queue: u16,
    pub(super) head: u16,
    /// Address of the status byte.
    pub(super) status: u64,
    /// Bytes of data that the driver wants written.
    pub(super) data_out: u64,
    /// The client's buffers.
    pub(super) data: Data,
    pub(super) view: Arc<View>,
    /// The bytes of the disk that it changes now, on disks where that is of interest.
    pub(super) claim: Option<ClaimId>,
    /// Bytes of the bounce buffers that it has.
    pub(super) bounced: usize,
}

/// The buffers that a request of a driver has for its data.
pub(super) enum Data {
    One(Buffer),
    Other(Box<[Buffer]>),
}

impl Default for Data {
    /// None; allocates nothing.
    fn default() -> Self {
        Self::Other(Box::default())
    }
}

impl Data {
    /// Those a read or a write moves bytes from or to later. What else a request has in its buffers is read, or answered,
    /// when it begins.
    pub(super) fn of(request: &BlkRequest<'_>) -> Self {
        let buffers = match request.header.kind {
            kind::IN => request.data_in,
            kind::OUT => request.data_out,
            _ => return Self::default(),
        };
        match buffers.iter().next() {
            Some(first) if u64::from(first.len) == buffers.len() => Self::One(first),
            _ => Self::Other(buffers.iter().collect()),
        }
    }

    fn buffers(&self) -> &[Buffer] {
        match self {
            Self::One(buffer) => std::slice::from_ref(buffer),
            Self::Other(buffers) => buffers,
        }
    }
}

impl Pending {
    /// Whether what follows needs memory that was removed.
    pub(super) fn uses(&self, after: &After, removed: &Removed) -> bool {
        let gone = |buffer: &Buffer| removed.touches(buffer.iova, buffer.len.into());
        removed.touches(self.status, 1) || after.moves_data() && self.data.buffers().iter().any(gone)
    }
}
