//! io_uring for a worker that serves disks: requests own the memory and the files they use.
//!
//! The [`Ring`] owns all memory and files of a request until its completion is reaped, so no mistake of a caller can free
//! memory during I/O. Dropping a ring cancels the requests in flight and waits for them.
//!
//! One thread submits and reaps (`&mut Ring`); it should be the same one for the life of the ring, because the
//! kernel cancels the requests of a thread that exits. Registered buffers and files may be changed from any
//! thread by a [`Registrar`]; for this the ring is not set up with `IORING_SETUP_SINGLE_ISSUER`.

mod adopt;
mod completion;
mod memory;
mod op;
mod registrar;
mod ring;
mod slab;
#[cfg(test)]
mod tests;
mod threads;
mod told;

pub use adopt::{AdoptError, Adopted, Leftover, RingRecord, Settled};
pub use completion::{Completion, SubmitError};
pub use memory::{
    AlignedBuf, Buffers, Direction, GuestIoVecs, IoVec, MAX_IOVECS, MemorySet, OwnedBuf, StableMemory, Wait,
    transfer_now,
};
pub use op::{File, FixedIoVec, Op};
pub use registrar::{FileSlot, Registrar};
pub use ring::Ring;
