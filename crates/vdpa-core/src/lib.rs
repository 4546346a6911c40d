//! vhost-vdpa devices without I/O.
//!
//! The crate implements the state of a vhost-vdpa device: its status machine, negotiation, ownership, translation tables
//! and rings. It opens no file, starts no thread and reads no clock, so that every transition can be tested on any machine.
//! What it needs from an operating system is behind the traits in [`host`].
//!
//! | role | trait or type |
//! |---|---|
//! | the requests of a client | [`ops::VdpaOps`] |
//! | a device implementation | [`parent::Parent`] |
//! | the platform: address spaces, memory, events | [`host::Host`] |
//! | the state machine that connects the three | [`device::Device`] |
//! | opening a device without a file | [`inprocess::Node`] |
//! | which pages a device has written | [`dirty::DirtyTracking`] |
#![forbid(unsafe_code)]

pub mod blk;
#[doc(hidden)]
pub mod crash_points;
pub mod device;
pub mod dirty;
pub mod errno;
pub mod error;
#[doc(hidden)]
pub mod faults;
pub mod feature_names;
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
pub mod rules;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod types;
pub mod vq;

pub use errno::Errno;
