//! [`Pending`]: a request that was taken from its ring and not answered yet.

use std::sync::Arc;

use vdpa_core::blk::{BlkRequest, kind};
use vdpa_core::iotlb::Removed;
use vdpa_core::ring::Buffer;

use vdpa_backend::worker::MemoryView;

use super::claims::ClaimId;
use super::disk::After;

/// A request whose I/O is in flight. Small, since it is moved several times for each request.
pub(super) struct Pending {
    pub(super) queue: u16,
    pub(super) head: u16,
    /// The bytes of the disk that it changes now, on disks where that is of interest.
    pub(super) claim: Option<ClaimId>,
    /// Address of the status byte.
    pub(super) status: u64,
    /// Bytes of data that the driver wants written.
    pub(super) data_out: u32,
    /// Bytes of the bounce buffers that it has.
    pub(super) bounced: u32,
    /// The client's buffers.
    pub(super) data: Data,
    pub(super) view: Arc<MemoryView>,
}

/// The buffers that a request of a driver has for its data: nearly always one.
#[derive(Default)]
pub(super) struct Data {
    iova: u64,
    /// Bytes; 0 for none.
    len: u64,
    /// If there are several.
    all: Option<Box<Several>>,
}

struct Several(Vec<Buffer>);

impl Data {
    /// Those a read or a write moves bytes from or to later. What else a request has in its buffers is read, or answered,
    /// when it begins.
    #[inline]
    pub(super) fn of(request: &BlkRequest<'_>) -> Self {
        let buffers = match request.header.kind {
            kind::IN => request.data_in,
            kind::OUT => request.data_out,
            _ => return Self::default(),
        };
        match buffers.iter().next() {
            Some(Buffer { iova, len }) if u64::from(len) == buffers.len() => {
                Self { iova, len: len.into(), all: None }
            }
            _ => Self { all: Some(Box::new(Several(buffers.iter().collect()))), ..Self::default() },
        }
    }

    /// Whether one of them is in removed memory.
    fn uses(&self, removed: &Removed) -> bool {
        let several = self.all.iter().flat_map(|several| &several.0);
        removed.touches(self.iova, self.len)
            || several.into_iter().any(|buffer| removed.touches(buffer.iova, buffer.len.into()))
    }
}

impl Pending {
    /// A request of a queue, and the buffers that it needs later.
    #[inline]
    pub(super) fn new(
        queue: u16,
        head: u16,
        request: &BlkRequest<'_>,
        data: Data,
        view: &Arc<MemoryView>,
    ) -> Self {
        let data_out = if request.header.kind == kind::OUT { request.data_out.len() } else { 0 };
        Self {
            queue,
            head,
            claim: None,
            status: request.status,
            data_out: u32::try_from(data_out).unwrap_or(u32::MAX),
            bounced: 0,
            data,
            view: Arc::clone(view),
        }
    }

    /// Whether there is nothing to be released when it ends.
    pub(super) const fn has_nothing(&self) -> bool {
        self.claim.is_none() && self.bounced == 0
    }

    /// Whether what follows needs memory that was removed.
    pub(super) fn uses(&self, after: &After, removed: &Removed) -> bool {
        removed.touches(self.status, 1) || after.moves_data() && self.data.uses(removed)
    }
}
