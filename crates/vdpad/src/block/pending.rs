//! [`Pending`]: a request that was taken from its ring and is not answered yet.

use std::sync::Arc;

use vdpa_core::blk::{BlkRequest, kind};
use vdpa_core::iotlb::Removed;
use vdpa_core::ring::Buffer;

use vdpa_backend::worker::MemoryView;

use super::disk::Continuation;
use super::range_lock::LockId;

/// A request whose I/O is in flight. Kept small, since it is moved several times for each request.
pub(super) struct Pending {
    pub(super) queue: u16,
    pub(super) head: u16,
    /// The lock on the bytes of the disk that it is changing, on disks that need one.
    pub(super) lock: Option<LockId>,
    /// Address of the status byte.
    pub(super) status: u64,
    /// Bytes of data that the driver wants written.
    pub(super) data_out: u32,
    /// Bytes of bounce buffers that it holds.
    pub(super) bounced: u32,
    /// The client's data buffers.
    pub(super) data: DataBuffers,
    pub(super) view: Arc<MemoryView>,
}

/// The client's data buffers of a request. Nearly always there is one, which is stored in place.
#[derive(Default)]
pub(super) struct DataBuffers {
    iova: u64,
    /// Bytes; 0 for none.
    len: u64,
    /// All buffers, if there are several.
    several: Option<Box<BufferList>>,
}

struct BufferList(Vec<Buffer>);

impl DataBuffers {
    /// The buffers that a read or a write accesses later. All other requests are done with their buffers when they have
    /// started.
    #[inline]
    pub(super) fn of(request: &BlkRequest<'_>) -> Self {
        let buffers = match request.header.kind {
            kind::IN => request.data_in,
            kind::OUT => request.data_out,
            _ => return Self::default(),
        };
        match buffers.iter().next() {
            Some(Buffer { iova, len }) if u64::from(len) == buffers.len() => {
                Self { iova, len: len.into(), several: None }
            }
            _ => Self { several: Some(Box::new(BufferList(buffers.iter().collect()))), ..Self::default() },
        }
    }

    /// Whether one of them is in memory that was removed.
    fn uses(&self, removed: &Removed) -> bool {
        let several = self.several.iter().flat_map(|several| &several.0);
        removed.touches(self.iova, self.len)
            || several.into_iter().any(|buffer| removed.touches(buffer.iova, buffer.len.into()))
    }
}

impl Pending {
    /// A request of a queue, and the data buffers that it accesses later.
    #[inline]
    pub(super) fn new(
        queue: u16,
        head: u16,
        request: &BlkRequest<'_>,
        data: DataBuffers,
        view: &Arc<MemoryView>,
    ) -> Self {
        let data_out = if request.header.kind == kind::OUT { request.data_out.len() } else { 0 };
        Self {
            queue,
            head,
            lock: None,
            status: request.status,
            data_out: u32::try_from(data_out).unwrap_or(u32::MAX),
            bounced: 0,
            data,
            view: Arc::clone(view),
        }
    }

    /// Whether it holds neither a lock nor bounce buffers that must be released when it ends.
    pub(super) const fn holds_no_resources(&self) -> bool {
        self.lock.is_none() && self.bounced == 0
    }

    /// Whether the request accesses memory that was removed, if `then` is what follows.
    pub(super) fn uses(&self, then: &Continuation, removed: &Removed) -> bool {
        removed.touches(self.status, 1) || then.uses_data() && self.data.uses(removed)
    }
}
