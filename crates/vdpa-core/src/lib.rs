//! vhost-vdpa devices without I/O.
//!
//! The crate holds what a vhost-vdpa device *is*: its status machine, negotiation, ownership, translation tables
//! and rings. It opens no file, starts no thread and reads no clock, so that every transition can be tested
//! anywhere; what it needs from an operating system it asks of the traits in [`host`].
//!
//! | who | trait or type |
//! |---|---|
//! | calls a device | [`ops::VdpaOps`] |
//! | implements a device | [`parent::Parent`] |
//! | brings address spaces, memory and events | [`host::Host`] |
//! | joins the three | [`device::Device`] |
//! | opens a device without a file | [`inprocess::Node`] |
#![forbid(unsafe_code)]

pub mod blk;
pub mod device;
pub mod errno;
pub mod error;
#[doc(hidden)]
pub mod faults;
pub mod features;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod handover;
pub mod host;
pub mod inprocess;
pub mod iotlb;
pub mod net;
pub mod ops;
mod owner;
pub mod parent;
pub mod ring;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod types;
pub mod vq;

pub use errno::Errno;
