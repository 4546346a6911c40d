//! The process that holds what must outlive a vDPA daemon, and starts the daemon again.
//!
//! The main process of the service is the [`holder`](holder::run): parent of the daemon process, one thread, no work of
//! its own. The daemon gives it copies of what must survive ([`client::Client`]): FUSE connections, memory files, eventfds,
//! io_uring rings with their pinned buffers. After a crash the holder starts the daemon again, which takes all of it back;
//! for a planned upgrade it starts a candidate from the new program and makes it the daemon when the old one commits.
//!
//! `docs/daemon-survival.md` has the processes, the messages and the sequences.
#![forbid(unsafe_code)]

pub mod client;
pub mod fdstore;
pub mod holder;
pub mod packet;
pub mod progress;
pub mod protocol;
mod socket;
