//! What the block devices share: the driver's requests, which a [`Disk`] turns into I/O operations of the kernel.
//!
//! | module | what it does |
//! |---|---|
//! | `requests` | [`Requests`], the queue handler of a block device: from the ring to the disk and back |
//! | `disk` | [`Disk`], what a kind of disk implements: the I/O operations of each request |
//! | `pending` | a request in flight |
//! | `range_lock` | locks on the bytes of the disk that operations in flight change |
//! | `cache` | whether a write must be stable before it is answered |

mod cache;
mod disk;
pub(crate) mod limit;
mod pending;
mod range_lock;
mod requests;

pub(crate) use cache::WriteCache;
pub(crate) use disk::{
    Continuation, Disk, FixedRead, LockedIo, ReadModifyWrite, RequestContext, Step, ZeroRange,
};
pub(crate) use range_lock::RangeLock;
pub(crate) use requests::Requests;
