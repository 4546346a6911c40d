//! What the block devices have in common: requests of the driver, carried out by a [`Disk`] as operations of the kernel.
//!
//! | module | what it does |
//! |---|---|
//! | `requests` | [`Requests`], the queue handler of a block device: from the ring to the disk and back |
//! | `disk` | [`Disk`], what each kind of disk makes of a request |
//! | `pending` | a request in flight |
//! | `claims` | bytes of the disk that operations in flight change |
//! | `cache` | whether writes are to be stable when they are answered |

mod cache;
mod claims;
mod disk;
mod pending;
mod requests;

pub(crate) use cache::WriteCache;
pub(crate) use claims::Claim;
pub(crate) use disk::{After, Claimed, Direct, Disk, Moment, Patch, Verdict, Zero};
pub(crate) use requests::Requests;
